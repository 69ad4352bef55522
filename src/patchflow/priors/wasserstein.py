r"""The Wasserstein patch prior: the patches of an image should be distributed as those of a reference image.

.. math:: R(x) = \frac{N}{p^2}\, T_{\varepsilon,\rho}(\mu_x, \nu)
          = \max_\psi \frac{1}{p^2} \sum_i E_\psi(P_i x), \qquad
          E_\psi(q) = \min\nolimits^\varepsilon_j \big(\tfrac12 \|q - q_j\|^2 - \psi_j\big)
          + \frac1M \sum_j \phi_\rho(\psi_j),

with the transport of :mod:`patchflow.numerics.transport` from the patches of :math:`x` to reference patches. With a
fixed potential it is a patch prior like any other, whose gradient moves each patch towards its target: in the interior
:math:`x` minus the average of the targets, and so the weight of :math:`R` is one over a variance. The potential is
raised along with the steps in :math:`x`.

References:
    Hertrich, Houdard, Redenbach, "Wasserstein patch prior for image superresolution", IEEE TCI 8, 2022,
    https://arxiv.org/abs/2109.12880
    Piening, Altekrueger, Hertrich, Hagemann, Walther, Steidl, "Learning from small data sets: patch-based regularizers
    in inverse problems for image reconstruction", 2023, https://arxiv.org/abs/2312.16611
    Mignon, Galerne, Hidane, Louchet, Mille, "Semi-unbalanced regularized optimal transport for image restoration", 2023
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.numerics.transport import assign, climb, marginal


class TransportCost(Energy):
    r"""The energy :math:`E_\psi` of a patch; see the module's formula.

    Args:
        reference: The reference patches :math:`q_j`, (size, patch).
        epsilon: The entropic smoothing :math:`\varepsilon`, in squared units of the image; 0 for none.
        rho: The penalty :math:`\rho` of using the reference patches unevenly, in the same units.

    Raises:
        InputError: If there are no reference patches, one is not finite, or a number is out of range.
    """

    reference: Tensor
    psi: Tensor

    def __init__(
        self,
        reference: Float[Tensor, "size patch"],
        *,
        epsilon: float | int = 0.0,
        rho: float | int = math.inf,
    ) -> None:
        super().__init__()
        if not len(reference) or not bool(reference.isfinite().all()):
            raise InputError(
                f"Transport needs finite reference patches but got {len(reference)}, of which "
                f"{int((~reference.isfinite()).sum())} values are not finite; give an image without holes."
            )
        if not (0 <= epsilon < math.inf and rho > 0):
            raise InputError(
                f"Got the smoothing {epsilon} and the penalty {rho}; the first must be 0 or more, the second positive."
            )
        self.epsilon, self.rho = float(epsilon), float(rho)
        self.register_buffer("reference", reference)
        self.register_buffer("psi", reference.new_zeros(len(reference)))
        self._rate = 0.0

    def forward(
        self, x: Float[Tensor, "batch patch"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate for the present potential; see :meth:`Energy.forward`. There are no second derivatives."""
        value, use = _TransportCost.apply(x, self.reference, self.psi, self.epsilon)
        value = value + marginal(self.psi, self.rho).mean()
        if self._rate:
            self.psi.copy_(climb(self.psi, use, self._rate, self.rho))
        return value

    @contextmanager
    def rising(self, rate: float) -> Iterator[None]:
        r"""Raise the potential with each evaluation, by one step of stochastic gradient ascent on its points.

        Args:
            rate: The step for a reference patch that is never used, in squared units of the image.
        """
        before, self._rate = self._rate, rate
        try:
            yield
        finally:
            self._rate = before

    def reset(self) -> None:
        """Start from the potential zero: every patch goes to its nearest reference patch."""
        self.psi.zero_()


class _TransportCost(torch.autograd.Function):
    """The (smooth) minimum, whose slope is the way to the target."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, reference: Tensor, psi: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        found = assign(x, reference, psi, epsilon)
        ctx.save_for_backward(x - found.target)
        ctx.mark_non_differentiable(found.use)
        return found.value, found.use

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * grad_outputs[0][:, None], None, None, None
