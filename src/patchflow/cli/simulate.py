"""``patchflow simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from patchflow.cli.config import write_config
from patchflow.cli.options import check_output, check_stack, start, value_range
from patchflow.cli.problems import Settings, refuse_foreign_flags
from patchflow.cli.scan import ScanFlags
from patchflow.cli.scanner import check_angles_flag, scanner_of
from patchflow.cli.slices import SLACK, Units, read_slices
from patchflow.errors import InputError
from patchflow.io.images import read_stack, write_image
from patchflow.io.sinogram import Sinogram, write_sinogram
from patchflow.papers import leuschner2021_lodopab as lodopab
from patchflow.problems.attenuation import MU_MAX
from patchflow.progress import progress_line


def simulate(
    images: list[str],
    *,
    problem: str,
    output: str | None = None,
    angles: int | None = None,
    photons: float | None = None,
    bins: int | None = None,
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
    range: str | None = None,
    grey: bool = False,
    seed: int = 0,
) -> None:
    """Simulate a noisy measurement of an image, or the sinogram of CT slices.

    Args:
        images: The image; for ct also several, or the DICOM files (or the folder) of one series.
        problem: super-resolution, deblurring, inpainting, denoising, ct (computed tomography), or a Python file that
            defines likelihood.
        output: File to write, by default measurement.tif; floating-point TIFF or .npy keeps the noise as it is. For ct
            .h5 (sinogram.h5).
        angles: ct: number of angles, equally spaced over 180 degrees.
        photons: ct: mean number of photons per bin without an object, 4096 by default.
        bins: ct: number of detector bins; by default one per pixel of the diagonal, 513 for 362 x 362 pixels.
        field_of_view: ct: side of the image in metres; that of the DICOM files by default.
        limited: ct: measure only the angles A:B, in degrees.
        fine: ct: pixels along a side of the finer grid that is measured, 1000 by default or twice the image.
        units: ct: of TIFF, .npy and HDF5 files: normalised (attenuation in units of 81.36/m), or hu.
        dataset: ct: the data set of HDF5 files that have several.
        noise: Standard deviation of the noise, in units of the image range.
        scale: Super-resolution: image pixels per measured pixel.
        boundary: circular or valid for super-resolution; periodic, reflect or valid for deblurring.
        kernel: The blur kernel, an image or .npy file; super-resolution: by default a Gaussian of half the scale.
        mask: Inpainting: an image that is white where pixels are measured.
        range: Values LO:HI of the file that become 0 and 1.
        grey: Convert a colour image to grey.
        seed: Random seed of the noise.
    """
    settings = dict(locals())
    refuse_foreign_flags(problem, settings)
    if problem == "ct":
        flags = ScanFlags(angles, photons, None, field_of_view, limited, dataset)
        _simulate_ct(images, output, flags, bins, fine, units, settings, seed)
        return
    if len(images) > 1:
        raise InputError(
            f"{len(images)} images were given but {problem} takes one; save a stack as one .tif or .npy file."
        )
    image = images[0]
    target = Path("measurement.tif" if output is None else output)
    check_output(target, (".tif", ".tiff", ".npy", ".png", ".jpg", ".jpeg"))
    start(seed, None)
    x = read_stack(image, value_range=value_range(range), grey=grey)
    check_stack(target, len(x))
    chosen = Settings(problem, noise, scale, boundary, kernel, mask)
    likelihood = chosen.likelihood((x.shape[2], x.shape[3]), measured=False)
    write_image(target, likelihood.simulate(x))
    write_config(target.with_suffix(".yaml"), "simulate", settings)
    print(f"{target}: {problem} of {image}, noise {chosen.std:g}.")


def _simulate_ct(
    images: list[str],
    output: str | None,
    flags: ScanFlags,
    bins: int | None,
    fine: int | None,
    units: Units,
    settings: dict[str, object],
    seed: int,
) -> None:
    target = Path("sinogram.h5" if output is None else output)
    check_output(target, (".h5", ".hdf5"))
    check_angles_flag(flags)
    start(seed, None)
    found = read_slices(images, units=units, dataset=flags.dataset, dither=True, slack=SLACK)
    scanner = scanner_of(found, images, flags, bins, fine)
    size, operator, photons = scanner.size, scanner.fine, scanner.photons
    if found.note:
        print(found.note)
    print(f"Measured on a finer grid: {operator.describe()}.")
    y = [lodopab.simulate(x, operator, photons) for x in progress_line(found.images, unit="slice")]
    write_sinogram(
        target,
        Sinogram(
            torch.cat(y),
            angles=operator.angles,
            detector_spacing=operator.spacing,
            pixel_spacing=scanner.view / size,
            image_shape=(size, size),
            photons=photons,
            attenuation_scale=MU_MAX,
            offset=0.0,
        ),
    )
    write_config(target.with_suffix(".yaml"), "simulate", settings)
    print(
        f"{target}: {len(y)} slice(s) of {size} x {size} pixels on {scanner.view:.4g} m, {len(operator.angles)} angles "
        f"x {operator.range_shape[1]} bins, {photons:g} photons."
    )
