"""``patchflow train acnn`` and ``train wpp-net``: networks of super-resolution, with pairs and without."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from torch import Tensor

from patchflow import models
from patchflow.cli.options import value_range
from patchflow.cli.problems import Settings
from patchflow.cli.slices import Units
from patchflow.cli.training import Training
from patchflow.errors import InputError
from patchflow.fit import Fit
from patchflow.io.images import read_image
from patchflow.learn_pairs import learn_pairs
from patchflow.learn_reference import learn_wpp
from patchflow.learn_wpp_net import learn_wpp_net
from patchflow.numerics.patches import common_channels
from patchflow.numerics.precision import Precision
from patchflow.problems.blur import Blur
from patchflow.problems.estimation import estimate_kernel
from patchflow.problems.resolution import LowResolution, lowers_resolution
from patchflow.resolution_models import SuperResolver

# Side length of an estimated kernel, and the noise beyond the range of the image that a measurement may have.
_ESTIMATED, _SLACK = 15, 8.0


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
    arguments = {"pairs": degrade, "crop": degrade.side(crop), "precision": precision}
    training.fit(
        model,
        learn_pairs,
        _validated,
        arguments,
    )


def train_wpp_net(
    images: list[str],
    *,
    output: str = "wpp-net.safetensors",
    measurements: list[str] | None = None,
    problem: str = "super-resolution",
    noise: float = 0.01,
    scale: int = 4,
    kernel: str | None = None,
    registered: list[str] | None = None,
    validation: str | None = None,
    weight: float = 100.0,
    size: int = 8,
    count: int = 2000,
    scales: int = 2,
    width: int = 32,
    layers: int = 10,
    crop: int = 16,
    batch: int = 8,
    steps: int = 10_000,
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
    """Learn super-resolution from measurements alone and the patches of a reference image, for reconstruct.

    The network (WPPNet) never sees pairs: its results should explain the measurements, and have the patches of the
    reference. Writes the model, and beside it the configuration (.yaml) that repeats the run. Ctrl-C keeps the state so
    far; --resume continues.

    Args:
        images: The reference images of high resolution: PNG, JPEG, TIFF, .npy or HDF5 files.
        output: Model file to write.
        measurements: The low-resolution images to learn from; without them, simulated ones of the reference.
        problem: super-resolution, or a Python file that defines likelihood with a blur that lowers the resolution.
        noise: Standard deviation of the noise, in units of the image range.
        scale: Image pixels per measured pixel.
        kernel: The blur kernel, an image or .npy file; by default a Gaussian of half the scale.
        registered: Two files, an image and what was measured of it, that the kernel is estimated from; it is written
            beside the model (.kernel.npy), for --kernel of reconstruct.
        validation: A high-resolution image, whose simulated measurement chooses the best state.
        weight: Weight of the prior against the data.
        size: Side length of the patches in pixels.
        count: Number of reference patches of each scale of the prior.
        scales: Number of scales of the prior, each half as large as the one before.
        width: Channels between the layers; published are 64.
        layers: Asymmetric layers.
        crop: Side length of the training crops in measured pixels.
        batch: Crops per step; published are 32.
        steps: Training steps.
        lr: Peak learning rate.
        average: Decay of the moving average of the weights; 0 for none.
        patience: Stop after this many validations without improvement.
        seconds: Time limit; the learning-rate schedule ends with it.
        precision: auto takes bfloat16 where this processor is faster with it.
        dihedral: Turn and mirror crops and patches at random; false for images with a preferred direction.
        range: Values LO:HI of the files that become 0 and 1.
        units: hu: TIFF, .npy and HDF5 files are in Hounsfield units.
        dataset: The data set of HDF5 files that have several.
        grey: Convert colour images to grey.
        seed: Random seed.
        threads: Number of threads; by default all cores.
        resume: Continue an interrupted run from the state file beside the output.
    """
    training = Training.begin("train wpp-net", dict(locals()))
    flags, operator, given = _unpaired(training)
    model = models.wpp_net(
        channels=common_channels(training.images),
        scale=operator.stride,
        kernel_shape=tuple(operator.kernel.shape),
        noise=flags.std,
        width=width,
        layers=layers,
    ).trained_for(operator.kernel)
    prior = learn_wpp(training.images, size=size, count=count, scales=scales, dihedral=dihedral)

    def learn(
        model: SuperResolver, images: list[Tensor], held: list[Tensor], **arguments: Any
    ) -> Fit:
        return learn_wpp_net(model, given, held, prior=prior, **arguments)

    arguments = {"weight": weight, "crop": crop, "precision": precision}
    training.fit(model, learn, _validated, arguments)


def _unpaired(training: Training) -> tuple[Settings, Blur, list[Tensor]]:
    """The flags of the problem, its operator, known or estimated, and the measurements to learn from."""
    settings, kernel = training.settings, training.settings["kernel"]
    limits = value_range(settings["range"])
    if settings["registered"] is not None:
        if kernel is not None or len(settings["registered"]) != 2:
            raise InputError(
                "--registered takes two files, [image.png,measured.png], and no --kernel beside it."
            )
        pair = [read_image(path, value_range=limits, grey=True) for path in settings["registered"]]
        found = estimate_kernel(pair[0], pair[1], size=max(_ESTIMATED, settings["scale"]))
        kernel = str(training.target.with_suffix(".kernel.npy"))
        np.save(kernel, found.kernel.numpy())
        print(
            f"{kernel}: estimated, sum {float(found.kernel.sum()):.3f}, constant {found.bias:.4f}, residual "
            f"{found.residual:.4f}."
        )
    flags = Settings(settings["problem"], settings["noise"], settings["scale"], None, kernel)
    operator = operator_for(flags, training.images[0])
    if settings["measurements"] is None:
        degrade = LowResolution(operator.kernel, operator.stride, flags.std)
        return flags, operator, [degrade(image)[1] for image in training.images]
    given = [
        read_image(path, value_range=limits, grey=settings["grey"], slack=_SLACK * flags.std)
        for path in settings["measurements"]
    ]
    return flags, operator, given


def _validated(result: Fit) -> str:
    if result.validation:
        return f"{-result.best:.2f} dB on the validation"
    return f"loss {result.losses[-1]:.1f}" if result.losses else "learned"


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
