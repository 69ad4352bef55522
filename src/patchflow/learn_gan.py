"""Learn a generator of patches and its critic from one to six images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchflow.errors import InputError
from patchflow.fit import Fit
from patchflow.learn_critic import blur_and_noise, learn_critic
from patchflow.priors.patch import PatchPrior
from patchflow.priors.patch_gan import PatchGAN

# Steps of the critic for one of the generator, as published for networks with a gradient penalty.
_CRITIC_STEPS = 5


def learn_gan(
    prior: PatchPrior,
    images: Sequence[Tensor],
    *,
    spoilt: float | int = 0.0,
    penalty: float | int = 10.0,
    dihedral: bool = False,
    batch: int = 64,
    steps: int = 10_000,
    lr: float = 1e-3,
    seconds: float | None = None,
    progress: bool = False,
) -> Fit:
    r"""Train the generator and the critic of ``prior`` against each other, and leave both frozen.

    Both go on with Adam at a constant rate, the generator at each fifth step of the critic.

    Args:
        prior: The prior, with a :class:`patchflow.priors.patch_gan.PatchGAN`.
        images: Training images, each (1, channels, height, width); sizes may differ.
        spoilt: Share of the negatives that are not generated but patches of the images, spoilt by
            :func:`patchflow.learn_critic.blur_and_noise`.
        penalty: The weight of the gradient penalty.
        dihedral: Turn and mirror the patches at random; for images without a preferred direction.
        batch: Pairs of patches per step.
        steps: Steps of the critic.
        lr: Adam's rate.
        seconds: Time limit.
        progress: Show a progress line.

    Returns:
        The record of the critic's run; its losses are minus the estimated Wasserstein-1 distance of the images'
        patches and the negatives, in pixel values.

    Raises:
        InputError: If the prior is none of :func:`patchflow.models.patch_gan`, images and prior do not fit together,
            or a setting is out of range.
        NumericalError: If the loss is not finite.
    """
    gan = prior.patch_energy
    if not isinstance(gan, PatchGAN):
        raise InputError(
            f"The prior has a {type(gan).__name__} and no generator; make one with patchflow.models.patch_gan."
        )
    if not 0 <= spoilt < 1:
        raise InputError(
            f"The share of spoilt patches is {spoilt} but must be in [0, 1); with spoilt ones alone use learn_critic."
        )
    weights = [p for p in gan.generator.parameters() if p.requires_grad]
    if not weights:
        raise InputError(
            "The generator has no trainable parameters; call requires_grad_(True) to train it again."
        )
    optimizer = torch.optim.Adam(weights, lr=lr, betas=(0.5, 0.999))
    step = 0

    def negatives(patches: Tensor) -> Tensor:
        nonlocal step
        step += 1
        if step % _CRITIC_STEPS == 0:
            value = gan(gan.generate(len(patches))).mean()
            for weight, slope in zip(weights, torch.autograd.grad(value, weights), strict=True):
                weight.grad = slope
            optimizer.step()
        with torch.no_grad():
            forged = gan.generate(len(patches)).view_as(patches).to(patches)
            kept = round(spoilt * len(patches))
            return torch.cat((blur_and_noise(patches[:kept]), forged[kept:])) if kept else forged

    record = learn_critic(
        PatchPrior(gan.critic, prior.size, prior.channels),
        images,
        perturb=negatives,
        penalty=penalty,
        dihedral=dihedral,
        batch=batch,
        steps=steps,
        lr=lr,
        schedule="constant",
        seconds=seconds,
        progress=progress,
    )
    prior.requires_grad_(False)
    return record
