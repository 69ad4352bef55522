"""``patchflow reconstruct``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from patchflow.cli.automatic import choose_for_scan, choose_method
from patchflow.cli.config import write_config
from patchflow.cli.error_bars import Calibration, Recipe
from patchflow.cli.image_methods import ImageMethod, Solver, Texture
from patchflow.cli.image_report import image_report
from patchflow.cli.image_samples import Chain, Sampling
from patchflow.cli.notes import convergence, misfit, residual_of
from patchflow.cli.novelty import Watch
from patchflow.cli.options import check_output, check_stack, output_folder, value_range
from patchflow.cli.options import start as begin
from patchflow.cli.problems import Settings, refuse_foreign_flags
from patchflow.cli.sample_report import notes_of, write_samples
from patchflow.cli.scan import ScanFlags, read_scan
from patchflow.cli.slices import Units
from patchflow.cli.tomography import reconstruct_ct
from patchflow.cli.tomography_methods import Choices
from patchflow.errors import InputError
from patchflow.io.images import read_stack, write_image
from patchflow.methods import WEIGHTLESS
from patchflow.metrics import psnr, ssim
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.report import write_report

# The reading of a measurement allows for noise beyond the range of the image, in standard deviations.
_SLACK = 8.0


def reconstruct(
    measurement: str,
    *,
    problem: str,
    output: str | None = None,
    method: ImageMethod | Literal["fbp", "fbp-unet", "auto"] = "patchnr",
    prior: str | None = None,
    angles: int | None = None,
    photons: float | None = None,
    size: int | None = None,
    field_of_view: float | None = None,
    limited: str | None = None,
    dataset: str | None = None,
    units: Units = "normalised",
    template: str | None = None,
    noise: float = 0.01,
    weight: float | str | None = None,
    scale: int = 4,
    boundary: Literal["circular", "periodic", "reflect", "valid"] | None = None,
    kernel: str | None = None,
    mask: str | None = None,
    truth: str | None = None,
    samples: int | None = None,
    chain: Chain = "mala",
    perception: float = 0.0,
    texture: str | None = None,
    ensemble: bool = True,
    start: str | None = None,
    budget: float | None = None,
    steps: int | None = None,
    stride: int | None = None,
    lr: float | None = None,
    solver: Literal["adam", "lbfgs"] = "adam",
    preset: Literal["default", "paper"] = "default",
    report: str | None = None,
    calibration: str | None = None,
    novelty: str | None = None,
    range: str | None = None,
    grey: bool = False,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Reconstruct an image (or a stack of images) from its measurement.

    Writes the image, the configuration (.yaml) that repeats the run, and with --report a folder with an HTML report.
    Ctrl-C keeps the image so far.

    Args:
        measurement: The measured image: PNG, JPEG, TIFF (also stacks) or .npy; for ct a sinogram: .h5, .npy or TIFF.
        problem: super-resolution, deblurring, inpainting, denoising, ct (computed tomography), or a Python file that
            defines likelihood.
        output: Image to write, by default reconstruction.png; .tif and .npy keep floating-point values. For ct .tif
            (reconstruction.tif), .npy, or with --template a new folder for a DICOM series.
        method: patchnr, epll, wpp (Wasserstein patch prior), local-ar (local adversarial regulariser), tv (total
            variation), student-t (Student-t mixture), patch-vae (variational autoencoder), tgv (generalised, of second
            order), tikhonov (closed form, periodic operators), bm3d (plug and play; extra bm3d), dip-tv (deep image
            prior), dpir (plug and play with a denoiser of many levels), pnp-pnn (with a proximal network, convergent),
            single-image (a network trained for this measurement), acnn or wpp-net (the same for super-resolution, from
            pairs or without), wpp-flow (the mean of samples, whose standard deviation the report shows); for ct
            patchnr, epll, wpp, local-ar, tv, tgv, dip-tv, fbp (filtered backprojection), fbp-unet (corrected by a
            network that was trained for this scan) or single-image (an unrolled network, from a few slices); auto
            chooses by the models in --prior, which may be a folder, the measurement, --samples and --budget, and says
            why.
        prior: The model file of patchflow train patch-nr, epll, student-t, wpp, local-ar (or patch-gan), patch-vae,
            denoiser, pnn, single-image, acnn, wpp-net, wpp-flow, fbp-unet or single-scan, whichever the
            method needs; for dpir also published weights of a DnCNN (.safetensors).
        angles: ct: number of measured angles; equally spaced over 180 degrees if the file does not hold them.
        photons: ct: mean number of photons per bin without an object, if the file does not say it.
        size: ct: pixels along a side of the image, if the file does not say it.
        field_of_view: ct: side of the image in metres, if the file does not say it.
        limited: ct: keep only the angles A:B, in degrees.
        dataset: ct: the data set of an HDF5 file that has several.
        units: ct: of the truth and of a .tif or .npy output: normalised (attenuation in units of 81.36/m), or hu.
        template: ct: a folder with the DICOM series of the same slices, whose headers the output takes.
        noise: Standard deviation of the noise, in units of the image range.
        weight: Weight of the prior against the data, or auto: chosen without the truth, by Stein's risk estimate,
            beside the discrepancy principle (about twenty reconstructions; of a stack for ct, on the first slice).
            patchnr: 0.1 suits any noise level, as the data term contains it (0.2 if it was trained with --smoothing);
            student-t and patch-vae 0.1; epll 0.2; wpp 100; dpir 0.23; pnp-pnn 0.4; tv and tgv: 0.56/noise times the
            share of pixels that were measured. ct, for LoDoPaB's scans: patchnr and epll 0.38, tv and tgv 30, or 40 and
            20 if directions are missing.
        scale: Super-resolution: image pixels per measured pixel.
        boundary: circular or valid for super-resolution; periodic, reflect or valid for deblurring.
        kernel: The blur kernel, an image or .npy file; super-resolution: by default a Gaussian of half the scale.
        mask: Inpainting: an image that is white where pixels were measured.
        truth: The true image, if known: PSNR while running, error map and metrics in the report.
        samples: Draw so many samples of the posterior (patchnr, student-t, patch-vae by Markov chains, dpir by split
            Gibbs, with a denoiser of --low 0.003 --high 0.5). Their mean is the output; beside it are written
            -std.tif, -low.tif and -high.tif (90 % of the samples), and -samples.npy.
        chain: Of samples by Markov chains: mala (accept or reject) or langevin (all accepted, biased by the step).
        perception: From 0 (most accurate) to 1 (best texture): moves the output towards what --texture knows.
        texture: The model of patchflow train patch-nr for --perception.
        ensemble: single-image of images: the mean over turned and mirrored measurements, if it was trained for such;
            false for one pass, up to eight times as fast (also if --method auto takes it).
        start: ct: a model of train single-scan or fbp-unet at whose result patchnr, epll, wpp and local-ar start, in
            place of total variation.
        budget: --method auto: seconds that the reconstruction may take, by an estimate on this machine.
        steps: Steps of the solver: patchnr, student-t and patch-vae 400, local-ar 72; of samples 600 of each chain, or
            60 levels. ct: 1000 if directions are missing, 300 with --start; tv and tgv: at most 1000, fewer once the
            duality gap is closed.
        stride: Stride of the patch grid whose phase cycles; by default the patch size: each step tiles the image.
        lr: Peak step of Adam, 0.01; for local-ar 0.02, for ct 0.003.
        solver: adam, or lbfgs, which takes all patches in each step and needs fewer steps.
        preset: paper is the published weight and procedure of patchnr (300 steps, 130,000 random patches in each; for
            ct 300 or 3000 steps, 40,000 random patches), and for images of epll, local-ar, wpp and dip-tv.
        report: Folder for the report.
        calibration: What patchflow calibrate IMAGE wrote: error bars, in the report and beside the output
            (-low.tif, -high.tif; for ct in its format and units).
        novelty: A model of patchflow train patch-nr, epll, student-t or patch-vae whose novelty map the report shows:
            where the image is unlike what it knows. By default that of the method, or of a model that auto finds.
        range: Values LO:HI of the files that become 0 and 1.
        grey: Convert colour images to grey.
        seed: Random seed.
        threads: Number of threads; by default all cores.
    """
    settings = dict(locals())
    refuse_foreign_flags(problem, settings)
    if problem == "ct":
        scan = ScanFlags(angles, photons, size, field_of_view, limited, dataset)
        if method == "auto":
            free = start is None and preset == "default"
            shown = report is not None and novelty is None
            found = choose_for_scan(prior, partial(read_scan, measurement, scan), free, shown)
            start = settings["start"] = start or found.start
            novelty = settings["novelty"] = novelty or found.novelty
            method, prior, why = found.adopt(settings)
            print(*why)
        choices = Choices(
            method,
            prior,
            weight,
            steps,
            lr,
            stride,
            solver,
            preset,
            truth,
            units,
            template,
            report,
            calibration,
            start,
        )
        reconstruct_ct(measurement, output, scan, choices, settings, seed, threads, novelty)
        return
    calibrated = None if calibration is None else Calibration.read(calibration)
    flags = Settings(problem, noise, scale, boundary, kernel, mask)

    def measured() -> tuple[Tensor, GaussianLikelihood]:
        y = read_stack(
            measurement, value_range=value_range(range), grey=grey, slack=_SLACK * flags.std
        )
        likelihood = flags.likelihood((y.shape[2], y.shape[3]), measured=True)
        _check_measurement(y, likelihood, measurement)
        return y, likelihood

    why = []
    if method == "auto":
        wished = samples is not None
        found = choose_method(
            prior,
            measured,
            samples=wished,
            budget=budget,
            ensemble=None if ensemble else False,
            shown=report is not None and novelty is None,
        )
        method, prior, why = found.adopt(settings)
        novelty = settings["novelty"] = novelty or found.novelty
        # What it says concerns a choice that was not made.
        settings["ensemble"] = ensemble = ensemble or method != "single-image"
    elif budget is not None:
        raise InputError(f"--budget {budget} is for --method auto; leave it out.")
    sampling = None if samples is None else Sampling(samples, method, chain, steps)
    textured = Texture.read(perception, texture)
    chosen = Solver(method, steps, stride, lr, solver, preset, weight, sampling, textured, ensemble)
    target = Path("reconstruction.png" if output is None else output)
    check_output(target, (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy"))
    loaded = chosen.prior(prior)
    has_own = calibrated is not None and calibrated.watches(loaded)
    watch = Watch.read(novelty, prior, loaded, report=report, calibrated=has_own)
    if report is not None:
        output_folder(report)
    begin(seed, threads)
    y, likelihood = measured()
    check_stack(target, len(y))
    x_true = None if truth is None else read_stack(truth, value_range=value_range(range), grey=grey)
    if x_true is not None and x_true.shape[-2:] != likelihood.operator.domain_shape:
        height, width = likelihood.operator.domain_shape
        raise InputError(
            f"The truth {truth} has {x_true.shape[2]} x {x_true.shape[3]} pixels but the reconstruction will have "
            f"{height} x {width}; give the image that was measured."
        )
    init = likelihood.operator.initial(y)
    if loaded is not None:
        loaded.check(init)
    if textured is not None:
        textured.prior.check(init)
    watch.check(init)
    begun = time.perf_counter()
    solution, weight, notes = chosen.run(
        likelihood, y, loaded, None if x_true is None else _follow(x_true)
    )
    seconds = time.perf_counter() - begun
    notes += convergence([solution])
    notes = [*why, *notes]
    if solution.samples is not None:
        checked = None if calibrated is None else calibrated.checked
        notes += notes_of(solution.samples, x_true, init, checked)
    write_image(target, solution.x)
    write_config(target.with_suffix(".yaml"), "reconstruct", settings)
    residual = residual_of(likelihood, solution.x, y)
    weightless = method in WEIGHTLESS or (method == "dpir" and samples is not None)
    weighted = "" if weightless else f", weight {weight:g}"
    print(
        f"{target}: {method}{weighted}, {solution.steps} steps in {seconds:.1f} s; "
        f"residual {residual:.4f} at noise {flags.std:g}."
    )
    notes += misfit(residual, flags.std, weighted=not weightless)
    print(*notes, sep="\n", end="\n" if notes else "")
    if x_true is not None:
        print(
            f"PSNR {float(psnr(solution.x, x_true).mean()):.2f} dB, SSIM {float(ssim(solution.x, x_true).mean()):.3f}"
        )
    bars = None
    if calibrated is not None:
        recipe = Recipe.of(likelihood, chosen, prior, solution.x.shape[1])
        bars = calibrated.bars(recipe, solution.x, loaded, x_true)
    if solution.samples is not None:
        sampled = write_samples(target, solution)
        bars = sampled if bars is None else bars
    if bars is not None:
        for end, values in (("low", bars.low), ("high", bars.high)):
            write_image(target.with_name(f"{target.stem}-{end}.tif"), values)
        print(*bars.notes, sep="\n")
        notes += bars.notes
    if report is not None:
        finding = watch.find(solution.x, None if bars is None else bars.novelty)
        shown = image_report(
            settings, y, init, solution, x_true, loaded, notes, seconds, bars, finding
        )
        print(*finding.notes, sep="\n", end="\n" if finding.notes else "")
        page = write_report(report, shown)
        print(f"Report: {page}")


def _check_measurement(y: Tensor, likelihood: GaussianLikelihood, path: str) -> None:
    expected = likelihood.operator.range_shape
    if tuple(y.shape[-2:]) != tuple(expected):
        raise InputError(
            f"The measurement {path} has {y.shape[2]} x {y.shape[3]} pixels but the operator gives "
            f"{expected[0]} x {expected[1]}; check the problem's flags."
        )


def _follow(truth: Tensor):  # noqa: ANN202
    def callback(step: int, x: Tensor, value: float) -> Mapping[str, str]:
        return {"psnr": f"{float(psnr(x, truth).mean()):.2f}"}

    return callback
