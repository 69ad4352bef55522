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

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from patchflow.crop_posterior import CropPosterior
from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.fit import Fit, fit
from patchflow.learn_pairs import PairLoss, minus_psnr, validation_pairs
from patchflow.numerics.dihedral import DIHEDRAL, symmetries
from patchflow.numerics.patches import PatchSampler, common_channels
from patchflow.numerics.precision import Precision
from patchflow.priors.multiscale import MultiscalePrior
from patchflow.problems.resolution import LowResolution
from patchflow.resolution_models import SuperResolver

WEIGHT, CROP, BATCH, LR, AVERAGE = 100.0, 16, 8, 1e-3, 0.99


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
        checkpoint: File for the training state.
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
        InputError: If they have not, there is no image, or the model was given no kernel.
    """
    channels = common_channels(images)
    if not channels == prior.channels == model.channels:
        raise InputError(
            f"The images have {channels} channels, the prior was made for {prior.channels} and the network for "
            f"{model.channels}; convert them all to grey or all to colour."
        )
    model.check_kernel(model.kernel)
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
