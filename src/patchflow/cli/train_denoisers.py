"""``patchflow train denoiser`` and ``train pnn``: the networks of plug and play."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from patchflow import models
from patchflow.cli.config import command_line, write_config
from patchflow.cli.options import check_output, start
from patchflow.cli.slices import Units
from patchflow.cli.train import read_training
from patchflow.errors import InputError, NumericalError
from patchflow.fit import Fit
from patchflow.learn_denoiser import learn_denoiser
from patchflow.networks.denoiser import Denoiser
from patchflow.networks.proximal import Activation
from patchflow.networks.proximal_denoiser import ProximalDenoiser
from patchflow.numerics.averaged import check_lipschitz
from patchflow.numerics.patches import common_channels
from patchflow.numerics.precision import Precision

# Of the image on which a Lipschitz constant is measured.
_SIDE = 64


def train_denoiser(
    images: list[str],
    *,
    output: str = "denoiser.safetensors",
    validation: str | None = None,
    holdout: float = 0.1,
    low: float = 0.0,
    high: float = 50 / 255,
    widths: list[int] | None = None,
    blocks: int = 2,
    preset: Literal["default", "paper"] = "default",
    crop: int = 48,
    batch: int = 16,
    steps: int = 20_000,
    lr: float = 2e-3,
    average: float = 0.995,
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
    """Learn a denoiser of all noise levels of a range (a small DRUNet), for reconstruct --method dpir.

    Writes the model, and beside it the configuration (.yaml) that repeats the run. Ctrl-C keeps the best state so far;
    --resume continues.

    Args:
        images: PNG, JPEG, TIFF, .npy or HDF5 files, also stacks; or the DICOM files (or the folder) of one CT series.
        output: Model file to write.
        validation: A file to validate on; without it, a part of each training image is held out.
        holdout: Held-out fraction of each training image.
        low: The smallest noise level, in units of the image range.
        high: The largest.
        widths: Channels of each scale, finest first, as [16,32,64].
        blocks: Residual blocks of each scale, on either way.
        preset: paper is the published network, of 32 million weights; it overrides widths and blocks.
        crop: Side length of the training crops in pixels.
        batch: Crops per step.
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
    settings = dict(locals())
    training, held = _begin(settings)
    denoiser = models.drunet(
        channels=common_channels(training),
        widths=(16, 32, 64) if widths is None else widths,
        blocks=blocks,
        low=low,
        high=high,
        preset=preset,
    )
    _learn(denoiser, training, held, settings, "train denoiser")


def train_pnn(
    images: list[str],
    *,
    output: str = "pnn.safetensors",
    validation: str | None = None,
    holdout: float = 0.1,
    level: float = 25 / 255,
    gamma: float | None = None,
    width: int = 8,
    features: int = 32,
    size: int = 5,
    layers: int = 4,
    activation: Activation = "shrink",
    penalty: float = 0.0,
    crop: int = 40,
    batch: int = 8,
    steps: int = 20_000,
    lr: float = 5e-3,
    average: float = 0.995,
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
    """Learn a convolutional proximal neural network as a denoiser, for reconstruct --method pnp-pnn.

    Without --gamma it is averaged, so that plug and play converges. Prints the measured Lipschitz constant.

    Args:
        images: PNG, JPEG, TIFF, .npy or HDF5 files, also stacks; or the DICOM files (or the folder) of one CT series.
        output: Model file to write.
        validation: A file to validate on; without it, a part of each training image is held out.
        holdout: Held-out fraction of each training image.
        level: The noise level, in units of the image range.
        gamma: Factor of the published residual form, such as 1.99 or 5: more freedom, no guarantee.
        width: Channels between the layers.
        features: Filters of each layer.
        size: Side length of the filters, odd.
        layers: Number of layers.
        activation: shrink (learned thresholds), relu, elu or tanh.
        penalty: Weight of the Parseval penalty during training, in place of the projection after every step.
        crop: Side length of the training crops in pixels.
        batch: Crops per step.
        steps: Training steps.
        lr: Peak learning rate.
        average: Decay of the moving average of the weights; 0 for none.
        patience: Stop after this many validations without improvement.
        seconds: Time limit; the learning-rate schedule ends with it.
        dihedral: Turn and mirror crops at random; false for images with a preferred direction.
        range: Values LO:HI of the files that become 0 and 1.
        units: hu: TIFF, .npy and HDF5 files are in Hounsfield units.
        dataset: The data set of HDF5 files that have several.
        grey: Convert colour images to grey.
        seed: Random seed.
        threads: Number of threads; by default all cores.
        resume: Continue an interrupted run from the state file beside the output.
    """
    settings = dict(locals())
    training, held = _begin(settings)
    denoiser = models.pnn(
        channels=common_channels(training),
        level=level,
        gamma=gamma,
        width=width,
        features=features,
        size=size,
        layers=layers,
        activation=activation,
    )
    _learn(denoiser, training, held, settings, "train pnn")
    measured = check_lipschitz(denoiser.network, training[0][:, :, :_SIDE, :_SIDE] - 0.5)
    told = (
        f"averaged with {denoiser.averagedness:.3g}"
        if denoiser.averagedness < 1
        else "not averaged"
    )
    print(
        f"Lipschitz constant of the network: {measured:.4f} measured, 1 guaranteed; of the denoiser: "
        f"{denoiser.lipschitz:.3g} guaranteed ({told})."
    )


def _begin(settings: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    check_output(Path(settings["output"]), (".safetensors",))
    start(settings["seed"], settings["threads"])
    how = (settings["range"], settings["units"], settings["dataset"], settings["grey"])
    training = read_training(settings["images"], *how)
    path = settings["validation"]
    return training, [] if path is None else read_training([path], *how)


def _learn(
    denoiser: Denoiser,
    training: list[Tensor],
    held: list[Tensor],
    settings: dict[str, Any],
    command: str,
) -> Fit:
    target = Path(settings["output"])
    state = target.with_suffix(".state.safetensors")
    proximal = isinstance(denoiser, ProximalDenoiser)
    if settings["resume"] and not state.exists():
        raise InputError(f"There is no {state} to resume from; start without --resume.")
    try:
        result = learn_denoiser(
            denoiser,
            training,
            held,
            holdout=settings["holdout"],
            crop=settings["crop"],
            dihedral=settings["dihedral"],
            batch=settings["batch"],
            steps=settings["steps"],
            lr=settings["lr"],
            average=settings["average"],
            penalty=settings["penalty"] if proximal else 0.0,
            patience=settings["patience"],
            seconds=settings["seconds"],
            precision="float32" if proximal else settings["precision"],
            checkpoint=state,
            resume=settings["resume"],
            progress=True,
        )
    except NumericalError:
        models.save(target, denoiser, images=training, seed=settings["seed"])
        raise
    summary = {
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "validation_psnr": -result.best,
        "stopped": result.stopped,
        "history": result.validation,
    }
    models.save(target, denoiser, images=training, seed=settings["seed"], training=summary)
    write_config(target.with_suffix(".yaml"), command, settings)
    print(
        f"{target}: {-result.best:.2f} dB on the validation crops after {result.steps} steps in {result.seconds:.0f} s "
        f"({result.stopped})."
    )
    if result.stopped == "interrupted":
        print(
            f"Interrupted; {state} holds the state. Continue with: "
            f"{command_line(command, settings | {'resume': True}, 'images')}"
        )
    else:
        state.unlink(missing_ok=True)
    return result
