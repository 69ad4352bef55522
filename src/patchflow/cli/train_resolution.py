"""``patchflow train acnn``: the network of super-resolution that learns from pairs."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from patchflow import models
from patchflow.cli.problems import Settings
from patchflow.cli.slices import Units
from patchflow.cli.training import Training
from patchflow.errors import InputError
from patchflow.fit import Fit
from patchflow.learn_pairs import learn_pairs
from patchflow.numerics.patches import common_channels
from patchflow.numerics.precision import Precision
from patchflow.problems.blur import Blur
from patchflow.problems.resolution import LowResolution, lowers_resolution


def train_acnn(
    images: list[str],
    *,
    output: str = "acnn.safetensors",
    problem: str = "super-resolution",
    noise: float = 0.01,
    scale: int = 4,
    kernel: str | None = None,
    validation: str | None = None,
    holdout: float = 0.1,
    width: int = 32,
    layers: int = 17,
    preset: Literal["default", "paper"] = "default",
    crop: int = 48,
    batch: int = 8,
    steps: int = 20_000,
    lr: float = 1e-3,
    average: float = 0.99,
    patience: int | None = None,
    seconds: float | None = None,
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
    """Learn super-resolution from pairs of crops and their simulated measurements, for reconstruct --method acnn.

    The network serves the scale, the blur and the noise that it was trained for, and no others; images of any size and
    boundary. Writes the model, and beside it the configuration (.yaml) that repeats the run. Ctrl-C keeps the best
    state so far; --resume continues.

    Args:
        images: PNG, JPEG, TIFF, .npy or HDF5 files, also stacks; or the DICOM files (or the folder) of one CT series.
        output: Model file to write.
        problem: super-resolution, or a Python file that defines likelihood with a blur that lowers the resolution.
        noise: Standard deviation of the noise, in units of the image range.
        scale: Image pixels per measured pixel.
        kernel: The blur kernel, an image or .npy file; by default a Gaussian of half the scale.
        validation: A file to validate on; without it, a part of each training image is held out.
        holdout: Held-out fraction of each training image.
        width: Channels between the layers.
        layers: Asymmetric layers.
        preset: paper is the published network, of width 64; it overrides width and layers.
        crop: Side length of the training crops in image pixels, a multiple of the scale; published is 64.
        batch: Crops per step; published are 16.
        steps: Training steps.
        lr: Peak learning rate.
        average: Decay of the moving average of the weights; 0 for none.
        patience: Stop after this many validations without improvement.
        seconds: Time limit; the learning-rate schedule ends with it.
        precision: auto takes bfloat16 where this processor is faster with it.
        dihedral: Turn and mirror crops at random; false for images with a preferred direction.
        range: Values LO:HI of the files that become 0 and 1.
        units: hu: TIFF, .npy and HDF5 files are in Hounsfield units.
        dataset: The data set of HDF5 files that have several.
        grey: Convert colour images to grey.
        seed: Random seed.
        threads: Number of threads; by default all cores.
        resume: Continue an interrupted run from the state file beside the output.
    """
    training = Training.begin("train acnn", dict(locals()))
    flags = Settings(problem, noise, scale, None, kernel)
    operator = operator_for(flags, training.images[0])
    degrade = LowResolution(operator.kernel, operator.stride, flags.std)
    model = models.acnn(
        channels=common_channels(training.images),
        scale=operator.stride,
        kernel_shape=tuple(operator.kernel.shape),
        noise=flags.std,
        width=width,
        layers=layers,
        preset=preset,
    ).trained_for(operator.kernel)
    arguments = {
        "pairs": degrade,
        "dihedral": dihedral,
        "crop": degrade.side(crop),
        "precision": precision,
    }
    training.fit(
        model,
        learn_pairs,
        validated,
        arguments,
    )


def operator_for(flags: Settings, image: Tensor) -> Blur:
    """The operator that the flags describe, for an image or a part of it.

    Raises:
        InputError: If it does not lower the resolution.
    """
    height, width = (extent - extent % max(flags.scale, 1) for extent in image.shape[2:])
    operator = flags.likelihood((height, width), measured=False).operator
    if not lowers_resolution(operator):
        raise InputError(
            f"The network learns super-resolution but the problem {flags.problem} does not lower the resolution; use "
            "--problem super-resolution."
        )
    return operator


def validated(result: Fit) -> str:
    """What is said of a training: the PSNR, or the loss where nothing validates."""
    if result.validation:
        return f"{-result.best:.2f} dB on the validation"
    return f"loss {result.losses[-1]:.1f}" if result.losses else "learned"
