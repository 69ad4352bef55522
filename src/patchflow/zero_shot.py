r"""Zero-shot super-resolution with patchNR: the prior is learned from the low-resolution image itself.

Patches look alike across the scales of an image. So a flow that is learned from the patches of the measurement
:math:`y` is a prior for the patches of the larger image :math:`x`:

.. math:: \hat x \in \arg\min_x \; \frac{1}{2\sigma^2}\|A x - y\|^2
          + w\,\frac{1}{p^2} \sum_i E_{\hat\theta}(P_i x), \qquad
          \hat\theta \in \arg\min_\theta \sum_j E_\theta(g_j P_j y + \xi_j)

with random turns and reflections :math:`g_j` of the patches. The published code turns the axes of batch and channels,
which does nothing; here it works. The measurement is noisy, and so are the patches that the flow learns: it knows the
law of noisy patches. The noise counts as (a part of) the smoothing, which Tweedie's formula takes away again, see
:meth:`patchflow.priors.patch.PatchPrior.denoise`.

References:
    Altekrueger, Denker, Hagemann, Hertrich, Maass, Steidl, "PatchNR: learning from very few images by patch normalizing
    flow regularization", Inverse Problems 39(6), 2023, https://arxiv.org/abs/2205.12021
    Glasner, Bagon, Irani, "Super-resolution from a single image", ICCV 2009
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.fit import Fit
from patchflow.learn import learn_patches
from patchflow.models import patch_nr
from patchflow.numerics.patches import grid_shape
from patchflow.priors.patch import PatchPrior
from patchflow.problems.blur import Blur
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.resolution import check_low_resolution, low_resolution
from patchflow.reconstruct import variational
from patchflow.solution import Solution
from patchflow.solve import minimize

Preset = Literal["default", "paper"]
Callback = Callable[[int, Tensor, float], Mapping[str, str] | None]

# For two minutes of learning. Tried on a photograph that no table reports (test_321 of bsd_train400, 180 x 180 pixels,
# seed 0; gain over aligned bicubic interpolation in dB, SSIM); total variation gains 1.76 dB there:
#   width 128, 1,000 steps of 256 patches, 150 of Adam: 2.13, .818; without turns 2.08, .819; smoothing .02 2.12, .817
#   width 256, 1,200 steps of 256 patches, 300 of Adam: weight .15: 2.30, .823; weight .3: 2.29, .819
# Width 256 takes twice the time. A smoothing below .01 would meet the steps of eight bits.
SIZE, HIDDEN, SMOOTHING, SECONDS, BATCH, WEIGHT, STEPS = 6, 128, 0.01, 120.0, 256, 0.2, 300

# Of the authors' script: 10,000 steps of 128 patches at a rate of 1e-4; then 60 of Adam at 0.01 with 80,000 random
# patches each. Their lambda multiplies the mean over patches, beside a sum over pixels that is not halved.
PUBLISHED_TRAINING_STEPS, PUBLISHED_BATCH, PUBLISHED_TRAINING_LR = 10_000, 128, 1e-4
PUBLISHED_STEPS, PUBLISHED_LR, PUBLISHED_PATCHES, PUBLISHED_LAMBDA = 60, 0.01, 80_000, 0.25


class ZeroShot(NamedTuple):
    """A super-resolved image, and how it came about.

    Attributes:
        solution: The image, with the energies along the way.
        prior: The patch prior that was learned from the measurement.
        training: The record of its training.
        weight: The weight of the prior.
    """

    solution: Solution
    prior: PatchPrior
    training: Fit
    weight: float | int


def super_resolve(
    y: Float[Tensor, "batch channels height width"],
    scale: int = 2,
    *,
    noise: float | int = 0.01,
    kernel_size: int = 16,
    std: float | int | None = None,
    boundary: Literal["circular", "valid"] = "valid",
    weight: float | int | None = None,
    seconds: float | int | None = None,
    preset: Preset = "default",
    progress: bool = False,
) -> Tensor:
    """Super-resolve an image from nothing but itself.

    Args:
        y: The low-resolution image in [0, 1], grey or colour, of batch size one.
        scale: Image pixels per measured pixel.
        noise: Standard deviation of its noise.
        kernel_size: Side length of the blur kernel in image pixels.
        std: Standard deviation of the Gaussian blur in image pixels; half the scale by default.
        boundary: See :func:`patchflow.problems.resolution.low_resolution`.
        weight: See :func:`reconstruct`, as the rest.
        seconds: Time limit of learning.
        preset: ``"paper"`` for the published procedure.
        progress: Show progress lines.

    Returns:
        The image.

    Raises:
        InputError: If the image and a number do not fit together; see :func:`reconstruct`.
    """
    likelihood = low_resolution(
        (y.shape[2], y.shape[3]),
        scale,
        noise=noise,
        kernel_size=kernel_size,
        std=std,
        boundary=boundary,
    )
    return reconstruct(
        likelihood, y, weight=weight, seconds=seconds, preset=preset, progress=progress
    ).solution.x


def reconstruct(
    likelihood: GaussianLikelihood,
    y: Float[Tensor, "batch channels height width"],
    *,
    weight: float | int | None = None,
    seconds: float | int | None = None,
    training_steps: int | None = None,
    steps: int | None = None,
    preset: Preset = "default",
    callback: Callback | None = None,
    progress: bool = False,
) -> ZeroShot:
    r"""Learn a patchNR from a low-resolution image and super-resolve it.

    Args:
        likelihood: The operator, a :class:`patchflow.problems.blur.Blur` with a stride, and the noise.
        y: The measurement, of batch size one; a colour patch is one vector.
        weight: The weight :math:`w`, by default :data:`WEIGHT`, or that of the paper's :math:`\lambda` = 0.25.
        seconds: Time limit of learning, by default :data:`SECONDS` if the steps are not given.
        training_steps: Steps of learning, by default as many as fit into the time; the paper's preset has 10,000.
        steps: Steps of the reconstruction, by default :data:`STEPS`; the paper's preset has 60.
        preset: ``"paper"`` is the published network and procedure, in which the augmentation does nothing.
        callback: See :func:`patchflow.solve.minimize`.
        progress: Show progress lines.

    Returns:
        The image with the prior. Interrupted (Ctrl-C), what there was.

    Raises:
        InputError: If the operator does not lower the resolution, the measurement has another shape, is not finite or
            smaller than a patch, the weight is negative, or there is no step.
    """
    operator = check_low_resolution(likelihood, y)
    steps = STEPS if steps is None else steps
    if steps < 1 or (weight is not None and not 0 <= weight < math.inf):
        raise InputError(
            f"Got weight {weight} and {steps} steps; the weight must be 0 or more (default {WEIGHT}), the steps at "
            "least 1."
        )
    prior, training = learn(
        y, likelihood.std, seconds=seconds, steps=training_steps, preset=preset, progress=progress
    )
    if preset == "paper":
        weight = published_weight(likelihood, prior) if weight is None else weight
        solution = _as_published(likelihood, operator, prior, y, weight, callback, progress)
        return ZeroShot(solution, prior, training, weight)
    weight = WEIGHT if weight is None else weight
    solution = variational.reconstruct(
        likelihood,
        prior,
        y,
        operator.initial(y),
        weight=weight,
        steps=steps,
        callback=callback,
        progress=progress,
    )
    return ZeroShot(solution, prior, training, weight)


def learn(
    y: Float[Tensor, "batch channels height width"],
    noise: float | int,
    *,
    seconds: float | int | None = None,
    steps: int | None = None,
    preset: Preset = "default",
    progress: bool = False,
) -> tuple[PatchPrior, Fit]:
    """Learn a patchNR from all patches of one noisy image.

    Nothing is held out: of so few patches all are needed, and two minutes are too short to learn them by heart.

    Args:
        y: The image.
        noise: The standard deviation of its noise.
        seconds: Time limit, by default :data:`SECONDS` if the steps are not given.
        steps: Number of steps, by default as many as fit into the time; the paper's preset has 10,000.
        preset: ``"paper"`` is the published network and training.
        progress: Show a progress line.

    Raises:
        InputError: If the image is smaller than a patch.
    """
    channels = y.shape[1]
    grid_shape((y.shape[2], y.shape[3]), SIZE)
    if preset == "paper":
        prior = patch_nr(channels=channels, preset="paper").to(y)
        training = learn_patches(
            prior,
            [y],
            [y],
            batch=PUBLISHED_BATCH,
            steps=PUBLISHED_TRAINING_STEPS if steps is None else steps,
            lr=PUBLISHED_TRAINING_LR,
            schedule="constant",
            warmup=1,
            average=0.0,
            seconds=seconds,
            precision="float32",
            progress=progress,
        )
        return prior, training
    smoothing = max(SMOOTHING, noise)
    prior = patch_nr(size=SIZE, channels=channels, hidden=HIDDEN, smoothing=smoothing).to(y)
    training = learn_patches(
        prior,
        [y],
        [y],
        dihedral=True,
        noise=noise,
        batch=BATCH,
        steps=10**6 if steps is None else steps,
        seconds=SECONDS if seconds is None and steps is None else seconds,
        progress=progress,
    )
    return prior, training


def published_weight(likelihood: GaussianLikelihood, prior: PatchPrior) -> float:
    r"""The library's weight of the paper's :math:`\lambda` = 0.25: :math:`\frac{\lambda}{2\sigma^2} \frac{p^2}{N}`."""
    rows, columns = grid_shape(likelihood.operator.domain_shape, prior.size)
    return PUBLISHED_LAMBDA / (2 * likelihood.std**2) * prior.size**2 / (rows * columns)


class _Framed(Energy):
    """An energy of images whose frame is the reflected inside; only the inside is free."""

    def __init__(self, energy: Energy, frame: list[int]) -> None:
        super().__init__()
        self.energy, self.frame = energy, frame

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Float[Tensor, " batch"]:
        """Of the inside; see :meth:`Energy.forward`."""
        return self.energy(functional.pad(x, self.frame, mode="reflect"), condition)


def _as_published(
    likelihood: GaussianLikelihood,
    operator: Blur,
    prior: PatchPrior,
    y: Tensor,
    weight: float | int,
    callback: Callback | None,
    progress: bool,
) -> Solution:
    """Minimise over the pixels between the measured ones; those outside of them are their reflection."""
    start = operator.initial(y)
    (top, bottom), (left, right) = operator.covered
    frame = [left, start.shape[3] - right, top, start.shape[2] - bottom]
    energy = likelihood + weight * prior.random(PUBLISHED_PATCHES)

    def follow(step: int, x: Tensor, value: float) -> Mapping[str, str] | None:
        whole = functional.pad(x, frame, mode="reflect")
        return None if callback is None else callback(step, whole, value)

    solution = minimize(
        _Framed(energy, frame),
        start[:, :, top:bottom, left:right],
        y,
        steps=PUBLISHED_STEPS,
        lr=PUBLISHED_LR,
        schedule="constant",
        callback=follow,
        progress=progress,
    )
    return solution._replace(x=functional.pad(solution.x, frame, mode="reflect"))
