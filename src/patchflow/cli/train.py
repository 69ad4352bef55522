"""``patchflow train``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor

from patchflow import models
from patchflow.cli.config import command_line, write_config
from patchflow.cli.options import check_output, start, value_range
from patchflow.cli.slices import Units, read_slices
from patchflow.errors import NumericalError
from patchflow.io.images import check_varies
from patchflow.learn import learn_patches
from patchflow.numerics.precision import Precision


def train_patch_nr(
    images: list[str],
    *,
    output: str = "prior.safetensors",
    validation: str | None = None,
    holdout: float = 0.1,
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
    settings = dict(locals())
    target = Path(output)
    check_output(target, (".safetensors",))
    start(seed, threads)
    training = read_training(images, range, units, dataset, grey)
    held = [] if validation is None else read_training([validation], range, units, dataset, grey)
    channels = training[0].shape[1]
    prior = models.patch_nr(
        size=size,
        channels=channels,
        layers=layers,
        hidden=hidden,
        padding=padding,
        smoothing=smoothing,
        precision=precision,
        preset=preset,
    )
    state = target.with_suffix(".state.safetensors")
    try:
        result = learn_patches(
            prior,
            training,
            held,
            holdout=holdout,
            dihedral=dihedral,
            batch=batch,
            steps=steps,
            lr=lr,
            average=average,
            patience=patience,
            seconds=seconds,
            precision=precision,
            preset=preset,
            checkpoint=state,
            resume=resume,
            progress=True,
        )
    except NumericalError:
        models.save(target, prior, images=training, seed=seed)
        raise
    summary = {
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "validation": result.best,
        "stopped": result.stopped,
        "history": result.validation,
    }
    models.save(target, prior, images=training, seed=seed, training=summary)
    write_config(target.with_suffix(".yaml"), "train patch-nr", settings)
    print(
        f"{target}: {result.best:.2f} nats per validation patch after {result.steps} steps in {result.seconds:.0f} s "
        f"({result.stopped})."
    )
    if result.stopped == "interrupted":
        print(
            f"Interrupted; {state} holds the state. Continue with: "
            f"{command_line('train patch-nr', settings | {'resume': True}, 'images')}"
        )
    else:
        state.unlink(missing_ok=True)


def read_training(
    images: list[str], range: str | None, units: Units, dataset: str | None, grey: bool
) -> list[Tensor]:
    """Read the images of the training commands, and print what there is to say about them.

    Args:
        images: Files, or a folder of DICOM files.
        range: The flag of the value range.
        units: The units of the files.
        dataset: The data set of HDF5 files.
        grey: Convert colour to grey.

    Raises:
        InputError: If a file cannot be read, or an image is constant.
    """
    found = read_slices(
        images,
        units=units,
        dataset=dataset,
        dither=True,
        value_range=value_range(range),
        grey=grey,
    )
    for name, image in zip(found.names, found.images, strict=True):
        check_varies(image, name)
    if found.note:
        print(found.note)
    return found.images
