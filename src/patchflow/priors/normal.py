"""Normal and log-normal laws, as images of N(0, I)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Transported
from patchflow.errors import InputError
from patchflow.priors.gaussian import Gaussian


class Normal(Transported):
    r"""The law :math:`N(m, L L^\top)` as the image :math:`x = m + L u` of :math:`u \sim N(0, I)`.

    Args:
        mean: The mean :math:`m`, of shape (dim,).
        covariance: The covariance :math:`L L^\top`, of shape (dim, dim), symmetric and positive definite.

    Raises:
        InputError: If the shapes do not fit or the covariance is not positive definite.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        law = Gaussian(mean, covariance)
        super().__init__(len(mean))
        self.law = law
        self.reference = mean.new_zeros(())

    def forward(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate; see :meth:`Energy.forward`. The condition is not used."""
        return self.law(x)

    def from_normal(self, u: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Scale and shift; see :meth:`Transported.from_normal`."""
        return self.law.mean + u @ self.law.factor.T

    def to_normal(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Shift and whiten; see :meth:`Transported.to_normal`."""
        centred = (x - self.law.mean).T
        return torch.linalg.solve_triangular(self.law.factor, centred, upper=False).T


class LogNormal(Transported):
    r"""Independent log-normal coordinates, :math:`x_i = e^{m_i + s_i u_i}` with :math:`u \sim N(0, I)`.

    .. math:: E(x) = \sum_i \frac{(\log x_i - m_i)^2}{2 s_i^2} + \log x_i + \log(s_i \sqrt{2\pi})

    The energy is infinite where a coordinate is not positive.

    Args:
        location: The means :math:`m` of the logarithms, of shape (dim,).
        scale: The standard deviations :math:`s` of the logarithms, of shape (dim,).

    Raises:
        InputError: If the shapes do not fit, or a scale is not positive and finite.
    """

    location: Tensor
    scale: Tensor

    def __init__(self, location: Tensor, scale: Tensor) -> None:
        if location.ndim != 1 or scale.shape != location.shape:
            raise InputError(
                f"A location of shape {tuple(location.shape)} and a scale of shape {tuple(scale.shape)} do not fit; "
                "give (dim,) and (dim,)."
            )
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise InputError(f"The scale is {scale.tolist()} but must be positive and finite.")
        super().__init__(len(location))
        self.register_buffer("location", location)
        self.register_buffer("scale", scale)
        self.reference = location.new_zeros(())

    def forward(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate; see :meth:`Energy.forward`. The condition is not used."""
        outside = x <= 0
        # where() differentiates both sides, hence a harmless point where the logarithm has no value.
        log = torch.where(outside, 1, x).log()
        energy = 0.5 * ((log - self.location) / self.scale).square() + log + self.scale.log()
        energy = torch.where(outside, math.inf, energy).sum(1)
        return energy + 0.5 * self.dim * math.log(2 * math.pi)

    def from_normal(self, u: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Scale, shift and exponentiate; see :meth:`Transported.from_normal`."""
        return (self.location + self.scale * u).exp()

    def to_normal(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Standardise the logarithm; see :meth:`Transported.to_normal`."""
        # The smallest normal number stands for the boundary, so that its score is finite.
        return (x.clamp_min(torch.finfo(x.dtype).tiny).log() - self.location) / self.scale
