r"""Stochastic kernels: Metropolis-Hastings, MALA, independence Metropolis, Langevin; and pairs of conditional laws.

Two constructions make every stochastic layer. :class:`Transition` pairs two conditional laws, one that does a step
and one
that undoes it (VAE and diffusion layers, see :mod:`patchflow.chains.gaussian`). :class:`Metropolis` accepts or rejects
what a :class:`~patchflow.chains.proposals.Proposal` proposes, so that :math:`e^{-E}` is left invariant.
:class:`Langevin` takes the steps of a
proposal without asking. The energy of the current point, and its gradient where the proposal needs one, are carried
from step to step: one evaluation a step.

References:
    Hagemann, Hertrich, Steidl, "Stochastic normalizing flows for inverse problems: a Markov chains viewpoint", 2022,
    https://arxiv.org/abs/2109.11375
    Wu, Koehler, Noe, "Stochastic normalizing flows", 2020, https://arxiv.org/abs/2002.06707
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.chains.kernel import Kernel, Step, add_choice
from patchflow.chains.proposals import LangevinProposal, Place, Proposal, StepSize, by_row
from patchflow.energy import Conditional, Energy
from patchflow.errors import InputError, NumericalError


class Transition(Kernel):
    r"""Do a step by one conditional law and undo it by another.

    :math:`\ell = \log q(x_0 \mid x_1) - \log p(x_1 \mid x_0)`.

    The dimensions of both sides may differ.

    Args:
        do: The law :math:`p(x_1 \mid x_0, y)` of the forward walk.
        undo: The law :math:`q(x_0 \mid x_1, y)` of the reverse walk.
    """

    def __init__(self, do: Conditional, undo: Conditional) -> None:
        super().__init__()
        self.do, self.undo = do, undo

    @property
    def bijective(self) -> bool:
        """Always false."""
        return False

    def forward(self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None) -> Step:
        """Draw from ``do``; see :meth:`Kernel.forward`."""
        return _walk(self.do, self.undo, x, condition)

    def reverse(self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None) -> Step:
        """Draw from ``undo``; see :meth:`Kernel.reverse`."""
        return _walk(self.undo, self.do, x, condition)


def _walk(do: Conditional, undo: Conditional, x: Tensor, condition: Tensor | None) -> Step:
    x_new, log_do = do.draw(x, condition)
    return Step(x_new, undo.log_prob(x, x_new, condition) - log_do)


class Metropolis(Kernel):
    r"""Accept or reject the steps of a proposal, so that :math:`e^{-E}` is left invariant.

    Each of ``steps`` times, ``substeps`` steps of the proposal lead along a path to :math:`x'`, which is accepted with
    probability :math:`\alpha = \min\{1, e^{E(x) - E(x') + \ell}\}` with the log-ratio :math:`\ell` of the path.
    The kernel is reversible, so it is its own pair and its log-ratio is :math:`E(x_1) - E(x_0)`.

    Args:
        energy: The energy :math:`E(x \mid y)`.
        proposal: :class:`RandomWalk` (Metropolis-Hastings), :class:`LangevinProposal` (MALA), :class:`Independent`.
        steps: Number of accept steps.
        substeps: Steps of the proposal before each accept step (not useful for :class:`Independent`).

    Raises:
        InputError: If a number of steps is not positive.

    References:
        Hastings, 1970, https://doi.org/10.1093/biomet/57.1.97
        Roberts, Tweedie, 1996, https://doi.org/10.2307/3318418 (MALA)
        Nilmeier, Crooks, Minh, Chodera, 2011, https://doi.org/10.1073/pnas.1106094108 (acceptance of paths)
    """

    def __init__(
        self, energy: Energy, proposal: Proposal, steps: int = 1, *, substeps: int = 1
    ) -> None:
        super().__init__()
        if steps < 1 or substeps < 1:
            raise InputError(f"Got {steps} steps of {substeps} sub-steps; both must be at least 1.")
        self.energy, self.proposal = energy, proposal
        self.steps, self.substeps = steps, substeps

    @property
    def bijective(self) -> bool:
        """Always false."""
        return False

    @property
    def invariant(self) -> Energy | None:
        """The kernel's energy."""
        return self.energy

    def forward(self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None) -> Step:
        """Take the steps; see :meth:`Kernel.forward`.

        Raises:
            NumericalError: If the energy is nan somewhere.
        """
        return self.walk(x, condition)[0]

    def reverse(self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None) -> Step:
        """The same as :meth:`forward`, for the kernel is reversible."""
        return self.walk(x, condition)[0]

    def walk(
        self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None
    ) -> tuple[Step, Float[Tensor, " batch"]]:
        """The step together with each row's mean acceptance probability."""
        start = place = self.proposal.locate(self.energy, x, condition)
        choices, acceptance = None, x.new_zeros(len(x))
        for _ in range(self.steps):
            new, log_ratio = self.proposal.propose(self.energy, place, condition)
            for _ in range(self.substeps - 1):
                new, more = self.proposal.propose(self.energy, new, condition)
                log_ratio = log_ratio + more
            if new.energy.isnan().any():
                raise NumericalError(
                    f"The energy is nan at {int(new.energy.isnan().sum())} of {len(x)} proposed points; let the "
                    "forward model return finite numbers, or infinite energy where it does not apply."
                )
            # Two infinite energies leave nan, which compares false: such a step is rejected.
            log_alpha = (place.energy - new.energy + log_ratio).clamp_max(0)
            accept = torch.rand_like(log_alpha).log() < log_alpha
            if log_alpha.requires_grad:
                choices = add_choice(choices, _log_choice(log_alpha, accept))
            acceptance = acceptance + log_alpha.detach().exp().nan_to_num(0)
            place = _choose(accept, new, place)
        # Where a row starts and ends at infinite energy the ratio is that of equal values.
        moved = torch.where(place.energy == start.energy, 0.0, place.energy - start.energy)
        return Step(place.x, moved, choices), acceptance / self.steps


class Langevin(Kernel):
    r"""Unadjusted Langevin steps, :math:`x \leftarrow x - \tau\nabla E(x) + \sqrt{2\tau}\,\xi`, paired with themselves.

    Small steps approach :math:`e^{-E}`; the log-ratio accounts exactly for what a finite step leaves.

    Args:
        energy: The energy :math:`E(x \mid y)`.
        step: The time step :math:`\tau`: a number, or a :class:`StepSize`.
        steps: Number of steps.

    Raises:
        InputError: If ``steps`` is not positive.
    """

    def __init__(self, energy: Energy, step: float | int | StepSize, steps: int = 1) -> None:
        super().__init__()
        if steps < 1:
            raise InputError(f"Got {steps} Langevin steps; use at least 1.")
        self.energy, self.proposal, self.steps = energy, LangevinProposal(step), steps

    @property
    def bijective(self) -> bool:
        """Always false."""
        return False

    def forward(self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None) -> Step:
        """Take the steps; see :meth:`Kernel.forward`."""
        place = self.proposal.locate(self.energy, x, condition)
        total = x.new_zeros(len(x))
        for _ in range(self.steps):
            place, log_ratio = self.proposal.propose(self.energy, place, condition)
            total = total + log_ratio
        return Step(place.x, total)

    def reverse(self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None) -> Step:
        """The same steps; see :meth:`Kernel.reverse`."""
        return self.forward(x, condition)


def _choose(accept: Tensor, new: Place, old: Place) -> Place:
    # Not accept * new + (1 - accept) * old, which is nan where one of them is infinite.
    extra = old.extra
    if extra is not None:
        assert new.extra is not None
        extra = torch.where(by_row(accept, extra), new.extra, extra)
    x = torch.where(by_row(accept, old.x), new.x, old.x)
    return Place(x, torch.where(accept, new.energy, old.energy), extra)


def _log_choice(log_alpha: Tensor, accept: Tensor) -> Tensor:
    """Log-probability of what was decided, with finite gradients."""
    # A proposal that cannot be accepted, or cannot be refused, leaves nothing to choose.
    open_choice = (log_alpha < 0) & (log_alpha > -80)
    safe = torch.where(open_choice, log_alpha, -1.0)
    refuse = torch.log(-torch.expm1(safe))
    return torch.where(open_choice, torch.where(accept, safe, refuse), 0.0)
