"""``patchflow train conditional-snf`` and ``patchflow sample``: posteriors of the parameters of a simulator."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

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
from patchflow.errors import InputError, NumericalError
from patchflow.io.atomic import existing_file, write_bytes
from patchflow.io.checkpoint import read_header
from patchflow.io.posterior import Posterior, check_posterior_path, write_posterior
from patchflow.learn_posterior import learn_posterior
from patchflow.posterior_models import conditional_snf, save_posterior_model
from patchflow.posterior_report import corner_plot, summary_text, write_posterior_report
from patchflow.report import versions
from patchflow.uncertainty.evidence import Correction, sample_posterior

# Walks per sample of each correction.
_EFFORT = {"none": 1, "resample": 4, "metropolis": 20}
# Beyond the first and last of 64 quantiles (2.4) a score counts standard deviations of the simulations.
_FAR = 6.0


def train_conditional_snf(
    *,
    problem: str,
    output: str = "snf.safetensors",
    layers: int = 4,
    hidden: int = 64,
    couplings: Literal["spline", "affine"] = "spline",
    components: int = 0,
    mcmc: Literal["independence", "mala", "mh", "none"] = "independence",
    mcmc_steps: int = 5,
    batch: int = 1024,
    steps: int = 5000,
    lr: float = 2e-3,
    seconds: float | None = None,
    simulations: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    resume: bool = False,
) -> None:
    """Learn the posteriors of all measurements of a simulator with a stochastic normalizing flow.

    Writes the model, and beside it the configuration (.yaml) that repeats the run. Ctrl-C keeps the best state so far;
    --resume true continues.

    Args:
        problem: Python file that defines likelihood (a patchflow.Likelihood), prior (a patchflow.Density) and perhaps
            names (a list of strings).
        output: Model file to write; also -o.
        layers: Coupling layers of the flow.
        hidden: Width of its networks.
        couplings: Rational-quadratic splines, or affine couplings.
        components: Components of a mixture as latent law, for posteriors with separated modes; 0 for a normal law.
        mcmc: Metropolis kernels after the couplings; mala needs the gradient of the forward model.
        mcmc_steps: Their steps.
        batch: Simulations per training step.
        steps: Training steps.
        lr: Peak learning rate.
        seconds: Time limit; the learning-rate schedule ends with it.
        simulations: Learn from this many simulations in all, for slow forward models; by default fresh ones at each
            step.
        seed: Random seed.
        threads: Number of threads; by default all cores.
        resume: Continue an interrupted run from the state file beside the output.
    """
    settings = dict(locals())
    target = Path(output)
    check_output(target, (".safetensors",))
    numbers = {"layers": layers, "hidden": hidden, "batch": batch, "steps": steps}
    at_least(1, numbers if mcmc == "none" else numbers | {"mcmc_steps": mcmc_steps})
    at_least(0, {"components": components})
    if simulations is not None:
        at_least(1000, {"simulations": simulations})
    for name, value in (("lr", lr), ("seconds", seconds)):
        if value is not None and not value > 0:
            raise InputError(f"--{name} is {value} but must be positive.")
    state = target.with_suffix(".state.safetensors")
    if resume:
        existing_file(state, "training state file")
    found = load_problem(problem, seed=seed, threads=threads, gradients=mcmc == "mala")
    flow = conditional_snf(
        found.likelihood,
        found.prior,
        found.data_dim,
        couplings=couplings,
        layers=layers,
        hidden=hidden,
        components=components,
        mcmc=mcmc,
        mcmc_steps=mcmc_steps,
    )
    about: dict[str, object] = {
        "problem": problem,
        "problem_sha256": found.checksum,
        "parameters": len(found.names),
        "names": list(found.names),
        "seed": seed,
    }
    try:
        result = learn_posterior(
            flow,
            found.likelihood,
            found.prior,
            batch=batch,
            steps=steps,
            seconds=seconds,
            lr=lr,
            simulations=simulations,
            checkpoint=state,
            resume=resume,
            progress=True,
        )
    except NumericalError:
        save_posterior_model(target, flow, about)
        raise
    with torch.no_grad():
        rates = flow.walk(batch, found.likelihood.simulate(found.prior.sample(batch))).acceptance
    summary = {
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "validation": result.best,
        "stopped": result.stopped,
        "acceptance": list(rates.values()),
        "history": result.validation,
    }
    save_posterior_model(target, flow, about | summary)
    write_config(target.with_suffix(".yaml"), "train conditional-snf", settings)
    accepted = "".join(f"; {mcmc} accepts {100 * rate:.0f} %" for rate in rates.values())
    print(
        f"{target}: validation loss {result.best:.2f} nats after {result.steps} steps in {result.seconds:.0f} s "
        f"({result.stopped}){accepted}."
    )
    if result.stopped == "interrupted":
        print(
            f"Interrupted; {state} holds the state. Continue with: "
            f"{command_line('train conditional-snf', settings | {'resume': True})}"
        )
    else:
        state.unlink(missing_ok=True)


def sample(
    measurement: str,
    *,
    problem: str,
    model: str,
    output: str = "posterior.nc",
    count: int = 10_000,
    correct: Correction = "resample",
    effort: int | None = None,
    truth: str | None = None,
    report: str | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Sample the posterior of a measurement with a model of patchflow train conditional-snf.

    Writes the samples, an HTML report and the corner plot (.png), and the configuration (.yaml) that repeats the run.

    Args:
        measurement: The measured values: a .csv file with one row or one column, with or without a header, or .npy.
        problem: The Python file of the training.
        model: The model file.
        output: File to write; also -o: .nc (NetCDF, as ArviZ reads it), .csv or .npy.
        count: Number of samples; also -n.
        correct: none: weighted samples; resample: draw from them by their weights; metropolis: each sample is the end
            of a Markov chain of whole walks.
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
    if effort is not None and correct == "none":
        raise InputError("--effort needs a correction; add --correct resample or metropolis.")
    y, _ = read_values(measurement, "measurement")
    if len(y) != (needed := model_data_dim(model)):
        raise InputError(
            f"The measurement {measurement} has {len(y)} values but {model} was learned for {needed}; give a "
            "measurement of the same experiment, or train a model for this one."
        )
    found = load_problem(problem, seed=seed, threads=threads)
    # The file may have chosen double precision.
    y = y.to(torch.get_default_dtype())
    flow, warnings = load_fitting(model, found)
    x_true = None if truth is None else _truth(truth, found)
    if page.parent != target.parent:
        output_folder(str(page.parent))
    warnings += _unusual(flow, y, measurement)
    walks = _EFFORT[correct] if effort is None else effort
    draws = sample_posterior(flow, count, y[None], correct=correct, effort=walks)
    # The report itself says what the weights say.
    notes = list(warnings)
    warnings += draws.warnings
    if draws.warnings:
        remedy = (
            "What helps the samples: a longer training (patchflow train conditional-snf --steps), or --correct "
            "metropolis with more --effort."
        )
        warnings.append(remedy)
        notes.append(remedy)
    kernel = str(read_header(model).arguments.get("mcmc", "layer"))
    command = command_line("sample", settings, "measurement")
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
        settings={"command": command, **given(settings), "versions": versions()},
    )
    write_posterior(target, posterior)
    write_config(target.with_suffix(".yaml"), "sample", settings)
    title = f"Posterior of {Path(measurement).name}"
    write_posterior_report(page, posterior, title=title, command=command, truth=x_true, notes=notes)
    picture = page.with_suffix(".png")
    write_bytes(picture, corner_plot(posterior, x_true))
    for warning in warnings:
        print(f"patchflow: warning: {warning}", file=sys.stderr)
    print(f"{summary_text(posterior)}\n\n{target}, {page}, {picture}")


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
