"""``patchflow train wpp-net`` and ``train wpp-flow``: super-resolution learned without pairs."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from patchflow import models
from patchflow.cli.options import value_range
from patchflow.cli.problems import Settings
from patchflow.cli.slices import Units
from patchflow.cli.train_resolution import operator_for, validated
from patchflow.cli.training import Training
from patchflow.errors import InputError
from patchflow.io.images import read_image
from patchflow.learn_reference import learn_wpp
from patchflow.learn_wpp_flow import learn_wpp_flow
from patchflow.learn_wpp_net import learn_wpp_net
from patchflow.numerics.patches import common_channels
from patchflow.numerics.precision import Precision
from patchflow.problems.blur import Blur
from patchflow.problems.estimation import estimate_kernel
from patchflow.problems.resolution import LowResolution

# Side length of an estimated kernel, and the noise beyond the range of the image that a measurement may have.
_ESTIMATED, _SLACK = 15, 8.0
# By how much the brightness of a registered pair may differ: what the estimate itself leaves open.
_SAME = 0.05


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

    arguments = {
        "prior": prior,
        "dihedral": dihedral,
        "weight": weight,
        "crop": crop,
        "precision": precision,
    }
    training.fit(model, learn_wpp_net, validated, arguments, given)


def train_wpp_flow(
    images: list[str],
    *,
    output: str = "wpp-flow.safetensors",
    measurements: list[str] | None = None,
    problem: str = "super-resolution",
    noise: float = 0.01,
    scale: int = 4,
    kernel: str | None = None,
    registered: list[str] | None = None,
    validation: str | None = None,
    weight: float = 1000.0,
    size: int = 8,
    count: int = 2000,
    scales: int = 2,
    width: int = 32,
    layers: int = 10,
    blocks: int = 4,
    hidden: int = 32,
    crop: int = 16,
    batch: int = 8,
    steps: int = 10_000,
    lr: float = 3e-3,
    average: float = 0.99,
    patience: int | None = None,
    seconds: float | None = None,
    dihedral: bool = True,
    range: str | None = None,
    units: Units = "normalised",
    dataset: str | None = None,
    grey: bool = False,
    seed: int = 0,
    threads: int | None = None,
    resume: bool = False,
) -> None:
    """Learn samples of super-resolved images from measurements and the patches of a reference image, for reconstruct.

    The conditional flow (WPPFlow) learns the posterior of the measurement's likelihood and the Wasserstein patch prior.
    Writes the model, and beside it the configuration (.yaml) that repeats the run. Ctrl-C keeps the state so far;
    --resume continues.

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
        weight: Weight of the prior against the data: the larger, the less samples differ.
        size: Side length of the patches in pixels.
        count: Number of reference patches of each scale of the prior.
        scales: Number of scales of the prior, each half as large as the one before.
        width: Features of the measurement.
        layers: Asymmetric layers that make them.
        blocks: Coupling blocks.
        hidden: Width of the couplings' networks.
        crop: Side length of the training crops in measured pixels.
        batch: Crops per step; published are 32.
        steps: Training steps.
        lr: Peak learning rate.
        average: Decay of the moving average of the weights; 0 for none.
        patience: Stop after this many validations without improvement.
        seconds: Time limit; the learning-rate schedule ends with it.
        dihedral: Turn and mirror crops and patches at random; false for images with a preferred direction.
        range: Values LO:HI of the files that become 0 and 1.
        units: hu: TIFF, .npy and HDF5 files are in Hounsfield units.
        dataset: The data set of HDF5 files that have several.
        grey: Convert colour images to grey.
        seed: Random seed.
        threads: Number of threads; by default all cores.
        resume: Continue an interrupted run from the state file beside the output.
    """
    training = Training.begin("train wpp-flow", dict(locals()))
    flags, operator, given = _unpaired(training)
    model = models.wpp_flow(
        channels=common_channels(training.images),
        scale=operator.stride,
        kernel_shape=tuple(operator.kernel.shape),
        noise=flags.std,
        width=width,
        layers=layers,
        blocks=blocks,
        hidden=hidden,
    ).trained_for(operator.kernel)
    prior = learn_wpp(training.images, size=size, count=count, scales=scales, dihedral=dihedral)

    arguments = {"prior": prior, "dihedral": dihedral, "weight": weight, "crop": crop}
    training.fit(model, learn_wpp_flow, validated, arguments, given)


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
        scale = settings["scale"]
        if settings["problem"].endswith(".py"):
            raise InputError(
                "--registered estimates the blur of super-resolution; leave it out with a problem file."
            )
        if tuple(scale * n for n in pair[1].shape[2:]) != tuple(pair[0].shape[2:]):
            raise InputError(
                f"The registered images have {pair[0].shape[2]} x {pair[0].shape[3]} and {pair[1].shape[2]} x "
                f"{pair[1].shape[3]} pixels, which is not the scale {scale}; give --scale, or other images."
            )
        found = estimate_kernel(pair[0], pair[1], size=max(_ESTIMATED, settings["scale"]))
        if not (abs(found.gain - 1) < _SAME and abs(found.bias) < _SAME):
            raise InputError(
                f"The registered measurement has other values than its image (times {found.gain:.3f}, plus "
                f"{found.bias:.3f}); subtract that constant from all measurements and divide them by that factor first."
            )
        kernel = str(training.target.with_suffix(".kernel.npy"))
        np.save(kernel, found.kernel.numpy())
        print(
            f"{kernel}: estimated, brightness times {found.gain:.3f} plus {found.bias:.4f}, residual "
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
