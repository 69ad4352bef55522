"""``patchflow train denoiser`` and ``train pnn``: the networks of plug and play."""

from __future__ import annotations

from typing import Literal

from patchflow import models
from patchflow.cli.slices import Units
from patchflow.cli.training import Training
from patchflow.fit import Fit
from patchflow.learn_denoiser import Spread, learn_denoiser
from patchflow.networks.drunet import WIDTHS
from patchflow.networks.proximal import Activation
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
    spread: Spread = "uniform",
    widths: list[int] | None = None,
    blocks: int = 1,
    cell: int = 2,
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

    Samples of the posterior (reconstruct --samples) take one with --low 0.003 --high 0.5 --spread log-uniform.

    Writes the model, and beside it the configuration (.yaml) that repeats the run. Ctrl-C keeps the best state so far;
    --resume continues.

    Args:
        images: PNG, JPEG, TIFF, .npy or HDF5 files, also stacks; or the DICOM files (or the folder) of one CT series.
        output: Model file to write.
        validation: A file to validate on; without it, a part of each training image is held out.
        holdout: Held-out fraction of each training image.
        low: The smallest noise level, in units of the image range.
        high: The largest.
        spread: How noise levels are drawn: uniform, or log-uniform where they span orders of magnitude.
        widths: Channels of each scale, finest first, as [32,64,64].
        blocks: Residual blocks of each scale, on either way.
        cell: Pixels along a side of the cells that are the finest scale: 1 is finer and slower.
        preset: paper is the published network, of 32 million weights; it overrides widths, blocks and cell.
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
    training = Training.begin("train denoiser", dict(locals()))
    denoiser = models.drunet(
        channels=common_channels(training.images),
        widths=WIDTHS if widths is None else widths,
        blocks=blocks,
        cell=cell,
        low=low,
        high=high,
        preset=preset,
    )
    training.fit(
        denoiser,
        learn_denoiser,
        _validated,
        {"crop": crop, "dihedral": dihedral, "precision": precision, "spread": spread},
    )


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
    activation: Activation | None = None,
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
        activation: shrink or clip (learned thresholds), relu, elu or tanh; by default shrink, and clip with --gamma.
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
    training = Training.begin("train pnn", dict(locals()))
    denoiser = models.pnn(
        channels=common_channels(training.images),
        level=level,
        gamma=gamma,
        width=width,
        features=features,
        size=size,
        layers=layers,
        activation=activation,
    )
    training.fit(
        denoiser,
        learn_denoiser,
        _validated,
        {"crop": crop, "dihedral": dihedral, "penalty": penalty},
    )
    measured = check_lipschitz(denoiser.network, training.images[0][:, :, :_SIDE, :_SIDE] - 0.5)
    told = (
        f"averaged with {denoiser.averagedness:.3g}"
        if denoiser.averagedness < 1
        else "not averaged"
    )
    print(
        f"Lipschitz constant of the network: {measured:.4f} measured, 1 guaranteed; of the denoiser: "
        f"{denoiser.lipschitz:.3g} guaranteed ({told})."
    )


def _validated(result: Fit) -> str:
    return f"{-result.best:.2f} dB on the validation crops"
