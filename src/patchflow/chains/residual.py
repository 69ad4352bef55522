r"""Residual flows: the identity plus a contraction, from data to latent.

``reverse`` is explicit, :math:`z = s\,(x + g(x, y))`, since that is the way of training by maximum likelihood;
``forward`` solves for x, which is the way of sampling. :class:`~patchflow.chains.kernel.Reversed` turns a block round.
The Jacobian of a block is neither triangular nor sparse: unlike a coupling it moves all coordinates by all others.

References:
    Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, "Invertible residual networks", 2019,
    https://arxiv.org/abs/1811.00995
    Chen, Behrmann, Duvenaud, Jacobsen, "Residual flows for invertible generative modeling", 2019,
    https://arxiv.org/abs/1906.02735
    Hertrich, "Proximal residual flows for Bayesian inverse problems", 2023, https://arxiv.org/abs/2211.17158
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.chains.contractions import Bound, Contraction
from patchflow.chains.kernel import Kernel, Step
from patchflow.errors import InputError
from patchflow.numerics.contraction import differentiable, fixed_point, log_det_estimate, newton

Trace = Literal["auto", "exact", "unbiased"]
# Up to this dimension a Jacobian costs about as much as the series of an estimate.
EXACT_DIM = 8


def estimates(trace: Trace, dim: int) -> bool:
    """Whether a trace or log-determinant is estimated: ``"auto"`` is exact up to dimension 8.

    Raises:
        InputError: If there is no such option.
    """
    if trace not in ("auto", "exact", "unbiased"):
        raise InputError(f"The trace is {trace!r}; choose from auto, exact, unbiased.")
    return trace == "unbiased" or (trace == "auto" and dim > EXACT_DIM)


class ResidualBlock(Kernel):
    r"""The bijection whose inverse is :math:`z = s\,(x + g(x, y))` with a contraction :math:`g`.

    :math:`\log|\det \nabla_x z| = d \log s + \log\det(I + \nabla g)`, either exactly, from the Jacobian, or by the
    unbiased estimate of :func:`~patchflow.numerics.contraction.log_det_estimate`. An estimate makes energies unbiased
    and their exponentials biased, so a :class:`~patchflow.chains.flow.Flow` with one is not
    :attr:`~patchflow.chains.flow.Flow.exact`.

    With exact log-determinants x is found by Newton's method, otherwise by fixed-point iteration, both to a proven
    error bound. Derivatives of the solution are implicit, so their memory does not grow with the iterations; they can
    be taken once in ``forward``, as often as one likes in ``reverse``.

    Args:
        contraction: The contraction: :class:`~patchflow.chains.contractions.SpectralNet`,
            :class:`~patchflow.chains.contractions.ProximalNet`, or one's own.
        trace: ``"exact"``, ``"unbiased"``, or ``"auto"``: exact up to dimension 8.
        tolerance: Largest error of a solution, relative to one plus its largest coordinate; not below rounding.

    Raises:
        InputError: If the tolerance is not positive, or there is no such trace.
    """

    def __init__(
        self, contraction: Contraction, *, trace: Trace = "auto", tolerance: float = 1e-8
    ) -> None:
        super().__init__()
        if not tolerance > 0:
            raise InputError(
                f"The tolerance is {tolerance} but must be positive; 1e-8 is the default."
            )
        self.contraction, self.dim, self.tolerance = contraction, contraction.dim, tolerance
        self.estimated = estimates(trace, contraction.dim)

    @property
    def bijective(self) -> bool:
        """Always true."""
        return True

    def forward(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Solve for the data of a latent point; see :meth:`Kernel.forward`.

        Raises:
            NumericalError: If the solution is not found to the tolerance.
        """
        bound = self.contraction.at(condition)
        target = x / self.contraction.scale
        accuracy = {"lipschitz": self.contraction.lipschitz, "tolerance": self.tolerance}
        if self.estimated:
            point = fixed_point(bound.value, target, **accuracy)
        else:
            point = newton(bound.with_jacobian, target, **accuracy)
        if torch.is_grad_enabled():
            residual = target - point - bound.value(point)
            point = differentiable(point, residual, bound.value, **accuracy)
        return Step(point, -self._value_and_log_det(bound, point)[1])

    def reverse(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Map data to latent; see :meth:`Kernel.reverse`."""
        value, log_det = self._value_and_log_det(self.contraction.at(condition), x)
        return Step(self.contraction.scale * (x + value), log_det)

    def _value_and_log_det(self, bound: Bound, x: Tensor) -> tuple[Tensor, Tensor]:
        constant = self.dim * math.log(self.contraction.scale)
        if self.estimated:
            value, log_det = log_det_estimate(bound.value, x, lipschitz=self.contraction.lipschitz)
            return value, log_det + constant
        value, jacobian = bound.with_jacobian(x)
        unit = torch.eye(self.dim, dtype=x.dtype, device=x.device)
        # The eigenvalues of I + J lie in a disc around one: the determinant is positive.
        return value, torch.linalg.slogdet(unit + jacobian).logabsdet + constant
