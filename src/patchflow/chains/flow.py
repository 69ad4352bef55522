r"""Flows: a latent density pushed through a chain of kernels.

A flow is an energy. For a bijective chain it is exact,

.. math:: E(x) = E_Z(T^{-1}(x)) - \log|\det \nabla T^{-1}(x)|,

so its mean over data is the forward Kullback-Leibler loss, and the same function is the regulariser on patches. For a
stochastic chain it is one path's bound, whose mean over data is the loss of the pair of chains up to a constant.

References:
    Hagemann, Hertrich, Steidl, "Stochastic normalizing flows for inverse problems: a Markov chains viewpoint", 2022,
    https://arxiv.org/abs/2109.11375
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.chains.kernel import Chain, Kernel, Slopes
from patchflow.energy import Density, Energy
from patchflow.errors import InputError

# Points per block of the graph-free gradient: large enough for full matmul speed, small enough for the cache.
_BLOCK = 4096


class Walk(NamedTuple):
    r"""Ends of forward walks, with importance weights that make them samples of the target.

    Attributes:
        x: The ends.
        log_weights: :math:`\log w = -E(x_T \mid y) + E_Z(x_0) + \sum_t \ell_t`, whose mean weight is the evidence.
        acceptance: Mean acceptance probability of each kernel that accepts and rejects, by its place in the chain.
    """

    x: Tensor
    log_weights: Tensor
    acceptance: dict[int, float]


class Flow(Density):
    r"""A latent density through a chain of kernels.

    Gradients of bijective chains come from the kernels' hand-written backward; when the parameters are frozen, as
    :func:`patchflow.fit` leaves them, block by block with constant memory. Values and gradients are those of
    autograd up to rounding, unless the caller asks for lower precision with ``torch.autocast``. Second
    derivatives work, by autograd.

    Training a stochastic chain skips the last kernels that leave ``target`` invariant: the reverse walk of data through
    them yields data of the same law, so they add no gradient but noise.

    Args:
        latent: The latent density.
        chain: The kernel from latent to data.
        target: The energy :math:`E(x \mid y)` that the chain approximates, normalised up to the evidence; what
            weights and reverse training need.
        accept_gradient: ``"unbiased"`` adds the score of the accept decisions, with the mean loss of the other rows as
            control variate; ``"biased"`` ignores how they depend on parameters, as the published code does.
    """

    def __init__(
        self,
        latent: Density,
        chain: Kernel,
        *,
        target: Energy | None = None,
        accept_gradient: Literal["unbiased", "biased"] = "unbiased",
    ) -> None:
        super().__init__()
        self.latent, self.chain, self.target = latent, chain, target
        self.accept_gradient = accept_gradient

    @property
    def exact(self) -> bool:
        """Whether the energy is the density's own value: the chain is bijective and no log-ratio an estimate."""
        estimated = any(isinstance(m, Kernel) and m.estimated for m in self.chain.modules())
        return self.chain.bijective and self.latent.exact and not estimated

    @property
    def trained(self) -> Kernel:
        """The chain without the last kernels that leave the target invariant."""
        if self.target is None or not isinstance(self.chain, Chain):
            return self.chain
        kernels = list(self.chain)
        while kernels and kernels[-1].invariant is self.target:
            kernels.pop()
        return self.chain if len(kernels) == len(self.chain) else Chain(*kernels)

    def forward(
        self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Minus the log-density of a bijective chain, one path's bound otherwise; see :meth:`Energy.forward`."""
        learned = [p for p in self.chain.parameters() if p.requires_grad]
        chain = self.trained if torch.is_grad_enabled() and learned else self.chain
        if torch.is_grad_enabled() and self._by_hand(chain, condition):
            if learned:
                return _Learning.apply(x, condition, self, chain, *learned)
            if x.requires_grad:
                return _Frozen.apply(x, condition, self)
        return self._by_autograd(x, condition, chain)

    def sample(self, count: int, condition: Tensor | None = None) -> Float[Tensor, "count *event"]:
        """Walk latent samples through the chain; see :meth:`Density.sample`."""
        condition = _repeated(condition, count)
        return self.chain(self.latent.sample(count, condition), condition).x

    def draw(
        self, count: int, condition: Tensor | None = None
    ) -> tuple[Float[Tensor, "count *event"], Float[Tensor, " count"]]:
        """Samples with their energies (of the path, if the chain is stochastic), in one walk."""
        condition = _repeated(condition, count)
        z, latent = self.latent.draw(count, condition)
        x, log_ratio, _ = self.chain(z, condition)
        return x, latent + log_ratio

    def walk(self, count: int, condition: Tensor | None = None) -> Walk:
        r"""Walk latent samples to the target, with weights.

        :math:`E[w\, f(x_T)] = \int f\, e^{-E(x \mid y)} dx`, so the mean weight is the evidence :math:`p(y)`.

        Args:
            count: The number of walks.
            condition: The measurement, of batch size one or ``count``.

        Raises:
            InputError: If the flow has no target.
        """
        target = self._target()
        condition = _repeated(condition, count)
        x, log_weights = self.latent.draw(count, condition)
        acceptance = {}
        kernels = self.chain if isinstance(self.chain, Chain) else [self.chain]
        for place, kernel in enumerate(kernels):
            step, rate = kernel.walk(x, condition)
            x, log_weights = step.x, log_weights + step.log_ratio
            if rate is not None:
                acceptance[place] = rate.mean().item()
        return Walk(x, log_weights - target(x, condition), acceptance)

    def reverse_loss(self, count: int, condition: Tensor | None = None) -> Float[Tensor, " count"]:
        r"""One path's term of the reverse Kullback-Leibler loss: :math:`-\log w`, whose mean bounds minus log evidence.

        Raises:
            InputError: If the flow has no target.
        """
        target = self._target()
        condition = _repeated(condition, count)
        z, latent = self.latent.draw(count, condition)
        x, log_ratio, choice = self.chain(z, condition)
        return self._with_score(target(x, condition) - latent - log_ratio, choice)

    def _target(self) -> Energy:
        if self.target is None:
            raise InputError(
                "The flow has no target, so its walks have no weights; give Flow(..., target=posterior)."
            )
        return self.target

    def _by_autograd(self, x: Tensor, condition: Tensor | None, chain: Kernel) -> Tensor:
        z, log_ratio, choice = chain.reverse(x, condition)
        return self._with_score(self.latent(z, condition) - log_ratio, choice)

    def _with_score(self, loss: Tensor, choice: Tensor | None) -> Tensor:
        """Add a term of value zero whose gradient is that of the probability of the decisions."""
        if choice is None or self.accept_gradient == "biased":
            return loss
        value = loss.detach()
        # The mean of the other rows is independent of this row's decisions: a control variate without bias.
        others = (value.sum() - value) / max(1, len(value) - 1)
        score = (value - others) * choice
        return loss + score - score.detach()

    def _by_hand(self, chain: Kernel, condition: Tensor | None) -> bool:
        constant = condition is None or not condition.requires_grad
        latent = not any(p.requires_grad for p in self.latent.parameters())
        return chain.bijective and constant and latent


class PathKL(Energy):
    r"""The loss of a stochastic flow: a weighted sum of the forward and the reverse path Kullback-Leibler divergence.

    Forward: data :math:`x \sim p(x \mid y)` walk to the latent law; it needs samples of the joint law. Reverse: latent
    samples walk to the data; it needs the target energy, and seeks modes.

    Args:
        flow: The flow.
        forward: Weight of the forward divergence.
        reverse: Weight of the reverse divergence.

    Raises:
        InputError: If both weights are zero or one is negative, or the reverse loss lacks a target.
    """

    def __init__(
        self, flow: Flow, *, forward: float | int = 1.0, reverse: float | int = 0.0
    ) -> None:
        super().__init__()
        if forward < 0 or reverse < 0 or forward + reverse == 0:
            raise InputError(
                f"The weights are {forward} and {reverse} but must not be negative, nor both zero."
            )
        if reverse and flow.target is None:
            raise InputError(
                "The reverse divergence needs the energy of the target; give Flow(..., target=posterior)."
            )
        self.flow, self.weights = flow, (float(forward), float(reverse))

    def forward(
        self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """One term of the loss per row of data; fresh latent samples for the reverse part, one per row."""
        forward, reverse = self.weights
        total = x.new_zeros(len(x))
        if forward:
            total = total + forward * self.flow(x, condition)
        if reverse:
            total = total + reverse * self.flow.reverse_loss(len(x), condition)
        return total


def _repeated(condition: Tensor | None, count: int) -> Tensor | None:
    return None if condition is None else condition.expand(count, *condition.shape[1:])


class _Frozen(torch.autograd.Function):
    """A frozen flow's energy, whose gradient in x is computed along with its value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, condition: Tensor | None, flow: Flow) -> Tensor:
        values, gradient = x.new_empty(len(x)), torch.empty_like(x)
        for start in range(0, len(x), _BLOCK):
            block = slice(start, start + _BLOCK)
            y = None if condition is None else condition[block]
            (z, log_ratio, _), pull = flow.chain.reverse_with_pullback(x[block], y)
            latent, g_z = flow.latent.value_and_grad(z, y)
            values[block] = latent - log_ratio
            gradient[block] = pull(g_z, torch.full_like(log_ratio, -1), None)
        ctx.save_for_backward(x, gradient)
        ctx.flow, ctx.condition = flow, condition
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, gradient = ctx.saved_tensors
        (g,) = grad_outputs
        if torch.is_grad_enabled():  # create_graph: somebody wants second derivatives
            flow = ctx.flow
            return _differentiable(flow, flow.chain, x, ctx.condition, g, [])[0], None, None
        return gradient * g.view(-1, *[1] * (x.ndim - 1)), None, None


class _Learning(torch.autograd.Function):
    """A flow's energy with the hand-written backward in x and in the chain's parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        condition: Tensor | None,
        flow: Flow,
        chain: Kernel,
        *learned: nn.Parameter,
    ) -> Tensor:
        (z, log_ratio, _), ctx.pull = chain.reverse_with_pullback(x, condition)
        latent, g_z = flow.latent.value_and_grad(z, condition)
        ctx.save_for_backward(x, g_z, *learned)
        ctx.flow, ctx.chain, ctx.condition = flow, chain, condition
        return latent - log_ratio

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, g_z, *learned = ctx.saved_tensors
        (g,) = grad_outputs
        if torch.is_grad_enabled():
            g_x, *slopes = _differentiable(ctx.flow, ctx.chain, x, ctx.condition, g, learned)
            return g_x, None, None, None, *slopes
        found: Slopes = {}
        g_x = ctx.pull(g_z * g.view(-1, *[1] * (g_z.ndim - 1)), -g, found)
        return g_x, None, None, None, *(found.get(parameter) for parameter in learned)


def _differentiable(
    flow: Flow,
    chain: Kernel,
    x: Tensor,
    condition: Tensor | None,
    g: Tensor,
    learned: list[Tensor],
) -> tuple[Tensor | None, ...]:
    """The gradients by autograd, as a graph."""
    value = flow._by_autograd(x, condition, chain)
    wanted = [tensor for tensor in (x, *learned) if tensor.requires_grad]
    found = iter(torch.autograd.grad(value, wanted, g, create_graph=True, allow_unused=True))
    return tuple(next(found) if tensor.requires_grad else None for tensor in (x, *learned))
