r"""Pairs of Markov kernels, and chains of them.

A :class:`Kernel` is a pair :math:`(K, R)`: ``forward`` draws :math:`x_1 \sim K(x_0, \cdot)` and ``reverse`` draws
:math:`x_0 \sim R(x_1, \cdot)`. Either walk reports

.. math:: \ell = \log \frac{\text{density of undoing the step}}{\text{density of doing it}},

the Radon-Nikodym derivative of one path law with respect to the other. It is :math:`\log|\det \nabla T|` for a
bijection and :math:`E(x_1) - E(x_0)` for a kernel that is reversible with respect to :math:`e^{-E}`; along a
chain it adds up.

References:
    Hagemann, Hertrich, Steidl, "Stochastic normalizing flows for inverse problems: a Markov chains viewpoint", 2022,
    https://arxiv.org/abs/2109.11375
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patchflow.energy import Energy


class Step(NamedTuple):
    """Where a walk arrived.

    Attributes:
        x: The new points.
        log_ratio: Log-density of undoing minus log-density of doing, per batch entry, in nats.
        log_choice: Log-probability of the discrete decisions (accept or reject) on the way, per batch entry; ``None``
            if there were none or nobody differentiates. Its gradient makes that of a path's expectation unbiased.
    """

    x: Tensor
    log_ratio: Tensor
    log_choice: Tensor | None = None


def add_choice(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The sum of two log-probabilities of decisions, either of which may be missing."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


# Gradients of parameters, summed where a parameter occurs more than once.
Slopes = dict[Tensor, Tensor]


class Pullback(NamedTuple):
    r"""A reverse step with its hand-written backward.

    ``pull(g_x, g_ratio, slopes)`` maps the gradients with respect to ``step.x`` and ``step.log_ratio`` to the gradient
    with respect to the input of the step, and adds those with respect to the parameters to ``slopes`` unless it is
    ``None``. It may overwrite ``g_x``, and can be called once.
    """

    step: Step
    pull: Callable[[Tensor, Tensor, Slopes | None], Tensor]


class Kernel(nn.Module, ABC):
    r"""A pair of Markov kernels :math:`(K, R)` with its log-ratio."""

    # Whether log-ratios are unbiased estimates, random even where the points are not.
    estimated = False

    @property
    @abstractmethod
    def bijective(self) -> bool:
        """Whether both walks are deterministic and undo each other exactly."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None) -> Step:
        r"""Draw :math:`x_1 \sim K(x, \cdot)`.

        Args:
            x: Points, with a leading batch axis.
            condition: The measurement :math:`y`, with the same batch axis, or ``None``.

        Returns:
            The new points and :math:`\log` of undoing minus :math:`\log` of doing.
        """

    @abstractmethod
    def reverse(self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None) -> Step:
        r"""Draw :math:`x_0 \sim R(x, \cdot)`; arguments and result as in :meth:`forward`."""

    @property
    def invariant(self) -> Energy | None:
        r"""The energy whose law :math:`e^{-E}` both walks leave invariant, if there is one."""
        return None

    def walk(
        self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None
    ) -> tuple[Step, Float[Tensor, " batch"] | None]:
        """The forward step, and each row's mean acceptance probability if the kernel accepts and rejects."""
        return self(x, condition), None

    def reverse_with_pullback(self, x: Tensor, condition: Tensor | None = None) -> Pullback:
        """Walk back, and keep what the gradient with respect to ``x`` needs.

        This default differentiates :meth:`reverse` by autograd; a kernel whose backward pass matters for speed writes
        it by hand. ``condition`` is a constant here.
        """
        with torch.enable_grad():
            start = x.detach().requires_grad_(True)
            step = self.reverse(start, condition)

        def pull(g_x: Tensor, g_ratio: Tensor, slopes: Slopes | None) -> Tensor:
            parameters = [] if slopes is None else [p for p in self.parameters() if p.requires_grad]
            outputs = [
                (out, g)
                for out, g in ((step.x, g_x), (step.log_ratio, g_ratio))
                if out.requires_grad
            ]
            g_start, *others = torch.autograd.grad(
                [out for out, _ in outputs],
                [start, *parameters],
                [g for _, g in outputs],
                allow_unused=True,
            )
            if slopes is not None:
                for parameter, slope in zip(parameters, others, strict=True):
                    if slope is not None:
                        add_slope(slopes, parameter, slope)
            return torch.zeros_like(start) if g_start is None else g_start

        return Pullback(Step(step.x.detach(), step.log_ratio.detach()), pull)


class Chain(Kernel):
    r"""Kernels one after another: :math:`K_1, \dots, K_T` forward, :math:`R_T, \dots, R_1` in reverse.

    A chain in a chain is unfolded, so that every kernel is seen by what walks, adapts or trains them one by one.
    """

    def __init__(self, *kernels: Kernel) -> None:
        super().__init__()
        self.kernels = nn.ModuleList()
        for kernel in kernels:
            self.kernels.extend(kernel.kernels if isinstance(kernel, Chain) else [kernel])

    def __len__(self) -> int:
        return len(self.kernels)

    def __iter__(self) -> Iterator[Kernel]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Kernel:
        kernel = self.kernels[index]
        assert isinstance(kernel, Kernel)
        return kernel

    @property
    def bijective(self) -> bool:
        """Whether every kernel is a bijection."""
        return all(kernel.bijective for kernel in self)

    def forward(self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None) -> Step:
        """Walk through all kernels; see :meth:`Kernel.forward`."""
        return self._walk(self, x, condition)

    def reverse(self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None) -> Step:
        """Walk back through all kernels, the last one first; see :meth:`Kernel.reverse`."""
        back = (self[index].reverse for index in range(len(self) - 1, -1, -1))
        return self._walk(back, x, condition)

    @staticmethod
    def _walk(
        steps: Iterable[Callable[[Tensor, Tensor | None], Step]],
        x: Tensor,
        condition: Tensor | None,
    ) -> Step:
        total, choices = x.new_zeros(len(x)), None
        for step in steps:
            x, log_ratio, choice = step(x, condition)
            total, choices = total + log_ratio, add_choice(choices, choice)
        return Step(x, total, choices)

    def reverse_with_pullback(self, x: Tensor, condition: Tensor | None = None) -> Pullback:
        """Walk back, and stack the kernels' pullbacks; see :meth:`Kernel.reverse_with_pullback`."""
        total = x.new_zeros(len(x))
        pulls = []
        for index in range(len(self) - 1, -1, -1):
            (x, log_ratio, _), pull = self[index].reverse_with_pullback(x, condition)
            total = total + log_ratio
            pulls.append(pull)

        def pull_all(g_x: Tensor, g_ratio: Tensor, slopes: Slopes | None) -> Tensor:
            # Consumed, so that each kernel's activations are freed as soon as they are used.
            while pulls:
                g_x = pulls.pop()(g_x, g_ratio, slopes)
            return g_x

        return Pullback(Step(x, total), pull_all)


class Reversed(Kernel):
    r"""The pair :math:`(R, K)`: the same kernel walked the other way round."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    @property
    def bijective(self) -> bool:
        """Whether the kernel is a bijection."""
        return self.kernel.bijective

    def forward(self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None) -> Step:
        """Walk the kernel in reverse; see :meth:`Kernel.forward`."""
        return self.kernel.reverse(x, condition)

    def reverse(self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None) -> Step:
        """Walk the kernel forward; see :meth:`Kernel.reverse`."""
        return self.kernel(x, condition)


def add_slope(slopes: Slopes, parameter: Tensor, slope: Tensor) -> None:
    """Add the gradient of a parameter to those found so far."""
    known = slopes.get(parameter)
    slopes[parameter] = slope if known is None else known.add_(slope)


class Conditioned(Kernel):
    r"""A kernel that sees features :math:`h(y)` of the condition instead of :math:`y`, computed once a walk.

    Args:
        features: The map :math:`h`, usually a standardisation and a small network; trained with the kernel.
        kernel: The kernel.
    """

    def __init__(self, features: nn.Module, kernel: Kernel) -> None:
        super().__init__()
        self.features, self.kernel = features, kernel

    @property
    def bijective(self) -> bool:
        """Whether the kernel is a bijection."""
        return self.kernel.bijective

    def forward(self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None) -> Step:
        """Walk with the features; see :meth:`Kernel.forward`."""
        return self.kernel(x, None if condition is None else self.features(condition))

    def reverse(self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None) -> Step:
        """Walk back with the features; see :meth:`Kernel.reverse`."""
        return self.kernel.reverse(x, None if condition is None else self.features(condition))


class Checkpointed(Kernel):
    r"""A kernel whose graph is not kept but computed again when gradients are wanted: time for memory.

    Args:
        kernel: The kernel; its random numbers are drawn again from the same state of the generator.
    """

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    @property
    def bijective(self) -> bool:
        """Whether the kernel is a bijection."""
        return self.kernel.bijective

    @property
    def invariant(self) -> Energy | None:
        """What the kernel leaves invariant."""
        return self.kernel.invariant

    def walk(
        self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None
    ) -> tuple[Step, Float[Tensor, " batch"] | None]:
        """The kernel's own walk, with its graph: for sampling and adaptation."""
        return self.kernel.walk(x, condition)

    def forward(self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None) -> Step:
        """Walk without keeping the graph; see :meth:`Kernel.forward`."""
        return self._walk(self.kernel, x, condition)

    def reverse(self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None) -> Step:
        """Walk back without keeping the graph; see :meth:`Kernel.reverse`."""
        return self._walk(self.kernel.reverse, x, condition)

    @staticmethod
    def _walk(step: Callable[..., Step], x: Tensor, condition: Tensor | None) -> Step:
        if not torch.is_grad_enabled():
            return step(x, condition)
        result = checkpoint(step, x, condition, use_reentrant=False)
        assert isinstance(result, Step)
        return result
