"""``patchflow calibrate``: error bars of images, or whether the samples of a posterior model are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from patchflow.cli.calibrate_images import calibrate_images
from patchflow.cli.calibrate_slices import calibrate_slices
from patchflow.cli.calibration import check_model
from patchflow.cli.image_methods import ImageMethod, Solver
from patchflow.cli.image_samples import Chain, Sampling
from patchflow.cli.problems import Settings, refuse_foreign_flags
from patchflow.cli.scan import ScanFlags
from patchflow.cli.slices import Units
from patchflow.cli.tomography_methods import Choices
from patchflow.errors import InputError

# Flags that concern images alone, beside those of scans, and their defaults.
_OF_IMAGES = {
    **{"method": "patchnr", "prior": None, "weight": None, "noise": 0.01, "scale": 4},
    **{"boundary": None, "kernel": None, "mask": None, "level": 0.9, "false_alarms": 0.01},
    **{"range": None, "grey": False, "samples": None, "chain": "mala"},
    **{"steps": None, "start": None, "ensemble": True},
}


def calibrate(
    images: Sequence[str] = (),
    *,
    problem: str,
    model: str | None = None,
    output: str = "calibration",
    datasets: int | None = None,
    draws: int | None = None,
    correct: Literal["none", "metropolis"] = "none",
    method: ImageMethod | Literal["fbp", "fbp-unet"] = "patchnr",
    prior: str | None = None,
    weight: float | None = None,
    steps: int | None = None,
    start: str | None = None,
    samples: int | None = None,
    chain: Chain = "mala",
    ensemble: bool = True,
    scan: str | None = None,
    angles: int | None = None,
    photons: float | None = None,
    bins: int | None = None,
    size: int | None = None,
    field_of_view: float | None = None,
    limited: str | None = None,
    fine: int | None = None,
    units: Units = "normalised",
    dataset: str | None = None,
    noise: float = 0.01,
    scale: int = 4,
    boundary: Literal["circular", "periodic", "reflect", "valid"] | None = None,
    kernel: str | None = None,
    mask: str | None = None,
    level: float = 0.9,
    false_alarms: float = 0.01,
    range: str | None = None,
    grey: bool = False,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Fit error bars of reconstructions to images with known truth, or test the samples of a posterior model.

    With images: measures each by simulation, reconstructs it, and writes calibration.json for reconstruct
    --calibration: intervals for the pixels, and for priors on patches thresholds of what is unlike these images. From
    ten images on (--level 0.9) the intervals are conformal. For ct the images are slices, measured as by simulate, and
    the intervals go by the noise of the scan at each pixel, too.

    With --model: tests on simulated measurements whether its samples are right. Writes a folder with calibration.png,
    ranks.csv and calibration.json, and says which parameters are overconfident, underconfident or biased.

    Args:
        images: Images with known truth that nothing was learned from: PNG, JPEG, TIFF or .npy; for ct slices: TIFF,
            .npy or HDF5 files, also stacks, or the DICOM files (or the folder) of one series.
        problem: With images as of reconstruct: super-resolution, deblurring, inpainting, denoising, ct or a Python
            file; with --model the Python file of the training.
        model: The model file of patchflow train conditional-snf.
        output: Folder to write; also -o.
        datasets: --model: number of simulated measurements, 300 by default.
        draws: --model: samples of the posterior of each, 200 by default.
        correct: --model: none tests the model; metropolis tests it with that correction, 20 times slower.
        method: Images: the method of reconstruct.
        prior: Images: the model file that the method needs.
        weight: Images: weight of the prior; the default of the method without it.
        steps: Images: number of steps, as of reconstruct; the default of the method without it.
        start: ct: the networks that the method starts at, as of reconstruct.
        samples: Images: calibrate the mean of so many samples (reconstruct --samples), and check the sampler.
        chain: Images: as of reconstruct.
        ensemble: Images: as of reconstruct.
        scan: ct: a sinogram whose geometry and dose to calibrate for; the next flags then complete what it does not
            say.
        angles: ct: number of angles, equally spaced over 180 degrees.
        photons: ct: mean number of photons per bin without an object, 4096 by default.
        bins: ct: number of detector bins; by default one per pixel of the diagonal, 513 for 362 x 362 pixels.
        size: ct: pixels along a side of the slices, if --scan does not say it.
        field_of_view: ct: side of the slices in metres; that of the DICOM files by default.
        limited: ct: only the angles A:B, in degrees.
        fine: ct: pixels along a side of the finer grid that is measured, 1000 by default or twice the image.
        units: ct: of TIFF, .npy and HDF5 files: normalised (attenuation in units of 81.36/m), or hu.
        dataset: ct: the data set of HDF5 files that have several.
        noise: Images: standard deviation of the noise, in units of the image range.
        scale: Super-resolution: image pixels per measured pixel.
        boundary: circular or valid for super-resolution; periodic, reflect or valid for deblurring.
        kernel: Deblurring: the blur kernel, an image or .npy file.
        mask: Inpainting: an image that is white where pixels were measured.
        level: Images: the share of the pixels that the intervals are to cover.
        false_alarms: Images: the share of the calibration images' pixels that may count as unlike them.
        range: Images: values LO:HI of the files that become 0 and 1.
        grey: Images: convert colour images to grey.
        seed: Random seed.
        threads: Number of threads; by default all cores.

    Raises:
        InputError: If neither or both of images and model are given, or what is given does not fit.
    """
    settings = dict(locals()) | {"images": list(images)}
    if bool(images) == (model is not None):
        raise InputError(
            "Give either images with known truth, for error bars, or --model, the model of a posterior to test."
        )
    if model is not None:
        for name, default in _OF_IMAGES.items():
            if settings[name] != default:
                raise InputError(
                    f"--{name.replace('_', '-')} {settings[name]} is for images; leave it out with --model."
                )
        refuse_foreign_flags(problem, settings)
        check_model(problem, model, settings)
        return
    of_model: dict[str, object] = {"datasets": datasets, "draws": draws}
    of_model["correct"] = None if correct == "none" else correct
    for name, value in of_model.items():
        if value is not None:
            raise InputError(f"--{name} {value} is for --model; leave it out.")
    refuse_foreign_flags(problem, settings)
    if problem == "ct":
        flags = ScanFlags(angles, photons, size, field_of_view, limited, dataset)
        choices = Choices(
            *(method, prior, weight, steps, None, None, "adam", "default"),
            truth=None,
            units=units,
            template=None,
            report=None,
            start=start,
        )
        calibrate_slices(images, flags, choices, settings)
        return
    sampling = None if samples is None else Sampling(samples, method, chain, None)
    solver = Solver(
        *(method, steps, None, None, "adam", "default", weight, sampling), ensemble=ensemble
    )
    calibrate_images(
        images, solver, Settings(problem, noise, scale, boundary, kernel, mask), settings
    )
