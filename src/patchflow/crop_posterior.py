r"""The posterior of super-resolution on crops: their data term, and the Wasserstein patch prior of all together.

.. math:: E(x \mid y) = \frac{1}{2 \sigma^2} \|A x - y\|^2 + w\, R(x),

where the patches of all images of a batch are one distribution in :math:`R` (:mod:`patchflow.priors.wasserstein`), with
one potential for all batches, which rises along with the steps of a training.

References:
    Altekrueger, Hertrich, "WPPNets and WPPFlows: the power of Wasserstein patch priors for superresolution", SIAM J.
    Imaging Sci. 16(3), 2023, https://arxiv.org/abs/2201.08157
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.numerics.patches import extract_patches
from patchflow.priors.multiscale import MultiscalePrior, shrink
from patchflow.priors.patch import PatchPrior
from patchflow.priors.wasserstein import TransportCost
from patchflow.problems.blur import Blur
from patchflow.problems.resolution import cell_offset

# Of a reference patch that is never used, per step, in squared units of images in [0, 1].
RATE = 1e-3


class CropPosterior(Energy):
    """The negative log posterior of the images of measured crops; see the module's formula.

    Measured pixels whose kernel reaches beyond a crop are not compared. Crops are reflected for the prior, so that all
    pixels count alike: a flow would spread what nothing holds. The patches of one random phase of the tiling are taken
    of each scale, which is unbiased.

    Args:
        kernel: The kernel of the blur.
        stride: The scale.
        std: The standard deviation of the noise.
        prior: The prior, of :func:`patchflow.learn_wpp` without padding.
        weight: Its weight.
        rate: How fast its potentials rise; see :meth:`patchflow.priors.wasserstein.TransportCost.rising`.

    Raises:
        InputError: If the prior is of another kind, or a number is out of range.
    """

    def __init__(
        self,
        kernel: Float[Tensor, "rows columns"],
        stride: int,
        std: float | int,
        prior: MultiscalePrior,
        *,
        weight: float | int,
        rate: float | int = RATE,
    ) -> None:
        super().__init__()
        if not (0 <= weight < math.inf and 0 <= rate < math.inf and std > 0):
            raise InputError(
                f"Got the weight {weight}, the rate {rate} and the noise {std}; weight and rate must be 0 or more and "
                "finite, the noise positive."
            )
        for scale in prior.priors:
            cost = scale.get_submodule("patch_energy")
            if not isinstance(cost, TransportCost) or (
                isinstance(scale, PatchPrior) and scale.padding
            ):
                raise InputError(
                    f"The prior has patches of a {type(cost).__name__} or a padding; make it with patchflow.learn_wpp "
                    "and without padding."
                )
        self.prior, self.weight, self.rate = prior, float(weight), float(rate)
        self.kernel, self.stride, self.std = kernel, stride, float(std)

    def forward(
        self, x: Float[Tensor, "batch channels rows columns"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate for the cells ``x`` of the measured crops ``condition``; see :meth:`Energy.forward`.

        Raises:
            InputError: If there is no measurement, or the crops are too small.
        """
        if condition is None:
            raise InputError("A posterior needs the measurement; pass it as condition.")
        with torch.autocast(x.device.type, enabled=False):
            x, y = x.to(condition.dtype), condition
            inside, measured, operator = self._inside(x)
            residual = (operator(x[inside]) - y[measured]) / self.std
            energy = 0.5 * residual.square().flatten(1).sum(1)
            if self.weight == 0:
                return energy
            return energy + self.weight * self._patches(x)

    def start(self, crop: int, channels: int) -> None:
        """Set the potentials to zero, after one evaluation of an empty crop: what is too small is told at once.

        Raises:
            InputError: If crops of so many measured pixels are too small.
        """
        y = self.kernel.new_zeros(1, channels, crop, crop)
        self(self.kernel.new_zeros(1, channels, crop * self.stride, crop * self.stride), y)
        for scale in self.prior.priors:
            cost = scale.get_submodule("patch_energy")
            assert isinstance(cost, TransportCost)
            cost.reset()

    def _inside(
        self, x: Tensor
    ) -> tuple[tuple[slice, ...], tuple[slice, slice, slice, slice], Blur]:
        """The pixels that the operator sees, the measured pixels that it then explains, and the operator."""
        everything = slice(None)
        pixels, measured, extents = [], [], []
        probe = Blur(self.kernel.to(x), (10**4, 10**4), "valid", stride=self.stride)
        for offset, taps, count in zip(
            cell_offset(probe), self.kernel.shape, x.shape[2:], strict=True
        ):
            first = math.ceil(offset / self.stride)
            start = first * self.stride - offset
            explained = (count - start - taps) // self.stride + 1
            if explained < 1:
                raise InputError(
                    f"Crops of {count // self.stride} measured pixels are smaller than the kernel of {taps} pixels; "
                    "use larger crops."
                )
            extents.append((explained - 1) * self.stride + taps)
            pixels.append(slice(start, start + extents[-1]))
            measured.append(slice(first, first + explained))
        operator = Blur(probe.kernel, (extents[0], extents[1]), "valid", stride=self.stride)
        return (
            (everything, everything, *pixels),
            (everything, everything, measured[0], measured[1]),
            operator,
        )

    def _patches(self, x: Tensor) -> Tensor:
        """The prior, with the patches of all images as one distribution."""
        values = []
        for k, scale in enumerate(self.prior.priors):
            x = shrink(x) if k else x
            cost, size = scale.get_submodule("patch_energy"), self.prior.size
            assert isinstance(cost, TransportCost)
            if min(x.shape[2:]) < size:
                raise InputError(
                    f"The image of a crop has {x.shape[2]} x {x.shape[3]} pixels at scale {k + 1} of the prior, which "
                    f"are smaller than its patches of {size} x {size}; use larger crops or fewer scales."
                )
            wide = functional.pad(x, [size - 1] * 4, mode="reflect")
            i, j = torch.randint(size, (2,)).tolist()
            patches = torch.cat([extract_patches(image, size, size, (i, j)) for image in wide])
            with cost.rising(self.rate):
                energies = cost(patches)
            values.append(4**k * energies.view(len(x), -1).sum(1))
        return torch.stack(values).mean(0)
