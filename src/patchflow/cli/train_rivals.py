"""``patchflow train epll``, ``wpp`` and ``local-ar``: the other priors on patches."""

from __future__ import annotations

import time
from functools import partial
from typing import Literal

from torch import Tensor, nn

from patchflow import models
from patchflow.cli.problems import Settings
from patchflow.cli.slices import Units
from patchflow.cli.training import Training
from patchflow.errors import InputError
from patchflow.learn_critic import learn_critic
from patchflow.learn_critic import noise as white_noise
from patchflow.learn_mixture import learn_epll
from patchflow.learn_reference import learn_wpp
from patchflow.numerics.patches import common_channels
from patchflow.priors.expectation_maximization import MixtureFit
from patchflow.priors.student_maximization import StudentFit


def train_epll(
    images: list[str],
    *,
    output: str = "epll.safetensors",
    validation: str | None = None,
    holdout: float = 0.1,
    false_alarms: float = 0.01,
    size: int = 6,
    components: int = 200,
    padding: int = 0,
    remove_mean: bool = False,
    dihedral: bool = False,
    count: int | None = None,
    floor: float = 1e-6,
    tolerance: float = 5e-3,
    steps: int = 500,
    range: str | None = None,
    units: Units = "normalised",
    dataset: str | None = None,
    grey: bool = False,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Learn the Gaussian mixture of EPLL from the patches of one to six images, by expectation maximisation.

    Writes the model, and beside it the configuration (.yaml) that repeats the run. Ctrl-C keeps the mixture so far.

    Args:
        images: PNG, JPEG, TIFF, .npy or HDF5 files, also stacks; or the DICOM files (or the folder) of one CT series.
        output: Model file to write.
        validation: A file (or a folder of DICOM files) to measure thresholds of novelty on; nothing is learned from it.
            Without it, a part of each training image is held out.
        holdout: Held-out fraction of each training image; 0 learns from all, and the model will draw no novelty map.
        false_alarms: Share of the held-out pixels that the novelty map of reports may mark.
        size: Side length of the patches in pixels.
        components: Number of components.
        padding: Reflected pixels around an image in reconstruction.
        remove_mean: Take the mean of each patch out, as in the original EPLL.
        dihedral: Turn and mirror patches at random (for images without a preferred direction).
        count: Number of patches, drawn at random; all by default.
        floor: Smallest variance of a component in any direction, in squared units of the image.
        tolerance: Stop when a step gains less than this many nats per patch.
        steps: Stop after this many steps in any case.
        range: Values LO:HI of the files that become 0 and 1.
        units: hu: TIFF, .npy and HDF5 files are in Hounsfield units.
        dataset: The data set of HDF5 files that have several.
        grey: Convert colour images to grey.
        seed: Random seed.
        threads: Number of threads; by default all cores.
    """
    training = Training.begin("train epll", dict(locals()))
    begun = time.perf_counter()
    prior, record = learn_epll(
        training.split(size)[0],
        size=size,
        components=components,
        padding=padding,
        remove_mean=remove_mean,
        dihedral=dihedral,
        count=count,
        floor=floor,
        tolerance=tolerance,
        max_iterations=steps,
        progress=True,
    )
    save_mixture(training, prior, record, time.perf_counter() - begun)


def save_mixture(
    training: Training, prior: nn.Module, record: MixtureFit | StudentFit, seconds: float
) -> None:
    """Write a mixture, and print how its training went.

    Args:
        training: The command.
        prior: The mixture as a prior.
        record: The record of expectation maximisation.
        seconds: How long it took.
    """
    done = len(record.log_likelihood) - 1
    summary = {"steps": done, "seconds": round(seconds, 1), "history": record.log_likelihood}
    training.save(prior, {**summary, **training.novelty(prior)})
    how = "converged" if record.converged else "not converged; give more --steps"
    if record.interrupted:
        how = "interrupted"
    kind = f"{len(record.weights)} components"
    if isinstance(record, StudentFit):
        low, high = float(record.degrees.min()), float(record.degrees.max())
        kind += f" of {low:.2g} to {high:.2g} degrees of freedom"
    print(
        f"{training.target}: {kind}, log-likelihood {record.log_likelihood[-1]:.2f} nats per patch after {done} steps "
        f"in {seconds:.0f} s ({how})."
    )


def train_wpp(
    images: list[str],
    *,
    output: str = "wpp.safetensors",
    size: int = 8,
    count: int = 2000,
    scales: int = 2,
    epsilon: float = 0.0,
    rho: float | None = None,
    padding: int = 0,
    dihedral: bool = False,
    range: str | None = None,
    units: Units = "normalised",
    dataset: str | None = None,
    grey: bool = False,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Draw the reference patches of the Wasserstein patch prior from one to six images.

    The model file holds these patches: pixels of the images. There is nothing to optimise, it takes a second.

    Args:
        images: PNG, JPEG, TIFF, .npy or HDF5 files, also stacks; or the DICOM files (or the folder) of one CT series.
        output: Model file to write.
        size: Side length of the patches in pixels; 6 in the paper.
        count: Number of reference patches of each scale; 10,000 in the paper.
        scales: Number of scales, each half as large as the one before.
        epsilon: Entropic smoothing, in squared units of the image; 0.01 reconstructs better, and slower.
        rho: Penalty of using the reference patches unevenly; by default they are used alike.
        padding: Reflected pixels around an image in reconstruction.
        dihedral: Turn and mirror patches at random (for images without a preferred direction).
        range: Values LO:HI of the files that become 0 and 1.
        units: hu: TIFF, .npy and HDF5 files are in Hounsfield units.
        dataset: The data set of HDF5 files that have several.
        grey: Convert colour images to grey.
        seed: Random seed.
        threads: Number of threads; by default all cores.
    """
    training = Training.begin("train wpp", dict(locals()))
    prior = learn_wpp(
        training.images,
        size=size,
        count=count,
        scales=scales,
        epsilon=epsilon,
        rho=rho,
        padding=padding,
        dihedral=dihedral,
    )
    training.save(prior, {})
    print(f"{output}: {count} reference patches at each of {scales} scales.")


def train_local_ar(
    images: list[str],
    *,
    output: str = "local-ar.safetensors",
    form: Literal["small", "original"] = "small",
    problem: str | None = None,
    noise: float = 0.01,
    scale: int = 4,
    boundary: Literal["circular", "periodic", "reflect", "valid"] | None = None,
    kernel: str | None = None,
    mask: str | None = None,
    padding: int = 0,
    dihedral: bool = False,
    batch: int = 64,
    steps: int = 10_000,
    lr: float = 1e-3,
    seconds: float | None = None,
    range: str | None = None,
    units: Units = "normalised",
    dataset: str | None = None,
    grey: bool = False,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Learn the local adversarial regulariser: a critic that tells patches of the images from spoilt ones.

    Spoilt are patches, blurred and made noisy at random; with --problem start images of simulated measurements, made
    noisy, which serves where that problem's artefacts are of another kind.

    Args:
        images: PNG, JPEG, TIFF, .npy or HDF5 files, also stacks; or the DICOM files (or the folder) of one CT series.
        output: Model file to write.
        form: small (of the patch group, 6 x 6 pixels) or original (13 x 13).
        problem: super-resolution, deblurring, inpainting, denoising, or a Python file that defines likelihood;
            without it patches are blurred and made noisy at random, as published (original: only noisy).
        noise: Of the problem: standard deviation of the noise, in units of the image range.
        scale: Super-resolution: image pixels per measured pixel.
        boundary: circular or valid for super-resolution; periodic, reflect or valid for deblurring.
        kernel: Deblurring: the blur kernel, an image or .npy file.
        mask: Inpainting: an image that is white where pixels were measured.
        padding: Reflected pixels around an image in reconstruction.
        dihedral: Turn and mirror patches at random (for images without a preferred direction).
        batch: Pairs of patches per step.
        steps: Training steps.
        lr: Peak learning rate.
        seconds: Time limit; the learning-rate schedule ends with it.
        range: Values LO:HI of the files that become 0 and 1.
        units: hu: TIFF, .npy and HDF5 files are in Hounsfield units.
        dataset: The data set of HDF5 files that have several.
        grey: Convert colour images to grey.
        seed: Random seed.
        threads: Number of threads; by default all cores.
    """
    settings = dict(locals())
    if problem == "ct":
        raise InputError("local-ar for ct learns from random blur and noise; leave --problem out.")
    if problem is None:
        told = {"boundary": boundary, "kernel": kernel, "mask": mask}
        told |= {"noise": None if noise == 0.01 else noise, "scale": None if scale == 4 else scale}
        for name, value in told.items():
            if value is not None:
                raise InputError(f"--{name} {value} says nothing without --problem; leave it out.")
    training = Training.begin("train local-ar", settings)
    channels = common_channels(training.images)
    original = form == "original"
    prior = (
        models.local_ar(channels=channels, padding=padding)
        if original
        else models.alr(channels=channels, padding=padding)
    )
    flags = None if problem is None else Settings(problem, noise, scale, boundary, kernel, mask)

    def degrade(x: Tensor) -> Tensor:
        assert flags is not None
        likelihood = flags.likelihood((x.shape[2], x.shape[3]), measured=False)
        return likelihood.operator.initial(likelihood.simulate(x))

    perturb = white_noise if original else None
    if flags is not None:
        # Start images alone teach a critic of super-resolution to reward oscillations: 8 dB instead of 28.
        perturb = partial(white_noise, low=0.0, high=0.2)
    result = learn_critic(
        prior,
        training.images,
        degrade=None if flags is None else degrade,
        perturb=perturb,
        penalty=5.0 if original else 10.0,
        dihedral=dihedral,
        batch=batch,
        steps=steps,
        lr=lr,
        seconds=seconds,
        progress=True,
    )
    summary = {
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "stopped": result.stopped,
        "distance": [-loss for loss in result.losses],
    }
    training.save(prior, summary)
    print(f"{output}: {result.steps} steps in {result.seconds:.0f} s ({result.stopped}).")
