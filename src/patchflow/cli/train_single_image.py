"""``patchflow train single-image``: a reconstructor for one measurement, learned from one to six images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from patchflow import models
from patchflow.cli.problems import Settings
from patchflow.cli.slices import Units
from patchflow.cli.training import Training
from patchflow.errors import InputError
from patchflow.image_models import SingleImage
from patchflow.learn_single_image import Problem, learn_single_image
from patchflow.numerics.patches import common_channels
from patchflow.numerics.precision import Precision
from patchflow.problems.signature import signature

# Between the stages, from weak to strong: their squares are as the variances of what is uncertain.
_WEAKEST, _STRONGEST = 1e-2, 1e-1
# Side length of training windows by default.
_WINDOW = 128


def train_single_image(
    images: list[str],
    *,
    problem: str,
    output: str = "single-image.safetensors",
    noise: float = 0.01,
    scale: int = 4,
    boundary: Literal["circular", "periodic", "reflect", "valid"] | None = None,
    kernel: str | None = None,
    mask: str | None = None,
    validation: str | None = None,
    holdout: float = 0.25,
    width: int = 64,
    blocks: int = 4,
    stages: int = 1,
    members: int = 1,
    window: int | None = None,
    free: float | None = None,
    teacher: str | None = None,
    batch: int = 4,
    steps: int = 20_000,
    lr: float = 1e-3,
    average: float = 0.99,
    patience: int | None = None,
    seconds: float | None = 300.0,
    precision: Precision = "auto",
    dihedral: bool = True,
    range: str | None = None,
    units: Units = "normalised",
    dataset: str | None = None,
    grey: bool = False,
    seed: int = 0,
    threads: int | None = None,
    resume: bool = False,
) -> None:
    """Learn a reconstructor for one measurement from simulated pairs of a few images.

    It serves the operator and the noise that it was trained for, and no others, in a fraction of a second: reconstruct
    --method single-image. Writes the model, and beside it the configuration (.yaml) that repeats the run. Ctrl-C keeps
    the best state so far; --resume continues.

    Args:
        images: PNG, JPEG, TIFF, .npy or HDF5 files, also stacks; or the DICOM files (or the folder) of one CT series.
        problem: super-resolution, deblurring, inpainting, denoising, or a Python file that defines likelihood.
        output: Model file to write.
        noise: Standard deviation of the noise, in units of the image range.
        scale: Super-resolution: image pixels per measured pixel.
        boundary: circular or valid for super-resolution; periodic, reflect or valid for deblurring.
        kernel: Deblurring: the blur kernel, an image or .npy file.
        mask: Inpainting: an image that is white where pixels were measured; training images must have its size.
        validation: A file to validate on; without it, a part of each training image is held out (for inpainting and
            problem files it is required, since windows are whole images).
        holdout: Held-out fraction of each training image.
        width: Channels of the networks.
        blocks: Residual blocks of each network.
        stages: Networks in a row, with a step to the data between them.
        members: Such rows, learned alike from other random starts; the mean of their images is taken.
        window: Side length of the training windows in pixels: 128 by default, or the size that the operator has.
        free: Share of the windows that are turned by any angle and scaled at random; by default half of them for
            super-resolution, else none, and none with --dihedral false.
        teacher: A model of this command for the same measurement: its mean over the turns is learned, so that a single
            pass (reconstruct --ensemble false) is nearly as good, also of a narrower network (--width).
        batch: Windows per step.
        steps: Training steps.
        lr: Peak learning rate.
        average: Decay of the moving average of the weights; 0 for none.
        patience: Stop after this many validations without improvement.
        seconds: Time limit; the learning-rate schedule ends with it.
        precision: auto takes bfloat16 where this processor is faster with it.
        dihedral: Turn and mirror windows at random; false for images with a preferred direction.
        range: Values LO:HI of the files that become 0 and 1.
        units: hu: TIFF, .npy and HDF5 files are in Hounsfield units.
        dataset: The data set of HDF5 files that have several.
        grey: Convert colour images to grey.
        seed: Random seed.
        threads: Number of threads; by default all cores.
        resume: Continue an interrupted run from the state file beside the output.
    """
    settings = dict(locals())
    if problem == "ct":
        raise InputError("single-image is for images; for ct use train single-scan.")
    if stages < 1:
        raise InputError(f"Got {stages} stages; use at least one.")
    flags = Settings(problem, noise, scale, boundary, kernel, mask)
    if problem == "super-resolution" and scale < 2:
        raise InputError(f"The scale is {scale} but must be at least 2.")
    if teacher is not None and Path(teacher).resolve() == Path(output).resolve():
        raise InputError(
            f"--teacher and --output are the same file, {output}; choose another --output."
        )
    taught = None if teacher is None else models.load(teacher, SingleImage)
    training = Training.begin("train single-image", settings)
    law = problem_of(flags)
    shape = window_shape(flags, training, window)
    model = models.single_image(
        measurement=signature(law(shape)),
        channels=common_channels(training.images),
        cell=scale if problem == "super-resolution" else 2,
        width=width,
        blocks=blocks,
        strengths=strengths(stages),
        members=members,
        dihedral=dihedral,
    )
    wrap = problem == "inpainting"
    training.fit(
        model,
        learn_single_image,
        lambda result: f"{-result.best:.2f} dB on the validation windows",
        {
            "problem": law,
            "window": shape,
            "wrap": wrap,
            "free": free,
            "teacher": taught,
            "precision": precision,
        },
    )


def problem_of(flags: Settings) -> Problem:
    """The law of the measurement of images of any shape."""
    return lambda shape: flags.likelihood(shape, measured=False)


def window_shape(flags: Settings, training: Training, window: int | None) -> tuple[int, int]:
    """The shape of the training windows: that of the operator, if it has one.

    Args:
        flags: The measurement.
        training: The training images.
        window: What was asked for.

    Raises:
        InputError: If another size was asked for than the operator's, or the scale does not divide it.
    """
    height = min(image.shape[2] for image in training.images)
    width = min(image.shape[3] for image in training.images)
    fixed = None
    if flags.problem == "inpainting":
        fixed = (height, width)
    elif flags.problem.endswith(".py"):
        operator = flags.likelihood((height, width), measured=False).operator
        fixed = operator.domain_shape
    if fixed is not None:
        if window is not None:
            raise InputError(
                f"--window {window} does not fit an operator of {fixed[0]} x {fixed[1]} pixels; leave it out."
            )
        return fixed
    # What is held out for the validation needs a window, too.
    room = height if training.held else height // 2
    side = min(_WINDOW, room, width) if window is None else window
    if flags.problem == "super-resolution":
        if window is not None and window % flags.scale:
            raise InputError(f"The window {window} is not divisible by the scale {flags.scale}.")
        side -= side % flags.scale
    return side, side


def strengths(stages: int) -> list[float]:
    """The strengths of the data steps between stages, from weak to strong in equal ratios."""
    if stages < 3:
        return [_WEAKEST] * (stages - 1)
    ratio = (_STRONGEST / _WEAKEST) ** (1 / (stages - 2))
    return [_WEAKEST * ratio**k for k in range(stages - 1)]
