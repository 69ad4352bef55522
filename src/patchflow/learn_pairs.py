r"""Learn a network from pairs: what it is given, and what it should make of that.

The training loss is an energy of the network's parameters, the mean squared error over the :math:`n` wanted values,

.. math:: E(x \mid z) = \frac1n \|G(z) - x\|^2.

Pairs are made of random crops of the training images, anew in each step: a function maps clean crops :math:`x` to what
is wanted and what is given. For super-resolution that is :class:`patchflow.problems.resolution.LowResolution`; for a
network that corrects a start image it is ``lambda x: (x, operator.initial(likelihood.simulate(x)))``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.fit import Fit, fit
from patchflow.numerics.patches import PatchSampler, common_channels, hold_out
from patchflow.numerics.precision import Precision
from patchflow.problems.resolution import LowResolution
from patchflow.resolution_models import SuperResolver

# Clean images to what is wanted of a network, and what it is given.
MakePairs = Callable[[Tensor], tuple[Tensor, Tensor]]
# Of each validation image a part of at most so many pixels along a side.
_VALIDATION_SIDE = 204
# The weights see each pixel of a crop less than once a step: the moving average goes over many steps.
LR, AVERAGE = 1e-3, 0.99


class PairLoss(Energy):
    """The mean squared error of a network; see the module's formula.

    Args:
        network: The network :math:`G`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate for what is wanted, ``x``, given ``condition``; see :meth:`Energy.forward`.

        Raises:
            InputError: If the network gives another shape.
        """
        found = self.network(condition).to(x.dtype)
        if found.shape != x.shape:
            raise InputError(
                f"The network makes {tuple(found.shape)} of what it is given but {tuple(x.shape)} is wanted; let the "
                "pairs and the network fit together."
            )
        return (found - x).square().flatten(1).mean(1)


def learn_pairs(
    network: nn.Module,
    images: Sequence[Tensor],
    validation: Sequence[Tensor] = (),
    *,
    pairs: MakePairs,
    holdout: float = 0.1,
    crop: int = 64,
    dihedral: bool = True,
    batch: int = 8,
    steps: int = 20_000,
    lr: float = LR,
    schedule: Literal["cosine", "constant"] = "cosine",
    warmup: int = 100,
    average: float = AVERAGE,
    patience: int | None = None,
    seconds: float | None = None,
    precision: Precision = "auto",
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Fit:
    """Train a network on pairs made of random crops, and leave it frozen at its best validated state.

    Args:
        network: The network, trained in place.
        images: Training images, each (1, channels, height, width); sizes may differ.
        validation: Images to validate on; without them the lowest ``holdout`` of each training image is held out.
        pairs: Makes of clean crops (batch, channels, height, width) what is wanted and what is given, with fresh noise
            at each call; it is called on crops of several sizes.
        holdout: Held-out fraction of each training image, in (0, 0.5], when there is no validation image.
        crop: Side length of the crops that pairs are made of.
        dihedral: Turn and mirror the crops at random; it must not turn what ``pairs`` does.
        batch: Crops per step.
        steps: Training steps.
        lr: Peak learning rate of Adam.
        schedule: ``"cosine"`` decay after the warm-up, or ``"constant"``.
        warmup: Steps of linear warm-up.
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
        InputError: If images differ in channels or are smaller than a crop, the network gives another shape than
            wanted or was made for another blur, or a number is out of range.
        NumericalError: If the loss is not finite; the best state so far is kept.
    """
    if common_channels([*images, *validation]) < 1 or crop < 1 or batch < 1 or steps < 1:
        raise InputError(
            f"Got crops of {crop} x {crop}, {batch} of them in each of {steps} steps; use at least one of each."
        )
    if isinstance(network, SuperResolver) and isinstance(pairs, LowResolution):
        network.check_kernel(pairs.kernel)
    if not validation:
        images, validation = hold_out(images, holdout, crop)
    sampler = PatchSampler(images, crop, batch, dihedral=dihedral)
    loss = PairLoss(network)
    known = validation_pairs(validation, pairs)
    with torch.no_grad():
        loss(*(part[:1] for part in known[0]))  # what does not fit together is told at once

    def draw() -> tuple[Tensor, Tensor]:
        return pairs(sampler().view(batch, sampler.channels, crop, crop))

    return fit(
        loss,
        draw,
        steps=steps,
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        average=average,
        validate=lambda: minus_psnr(loss, known),
        validate_every=min(500, max(25, steps // 40)),
        patience=patience,
        budget=seconds,
        precision=precision,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )


def minus_psnr(loss: PairLoss, known: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Minus the mean PSNR in decibels over pairs of what is wanted and what is given."""
    errors = [float(loss(wanted, given).mean().clamp_min(1e-12)) for wanted, given in known]
    return 10 * sum(math.log10(error) for error in errors) / len(errors)


def validation_pairs(images: Sequence[Tensor], pairs: MakePairs) -> list[tuple[Tensor, Tensor]]:
    """Pairs from the middle of images, the same whatever the seed."""
    known = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for image in images:
            height, width = image.shape[-2:]
            rows, columns = min(height, _VALIDATION_SIDE), min(width, _VALIDATION_SIDE)
            top, left = (height - rows) // 2, (width - columns) // 2
            known.append(pairs(image[:, :, top : top + rows, left : left + columns]))
    return known
