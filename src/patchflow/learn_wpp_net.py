r"""Learn super-resolution without a single high-resolution image of what is measured: WPPNets.

The network :math:`G` sees measured crops :math:`y` only. Its results should explain them, and their patches should be
distributed as those of a reference image,

.. math:: E(G) = \mathbb E_y \Big[ \frac{1}{2 \sigma^2} \|A\, G(y) - y\|^2 + w\, R(G(y)) \Big],

with the Wasserstein patch prior :math:`R` (:mod:`patchflow.priors.wasserstein`), where all crops of a batch make one
distribution of patches and share one potential, which rises along with the steps. Published is the mean squared error
plus :math:`\lambda = 0.02` times :math:`W_2^2`, which is :math:`w = \lambda p^2 / (\sigma s)^2` = 450 at scale
:math:`s = 4` and noise .01 for patches of 6 x 6 pixels, whose means are taken out there.

References:
    Altekrueger, Hertrich, "WPPNets and WPPFlows: the power of Wasserstein patch priors for superresolution", SIAM J.
    Imaging Sci. 16(3), 2023, https://arxiv.org/abs/2201.08157
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.fit import Fit, fit
from patchflow.learn_pairs import PairLoss, minus_psnr, validation_pairs
from patchflow.numerics.dihedral import DIHEDRAL, symmetries
from patchflow.numerics.patches import PatchSampler, common_channels, extract_patches
from patchflow.numerics.precision import Precision
from patchflow.priors.multiscale import MultiscalePrior, shrink
from patchflow.priors.patch import PatchPrior
from patchflow.priors.wasserstein import TransportCost
from patchflow.problems.blur import Blur
from patchflow.problems.resolution import LowResolution, cell_offset
from patchflow.resolution_models import SuperResolver

WEIGHT, CROP, BATCH, LR, AVERAGE = 100.0, 16, 8, 1e-3, 0.99
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
        weight: float | int = WEIGHT,
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


class NetworkLoss(Energy):
    """The posterior's energy of what a network makes of measured crops."""

    def __init__(self, network: nn.Module, posterior: CropPosterior) -> None:
        super().__init__()
        self.network, self.posterior = network, posterior

    def forward(
        self, x: Float[Tensor, "batch channels height width"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate for measured crops; see :meth:`Energy.forward`. The condition is not used."""
        return self.posterior(self.network(x), x)


def learn_wpp_net(
    model: SuperResolver,
    measurements: Sequence[Tensor],
    validation: Sequence[Tensor] = (),
    *,
    prior: MultiscalePrior,
    weight: float = WEIGHT,
    crop: int = CROP,
    dihedral: bool = True,
    batch: int = BATCH,
    steps: int = 10_000,
    lr: float = LR,
    average: float = AVERAGE,
    patience: int | None = None,
    seconds: float | None = None,
    precision: Precision = "auto",
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Fit:
    """Train a network on measurements alone, and leave it frozen.

    Args:
        model: The network, with the operator and the noise that it is trained for (:func:`patchflow.wpp_net`).
        measurements: Measured images, each (1, channels, height, width); sizes may differ.
        validation: High-resolution images; their simulated measurements choose the best state. Without them the last
            state is kept, averaged over steps.
        prior: The prior of a reference image (:func:`patchflow.learn_wpp`); its potentials start at zero.
        weight: The weight of the prior.
        crop: Side length of the crops, in measured pixels.
        dihedral: Turn and mirror the crops at random, as far as the kernel stays as it is.
        batch: Crops per step.
        steps: Training steps.
        lr: Peak learning rate of Adam, which decays by a cosine.
        average: Decay of the moving average of the weights; 0 for none.
        patience: Stop early after this many validations without improvement.
        seconds: Time limit; the schedule ends with it.
        precision: Precision of the network during training.
        checkpoint: File for the training state, without the potentials, which rise anew after a resume.
        resume: Continue from ``checkpoint``.
        progress: Show a progress line.

    Returns:
        The record of the run; its validation values are minus the mean PSNR in decibels.

    Raises:
        InputError: If measurements, prior, validation and network do not fit together, or a number is out of range.
        NumericalError: If the loss is not finite.
    """
    posterior = posterior_of(model, prior, [*measurements, *validation], weight=weight)
    draw = MeasuredCrops(model, measurements, crop, batch, dihedral=dihedral)
    posterior.start(crop, model.channels)
    known = validation_pairs(validation, LowResolution(model.kernel, model.scale, model.noise))
    pair_loss = PairLoss(model.network)
    return fit(
        NetworkLoss(model.network, posterior),
        draw,
        steps=steps,
        lr=lr,
        warmup=100,
        average=average,
        validate=(lambda: minus_psnr(pair_loss, known)) if known else None,
        validate_every=min(500, max(25, steps // 40)),
        patience=patience,
        budget=seconds,
        precision=precision,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )


def posterior_of(
    model: SuperResolver, prior: MultiscalePrior, images: Sequence[Tensor], *, weight: float | int
) -> CropPosterior:
    """The posterior that a model is trained for, if images, prior and model have the same channels.

    Raises:
        InputError: If they have not, or there is no image.
    """
    channels = common_channels(images)
    if not channels == prior.channels == model.channels:
        raise InputError(
            f"The images have {channels} channels, the prior was made for {prior.channels} and the network for "
            f"{model.channels}; convert them all to grey or all to colour."
        )
    return CropPosterior(model.kernel, model.scale, model.noise, prior, weight=weight)


class MeasuredCrops:
    """Random crops of measurements.

    Args:
        model: The model that learns from them.
        measurements: Measured images.
        crop: Side length of the crops.
        batch: Number of crops per call.
        dihedral: Turn and mirror them, as far as the model's kernel stays as it is.

    Raises:
        InputError: If a measurement is smaller than a crop.
    """

    def __init__(
        self,
        model: SuperResolver,
        measurements: Sequence[Tensor],
        crop: int,
        batch: int,
        *,
        dihedral: bool,
    ) -> None:
        if crop < 1 or batch < 1:
            raise InputError(
                f"Got {batch} crops of {crop} x {crop} in each step; use at least 1 of 1 x 1."
            )
        turns = dihedral and len(symmetries(model.kernel)) == len(DIHEDRAL)
        self.sampler = PatchSampler(measurements, crop, batch, dihedral=turns)
        self.shape = (batch, self.sampler.channels, crop, crop)

    def __call__(self) -> Float[Tensor, "batch channels height width"]:
        """Draw crops."""
        return self.sampler().view(self.shape)
