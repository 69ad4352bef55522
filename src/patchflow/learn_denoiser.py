r"""Learn a denoiser from images: random crops, fresh noise in every step, and networks kept on their constraint.

The training loss of a denoiser is an energy of its parameters,

.. math:: E(x \mid \sigma) = \frac{1}{\sigma n} \|D(x + \sigma \varepsilon, \sigma) - x\|^2,
          \qquad \varepsilon \sim N(0, I),

for :math:`n` pixels. The squared error grows about as the noise level, so that dividing by it lets all levels count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.fit import Fit, fit
from patchflow.networks.denoiser import Denoiser, level_of
from patchflow.networks.proximal import ProximalNetwork
from patchflow.networks.proximal_convolution import ConvolutionalProximalNetwork
from patchflow.networks.proximal_denoiser import ProximalDenoiser
from patchflow.numerics.patches import PatchSampler, common_channels, hold_out
from patchflow.numerics.precision import Precision

# Levels below it weigh no more than it does.
_SMALLEST_LEVEL = 1 / 255
# The largest norm of gradients, but for proximal networks, which are kept on their constraint: three times the usual
# one of a DRUNet at the full rate. Without it a training of 60,000 steps diverged after 18,000.
_CLIP = 0.5
# Validation: crops of so many pixels along a side, so many in all, each with every one of so many levels.
_VALIDATION_SIDE, _VALIDATION_CROPS, _VALIDATION_LEVELS = 96, 12, 3

Spread = Literal["uniform", "log-uniform"]


class Constrained:
    """Random batches, and a network that is brought back to its constraint before each of them.

    :func:`patchflow.fit.fit` draws a batch before each step, so that the parameters are constrained after every step
    but the last: call ``finish_`` after it, and in the validation, where the parameters are an average.

    Args:
        batches: Returns a batch, as of ``fit``.
        network: The network.
    """

    def __init__(
        self,
        batches: Callable[[], Tensor | tuple[Tensor, Tensor]],
        network: ProximalNetwork | ConvolutionalProximalNetwork,
    ) -> None:
        self.batches, self.network = batches, network

    def __call__(self) -> Tensor | tuple[Tensor, Tensor]:
        """Constrain the network, and draw a batch."""
        self.network.constrain_()
        return self.batches()


class DenoisingLoss(Energy):
    r"""The energy :math:`E(x \mid \sigma)` of the module, with fresh noise at each call.

    Args:
        denoiser: The denoiser.
        penalty: The weight of the Parseval penalty of a :class:`patchflow.networks.proximal_denoiser.ProximalDenoiser`;
            0 for none.

    Raises:
        InputError: If the penalty is negative, or positive for a network that has none.
    """

    def __init__(self, denoiser: Denoiser, *, penalty: float | int = 0.0) -> None:
        super().__init__()
        if penalty < 0 or (penalty > 0 and not isinstance(denoiser, ProximalDenoiser)):
            raise InputError(
                f"The weight of the Parseval penalty is {penalty} for a {type(denoiser).__name__}; it must not be "
                "negative, and only proximal denoisers have one."
            )
        self.denoiser, self.weight = denoiser, float(penalty)

    def forward(
        self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate for clean images and the noise level of each; see :meth:`Energy.forward`.

        Raises:
            InputError: If there is no noise level.
        """
        if condition is None:
            raise InputError("A denoiser learns at noise levels; pass one for each image.")
        noisy = x + level_of(x, condition) * torch.randn_like(x)
        squares = (self.denoiser(noisy, condition) - x).square().flatten(1).mean(1)
        energy = squares / condition.clamp_min(_SMALLEST_LEVEL)
        if self.weight and isinstance(self.denoiser, ProximalDenoiser):
            energy = energy + self.weight * self.denoiser.network.penalty()
        return energy


def learn_denoiser(
    denoiser: Denoiser,
    images: Sequence[Tensor],
    validation: Sequence[Tensor] = (),
    *,
    holdout: float = 0.1,
    crop: int = 48,
    dihedral: bool = True,
    batch: int = 16,
    steps: int = 20_000,
    lr: float = 2e-3,
    schedule: Literal["cosine", "constant"] = "cosine",
    warmup: int = 200,
    average: float = 0.995,
    spread: Spread = "uniform",
    penalty: float | int = 0.0,
    patience: int | None = None,
    seconds: float | None = None,
    precision: Precision = "auto",
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Fit:
    """Train a denoiser on random crops of images, and leave it frozen at its best validated state.

    Noise levels are drawn from those that the denoiser was made for. Long gradients are shortened, but of proximal
    denoisers: these are brought back to their constraint after every step, unless there is a ``penalty``, and always at
    the end and where they are validated.

    Args:
        denoiser: The denoiser to train.
        images: Training images, each (1, channels, height, width); sizes may differ.
        validation: Images to validate on; without them the lowest ``holdout`` of each training image is held out.
        holdout: Held-out fraction of each training image, in (0, 0.5], when there is no validation image.
        crop: Side length of the crops.
        dihedral: Turn and mirror the crops at random.
        batch: Crops per step.
        steps: Training steps.
        lr: Peak learning rate of Adam.
        schedule: ``"cosine"`` decay after the warm-up, or ``"constant"``.
        warmup: Steps of linear warm-up.
        average: Decay of the moving average of the weights; 0 for none.
        spread: How noise levels are drawn: ``"uniform"`` as published, or ``"log-uniform"`` where they span orders of
            magnitude.
        penalty: Weight of the Parseval penalty of a proximal denoiser during the training (published is 1e4 for sums
            over pixels, at steps of 1e-5), in place of the projection after every step.
        patience: Stop early after this many validations without improvement.
        seconds: Time limit; the schedule ends with it.
        precision: Precision of the network during training; with a penalty it is float32.
        checkpoint: File for the training state.
        resume: Continue from ``checkpoint``.
        progress: Show a progress line.

    Returns:
        The record of the run; its validation values are minus the mean PSNR in decibels, over three of the levels.

    Raises:
        InputError: If images and denoiser do not fit together, or a number is out of range.
    """
    for image in (*images, *validation):
        denoiser.check(image)
    common_channels(images)
    if crop < 8 or batch < 1 or steps < 1:
        raise InputError(
            f"Got crops of {crop} x {crop}, {batch} of them in each of {steps} steps; use at least 8 pixels and one of "
            "each."
        )
    loss = DenoisingLoss(denoiser, penalty=penalty)
    if not validation:
        images, validation = hold_out(images, holdout, crop)
    sampler = PatchSampler(images, crop, batch, dihedral=dihedral)
    low, high = denoiser.levels
    if spread == "log-uniform" and not low > 0:
        raise InputError(
            f"The smallest noise level is {low} but must be positive where levels are log-uniform, such as 0.003."
        )

    def draw() -> tuple[Tensor, Tensor]:
        x = sampler().view(batch, sampler.channels, crop, crop)
        return x, _level(torch.rand(batch).to(x), low, high, spread)

    network = denoiser.network if isinstance(denoiser, ProximalDenoiser) else None
    if network is not None and penalty:
        precision = (
            "float32"  # eight bits say little about how far the filters are from the constraint
        )
    noisy = _validation_pairs(validation, denoiser.levels, spread)

    def validate() -> float:
        if network is not None:
            network.finish_(20)
        return _minus_psnr(denoiser, noisy)

    run = partial(
        fit,
        loss,
        draw if network is None or penalty else Constrained(draw, network),
        steps=steps,
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        average=average,
        clip=_CLIP if network is None else None,
        validate=validate,
        validate_every=min(500, max(25, steps // 40)),
        patience=patience,
        budget=seconds,
        precision=precision,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )
    try:
        return run()
    finally:
        # Whatever ended the run: what is kept is on the constraint.
        if network is not None:
            network.finish_()


def _level(share: Tensor, low: float, high: float, spread: Spread) -> Tensor:
    """The noise level below which a share of all levels lies."""
    return low * (high / low) ** share if spread == "log-uniform" else low + (high - low) * share


def _validation_pairs(
    images: Sequence[Tensor], levels: tuple[float, float], spread: Spread
) -> list[tuple[Tensor, Tensor, float]]:
    """Clean crops from the middle of images, their noisy ones and the noise level, the same whatever the seed."""
    generator = torch.Generator().manual_seed(0)
    chosen = [levels[1]]
    if levels[0] < levels[1]:
        # The middles of as many parts of the range.
        middles = (torch.arange(_VALIDATION_LEVELS) + 0.5) / _VALIDATION_LEVELS
        chosen = _level(middles, *levels, spread).tolist()
    pairs = []
    for image in images[:: max(1, math.ceil(len(images) / _VALIDATION_CROPS))]:
        height, width = image.shape[-2:]
        rows, columns = min(height, _VALIDATION_SIDE), min(width, _VALIDATION_SIDE)
        top, left = (height - rows) // 2, (width - columns) // 2
        x = image[:, :, top : top + rows, left : left + columns]
        for level in chosen:
            noise = torch.randn(x.shape, generator=generator).to(x)
            pairs.append((x, x + level * noise, level))
    return pairs


def _minus_psnr(denoiser: Denoiser, pairs: Sequence[tuple[Tensor, Tensor, float]]) -> float:
    errors = [
        float((denoiser(noisy, level) - x).square().mean().clamp_min(1e-12))
        for x, noisy, level in pairs
    ]
    return 10 * sum(math.log10(error) for error in errors) / len(errors)
