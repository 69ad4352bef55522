r"""Patch priors: an energy of patches, summed over an image.

.. math:: R(x) = \frac{1}{p^2} \sum_{i=1}^{N} E(P_i x),

over all :math:`N` overlapping :math:`p \times p` patches :math:`P_i x`. Each inner pixel lies in :math:`p^2`
patches, so
:math:`R` is in nats of the whole image and its weight against a negative log-likelihood depends neither on the
size of the image nor on the patch size or stride. With the energy of a normalizing flow it is patchNR. The paper's
:math:`\lambda` multiplies the *mean* over patches;
:func:`patchflow.papers.altekrueger2023_patchnr.weight_of_lambda` converts it.

References:
    Altekrueger, Denker, Hagemann, Hertrich, Maass, Steidl, "PatchNR: learning from very few images by patch normalizing
    flow regularization", Inverse Problems 39(6), 2023, https://arxiv.org/abs/2205.12021
    Zoran, Weiss, "From learning models of natural image patches to whole image restoration", ICCV 2011
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.numerics.patches import add_patches, extract_patches, grid_shape
from patchflow.numerics.precision import Precision, autocast

# Patches in memory at a time, whatever the size of the image.
_CHUNK = 32768


class PatchPrior(Energy):
    r"""The sum of a patch energy over all patches of an image; see the module's formula.

    Args:
        patch_energy: The energy of a patch, on vectors of ``channels * size**2`` numbers.
        size: Side length :math:`p` of a patch.
        channels: Number of channels; a colour patch is one vector.
        padding: Pixels by which the image is extended on each side by reflection before its patches are taken, so that
            the border counts as much as the inside.
        smoothing: Standard deviation of the white noise on the patches that the energy was learned from, 0 for none:
            the energy is that of noisy patches, and :meth:`denoise` takes the noise away again.
        precision: Precision of the networks when images are float32: ``"auto"`` takes bfloat16 where this device is
            faster with it (measured once), with float32 sums. Images in float64 are always computed in float64.

    Raises:
        InputError: If ``size`` or ``channels`` is not positive, or ``padding`` or ``smoothing`` is negative.
    """

    def __init__(
        self,
        patch_energy: Energy,
        size: int = 6,
        channels: int = 1,
        *,
        padding: int = 0,
        smoothing: float = 0.0,
        precision: Precision = "float32",
    ) -> None:
        super().__init__()
        if size < 1 or channels < 1 or padding < 0 or not 0 <= smoothing < math.inf:
            raise InputError(
                f"Got size {size}, channels {channels}, padding {padding} and smoothing {smoothing}; sizes must be "
                "positive, the padding 0 or more, and the smoothing, too."
            )
        self.patch_energy = patch_energy
        self.size, self.channels, self.padding = size, channels, padding
        self.smoothing = smoothing
        self.precision: Precision = precision

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, " batch"]:
        """Sum over all patches; see :meth:`Energy.forward`. The condition is not used."""
        return self._sum(x, 1, (0, 0))

    def phases(self, stride: int | None = None) -> tuple[PatchPhase, ...]:
        r"""Energies on the ``stride**2`` phases of a coarse patch grid, whose mean is exactly this energy.

        Cycling through them while minimising evaluates ``stride**2`` times fewer patches per step. With the default,
        each phase tiles the image: no pixel is in two patches. They share this prior's parameters and come in an order
        in which neighbours in time are far apart in space.

        Args:
            stride: Stride of the coarse grid; the patch size by default.
        """
        step = self.size if stride is None else stride
        return tuple(PatchPhase(self, step, phase) for phase in _phase_order(step))

    def random(self, count: int) -> RandomPatches:
        """The published estimate from ``count`` random patches, drawn anew at each evaluation."""
        return RandomPatches(self, count)

    @torch.no_grad()
    def nll_map(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch 1 height width"]:
        """Per pixel, the mean energy (nats) of the patches that contain it: high where the prior is surprised."""
        size = self.size
        maps = []
        for image in x:
            rows, columns = grid_shape((image.shape[1], image.shape[2]), size)
            energies = [
                self.patch_energy(patches) for patches, _, _ in self._bands(image, 1, (0, 0))
            ]
            grid = torch.cat(energies).view(1, 1, rows, columns)
            sums, counts = (
                functional.conv_transpose2d(values, torch.ones(1, 1, size, size).to(values))
                for values in (grid, torch.ones_like(grid))
            )
            maps.append(sums / counts)
        return torch.cat(maps)

    @torch.no_grad()
    def denoise(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        r"""The mean of the clean image, as far as single patches tell it, where each patch carries the smoothing noise.

        Tweedie's formula for each patch, :math:`\mathbb E[z \mid P_i x] = P_i x - s^2 \nabla E(P_i x)` with the
        smoothing :math:`s`, averaged where patches overlap. Without smoothing it is x itself.

        References:
            Efron, "Tweedie's formula and selection bias", JASA 106, 2011, https://doi.org/10.1198/jasa.2011.tm11181
        """
        if self.smoothing == 0:
            return x
        self.check(x)
        frame = [self.padding] * 4
        wide = functional.pad(x, frame, mode="reflect") if self.padding else x
        slope, counts = torch.zeros_like(wide), torch.zeros_like(wide[:1])
        with autocast(x, self.precision):
            for k, image in enumerate(wide):
                for patches, top, bottom in self._bands(image, 1, (0, 0)):
                    _, slopes = self.patch_energy.value_and_grad(patches)
                    add_patches(slope[k, :, top:bottom], slopes, self.size)
                    if k == 0:
                        add_patches(counts[0, :, top:bottom], torch.ones_like(slopes), self.size)
        wide = wide - self.smoothing**2 * slope / counts
        rows, columns = (slice(self.padding, n - self.padding) for n in wide.shape[2:])
        return wide[:, :, rows, columns]

    def _sum(self, x: Tensor, stride: int, phase: tuple[int, int]) -> Tensor:
        self.check(x)
        if self.padding:
            x = functional.pad(x, [self.padding] * 4, mode="reflect")
        scale = stride**2 / self.size**2
        learning = any(parameter.requires_grad for parameter in self.patch_energy.parameters())
        if torch.is_grad_enabled() and x.requires_grad and not learning:
            return scale * _Assemble.apply(x, self, stride, phase)
        with autocast(x, self.precision):
            sums = [
                sum(
                    (
                        self.patch_energy(patches).sum()
                        for patches, _, _ in self._bands(image, stride, phase)
                    ),
                    start=x.new_zeros(()),
                )
                for image in x
            ]
        return scale * torch.stack(sums)

    def check(self, x: Tensor) -> None:
        """Refuse images that do not fit, before a long computation.

        Raises:
            InputError: If the number of channels is another or the image is smaller than a patch.
        """
        grid_shape((x.shape[2], x.shape[3]), self.size)
        if x.shape[1] != self.channels:
            raise InputError(
                f"The image has {x.shape[1]} channels but the patch prior was made for {self.channels}; "
                "convert the image or train a model on such images."
            )

    def _bands(
        self, image: Tensor, stride: int, phase: tuple[int, int]
    ) -> Iterator[tuple[Tensor, int, int]]:
        """Patches of bands of grid rows, with the first and last pixel row of each band."""
        if any(s + self.size > n for s, n in zip(phase, image.shape[1:], strict=True)):
            return  # A small image has no patch on this phase.
        rows, columns = grid_shape((image.shape[1], image.shape[2]), self.size, stride, phase)
        per_band = max(1, _CHUNK // columns)
        for first in range(0, rows, per_band):
            count = min(per_band, rows - first)
            top = phase[0] + first * stride
            bottom = top + (count - 1) * stride + self.size
            yield (
                extract_patches(image[:, top:bottom], self.size, stride, (0, phase[1])),
                top,
                bottom,
            )


class PatchPhase(Energy):
    """A patch prior on one phase of a coarse patch grid; built by :meth:`PatchPrior.phases`."""

    def __init__(self, prior: PatchPrior, stride: int, phase: tuple[int, int]) -> None:
        super().__init__()
        self.prior, self.stride, self.phase = prior, stride, phase

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, " batch"]:
        """Sum over the grid, scaled to the whole image; see :meth:`Energy.forward`."""
        return self.prior._sum(x, self.stride, self.phase)


class RandomPatches(Energy):
    r"""The published stochastic patch prior: :math:`\frac{N}{n p^2} \sum_{k=1}^n E(P_{i_k} x)` with random :math:`i_k`.

    Unbiased for :class:`PatchPrior`. The patches are drawn without replacement from torch's global generator.
    """

    def __init__(self, prior: PatchPrior, count: int) -> None:
        super().__init__()
        self.prior, self.count = prior, count

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, " batch"]:
        """Sum over random patches, scaled to the whole image; see :meth:`Energy.forward`."""
        prior = self.prior
        prior.check(x)
        if prior.padding:
            x = functional.pad(x, [prior.padding] * 4, mode="reflect")
        values = []
        for image in x:
            patches = extract_patches(image, prior.size)
            chosen = torch.randperm(len(patches), device=x.device)[: self.count]
            scale = len(patches) / (len(chosen) * prior.size**2)
            with autocast(x, prior.precision):
                values.append(scale * prior.patch_energy(patches[chosen]).sum())
        return torch.stack(values)


class _Assemble(torch.autograd.Function):
    """Patch energies summed over a grid, with the gradient computed along, band by band, in bounded memory."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, prior: PatchPrior, stride: int, phase: tuple[int, int]
    ) -> Tensor:
        values, gradient = x.new_zeros(len(x)), torch.zeros_like(x)
        with autocast(x, prior.precision):
            for k, image in enumerate(x):
                for patches, top, bottom in prior._bands(image, stride, phase):
                    energies, slopes = prior.patch_energy.value_and_grad(patches)
                    values[k] += energies.sum()
                    add_patches(
                        gradient[k, :, top:bottom], slopes, prior.size, stride, (0, phase[1])
                    )
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].view(-1, 1, 1, 1), None, None, None


def _phase_order(stride: int) -> list[tuple[int, int]]:
    # A fixed shuffle: in raster order neighbouring phases share most of their patches' pixels.
    shuffled = torch.randperm(stride**2, generator=torch.Generator().manual_seed(0))
    return [(k // stride, k % stride) for k in shuffled.tolist()]
