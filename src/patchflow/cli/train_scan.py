"""``patchflow train fbp-unet`` and ``train single-scan``: networks that reconstruct one kind of scan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from patchflow import models
from patchflow.cli.scan import ScanFlags
from patchflow.cli.scanner import Scanner, check_angles_flag, scanner_for
from patchflow.cli.slices import Units
from patchflow.cli.training import Training
from patchflow.errors import InputError
from patchflow.learn_scan import learn_scan
from patchflow.numerics.precision import Precision
from patchflow.scan_network import ScanNetwork
from patchflow.tomography_models import WIDTHS

# Peak rates of Adam by preset: without sums and normalisation, the published network diverges at higher ones.
_RATES = {"default": 2e-3, "paper": 5e-4}


def train_fbp_unet(
    images: list[str],
    *,
    output: str = "fbp-unet.safetensors",
    validation: str | None = None,
    scan: str | None = None,
    angles: int | None = None,
    photons: float | None = None,
    bins: int | None = None,
    size: int | None = None,
    field_of_view: float | None = None,
    limited: str | None = None,
    fine: int | None = None,
    widths: list[int] | None = None,
    blocks: int = 1,
    cell: int = 2,
    preset: Literal["default", "paper"] = "default",
    crop: int = 96,
    batch: int = 4,
    steps: int = 20_000,
    lr: float | None = None,
    average: float = 0.99,
    patience: int | None = None,
    seconds: float | None = None,
    precision: Precision = "auto",
    units: Units = "normalised",
    dataset: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    resume: bool = False,
) -> None:
    """Learn to correct filtered backprojections by a U-Net, for reconstruct --problem ct --method fbp-unet.

    The scan is simulated, with fresh noise all the time: the model serves this geometry and this number of photons.
    Say them by the flags of simulate --problem ct, or by --scan, a sinogram that was taken so.

    Writes the model, and beside it the configuration (.yaml) that repeats the run. Ctrl-C keeps the best state so far;
    --resume continues.

    Args:
        images: Slices: TIFF, .npy or HDF5 files, also stacks; or the DICOM files (or the folder) of one CT series.
        output: Model file to write.
        validation: A file with slices to validate on; without it the middle one of the training slices is held out.
        scan: A sinogram whose geometry and dose to train for; the next flags then complete what it does not say.
        angles: Number of angles, equally spaced over 180 degrees.
        photons: Mean number of photons per bin without an object, 4096 by default.
        bins: Number of detector bins; by default one per pixel of the diagonal, 513 for 362 x 362 pixels.
        size: Of --scan: pixels along a side of the image.
        field_of_view: Side of the image in metres; that of the DICOM files by default.
        limited: Only the angles A:B, in degrees.
        fine: Pixels along a side of the finer grid that is measured, 1000 by default or twice the image.
        widths: Channels of each scale, finest first, [32,64,96] by default.
        blocks: Residual blocks of each scale, on the way down and up.
        cell: Pixels along a side of the cells of the finest scale.
        preset: paper is the published U-Net; it overrides widths, blocks and cell.
        crop: Side length of the training crops in pixels.
        batch: Crops per step.
        steps: Training steps.
        lr: Peak learning rate, 0.002 by default and 0.0005 of the preset paper.
        average: Decay of the moving average of the weights; 0 for none.
        patience: Stop after this many validations without improvement.
        seconds: Time limit; the learning-rate schedule ends with it.
        precision: auto takes bfloat16 where this processor is faster with it.
        units: hu: TIFF, .npy and HDF5 files are in Hounsfield units.
        dataset: The data set of HDF5 files that have several.
        seed: Random seed.
        threads: Number of threads; by default all cores.
        resume: Continue an interrupted run from the state file beside the output.
    """
    settings = dict(locals()) | {"lr": _RATES[preset] if lr is None else lr}
    training, scanner = _begin("train fbp-unet", settings)
    model = models.fbp_unet(
        scanner.operator,
        scanner.photons,
        widths=widths or WIDTHS,
        blocks=blocks,
        cell=cell,
        preset=preset,
    )
    _fit(training, scanner, model)


def train_single_scan(
    images: list[str],
    *,
    output: str = "single-scan.safetensors",
    validation: str | None = None,
    scan: str | None = None,
    angles: int | None = None,
    photons: float | None = None,
    bins: int | None = None,
    size: int | None = None,
    field_of_view: float | None = None,
    limited: str | None = None,
    fine: int | None = None,
    start: Literal["auto", "network", "tv"] = "auto",
    stages: int = 4,
    widths: list[int] | None = None,
    blocks: int = 1,
    cell: int = 2,
    members: int = 1,
    crop: int = 96,
    batch: int = 4,
    steps: int = 20_000,
    lr: float = 2e-3,
    average: float = 0.99,
    patience: int | None = None,
    seconds: float | None = None,
    precision: Precision = "auto",
    units: Units = "normalised",
    dataset: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    resume: bool = False,
) -> None:
    """Learn to reconstruct one kind of scan from a few slices, for reconstruct --problem ct --method single-image.

    Networks correct filtered backprojection, or total variation where directions are missing; between them steps lead
    towards the sinogram. The scan is simulated, with fresh noise all the time: the model serves this geometry and this
    number of photons. Say them by the flags of simulate --problem ct, or by --scan, a sinogram that was taken so.

    Writes the model, and beside it the configuration (.yaml) that repeats the run. Ctrl-C keeps the best state so far;
    --resume continues.

    Args:
        images: Slices: TIFF, .npy or HDF5 files, also stacks; or the DICOM files (or the folder) of one CT series.
        output: Model file to write.
        validation: A file with slices to validate on; without it the middle one of the training slices is held out.
        scan: A sinogram whose geometry and dose to train for; the next flags then complete what it does not say.
        angles: Number of angles, equally spaced over 180 degrees.
        photons: Mean number of photons per bin without an object, 4096 by default.
        bins: Number of detector bins; by default one per pixel of the diagonal, 513 for 362 x 362 pixels.
        size: Of --scan: pixels along a side of the image.
        field_of_view: Side of the image in metres; that of the DICOM files by default.
        limited: Only the angles A:B, in degrees.
        fine: Pixels along a side of the finer grid that is measured, 1000 by default or twice the image.
        start: network: the first stage corrects filtered backprojections; tv: it is total variation, which takes
            longer and fills in missing directions; auto: tv where directions are missing.
        stages: Stages in a row, with a step to the data between them; all but the first by one network.
        widths: Channels of each scale of the networks, finest first, [32,64,96] by default.
        blocks: Residual blocks of each scale, on the way down and up.
        cell: Pixels along a side of the cells of the finest scale.
        members: Networks of each stage, learned alike from other random starts; their mean is taken.
        crop: Side length of the training crops in pixels.
        batch: Crops per step.
        steps: Training steps.
        lr: Peak learning rate.
        average: Decay of the moving average of the weights; 0 for none.
        patience: Stop after this many validations without improvement.
        seconds: Time limit; the learning-rate schedule ends with it.
        precision: auto takes bfloat16 where this processor is faster with it.
        units: hu: TIFF, .npy and HDF5 files are in Hounsfield units.
        dataset: The data set of HDF5 files that have several.
        seed: Random seed.
        threads: Number of threads; by default all cores.
        resume: Continue an interrupted run from the state file beside the output.
    """
    training, scanner = _begin("train single-scan", dict(locals()))
    model = models.single_scan(
        scanner.operator,
        scanner.photons,
        start=start,
        stages=stages,
        widths=widths or WIDTHS,
        blocks=blocks,
        cell=cell,
        members=members,
    )
    _fit(training, scanner, model)


def _begin(command: str, settings: Mapping[str, Any]) -> tuple[Training, Scanner]:
    """Read the slices, and the scan that is to be simulated."""
    flags = ScanFlags(
        **{
            name: settings[name]
            for name in ("angles", "photons", "size", "field_of_view", "limited", "dataset")
        }
    )
    if settings["scan"] is None:
        check_angles_flag(flags)
        if settings["size"] is not None:
            raise InputError(
                f"--size {settings['size']} says nothing without --scan; the slices say it."
            )
    training = Training.begin(command, settings)
    images = settings["images"]
    scanner = scanner_for(
        training.found, images, flags, settings["scan"], settings["bins"], settings["fine"]
    )
    print(f"Measured on a finer grid: {scanner.fine.describe()}; {scanner.photons:g} photons.")
    return training, scanner


def _fit(training: Training, scanner: Scanner, model: ScanNetwork) -> None:
    said = training.settings
    training.fit(
        model,
        learn_scan,
        lambda result: f"{-result.best:.2f} dB on the validation slices",
        {"fine": scanner.fine, "crop": said["crop"], "precision": said["precision"]},
    )
