"""``patchflow reconstruct --problem ct``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from patchflow.cli.calibrate_slices import show_difference
from patchflow.cli.config import write_config
from patchflow.cli.error_bars import Calibration, Recipe
from patchflow.cli.notes import convergence
from patchflow.cli.novelty import Watch
from patchflow.cli.options import check_output, output_folder, start
from patchflow.cli.scan import Scan, ScanFlags, read_scan
from patchflow.cli.slices import Units, read_reference
from patchflow.cli.tomography_methods import Choices, Follow, Result, SliceSolver
from patchflow.cli.tomography_report import metrics_of, write_tomography_report
from patchflow.errors import InputError
from patchflow.io.dicom import Series, check_series_folder, read_series, write_series
from patchflow.io.images import write_image
from patchflow.metrics import psnr
from patchflow.problems.attenuation import MU_MAX, to_hounsfield
from patchflow.problems.poisson import PoissonNoise
from patchflow.uncertainty.noise_level import noise_level


def reconstruct_ct(
    measurement: str,
    output: str | None,
    flags: ScanFlags,
    choices: Choices,
    settings: dict[str, object],
    seed: int,
    threads: int | None,
    novelty: str | None = None,
) -> None:
    """Reconstruct slices from a sinogram.

    Args:
        measurement: The sinogram's file.
        output: The file, or the folder of a DICOM series, to write.
        flags: What the flags say about the scan.
        choices: What they say about the reconstruction.
        settings: All flags of the command, for the configuration.
        seed: Random seed.
        threads: Number of threads.
        novelty: The model file whose novelty map the report shows; by default the prior.

    Raises:
        InputError: If something given cannot be used.
    """
    target = Path("reconstruction.tif" if output is None else output)
    calibrated = None
    if choices.calibration is not None:
        calibrated = Calibration.read(choices.calibration, tomography=True)
    for path in (target, *(() if calibrated is None else _ends(target))):
        _check_target(path, choices.template)
    start(seed, threads)
    scan = read_scan(measurement, flags)
    template = None if choices.template is None else _read_template(choices.template, scan)
    truth = None if choices.truth is None else _read_truth(choices.truth, choices.units, scan)
    prior = choices.load(scan)
    solve = SliceSolver(scan, prior, choices)
    has_own = calibrated is not None and calibrated.watches(prior)
    watch = Watch.read(novelty, choices.prior, prior, report=choices.report, calibrated=has_own)
    watch.check(torch.zeros(1, 1, *scan.operator.domain_shape))
    if choices.report is not None:
        output_folder(choices.report)
    for note in scan.notes:
        print(note)
    print(
        f"{scan.operator.describe()}; {scan.covered:.4g} of 180 degrees, {scan.photons:g} photons."
    )
    print(solve.describe())
    begun = time.perf_counter()
    results = _run(scan, truth, solve)
    seconds = time.perf_counter() - begun
    solutions = [result.solution for result in results]
    x = torch.cat([solution.x for solution in solutions])
    _write(target, x, template, choices, choices.chosen.title)
    write_config(target.with_suffix(".yaml"), "reconstruct", settings)
    y = scan.y[: len(x)]
    print(
        f"{target}: {choices.method}, {len(x)} of {len(scan.y)} slice(s) in {seconds:.1f} s, "
        f"{'HU' if choices.units == 'hu' or template is not None else 'normalised'}; "
        f"misfit {_misfit(scan, x, y):.3f} (1 is what the noise explains)."
    )
    notes = [*solve.notes, *convergence(solutions, "; --steps allows more")]
    print(*notes, sep="\n", end="\n" if notes else "")
    if solutions[-1].interrupted or len(x) < len(scan.y):
        print("Interrupted; what was finished is kept.")
    fbp = torch.cat([result.fbp for result in results])
    if truth is not None:
        truth = truth[: len(x)]
        figures = metrics_of(x, truth)
        means = {name: sum(row[name] for row in figures) / len(figures) for name in figures[0]}
        print(
            f"PSNR {means['psnr']:.2f} dB, SSIM {means['ssim']:.3f} (range of the slice); "
            f"{means['psnr_range_1']:.2f} dB, {means['ssim_range_1']:.3f} (range 1)"
        )
    bars = None
    if calibrated is not None:
        recipe = Recipe.of(scan.likelihood, choices, choices.prior, channels=1)
        noise = noise_level(scan.likelihood, y)
        bars = calibrated.bars(recipe, x, prior, truth, show_difference, noise)
        level = f"{100 * calibrated.intervals.level:.0f} %"
        for path, end, name in zip(
            _ends(target), (bars.low, bars.high), ("low", "high"), strict=True
        ):
            _write(path, end, template, choices, f"{choices.chosen.title}, {level} {name}")
        print(*bars.notes, sep="\n")
        notes += bars.notes
    if choices.report is not None:
        finding = watch.find(x, None if bars is None else bars.novelty)
        print(*finding.notes, sep="\n", end="\n" if finding.notes else "")
        page = write_tomography_report(
            choices.report,
            settings=settings,
            title=f"Computed tomography of {Path(measurement).name}",
            summary=f"{scan.operator.describe()}. {solve.describe()}",
            method=choices.chosen.title,
            y=y,
            fbp=fbp,
            x=x,
            truth=truth,
            history=solutions[0].history,
            finding=finding,
            bars=bars,
            seconds=seconds,
            notes=[*scan.notes, *notes],
        )
        print(f"Report: {page}")


def _ends(target: Path) -> tuple[Path, Path]:
    """Where the lower and the upper ends of error bars go, beside the output."""
    low, high = (target.with_name(f"{target.stem}-{end}{target.suffix}") for end in ("low", "high"))
    return low, high


def _check_target(target: Path, template: str | None) -> None:
    if template is None:
        if target.suffix == "":
            raise InputError(
                f"{target} has no extension, so it is the folder of a DICOM series, which needs --template, the series "
                "whose headers it takes; give it, or a .tif or .npy file."
            )
        check_output(target, (".tif", ".tiff", ".npy"))
    elif target.suffix != "":
        raise InputError(
            f"{target} has the extension {target.suffix!r} but --template {template} asks for a DICOM series; give a "
            "new folder."
        )
    else:
        check_series_folder(target)


def _read_template(path: str, scan: Scan) -> Series:
    series = read_series(path)
    expected = (len(scan.y), 1, *scan.operator.domain_shape)
    if tuple(series.hu.shape) != expected:
        raise InputError(
            f"The series {path} has {len(series.hu)} slice(s) of {series.hu.shape[2]} x {series.hu.shape[3]} pixels "
            f"but the reconstruction will have {expected[0]} of {expected[2]} x {expected[3]}; give the series of the "
            "same slices."
        )
    pixel = 1000 * scan.operator.pixel
    if not all(math.isclose(spacing, pixel, rel_tol=1e-2) for spacing in series.spacing):
        raise InputError(
            f"The series {path} has pixels of {series.spacing[0]:g} x {series.spacing[1]:g} mm but the reconstruction "
            f"of {pixel:.4g} mm; give the series of the same slices, or correct --field-of-view."
        )
    return series


def _read_truth(path: str, units: Units, scan: Scan) -> Tensor:
    found = read_reference(path, units).images
    shape = scan.operator.domain_shape
    if len(found) != len(scan.y) or any(tuple(image.shape[2:]) != shape for image in found):
        raise InputError(
            f"The truth {path} has {len(found)} slice(s) of {found[0].shape[2]} x {found[0].shape[3]} pixels but the "
            f"reconstruction will have {len(scan.y)} of {shape[0]} x {shape[1]}; give the slices that were measured."
        )
    return torch.cat(found)


def _run(
    scan: Scan, truth: Tensor | None, solve: Callable[[Tensor, Follow | None], Result]
) -> list[Result]:
    """Reconstruct slice by slice; when interrupted, those that are finished, or else the one so far."""
    results: list[Result] = []
    for k in range(len(scan.y)):
        if len(scan.y) > 1:
            print(f"Slice {k + 1} of {len(scan.y)}:")
        try:
            result = solve(scan.y[k : k + 1], None if truth is None else _follow(truth[k : k + 1]))
        except KeyboardInterrupt:
            if not results:
                raise
            break
        if result.solution.interrupted and results:
            break
        results.append(result)
        if result.solution.interrupted:
            break
    return results


def _follow(truth: Tensor) -> Follow:
    own = float(truth.max() - truth.min())

    def callback(step: int, x: Tensor, value: float) -> Mapping[str, str]:
        return {"psnr": f"{float(psnr(x, truth, own).mean()):.2f}"}

    return callback


@torch.no_grad()
def _misfit(scan: Scan, x: Tensor, y: Tensor) -> float:
    """The mean squared residual over its variance."""
    noise = PoissonNoise(scan.photons, MU_MAX)
    parts = [
        noise.precision(b) * (scan.operator(a) - b).square()
        for a, b in zip(x.split(1), y.split(1), strict=True)
    ]
    return float(torch.cat(parts).mean())


def _write(target: Path, x: Tensor, template: Series | None, choices: Choices, title: str) -> None:
    if template is None:
        write_image(target, to_hounsfield(x) if choices.units == "hu" else x)
        return
    count = len(x)  # fewer when interrupted
    part = Series(
        template.hu[:count],
        template.spacing,
        template.positions[:count],
        template.headers[:count],
    )
    write_series(target, to_hounsfield(x), part, title)
