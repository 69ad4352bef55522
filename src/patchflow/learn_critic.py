"""Learn the critic of an adversarial regulariser from one to six images and a way to spoil them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from patchflow.errors import InputError, NumericalError
from patchflow.fit import Fit
from patchflow.numerics.patches import PatchSampler, common_channels
from patchflow.priors.adversarial import adversarial_loss
from patchflow.priors.patch import PatchPrior
from patchflow.problems.blur import gaussian_kernel
from patchflow.progress import progress_line

# How often the loss is recorded and the progress line renewed, as in `fit`.
_REPORT_EVERY = 50

Patches = Float[Tensor, "batch channels size size"]


def noise(patches: Patches, *, low: float = 0.05, high: float = 0.3) -> Patches:
    """The degradation of the original: white noise, each patch with a random level between ``low`` and ``high``."""
    levels = low + (high - low) * torch.rand(len(patches), 1, 1, 1).to(patches)
    return patches + levels * torch.randn_like(patches)


def blur_and_noise(patches: Patches) -> Patches:
    """The one of the patch group: a 5 x 5 Gaussian blur of std U(.001, .3), one per batch, and noise of U(0, .2)."""
    std = 0.001 + 0.299 * float(torch.rand(()))
    kernel = gaussian_kernel(5, std).to(patches)
    flat = functional.pad(patches.flatten(0, 1)[:, None], [2] * 4, mode="reflect")
    return noise(functional.conv2d(flat, kernel[None, None]).view_as(patches), low=0.0, high=0.2)


def learn_critic(
    prior: PatchPrior,
    images: Sequence[Tensor],
    *,
    degrade: Callable[[Tensor], Tensor] | None = None,
    perturb: Callable[[Tensor], Tensor] | None = None,
    penalty: float | int = 10.0,
    dihedral: bool = False,
    batch: int = 64,
    steps: int = 10_000,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.5, 0.999),
    schedule: str = "cosine",
    seconds: float | None = None,
    progress: bool = False,
) -> Fit:
    r"""Train the critic of ``prior`` to be low on clean and high on degraded patches, and leave it frozen.

    Degraded patches come from images, degraded once, or are made of each batch of clean ones, or both, one after the
    other; without either by :func:`blur_and_noise`, as published. Regularisers for one operator learn from its
    reconstructions without a prior: ``degrade=lambda x: operator.initial(likelihood.simulate(x))``; give an image
    several times for several draws of its noise. Where these are smooth, as in super-resolution, a critic that has
    seen nothing rougher than clean patches goes on falling in oscillations: add noise with ``perturb``.

    Args:
        prior: The prior, with a :class:`patchflow.priors.adversarial.PatchCritic`.
        images: Training images, each (1, channels, height, width); sizes may differ.
        degrade: Makes a degraded image of the same shape of an image.
        perturb: Makes degraded patches of patches (batch, channels, size, size), at each step anew.
        penalty: The weight of the gradient penalty; 10 in the patch group's form, 5 in the original.
        dihedral: Turn and mirror the patches at random; for images without a preferred direction.
        batch: Pairs of patches per step.
        steps: Training steps.
        lr: Peak learning rate of Adam.
        betas: Adam's decays.
        schedule: ``"cosine"`` decay to zero, or ``"constant"``.
        seconds: Time limit; the schedule ends with it.
        progress: Show a progress line.

    Returns:
        The record of the run; its losses are minus the estimated Wasserstein-1 distance, in pixel values, without the
        penalty. Interrupting (Ctrl-C) keeps the critic so far.

    Raises:
        InputError: If images, degradation and prior do not fit together, nothing is left to train, or a setting is
            out of range.
        NumericalError: If the loss is not finite.
    """
    _check(prior, images, penalty, batch, steps, lr, schedule, seconds)
    if degrade is None and perturb is None:
        perturb = blur_and_noise
    sampler = PatchSampler(_pairs(images, degrade), prior.size, batch, dihedral=dihedral)
    parameters = [p for p in prior.patch_energy.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True)
    device = parameters[0].device
    losses: list[float] = []
    block: list[float] = []
    step, stopped, started = 0, "finished", time.perf_counter()
    bar = progress_line(total=steps, shown=progress)
    try:
        for step in range(1, steps + 1):
            elapsed = time.perf_counter() - started
            done = max((step - 1) / steps, elapsed / seconds if seconds else 0.0)
            if done >= 1:
                step, stopped = step - 1, "budget"
                break
            if schedule == "cosine":
                optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * done))
            clean, degraded = sampler().to(device).view(batch, 2, -1).unbind(1)
            if perturb is not None:
                shape = (batch, prior.channels, prior.size, prior.size)
                degraded = perturb(degraded.view(shape)).flatten(1)
            loss, distance = adversarial_loss(prior.patch_energy, clean, degraded, penalty=penalty)
            if not math.isfinite(loss.item()):
                raise NumericalError(
                    f"The training loss is {loss.item()} at step {step}; use a smaller lr than {lr:g}, "
                    "or check the images and their degradation."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            block.append(-distance.item())
            if step % _REPORT_EVERY == 0 or step == steps:
                losses.append(sum(block) / len(block))
                block.clear()
                bar.update(step - bar.n)
                bar.set_postfix(distance=f"{-losses[-1]:.4f}", refresh=False)
    except KeyboardInterrupt:
        step, stopped = step - 1, "interrupted"
    finally:
        bar.close()
        prior.requires_grad_(False)
    return Fit(step, losses, [], math.nan, time.perf_counter() - started, stopped)


def _pairs(images: Sequence[Tensor], degrade: Callable[[Tensor], Tensor] | None) -> list[Tensor]:
    """Each image with its degraded one as further channels, so that patches are drawn in pairs."""
    pairs = []
    for image in images:
        degraded = image if degrade is None else degrade(image).detach()
        if degraded.shape != image.shape:
            raise InputError(
                f"The degraded image is {tuple(degraded.shape)} but the image is {tuple(image.shape)}; let degrade "
                "return a reconstruction of the same size, such as operator.initial(y)."
            )
        if not bool(degraded.isfinite().all()):
            raise InputError("The degraded image has values that are not finite; check degrade.")
        pairs.append(torch.cat([image, degraded.to(image)], 1))
    return pairs


def _check(
    prior: PatchPrior,
    images: Sequence[Tensor],
    penalty: float | int,
    batch: int,
    steps: int,
    lr: float,
    schedule: str,
    seconds: float | None,
) -> None:
    channels = common_channels(images)
    if channels != prior.channels:
        raise InputError(
            f"The images have {channels} channels but the model was made for {prior.channels}; "
            "convert the images, or set the number of channels of the model."
        )
    if not any(p.requires_grad for p in prior.patch_energy.parameters()):
        raise InputError(
            "The critic has no trainable parameters; call requires_grad_(True) on it to train it again."
        )
    if not (penalty > 0 and lr > 0):
        raise InputError(f"The penalty is {penalty} and lr {lr}; both must be positive.")
    if batch < 1 or steps < 1:
        raise InputError(f"Got a batch of {batch} and {steps} steps; both must be at least 1.")
    if seconds is not None and not seconds > 0:
        raise InputError(
            f"The time limit is {seconds} s but must be positive; leave it out for none."
        )
    if schedule not in ("cosine", "constant"):
        raise InputError(f"The schedule is {schedule!r}; use 'cosine' or 'constant'.")
