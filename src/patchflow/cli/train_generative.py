"""``patchflow train patch-vae``, ``patch-gan`` and ``student-t``: generative models of patches."""

from __future__ import annotations

import time

from patchflow import models
from patchflow.cli.slices import Units
from patchflow.cli.train_rivals import save_mixture
from patchflow.cli.training import Training
from patchflow.learn import learn_patches
from patchflow.learn_gan import learn_gan
from patchflow.learn_mixture import learn_student_t
from patchflow.numerics.patches import common_channels


def train_patch_vae(
    images: list[str],
    *,
    output: str = "patch-vae.safetensors",
    validation: str | None = None,
    holdout: float = 0.1,
    false_alarms: float = 0.01,
    size: int = 6,
    latent: int = 12,
    hidden: int = 64,
    std: float = 0.05,
    padding: int = 0,
    dihedral: bool = False,
    batch: int = 512,
    steps: int = 10_000,
    lr: float = 2e-3,
    average: float = 0.999,
    patience: int | None = None,
    seconds: float | None = None,
    range: str | None = None,
    units: Units = "normalised",
    dataset: str | None = None,
    grey: bool = False,
    seed: int = 0,
    threads: int | None = None,
    resume: bool = False,
) -> None:
    """Learn a variational autoencoder from the patches of one to six images.

    Writes the model, and beside it the configuration (.yaml) that repeats the run. Ctrl-C keeps the best state so far;
    --resume continues.

    Args:
        images: PNG, JPEG, TIFF, .npy or HDF5 files, also stacks; or the DICOM files (or the folder) of one CT series.
        output: Model file to write.
        validation: A file (or a folder of DICOM files) to validate on; without it, a part of each training image is
            held out.
        holdout: Held-out fraction of each training image.
        false_alarms: Share of the held-out pixels that the novelty map of reports may mark.
        size: Side length of the patches in pixels.
        latent: Dimension of the latent variables.
        hidden: Width of encoder and decoder.
        std: Standard deviation of the decoder at the start, in units of the image range.
        padding: Reflected pixels around an image in reconstruction.
        dihedral: Turn and mirror patches at random (for images without a preferred direction).
        batch: Patches per step.
        steps: Training steps.
        lr: Peak learning rate.
        average: Decay of the moving average of the weights; 0 for none.
        patience: Stop after this many validations without improvement.
        seconds: Time limit; the learning-rate schedule ends with it.
        range: Values LO:HI of the files that become 0 and 1.
        units: hu: TIFF, .npy and HDF5 files are in Hounsfield units.
        dataset: The data set of HDF5 files that have several.
        grey: Convert colour images to grey.
        seed: Random seed.
        threads: Number of threads; by default all cores.
        resume: Continue an interrupted run from the state file beside the output.
    """
    training = Training.begin("train patch-vae", dict(locals()))
    prior = models.patch_vae(
        size=size,
        channels=common_channels(training.images),
        latent=latent,
        hidden=hidden,
        std=std,
        padding=padding,
    )
    training.fit(
        prior,
        learn_patches,
        lambda result: f"a bound of {result.best:.2f} nats per validation patch",
        {"dihedral": dihedral},
    )


def train_patch_gan(
    images: list[str],
    *,
    output: str = "patch-gan.safetensors",
    size: int = 6,
    latent: int = 16,
    hidden: int = 128,
    spoilt: float = 0.0,
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
    """Learn a generator of patches and its critic, the prior of --method local-ar, from one to six images.

    Writes the model, and beside it the configuration (.yaml) that repeats the run. Ctrl-C keeps both as they are.

    Args:
        images: PNG, JPEG, TIFF, .npy or HDF5 files, also stacks; or the DICOM files (or the folder) of one CT series.
        output: Model file to write.
        size: Side length of the patches in pixels, at least 3.
        latent: Number of random numbers the generator makes a patch of.
        hidden: Width of the generator.
        spoilt: Share of the critic's negatives that are spoilt patches of the images, as those of local-ar.
        padding: Reflected pixels around an image in reconstruction.
        dihedral: Turn and mirror patches at random (for images without a preferred direction).
        batch: Pairs of patches per step.
        steps: Steps of the critic; the generator takes a fifth of them.
        lr: Learning rate of both.
        seconds: Time limit.
        range: Values LO:HI of the files that become 0 and 1.
        units: hu: TIFF, .npy and HDF5 files are in Hounsfield units.
        dataset: The data set of HDF5 files that have several.
        grey: Convert colour images to grey.
        seed: Random seed.
        threads: Number of threads; by default all cores.
    """
    training = Training.begin("train patch-gan", dict(locals()))
    prior = models.patch_gan(
        size=size,
        channels=common_channels(training.images),
        latent=latent,
        hidden=hidden,
        padding=padding,
    )
    result = learn_gan(
        prior,
        training.images,
        spoilt=spoilt,
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


def train_student_t(
    images: list[str],
    *,
    output: str = "student-t.safetensors",
    validation: str | None = None,
    holdout: float = 0.1,
    false_alarms: float = 0.01,
    size: int = 6,
    components: int = 50,
    padding: int = 0,
    dihedral: bool = False,
    count: int = 50_000,
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
    """Learn a Student-t mixture from the patches of one to six images, by expectation maximisation.

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
        dihedral: Turn and mirror patches at random (for images without a preferred direction).
        count: Number of patches, drawn at random; all, if there are fewer.
        floor: Smallest eigenvalue of a scatter matrix, in squared units of the image.
        tolerance: Stop when a step gains less than this many nats per patch.
        steps: Stop after this many steps in any case.
        range: Values LO:HI of the files that become 0 and 1.
        units: hu: TIFF, .npy and HDF5 files are in Hounsfield units.
        dataset: The data set of HDF5 files that have several.
        grey: Convert colour images to grey.
        seed: Random seed.
        threads: Number of threads; by default all cores.
    """
    training = Training.begin("train student-t", dict(locals()))
    begun = time.perf_counter()
    prior, record = learn_student_t(
        training.split(size)[0],
        size=size,
        components=components,
        padding=padding,
        dihedral=dihedral,
        count=count,
        floor=floor,
        tolerance=tolerance,
        max_iterations=steps,
        progress=True,
    )
    save_mixture(training, prior, record, time.perf_counter() - begun)
