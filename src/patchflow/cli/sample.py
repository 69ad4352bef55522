"""``patchflow sample``: posterior samples of the parameters of a simulator."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from patchflow.chains.features import NormalScores
from patchflow.chains.flow import Flow
from patchflow.cli.config import command_line, write_config
from patchflow.cli.options import check_output, output_folder
from patchflow.cli.posterior_problem import (
    Problem,
    at_least,
    given,
    load_fitting,
    load_problem,
    model_data_dim,
    read_values,
)
from patchflow.errors import InputError
from patchflow.io.atomic import write_bytes
from patchflow.io.checkpoint import read_header
from patchflow.io.posterior import Posterior, check_posterior_path, write_posterior
from patchflow.posterior_report import corner_plot, summary_text, write_posterior_report
from patchflow.report import versions
from patchflow.uncertainty.annealing import anneal
from patchflow.uncertainty.evidence import Correction, sample_posterior

# Walks per sample of each correction.
_EFFORT = {"none": 1, "resample": 4, "metropolis": 20}
# Beyond the first and last of 64 quantiles (2.4) a score counts standard deviations of the simulations.
_FAR = 6.0


def sample(
    measurement: str,
    *,
    problem: str,
    model: str | None = None,
    output: str = "posterior.nc",
    count: int = 10_000,
    correct: Correction | None = None,
    effort: int | None = None,
    truth: str | None = None,
    report: str | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Sample the posterior of a measurement, with a model of patchflow train conditional-snf or without.

    Without a model, particles are annealed from the prior to this posterior: nothing is learned, the forward model is
    evaluated more often. Writes the samples, an HTML report and the corner plot (.png), and the configuration
    (.yaml) that repeats the run.

    Args:
        measurement: The measured values: a .csv file with one row or one column, with or without a header, or .npy.
        problem: The Python file that defines likelihood and prior; with a model, that of its training.
        model: The model file; without it, annealing.
        output: File to write; also -o: .nc (NetCDF, as ArviZ reads it), .csv or .npy.
        count: Number of samples; also -n.
        correct: none: weighted samples; resample: draw from them by their weights; metropolis: each sample is the end
            of a Markov chain of whole walks. Only with a model; resample by default.
        effort: Walks per sample; 4 for resample, 20 for metropolis.
        truth: The true parameters, if known, for the plots: .csv or .npy.
        report: Folder or .html file for the report; by default beside the output.
        seed: Random seed.
        threads: Number of threads; by default all cores.
    """
    settings = dict(locals())
    target = Path(output)
    check_output(target, (".nc", ".csv", ".npy"))
    check_posterior_path(target)
    page = _page(target, report)
    for path in filter(None, (measurement, truth)):
        if Path(path).resolve() in (target.resolve(), target.with_suffix(".weights.npy").resolve()):
            raise InputError(f"The output {target} would overwrite {path}; choose another name.")
    at_least(1, {"count": count} if effort is None else {"count": count, "effort": effort})
    _check_options(model, correct, effort)
    y, _ = read_values(measurement, "measurement")
    if model is not None and len(y) != (needed := model_data_dim(model)):
        raise InputError(
            f"The measurement {measurement} has {len(y)} values but {model} was learned for {needed}; give a "
            "measurement of the same experiment, or train a model for this one."
        )
    found = load_problem(problem, seed=seed, threads=threads)
    # The file may have chosen double precision.
    y = y.to(torch.get_default_dtype())
    x_true = None if truth is None else _truth(truth, found)
    command = command_line("sample", settings, "measurement")
    about = {"command": command, **given(settings), "versions": versions()}
    if page.parent != target.parent:
        output_folder(str(page.parent))
    if model is None:
        posterior, warnings, notes = _annealed(found, y, count, about)
    else:
        way = correct or "resample"
        walks = _EFFORT[way] if effort is None else effort
        posterior, warnings, notes = _walked(model, found, y, measurement, count, way, walks, about)
    write_posterior(target, posterior)
    write_config(target.with_suffix(".yaml"), "sample", settings)
    title = f"Posterior of {Path(measurement).name}"
    write_posterior_report(page, posterior, title=title, command=command, truth=x_true, notes=notes)
    picture = page.with_suffix(".png")
    write_bytes(picture, corner_plot(posterior, x_true))
    for warning in warnings:
        print(f"patchflow: warning: {warning}", file=sys.stderr)
    print(f"{summary_text(posterior)}\n\n{target}, {page}, {picture}")


def _check_options(model: str | None, correct: Correction | None, effort: int | None) -> None:
    if model is None and (correct is not None or effort is not None):
        raise InputError(
            "--correct and --effort correct a model's samples, but there is none; give --model or leave them out."
        )
    if effort is not None and correct == "none":
        raise InputError("--effort needs a correction; add --correct resample or metropolis.")


def _annealed(
    found: Problem, y: Tensor, count: int, about: dict[str, object]
) -> tuple[Posterior, list[str], list[str]]:
    at_least(20, {"count": count})
    if len(y) != found.data_dim:
        raise InputError(
            f"The measurement has {len(y)} values but the forward model gives {found.data_dim}; give a measurement of "
            "this problem."
        )
    result = anneal(found.likelihood + found.prior, found.prior, y[None], particles=count)
    notes = [
        f"Annealed from the prior in {result.temperatures} temperatures, {result.evaluations} evaluations of the "
        "posterior. The error of log Z is too small if the posterior has separated modes."
    ]
    posterior = Posterior(
        result.x[0],
        torch.zeros(count),
        found.names,
        y,
        log_evidence=(float(result.log_evidence[0]), float(result.standard_error[0])),
        ess=float(result.ess[0]),
        acceptance={"difference walk": result.acceptance},
        settings=about,
    )
    return posterior, [], notes


def _walked(
    model: str,
    found: Problem,
    y: Tensor,
    measurement: str,
    count: int,
    correct: Correction,
    walks: int,
    about: dict[str, object],
) -> tuple[Posterior, list[str], list[str]]:
    flow, warnings = load_fitting(model, found)
    warnings += _unusual(flow, y, measurement)
    draws = sample_posterior(flow, count, y[None], correct=correct, effort=walks)
    # The report itself says what the weights say.
    notes = list(warnings)
    warnings += draws.warnings
    if draws.warnings:
        remedy = (
            "What helps the samples: a longer training (patchflow train conditional-snf --steps), annealing (leave out "
            "--model), or --correct metropolis with more --effort if k-hat is below 0.7."
        )
        warnings.append(remedy)
        notes.append(remedy)
    kernel = str(read_header(model).arguments.get("mcmc", "layer"))
    posterior = Posterior(
        draws.x,
        draws.log_weights,
        found.names,
        y,
        log_evidence=draws.log_evidence,
        # Of all walks, whichever way the samples were made of them.
        ess=draws.ess * count * walks,
        k_hat=draws.k_hat,
        acceptance=dict(zip([kernel], draws.acceptance.values(), strict=False)),
        settings=about,
    )
    return posterior, warnings, notes


def _page(target: Path, report: str | None) -> Path:
    if report is None:
        return target.with_suffix(".html")
    if report.lower().endswith(".html"):
        check_output(Path(report), (".html",))
        return Path(report)
    return Path(report) / f"{target.stem}.html"


def _truth(path: str, problem: Problem) -> Sequence[float]:
    values, titles = read_values(path, "truth")
    names = list(problem.names)
    if len(values) != len(names):
        raise InputError(
            f"The truth {path} has {len(values)} values but there are {len(names)} parameters "
            f"({', '.join(names)}); give one each."
        )
    by_title = dict(zip(titles, values.tolist(), strict=False))
    if titles and set(titles) != set(names):
        raise InputError(
            f"The truth {path} has the columns {', '.join(titles)} but the parameters are {', '.join(names)}; give the "
            "truth of this problem."
        )
    # A header with the names of the parameters may have them in another order.
    return [by_title[name] for name in names] if set(titles) == set(names) else values.tolist()


def _unusual(flow: Flow, y: Tensor, path: str) -> list[str]:
    features = next(module for module in flow.modules() if isinstance(module, NormalScores))
    far = (features(y[None])[0].abs() > _FAR).nonzero()[:, 0].tolist()
    if not far:
        return []
    return [
        f"Value {far[0] + 1} of {path} ({float(y[far[0]]):g}) is far from all simulated measurements "
        f"({len(far)} of {len(y)} values are): check the units, the prior and the forward model."
    ]
