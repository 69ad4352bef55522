r"""Learn a reconstructor from one to six images and a known measurement: pairs are simulated anew in each step.

Windows of the training images are turned, mirrored, some of them scaled, measured at a random phase of the operator's
grid with fresh noise, and the network is to bring them back. The training loss is an energy of its parameters, the mean
squared error

.. math:: E(x \mid y) = \frac1n \|G(y; A) - x\|^2 .

With a teacher :math:`T`, a reconstructor that has been learned before, the network is to learn what the teacher makes
of a measurement that is turned or mirrored at random,

.. math:: x = g^{-1} T(g y; A), \qquad g \text{ uniform among the symmetries that } A \text{ commutes with},

so that its best result is the teacher's mean over all of them, which takes a pass of the teacher for each.

References:
    Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015, https://arxiv.org/abs/1503.02531
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.fit import Fit, fit
from patchflow.image_models import SingleImage
from patchflow.numerics.patches import common_channels, hold_out
from patchflow.numerics.precision import Precision, autocast
from patchflow.numerics.windows import WindowSampler, middle
from patchflow.problems.likelihood import Likelihood
from patchflow.problems.operator import LinearOperator, Shape
from patchflow.problems.resolution import lowers_resolution
from patchflow.problems.turns import IDENTITY, Turn, commuting

# The law of the measurement of images of a shape.
Problem = Callable[[Shape], Likelihood]
# Windows of the validation images.
_VALIDATION = 6


class ReconstructionLoss(Energy):
    """The mean squared error of a network for one operator; see the module's formula.

    Args:
        model: The network.
        operator: The operator.
    """

    def __init__(self, model: SingleImage, operator: LinearOperator) -> None:
        super().__init__()
        self.model, self.operator = model, operator

    def forward(
        self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate for images ``x`` and their measurements ``condition``; see :meth:`Energy.forward`."""
        assert condition is not None
        errors = [
            (member(condition, self.operator) - x).square().flatten(1).mean(1)
            for member in self.model.members
        ]
        return torch.stack(errors).mean(0)


def learn_single_image(
    model: SingleImage,
    images: Sequence[Tensor],
    validation: Sequence[Tensor] = (),
    *,
    problem: Problem,
    holdout: float = 0.1,
    window: Shape = (128, 128),
    wrap: bool = False,
    free: float | None = None,
    teacher: SingleImage | None = None,
    batch: int = 4,
    steps: int = 20_000,
    lr: float = 1e-3,
    schedule: Literal["cosine", "constant"] = "cosine",
    warmup: int = 100,
    average: float = 0.99,
    patience: int | None = None,
    seconds: float | None = None,
    precision: Precision = "auto",
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Fit:
    """Train a reconstructor for one kind of measurement, and leave it frozen at its best validated state.

    Args:
        model: The reconstructor, trained in place; made for this problem's measurement.
        images: Training images, each (1, channels, height, width); sizes may differ.
        validation: Images to validate on; without them the lowest ``holdout`` of each training image is held out.
        problem: The law of the measurement for a height and a width.
        holdout: Held-out fraction of each training image, in (0, 0.5], when there is no validation image.
        window: Height and width of the training windows: of the whole image for operators that are made for one size.
        wrap: Take windows of images that go on periodically: for windows of the images' own size.
        free: Share of the windows that are turned by any angle and scaled at random, so that the images are learned by
            heart less; see :class:`patchflow.numerics.windows.WindowSampler`. By default half of them where the
            operator is a blur with a stride, else none: the detail of interpolated windows is not that of images, and
            an operator of full resolution shows it.
        teacher: A frozen reconstructor for the same measurement, whose mean over the turns the network learns.
        batch: Windows per step.
        steps: Training steps.
        lr: Peak learning rate of Adam.
        schedule: ``"cosine"`` decay after the warm-up, or ``"constant"``.
        warmup: Steps of linear warm-up.
        average: Decay of the moving average of the weights; 0 for none.
        patience: Stop early after this many validations without improvement.
        seconds: Time limit; the schedule ends with it.
        precision: Precision of the networks during training.
        checkpoint: File for the training state.
        resume: Continue from ``checkpoint``.
        progress: Show a progress line.

    Returns:
        The record of the run; its validation values are minus the mean PSNR in decibels.

    Raises:
        InputError: If images, model, teacher and problem do not fit together, images are smaller than a window or have
            no texture, or a number is out of range.
        NumericalError: If the loss is not finite; the best state so far is kept.
    """
    channels = common_channels([*images, *validation])
    if channels != model.channels:
        raise InputError(
            f"The images have {channels} channels but the model was made for {model.channels}; convert them or make "
            "another model."
        )
    if batch < 1 or steps < 1 or min(window) < 1:
        raise InputError(
            f"Got {steps} steps of {batch} windows of {window[0]} x {window[1]} pixels; use at least one of each."
        )
    if free is not None and not 0 <= free <= 1:
        raise InputError(f"The share of free windows is {free:g} but must lie between 0 and 1.")
    if free and not model.dihedral:
        raise InputError(
            f"A share {free:g} of free windows, turned by any angle, was asked for, but the model is for images with a "
            "preferred direction; leave it out."
        )
    for number, image in enumerate(images, 1):
        if not float(image.std()) > 0:
            raise InputError(
                f"Training image {number} is constant; a network learns nothing from an image without texture."
            )
    likelihood = problem(window)
    model.check_measurement(likelihood)
    if not validation:
        if any(image.shape[2] < 2 * max(window) for image in images):
            raise InputError(
                f"Without a validation image a part of each training image is held out, but windows of {window[0]} x "
                f"{window[1]} pixels leave no room for it; give a validation image, or choose smaller windows."
            )
        images, validation = hold_out(images, holdout, max(window))
    operator = likelihood.operator
    assert isinstance(operator, LinearOperator)
    turns = () if teacher is None else _turns_of(teacher, model, likelihood)
    if free is None:
        free = 0.5 if model.dihedral and lowers_resolution(operator) else 0.0
    sampler = WindowSampler(images, window, batch, dihedral=model.dihedral, wrap=wrap, free=free)
    loss = ReconstructionLoss(model, operator)
    known = _validation_pairs(validation, window, likelihood)

    @torch.no_grad()
    def draw() -> tuple[Tensor, Tensor]:
        x = sampler()
        y = likelihood.simulate(x)
        if teacher is not None:
            turn = turns[int(torch.randint(len(turns), ()))]
            with autocast(y, precision):
                x = turn.symmetry.undo(teacher(turn(y), operator))
        return x, y

    return fit(
        loss,
        draw,
        steps=steps,
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        average=average,
        validate=lambda: _minus_psnr(loss, known),
        validate_every=min(500, max(25, steps // 40)),
        patience=patience,
        budget=seconds,
        precision=precision,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )


def _turns_of(teacher: SingleImage, model: SingleImage, likelihood: Likelihood) -> tuple[Turn, ...]:
    """The turns over which a teacher is averaged; of an operator that commutes with none its single pass is learned."""
    if teacher is model:
        raise InputError("A network cannot be its own teacher; give a copy of it.")
    if teacher.channels != model.channels:
        raise InputError(
            f"The teacher was trained for {teacher.channels} channels but the model was made for {model.channels}; "
            "learn from another."
        )
    if model.dihedral and not teacher.dihedral:
        raise InputError(
            "The teacher was trained for images with a preferred direction but the model is to learn from turned ones; "
            "train it with dihedral=False, too."
        )
    try:
        teacher.check_measurement(likelihood)
    except InputError as error:
        raise InputError(f"Of the teacher: {error}") from error
    assert isinstance(likelihood.operator, LinearOperator)
    return commuting(likelihood.operator) if teacher.dihedral else (IDENTITY,)


def _validation_pairs(
    images: Sequence[Tensor], window: Shape, likelihood: Likelihood
) -> list[tuple[Tensor, Tensor]]:
    """Windows of the images and their measurements, the same whatever the seed."""
    for image in images:
        if image.shape[-2] < window[0] or image.shape[-1] < window[1]:
            raise InputError(
                f"A validation image has {image.shape[-2]} x {image.shape[-1]} pixels but windows have {window[0]} x "
                f"{window[1]}; give larger images or choose smaller windows."
            )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clean = [middle(image, window) for image in images]
        sampler = WindowSampler(images, window, 1)
        clean += [sampler() for _ in range(_VALIDATION - len(clean))]
        return [(x, likelihood.simulate(x)) for x in clean]


@torch.no_grad()
def _minus_psnr(loss: ReconstructionLoss, known: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Minus the mean PSNR in decibels of the results of a single pass."""
    errors = [float((loss.model(y, loss.operator) - x).square().mean()) for x, y in known]
    return 10 * sum(math.log10(max(error, 1e-12)) for error in errors) / len(errors)
