r"""A single pass that learns what the mean over turns and reflections knows.

The mean of a network over the eight turns of an image is better than the network, and takes eight times as long. So the
network is trained on, from a copy :math:`\bar G` of itself that is that mean, by

.. math:: E(y) = \frac1n \|G(y; A) - \bar G(y; A)\|^2, \qquad
          \bar G(y; A) = \frac18 \sum_g g^{-1} G_0(g y; A),

on measurements of windows that are turned by any angle and scaled: images that it has not learned by heart.

References:
    Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015, https://arxiv.org/abs/1503.02531
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from patchflow.errors import InputError
from patchflow.fit import Fit, fit
from patchflow.image_models import SingleImage
from patchflow.learn_single_image import (
    Problem,
    ReconstructionLoss,
    minus_psnr,
    validation_pairs,
)
from patchflow.numerics.precision import Precision, autocast
from patchflow.numerics.windows import FreeWindowSampler
from patchflow.problems.operator import LinearOperator, Shape
from patchflow.reconstruct import single_image


def distil_turns(
    model: SingleImage,
    images: Sequence[Tensor],
    validation: Sequence[Tensor],
    *,
    problem: Problem,
    window: Shape = (128, 128),
    batch: int = 4,
    steps: int = 20_000,
    lr: float = 3e-4,
    average: float = 0.998,
    seconds: float | None = None,
    precision: Precision = "auto",
    progress: bool = False,
) -> Fit:
    """Train a reconstructor on, until a single pass is nearly as good as the mean over the turns.

    Args:
        model: A reconstructor that :func:`patchflow.learn_single_image` has trained; changed in place, and left frozen
            at its best validated state.
        images: The training images, each (1, channels, height, width).
        validation: Images to validate a single pass on.
        problem: The law of the measurement for a height and a width.
        window: Height and width of the windows.
        batch: Windows per step.
        steps: Training steps.
        lr: Peak learning rate of Adam.
        average: Decay of the moving average of the weights; 0 for none.
        seconds: Time limit; the schedule ends with it.
        precision: Precision of the networks during training.
        progress: Show a progress line.

    Returns:
        The record of the run; its validation values are minus the mean PSNR of a single pass in decibels.

    Raises:
        InputError: If the reconstructor is for another measurement or other channels, or for images with a preferred
            direction, or its operator commutes with no turn.
    """
    likelihood = problem(window)
    model.check_measurement(likelihood)
    operator = likelihood.operator
    assert isinstance(operator, LinearOperator)
    turns = single_image.commuting(operator) if model.dihedral else ()
    if not turns:
        why = "operator commutes with" if model.dihedral else "reconstructor was trained for"
        raise InputError(
            f"The {why} no turn or reflection, so that there is no mean over them to learn from; use it as it is."
        )
    for image in images:
        model.check(image)
    teacher = copy.deepcopy(model).requires_grad_(False)
    loss = ReconstructionLoss(model.requires_grad_(True), operator)
    known = validation_pairs(validation, window, likelihood)
    sampler = FreeWindowSampler(images, window, batch)

    @torch.no_grad()
    def draw() -> tuple[Tensor, Tensor]:
        y = likelihood.simulate(sampler())
        with autocast(y, precision):
            return single_image.mean_over_turns(teacher, y, operator, turns), y

    return fit(
        loss,
        draw,
        steps=steps,
        lr=lr,
        average=average,
        validate=lambda: minus_psnr(loss, known),
        validate_every=min(250, max(25, steps // 40)),
        budget=seconds,
        precision=precision,
        progress=progress,
    )
