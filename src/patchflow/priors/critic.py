"""The patch prior of a convolutional critic, evaluated on the whole image instead of patch by patch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.numerics.patches import grid_shape
from patchflow.numerics.precision import Precision, autocast
from patchflow.priors.adversarial import PatchCritic
from patchflow.priors.patch import PatchPhase, PatchPrior

# Pixels of an image in memory at a time, however large it is.
_PIXELS = 65536


class CriticPrior(PatchPrior):
    """The patch prior of a critic without padding, by convolutions over the whole image.

    The same value as that of ``PatchPrior(critic, critic.size)``, many times faster. Its phases have the stride of the
    critic by default.

    Args:
        critic: The critic.
        padding: See :class:`patchflow.priors.patch.PatchPrior`.
        precision: See there.

    Raises:
        InputError: If the critic pads, or its patches are larger than what it looks at.
    """

    def __init__(
        self, critic: PatchCritic, *, padding: int = 0, precision: Precision = "float32"
    ) -> None:
        if critic.size != critic.field or any(layer.padding for layer in critic.layers):
            raise InputError(
                f"The critic of {critic.size} x {critic.size} patches looks at {critic.field} x {critic.field} pixels, "
                "with or without padding; over whole images use one without padding whose patches are what it looks "
                "at, or PatchPrior."
            )
        super().__init__(critic, critic.size, critic.channels, padding=padding, precision=precision)

    @property
    def critic(self) -> PatchCritic:
        """The critic."""
        assert isinstance(self.patch_energy, PatchCritic)
        return self.patch_energy

    def phases(self, stride: int | None = None) -> tuple[PatchPhase, ...]:
        """Energies on the phases of a patch grid; see :meth:`PatchPrior.phases`."""
        return super().phases(self.critic.stride if stride is None else stride)

    @torch.no_grad()
    def nll_map(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch 1 height width"]:
        """Per pixel, the mean energy of the patches that contain it; see :meth:`PatchPrior.nll_map`."""
        rows = [
            self.critic.on_grid(x[:, :, top:bottom], 1)
            for top, bottom in self._strips((x.shape[2], x.shape[3]), 1, (0, 0))
        ]
        grid = torch.cat(rows, 1)[:, None]
        sums, counts = (
            functional.conv_transpose2d(v, torch.ones(1, 1, self.size, self.size).to(v))
            for v in (grid, torch.ones_like(grid))
        )
        return sums / counts

    def _sum(self, x: Tensor, stride: int, phase: tuple[int, int]) -> Tensor:
        self.check(x)
        if self.padding:
            x = functional.pad(x, [self.padding] * 4, mode="reflect")
        scale = stride**2 / self.size**2
        learning = any(parameter.requires_grad for parameter in self.critic.parameters())
        if torch.is_grad_enabled() and x.requires_grad and not learning:
            return scale * _Strips.apply(x, self, stride, phase)
        energy, total = _OnGrid(self.critic, stride), x.new_zeros(len(x))
        with autocast(x, self.precision):
            for top, bottom in self._strips((x.shape[2], x.shape[3]), stride, phase):
                total = total + energy(x[:, :, top:bottom, phase[1] :])
        return scale * total

    def _strips(
        self, shape: tuple[int, int], stride: int, phase: tuple[int, int]
    ) -> Iterator[tuple[int, int]]:
        """First and last pixel rows of strips of the image that have the rows of the grid among them."""
        if any(s + self.size > n for s, n in zip(phase, shape, strict=True)):
            return  # A small image has no patch on this phase.
        rows, _ = grid_shape(shape, self.size, stride, phase)
        # Strips overlap by almost a patch, so that thin ones would be slow.
        per_strip = max(_PIXELS // shape[1], 4 * self.size) // stride + 1
        for first in range(0, rows, per_strip):
            count = min(per_strip, rows - first)
            top = phase[0] + first * stride
            yield top, top + (count - 1) * stride + self.size


class _OnGrid(Energy):
    """A critic summed over the grid that begins in the corner of an image."""

    def __init__(self, critic: PatchCritic, stride: int) -> None:
        super().__init__()
        self.critic, self.stride = critic, stride

    def forward(
        self, x: Float[Tensor, "batch channels height width"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        return self.critic.on_grid(x, self.stride).sum((1, 2))


class _Strips(torch.autograd.Function):
    """A critic summed over a grid, with the gradient computed along, strip by strip, in bounded memory."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, prior: CriticPrior, stride: int, phase: tuple[int, int]
    ) -> Tensor:
        energy = _OnGrid(prior.critic, stride)
        values, gradient = x.new_zeros(len(x)), torch.zeros_like(x)
        with autocast(x, prior.precision):
            for k in range(len(x)):
                for top, bottom in prior._strips((x.shape[2], x.shape[3]), stride, phase):
                    value, slope = energy.value_and_grad(x[k : k + 1, :, top:bottom, phase[1] :])
                    values[k] += value[0]
                    gradient[k, :, top:bottom, phase[1] :] += slope[0]
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].view(-1, 1, 1, 1), None, None, None
