"""Learn a patch prior from one to six images: what to fit on, what to validate on, and a recipe that works."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from patchflow.chains.autoencoder import Autoencoder
from patchflow.errors import InputError
from patchflow.fit import Fit, fit
from patchflow.numerics.patches import PatchSampler, extract_patches, hold_out
from patchflow.numerics.precision import Precision
from patchflow.priors.patch import PatchPrior

# Fixed patches on which training is validated.
VALIDATION_PATCHES = 8192


def learn_patches(
    prior: PatchPrior,
    images: Sequence[Tensor],
    validation: Sequence[Tensor] = (),
    *,
    holdout: float = 0.1,
    dihedral: bool = False,
    noise: float | int = 0.0,
    batch: int = 512,
    steps: int = 10_000,
    lr: float = 2e-3,
    schedule: Literal["cosine", "constant"] = "cosine",
    warmup: int = 200,
    average: float = 0.999,
    patience: int | None = None,
    seconds: float | None = None,
    precision: Precision = "auto",
    preset: Literal["default", "paper"] = "default",
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Fit:
    r"""Fit the patch energy of ``prior`` to all patches of the images, and leave it frozen at its best validated state.

    A prior with ``smoothing`` sees each patch with fresh noise of that standard deviation; of less, if the images are
    noisy themselves. A variational autoencoder learns by random draws and is validated without them.

    Args:
        prior: The prior to train.
        images: Training images, each (1, channels, height, width); sizes may differ.
        validation: Images to validate on; without them the lowest ``holdout`` of each training image is held out.
        holdout: Held-out fraction of each training image, in (0, 0.5], when there is no validation image.
        dihedral: Turn and mirror the patches at random; for images without a preferred direction.
        noise: Standard deviation of the noise that the images carry already. It counts towards the smoothing.
        batch: Patches per step.
        steps: Training steps.
        lr: Peak learning rate of Adam.
        schedule: ``"cosine"`` decay after the warm-up, or ``"constant"``.
        warmup: Steps of linear warm-up.
        average: Decay of the moving average of the weights; 0 for none.
        patience: Stop early after this many validations (every 100 to 250 steps) without improvement.
        seconds: Time limit; the schedule ends with it.
        precision: Precision of the networks during training; autoencoders always learn in float32.
        preset: ``"paper"`` is the published procedure: 750,000 steps of 32 patches at a constant rate of 1e-4,
            in float32. It overrides ``batch``, ``steps``, ``lr``, ``schedule``, ``warmup``, ``average`` and
            ``precision``.
        checkpoint: File for the training state.
        resume: Continue from ``checkpoint``.
        progress: Show a progress line.

    Returns:
        The record of the run.

    Raises:
        InputError: If images and prior do not fit together, ``holdout`` leaves no patch, or the images have more noise
            than the smoothing.
    """
    if preset == "paper":
        batch, steps, lr, schedule, warmup = 32, 750_000, 1e-4, "constant", 1
        average, precision = 0.0, "float32"
    for image in (*images, *validation):
        if image.shape[1] != prior.channels:
            raise InputError(
                f"An image has {image.shape[1]} channels but the model was made for {prior.channels}; "
                "convert the image, or set the number of channels of the model."
            )
    if noise and not 0 < noise <= prior.smoothing:
        raise InputError(
            f"The images carry noise of {noise} but the smoothing of the prior is {prior.smoothing}; give a noise of 0 "
            "or more, and make the prior with a smoothing at least as large."
        )
    added = math.sqrt(prior.smoothing**2 - noise**2)
    if not validation:
        images, validation = hold_out(images, holdout, prior.size)
    sampler = PatchSampler(images, prior.size, batch, dihedral=dihedral, noise=added)
    patches = validation_patches(validation, prior.size, noise=added)
    energy = prior.patch_energy
    return fit(
        energy.sampled() if isinstance(energy, Autoencoder) else energy,
        sampler,
        steps=steps,
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        average=average,
        validate=lambda: energy(patches).mean().item(),
        validate_every=min(250, max(100, steps // 40)),
        patience=patience,
        budget=seconds,
        precision="float32" if isinstance(energy, Autoencoder) else precision,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )


def validation_patches(images: Sequence[Tensor], size: int, *, noise: float | int = 0.0) -> Tensor:
    """The fixed 8,192 patches (or all, if fewer) of images on which training is validated, whatever the seed.

    Args:
        images: The images.
        size: Side length of a patch.
        noise: Standard deviation of the (fixed) noise on them.
    """
    patches = torch.cat([extract_patches(image[0], size) for image in images])
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(patches), generator=generator)
    patches = patches[order[:VALIDATION_PATCHES]]
    return patches + noise * torch.randn(patches.shape, generator=generator).to(patches)
