"""``patchflow train``."""

from __future__ import annotations

from typing import Literal

from patchflow import models
from patchflow.cli.slices import Units
from patchflow.cli.training import Training
from patchflow.learn import learn_patches
from patchflow.numerics.patches import common_channels
from patchflow.numerics.precision import Precision


def train_patch_nr(
    images: list[str],
    *,
    output: str = "prior.safetensors",
    validation: str | None = None,
    holdout: float = 0.1,
    false_alarms: float = 0.01,
    size: int = 6,
    layers: int = 5,
    hidden: int = 256,
    padding: int = 0,
    smoothing: float = 0.0,
    dihedral: bool = False,
    batch: int = 512,
    steps: int = 10_000,
    lr: float = 2e-3,
    average: float = 0.999,
    patience: int | None = None,
    seconds: float | None = None,
    precision: Precision = "auto",
    preset: Literal["default", "paper"] = "default",
    range: str | None = None,
    units: Units = "normalised",
    dataset: str | None = None,
    grey: bool = False,
    seed: int = 0,
    threads: int | None = None,
    resume: bool = False,
) -> None:
    """Learn a patchNR from the patches of one to six images, or of some more.

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
        layers: Coupling blocks of the flow.
        hidden: Width of the flow's networks.
        padding: Reflected pixels around an image in reconstruction; 4 in the paper's computed tomography.
        smoothing: Standard deviation of noise that patches are learned with and reconstructions are freed of again;
            0.02 with --size 8 is best for photographs in [0, 1], smaller details need less.
        dihedral: Turn and mirror patches at random (for images without a preferred direction).
        batch: Patches per step.
        steps: Training steps.
        lr: Peak learning rate.
        average: Decay of the moving average of the weights; 0 for none.
        patience: Stop after this many validations without improvement.
        seconds: Time limit; the learning-rate schedule ends with it.
        precision: auto takes bfloat16 where this processor is faster with it.
        preset: paper is the published network and procedure (750,000 steps of 32 patches: hours).
        range: Values LO:HI of the files that become 0 and 1.
        units: hu: TIFF, .npy and HDF5 files are in Hounsfield units, as DICOM files always are, and are converted to
            attenuation in units of 81.36/m.
        dataset: The data set of HDF5 files that have several.
        grey: Convert colour images to grey.
        seed: Random seed.
        threads: Number of threads; by default all cores.
        resume: Continue an interrupted run from the state file beside the output.
    """
    training = Training.begin("train patch-nr", dict(locals()))
    prior = models.patch_nr(
        size=size,
        channels=common_channels(training.images),
        layers=layers,
        hidden=hidden,
        padding=padding,
        smoothing=smoothing,
        precision=precision,
        preset=preset,
    )
    training.fit(
        prior,
        learn_patches,
        lambda result: f"{result.best:.2f} nats per validation patch",
        {"dihedral": dihedral, "precision": precision, "preset": preset},
    )
