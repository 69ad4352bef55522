r"""Continuous flows: the solution of an ordinary differential equation between data and latent law.

Time runs from 0 at the data to 1 at the latent law, the way of training:

.. math:: \dot x = v(t, x, y), \qquad \frac{d}{dt} \log|\det \nabla x(t)| = \nabla \cdot v(t, x, y) .

``reverse`` integrates from 0 to 1, ``forward`` from 1 to 0. The solver is the library ``torchdiffeq``, an optional
extra: ``pip install 'patchflow[ode]'``.

References:
    Chen, Rubanova, Bettencourt, Duvenaud, "Neural ordinary differential equations", 2018,
    https://arxiv.org/abs/1806.07366
    Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, "FFJORD: free-form continuous dynamics for scalable reversible
    generative models", 2019, https://arxiv.org/abs/1810.01367
    Onken, Wu Fung, Li, Ruthotto, "OT-Flow: fast and accurate continuous normalizing flows via optimal transport", 2021,
    https://arxiv.org/abs/2006.00104
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.chains.flow import Flow
from patchflow.chains.kernel import Chain, Kernel, Step
from patchflow.chains.residual import Trace, estimates
from patchflow.chains.velocities import Potential, Velocity
from patchflow.energy import Energy
from patchflow.errors import InputError, NumericalError

Solver = Literal["dopri5", "dopri8", "bosh3", "rk4", "midpoint"]
_FIXED = ("rk4", "midpoint")


class Costs(NamedTuple):
    r"""What a path from data to latent law costs, one value per batch entry.

    Attributes:
        transport: :math:`L = \int_0^1 \tfrac12 \|v\|^2 dt`.
        hjb: :math:`R = \int_0^1 |\partial_t \Phi - \tfrac12 \|\nabla \Phi\|^2|\, dt`, zero without a potential.
    """

    transport: Tensor
    hjb: Tensor


class ContinuousFlow(Kernel):
    r"""The flow of a velocity field over the unit of time, as a bijection.

    Both walks solve the same equation, so they undo each other up to the tolerance of the solver. An adaptive solver
    controls the error of the whole batch. :math:`\log|\det|` is the integral of the divergence: exact, or
    Hutchinson's unbiased estimate with the same random signs along a path; then a
    :class:`~patchflow.chains.flow.Flow` is not :attr:`~patchflow.chains.flow.Flow.exact`.

    Args:
        velocity: The field.
        trace: ``"exact"``, ``"unbiased"``, or ``"auto"``: exact up to dimension 8, and where it has a closed form.
        method: The solver: the adaptive ``"dopri5"``, ``"dopri8"`` or ``"bosh3"``; ``"rk4"`` or ``"midpoint"`` with a
            fixed step.
        tolerance: Relative and absolute tolerance of adaptive solvers.
        steps: Steps of solvers with a fixed step.
        max_evaluations: Most evaluations of the velocity in one solve of an adaptive solver.
        gradient: ``"solver"`` differentiates the steps that were taken; ``"adjoint"`` solves another equation backwards
            in time, in memory that does not grow with the steps, to the tolerance only.

    Raises:
        InputError: If an option does not exist or a number is not positive.
    """

    def __init__(
        self,
        velocity: Velocity,
        *,
        trace: Trace = "auto",
        method: Solver = "dopri5",
        tolerance: float = 1e-5,
        steps: int = 16,
        max_evaluations: int = 5000,
        gradient: Literal["solver", "adjoint"] = "solver",
    ) -> None:
        super().__init__()
        if method not in get_args(Solver) or gradient not in ("solver", "adjoint"):
            raise InputError(
                f"Got the solver {method!r} with gradients by {gradient!r}; choose from {', '.join(get_args(Solver))}, "
                "and solver or adjoint."
            )
        if not tolerance > 0 or min(steps, max_evaluations) < 1:
            raise InputError(
                f"Got the tolerance {tolerance}, {steps} steps and {max_evaluations} evaluations; all must be positive."
            )
        self.velocity, self.dim = velocity, velocity.dim
        self.method, self.tolerance, self.steps = method, tolerance, steps
        self.max_evaluations, self.adjoint = max_evaluations, gradient == "adjoint"
        exact = trace == "auto" and velocity.closed_form
        self.estimated = estimates("exact" if exact else trace, velocity.dim)

    @property
    def bijective(self) -> bool:
        """Always true."""
        return True

    def forward(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Integrate from latent to data; see :meth:`Kernel.forward`.

        Raises:
            InputError: If torchdiffeq is not installed.
            NumericalError: If the solver does not reach its tolerance or leaves the finite numbers.
        """
        end, log_ratio = self._solve(self._slope(x, condition), x, 1, ends=(1.0, 0.0), y=condition)
        return Step(end, log_ratio)

    def reverse(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Integrate from data to latent; see :meth:`Kernel.reverse`. Errors as in :meth:`forward`."""
        end, log_ratio = self._solve(self._slope(x, condition), x, 1, ends=(0.0, 1.0), y=condition)
        return Step(end, log_ratio)

    def reverse_with_costs(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> tuple[Step, Costs]:
        """Integrate from data to latent together with what the path costs; errors as in :meth:`forward`."""
        slope = self._slope(x, condition)

        def with_costs(time: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            v, divergence = slope(time, state)
            kinetic = 0.5 * v.square().sum(1)
            if not isinstance(self.velocity, Potential):
                return v, divergence, kinetic, torch.zeros_like(kinetic)
            change = self.velocity.slopes(time, state[0], condition).time
            return v, divergence, kinetic, (change - kinetic).abs()

        end, log_ratio, transport, hjb = self._solve(with_costs, x, 3, ends=(0.0, 1.0), y=condition)
        return Step(end, log_ratio), Costs(transport, hjb)

    def _slope(self, x: Tensor, condition: Tensor | None) -> Callable[..., tuple[Tensor, ...]]:
        if not self.estimated:
            return lambda time, state: self.velocity.with_divergence(time, state[0], condition)
        noise = torch.randint(0, 2, x.shape, device=x.device).to(x.dtype) * 2 - 1
        return lambda time, state: self.velocity.with_estimate(time, state[0], condition, noise)

    def _solve(
        self,
        slope: Callable[..., tuple[Tensor, ...]],
        x: Tensor,
        integrals: int,
        *,
        ends: tuple[float, float],
        y: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """The point at the end, and the integrals along the path."""
        odeint, odeint_adjoint = _library()
        fixed, evaluations = self.method in _FIXED, 0

        def counted(time: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal evaluations
            evaluations += 1
            if not fixed and evaluations > self.max_evaluations:
                raise self._missed(f"{self.max_evaluations} evaluations")
            return slope(time, state)

        start = (x, *(x.new_zeros(len(x)) for _ in range(integrals)))
        times = torch.tensor(ends, dtype=x.dtype, device=x.device)
        options: dict[str, Any] = {
            "rtol": self.tolerance,
            "atol": self.tolerance,
            "method": self.method,
            # A step ends exactly at the end, where the solver would interpolate at lower order.
            "options": {"step_size": 1 / self.steps} if fixed else {"step_t": times[1:]},
        }
        try:
            if self.adjoint and torch.is_grad_enabled():
                learned = [*self.velocity.parameters(), *([] if y is None else [y])]
                wanted = tuple(tensor for tensor in learned if tensor.requires_grad)
                path = odeint_adjoint(counted, start, times, adjoint_params=wanted, **options)
            else:
                path = odeint(counted, start, times, **options)
        except AssertionError as error:  # how torchdiffeq says that a step became too small
            raise self._missed("steps down to rounding") from error
        result = tuple(values[-1] for values in path)
        if not all(bool(values.isfinite().all()) for values in result):
            raise NumericalError(
                f"The ODE solver {self.method} left the finite numbers; train with a smaller lr, or start closer to "
                "the identity."
            )
        return result

    def _missed(self, spent: str) -> NumericalError:
        return NumericalError(
            f"The ODE solver {self.method} did not reach its tolerance {self.tolerance:g} with {spent}; use a larger "
            "tolerance or max_evaluations, or train with a transport cost, which keeps paths straight."
        )


class TransportKL(Energy):
    r"""OT-Flow's training loss: the energy of a continuous flow plus what its paths cost, in one solve.

    .. math:: E(x \mid y) + \alpha_L L(x) + \alpha_R R(x), \qquad L = \int_0^1 \tfrac12 \|v\|^2 dt, \quad
        R = \int_0^1 \big|\partial_t \Phi - \tfrac12 \|\nabla \Phi\|^2\big|\, dt .

    Among all flows that reach the latent law, that of least transport cost has straight paths, which a solver follows
    in few steps; :math:`R` vanishes along them, and helps to find them. The published weights (1, 100, 5) of cost,
    likelihood and penalty are :math:`\alpha_L = 0.01`, :math:`\alpha_R = 0.05` here.

    Args:
        flow: The flow, with at least one :class:`ContinuousFlow` in its chain; the costs of several add up.
        transport: The weight :math:`\alpha_L`.
        hjb: The weight :math:`\alpha_R`; it needs velocities of a :class:`~patchflow.chains.velocities.Potential`.

    Raises:
        InputError: If a weight is negative, or the chain has not what the weights need.

    References:
        Onken, Wu Fung, Li, Ruthotto, "OT-Flow: fast and accurate continuous normalizing flows via optimal transport",
        2021, https://arxiv.org/abs/2006.00104
    """

    def __init__(self, flow: Flow, *, transport: float = 0.01, hjb: float = 0.0) -> None:
        super().__init__()
        if transport < 0 or hjb < 0:
            raise InputError(f"The weights are {transport} and {hjb} but must not be negative.")
        found = [kernel for kernel in _kernels(flow.chain) if isinstance(kernel, ContinuousFlow)]
        if not found:
            raise InputError("The flow has no ContinuousFlow in its chain, so no path has a cost.")
        if hjb and not all(isinstance(kernel.velocity, Potential) for kernel in found):
            raise InputError(
                f"The penalty hjb={hjb} needs the velocity of a Potential; set it to 0, or use one."
            )
        self.flow, self.weights = flow, (float(transport), float(hjb))

    def forward(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """One term of the loss per row of data."""
        transport, hjb = self.weights
        penalty, total = x.new_zeros(len(x)), x.new_zeros(len(x))
        for kernel in reversed(_kernels(self.flow.chain)):
            if isinstance(kernel, ContinuousFlow):
                step, costs = kernel.reverse_with_costs(x, condition)
                penalty = penalty + transport * costs.transport + hjb * costs.hjb
            else:
                step = kernel.reverse(x, condition)
            x, total = step.x, total + step.log_ratio
        return self.flow.latent(x, condition) - total + penalty


def _kernels(chain: Kernel) -> list[Kernel]:
    return list(chain) if isinstance(chain, Chain) else [chain]


def _library() -> tuple[Any, Any]:
    try:
        from torchdiffeq import odeint, odeint_adjoint
    except ImportError as error:
        raise InputError(
            "A continuous flow needs the library torchdiffeq: run pip install 'patchflow[ode]'."
        ) from error
    return odeint, odeint_adjoint
