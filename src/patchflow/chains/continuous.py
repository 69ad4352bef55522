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

Solver = Literal["dopri5", "dopri8", "rk4"]
# Most steps of an adaptive solver: a path that needs more is no longer one that trains.
_MOST = 1000


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
        method: The solver: the adaptive ``"dopri5"`` or ``"dopri8"`` (of higher order, for small tolerances), or
            ``"rk4"`` with a fixed step.
        tolerance: Relative and absolute tolerance of adaptive solvers.
        steps: Steps of ``"rk4"``.

    Raises:
        InputError: If an option does not exist, a number is not positive, or torchdiffeq is not installed.
    """

    def __init__(
        self,
        velocity: Velocity,
        *,
        trace: Trace = "auto",
        method: Solver = "dopri5",
        tolerance: float = 1e-5,
        steps: int = 16,
    ) -> None:
        super().__init__()
        if method not in get_args(Solver):
            raise InputError(
                f"There is no solver {method!r}; choose from {', '.join(get_args(Solver))}."
            )
        if not tolerance > 0 or steps < 1:
            raise InputError(f"Got the tolerance {tolerance} and {steps} steps; use positive ones.")
        _odeint()  # to miss it now and not after the first batch
        self.velocity, self.dim = velocity, velocity.dim
        self.method, self.tolerance, self.steps = method, tolerance, steps
        exact = trace == "auto" and velocity.closed_form
        self.estimated = estimates("exact" if exact else trace, velocity.dim)

    @property
    def bijective(self) -> bool:
        """Always true."""
        return True

    def forward(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Integrate from latent to data; see :meth:`Kernel.forward`.

        Raises:
            NumericalError: If the solver does not reach its tolerance or leaves the finite numbers.
        """
        end, log_ratio = self._solve(self._slope(x, condition), x, 1, ends=(1.0, 0.0))
        return Step(end, log_ratio)

    def reverse(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Integrate from data to latent; see :meth:`Kernel.reverse`. Errors as in :meth:`forward`."""
        end, log_ratio = self._solve(self._slope(x, condition), x, 1, ends=(0.0, 1.0))
        return Step(end, log_ratio)

    def reverse_with_costs(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> tuple[Step, Costs]:
        """Integrate from data to latent together with what the path costs; errors as in :meth:`forward`."""
        slope = self._slope(x, condition)

        def with_costs(time: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if isinstance(self.velocity, Potential):
                found = self.velocity.slopes(time, state[0], condition)
                kinetic = 0.5 * found.point.square().sum(1)
                return -found.point, -found.laplacian, kinetic, (found.time - kinetic).abs()
            v, divergence = slope(time, state)
            kinetic = 0.5 * v.square().sum(1)
            return v, divergence, kinetic, torch.zeros_like(kinetic)

        end, log_ratio, transport, hjb = self._solve(with_costs, x, 3, ends=(0.0, 1.0))
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
    ) -> tuple[Tensor, ...]:
        """The point at the end, and the integrals along the path."""
        start = (x, *(x.new_zeros(len(x)) for _ in range(integrals)))
        times = torch.tensor(ends, dtype=x.dtype, device=x.device)
        if self.method == "rk4":
            options: dict[str, Any] = {"step_size": 1 / self.steps}
        else:
            # A step ends exactly at the end, where the solver would interpolate at lower order.
            options = {"step_t": times[1:], "max_num_steps": _MOST}
        try:
            path = _odeint()(
                slope,
                start,
                times,
                rtol=self.tolerance,
                atol=self.tolerance,
                method=self.method,
                options=options,
            )
        except AssertionError as error:  # how torchdiffeq gives up
            raise NumericalError(
                f"The ODE solver {self.method} did not reach its tolerance {self.tolerance:g}: it took {_MOST} steps, "
                "or they became too small; use a larger tolerance, or train with a smaller lr or with TransportKL, "
                "which keeps paths straight."
            ) from error
        result = tuple(values[-1] for values in path)
        if not all(bool(values.isfinite().all()) for values in result):
            raise NumericalError(
                f"The ODE solver {self.method} left the finite numbers; train with a smaller lr, or take more steps."
            )
        return result


class TransportKL(Energy):
    r"""OT-Flow's training loss: the energy of a continuous flow plus what its paths cost, in one solve.

    .. math:: E(x \mid y) + \alpha_L L(x) + \alpha_R R(x), \qquad L = \int_0^1 \tfrac12 \|v\|^2 dt, \quad
        R = \int_0^1 \big|\partial_t \Phi - \tfrac12 \|\nabla \Phi\|^2\big|\, dt .

    Among all flows that reach the latent law, that of least transport cost has straight paths, which a solver follows
    in few steps; :math:`R` vanishes along them, and helps to find them. The published weights (1, 100, 5) of cost,
    likelihood and penalty are :math:`\alpha_L = 0.01`, :math:`\alpha_R = 0.05` here.

    Args:
        flow: The flow: bijections, at least one of them a :class:`ContinuousFlow`; the costs of several add up.
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
        if not found or not flow.chain.bijective:
            raise InputError(
                f"The chain has {len(found)} continuous flows; give at least one, and only bijections beside them."
            )
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


def _odeint() -> Callable[..., Any]:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise InputError(
            "A continuous flow needs the library torchdiffeq: run pip install 'patchflow[ode]'."
        ) from error
    return odeint
