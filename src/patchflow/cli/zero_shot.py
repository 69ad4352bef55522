"""``patchflow zero-shot``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from patchflow import zero_shot as patchnr
from patchflow.cli.config import command_line, write_config
from patchflow.cli.options import check_output, check_stack, output_folder, start, value_range
from patchflow.errors import InputError
from patchflow.io.images import check_varies, read_stack, write_image
from patchflow.metrics import psnr, ssim
from patchflow.priors.patch import PatchPrior
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.resolution import low_resolution
from patchflow.reconstruct import dual_sr, zssr
from patchflow.records import Record
from patchflow.report import Curve, Panel, Report, write_report
from patchflow.solution import Solution
from patchflow.table import build_table

# The reading of a measurement allows for noise beyond the range of the image, in standard deviations.
_SLACK = 8.0


class _Result(NamedTuple):
    """What was made of the measurement, in a sentence, too; patchnr's prior; and what its record counts."""

    solution: Solution
    told: str
    prior: PatchPrior | None
    axis: str


def zero_shot(
    measurement: str,
    *,
    output: str | None = None,
    method: Literal["patchnr", "zssr", "dual-sr"] = "patchnr",
    scale: int = 2,
    noise: float = 0.01,
    kernel_size: int = 16,
    blur: float | None = None,
    boundary: Literal["circular", "valid"] = "valid",
    weight: float | None = None,
    seconds: float | None = None,
    steps: int | None = None,
    preset: Literal["default", "paper"] = "default",
    truth: str | None = None,
    report: str | None = None,
    range: str | None = None,
    grey: bool = False,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Super-resolve an image from nothing but itself: what is needed is learned from its own patches.

    Writes the image, the configuration (.yaml) that repeats the run, and with --report a folder with an HTML report.
    Ctrl-C keeps the image so far.

    Args:
        measurement: The low-resolution image: PNG, JPEG, TIFF or .npy, grey or colour.
        output: Image to write, by default reconstruction.png; .tif and .npy keep floating-point values.
        method: patchnr (a flow of the image's patches as prior), zssr (a network that learns to undo one more loss of
            resolution), or dual-sr (networks that learn to lower the resolution and to raise it again; the blur is
            learned, too).
        scale: Image pixels per measured pixel.
        noise: Standard deviation of the noise, in units of the image range.
        kernel_size: Side length of the Gaussian blur kernel, in image pixels.
        blur: Standard deviation of the blur in image pixels; half the scale by default.
        boundary: valid measures where the kernel fits, so that the image has a frame which is a guess; circular takes
            it as periodic.
        weight: patchnr: weight of the prior against the data.
        seconds: Time limit of learning, 120 by default (none for patchnr's preset paper).
        steps: Steps after learning (patchnr).
        preset: paper is the published procedure of patchnr (about an hour) or zssr.
        truth: The true image, if known: PSNR, error map and metrics in the report.
        report: Folder for the report.
        range: Values LO:HI of the files that become 0 and 1.
        grey: Convert colour images to grey.
        seed: Random seed.
        threads: Number of threads; by default all cores.
    """
    settings = dict(locals())
    for name, value in {"weight": weight, "steps": steps}.items():
        if value is not None and (method != "patchnr" or (preset, name) == ("paper", "steps")):
            raise InputError(
                f"--{name} {value} says nothing about the method {method} with the preset {preset}; leave it out."
            )
    if (method, preset) == ("dual-sr", "paper"):
        raise InputError("The preset paper is that of patchnr and zssr, not of dual-sr.")
    if not noise > 0:
        raise InputError(
            f"The noise is {noise} but must be positive; for clean 8-bit data use their rounding error, 0.001."
        )
    target = Path("reconstruction.png" if output is None else output)
    check_output(target, (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy"))
    if report is not None:
        output_folder(report)
    start(seed, threads)
    limits = value_range(range)
    y = read_stack(measurement, value_range=limits, grey=grey, slack=_SLACK * noise)
    check_stack(target, len(y))
    check_varies(y, measurement)
    likelihood = low_resolution(
        (y.shape[2], y.shape[3]),
        scale,
        noise=noise,
        kernel_size=kernel_size,
        std=blur,
        boundary=boundary,
    )
    x_true = None if truth is None else read_stack(truth, value_range=limits, grey=grey)
    if x_true is not None and (x_true.shape[1], *x_true.shape[2:]) != (
        y.shape[1],
        *likelihood.operator.domain_shape,
    ):
        height, width = likelihood.operator.domain_shape
        raise InputError(
            f"The truth {truth} has {x_true.shape[1]} channels of {x_true.shape[2]} x {x_true.shape[3]} pixels but the "
            f"reconstruction will have {y.shape[1]} of {height} x {width}; give the image that was measured."
        )
    begun = time.perf_counter()
    result = _solve(method, likelihood, y, weight, seconds, steps, preset)
    spent = time.perf_counter() - begun
    x = result.solution.x
    write_image(target, x)
    write_config(target.with_suffix(".yaml"), "zero-shot", settings)
    residual = float((likelihood.operator(x) - y).square().mean().sqrt())
    print(
        f"{target}: {result.told}, in all {spent:.1f} s; residual {residual:.4f} at noise {noise:g}."
    )
    if x_true is not None:
        print(f"PSNR {float(psnr(x, x_true)):.2f} dB, SSIM {float(ssim(x, x_true)):.3f}")
    if report is not None:
        start_image = likelihood.operator.initial(y)
        page = write_report(report, _report(settings, y, start_image, result, x_true, spent))
        print(f"Report: {page}")


def _solve(
    method: str,
    likelihood: GaussianLikelihood,
    y: Tensor,
    weight: float | None,
    seconds: float | None,
    steps: int | None,
    preset: Literal["default", "paper"],
) -> _Result:
    if method == "zssr":
        limit = zssr.SECONDS if seconds is None else seconds
        solution = zssr.reconstruct(likelihood, y, seconds=limit, preset=preset, progress=True)
        return _Result(solution, "zssr", None, "mean absolute deviation")
    if method == "dual-sr":
        limit = dual_sr.SECONDS if seconds is None else seconds
        solution = dual_sr.reconstruct(likelihood, y, seconds=limit, progress=True)
        told = f"dual-sr, learned in {solution.steps} steps"
        return _Result(solution, told, None, "weighted sum of the losses")
    found = patchnr.reconstruct(
        likelihood,
        y,
        weight=weight,
        seconds=seconds,
        steps=steps,
        preset=preset,
        progress=True,
    )
    told = (
        f"patchnr, learned in {found.training.steps} steps and {found.training.seconds:.0f} s, "
        f"weight {found.weight:g}, {found.solution.steps} steps"
    )
    return _Result(found.solution, told, found.prior, "energy [nats]")


def _report(
    settings: Mapping[str, object],
    y: Tensor,
    init: Tensor,
    result: _Result,
    truth: Tensor | None,
    seconds: float,
) -> Report:
    method, x, history = str(settings["method"]), result.solution.x, result.solution.history
    table = None
    if truth is not None:
        records = [
            Record(name, "0", {"psnr": float(psnr(z, truth)), "ssim": float(ssim(z, truth))})
            for name, z in (("bicubic, aligned", init), (method, x))
        ]
        table = build_table("reconstruction", "PSNR and SSIM, data range 1, whole image", records)
    steps = [float(k) for k, _ in enumerate(history)]
    return Report(
        title=f"Zero-shot super-resolution of {settings['measurement']}",
        command=command_line("zero-shot", settings, "measurement"),
        measurement=Panel("measurement", y),
        baseline=Panel("bicubic, aligned", init, "what the method started from"),
        reconstruction=Panel(method, x),
        truth=None if truth is None else Panel("truth", truth),
        table=table,
        curves=[Curve("record", steps, history, result.axis)] if history else [],
        nll_map=None if result.prior is None else result.prior.nll_map(x)[0, 0],
        seed=int(str(settings["seed"])),
        timings={"learning and reconstruction": seconds},
        settings={key: value for key, value in settings.items() if value is not None},
        notes=[
            "No novelty map can be drawn: what is known was learned from this measurement, and there is no image to "
            "compare with; patchflow reconstruct --novelty draws one."
        ],
    )
