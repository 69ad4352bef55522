"""Eight tasks of the sbibm benchmark whose likelihood can be computed: accuracy and calibration of our posteriors.

Two columns of methods. With the likelihood: particles annealed from the prior to each posterior, nothing learned.
Simulator
only: a conditional flow learned from 30,000 simulations, the likelihood never evaluated. C2ST against the benchmark's
reference samples is 0.5 if nothing tells the samples apart.

References:
    Lueckmann, Boelts, Greenberg, Goncalves, Macke, "Benchmarking simulation-based inference", 2021,
    https://arxiv.org/abs/2101.04653
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from patchflow.chains.flow import Flow
from patchflow.errors import InputError
from patchflow.learn_posterior import learn_posterior
from patchflow.papers.sbibm_tasks import NAMES, Task, read_observation, task
from patchflow.posterior_models import conditional_snf
from patchflow.problems.likelihood import Likelihood
from patchflow.progress import progress_line
from patchflow.records import Record
from patchflow.sample_metrics import c2st
from patchflow.table import Metric, Table, build_table
from patchflow.uncertainty.annealing import anneal
from patchflow.uncertainty.calibration import sbc_ranks, sbc_test, tarp_test

# Rows: a task's name, and the name with this suffix.
SIMULATOR = "/simulator-only"
METHODS = (*NAMES, *(name + SIMULATOR for name in NAMES))
SAMPLES = 10_000
SIMULATIONS = 30_000
# Neural posterior estimation with 30,000 simulations.
PUBLISHED = {
    "two_moons": 0.57,
    "gaussian_linear": 0.55,
    "gaussian_mixture": 0.56,
    "slcp": 0.84,
    "bernoulli_glm": 0.65,
}
# Data sets, draws and particles of the calibration checks; half of the first and last where a simulator solves an ODE.
DATASETS, DRAWS, PARTICLES = 200, 100, 400
METRICS = (
    Metric("c2st", "C2ST", 3, False),
    Metric("evaluations", "likelihood evaluations", 0, None, "thousand"),
    Metric("seconds", "sampling", 1, None, "CPU s"),
    Metric("training", "training", 0, None, "CPU s"),
    Metric("sbc", "SBC p", 3, None),
    Metric("tarp", "TARP p", 3, None),
)


def run(
    data: Path,
    *,
    methods: Sequence[str] = METHODS,
    observations: int = 4,
    seconds: float = 120.0,
    seed: int = 0,
) -> tuple[Table, list[Record]]:
    """Run the tasks.

    Args:
        data: The folder with ``sbibm/``.
        methods: Which of :data:`METHODS`.
        observations: How many of the ten observations: 1 to 4 of those at hand.
        seconds: Training time of the flow that sees simulations only.
        seed: Seed.

    Returns:
        The table and the figures of each observation.

    Raises:
        InputError: If a task is unknown or a file is missing.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or observations < 1:
        raise InputError(
            f"Got the tasks {unknown} and {observations} observations; use at least 1, and tasks of "
            f"{', '.join(METHODS)}."
        )
    records: list[Record] = []
    for name in progress_line(methods, title="task"):
        torch.manual_seed(seed)
        problem = task(name.removesuffix(SIMULATOR), data / "sbibm")
        records += _task(name, problem, data / "sbibm", observations, seconds)
    protocol = (
        f"{observations} observations a task, {SAMPLES:,} samples; simulator only: {SIMULATIONS:,} simulations, "
        f"{seconds:.0f} s of training; SBC (smallest p over parameters times their number) and TARP over "
        f"{DATASETS} data sets (ODE: {DATASETS // 2}); published: neural posterior estimation"
    )
    published = {
        name + SIMULATOR: {"c2st": value}
        for name, value in PUBLISHED.items()
        if name + SIMULATOR in methods
    }
    table = build_table("sbibm", protocol, records, published=published, metrics=METRICS)
    return table, records


def _task(
    label: str, problem: Task, folder: Path, observations: int, seconds: float
) -> list[Record]:
    flow, training = _learn(problem, seconds) if label.endswith(SIMULATOR) else (None, 0.0)
    truths, samples = _calibration_samples(problem, flow)
    ranks = sbc_ranks(samples, truths)
    sbc = min(1.0, truths.shape[1] * sbc_test(ranks, DRAWS).min().item())
    tarp = tarp_test(samples, truths)
    records = []
    for number in range(1, observations + 1):
        y, _, reference = read_observation(folder, problem.name, number)
        begun = time.process_time()
        if flow is None:
            # Three times the particles steady the weights of separated modes; an ODE is too dear for that.
            particles = SAMPLES * (3 if problem.gradient else 1)
            posterior = problem.likelihood + problem.prior
            result = anneal(posterior, problem.prior, y, particles=particles)
            x = result.x[0, torch.randperm(particles)[:SAMPLES]]
            evaluations = result.evaluations / 1000
        else:
            with torch.no_grad():
                x, evaluations = flow.sample(SAMPLES, y), 0.0
        values = {
            "seconds": time.process_time() - begun,
            "c2st": c2st(reference, x),
            "evaluations": evaluations,
            "training": training,
            "sbc": sbc,
            "tarp": tarp,
        }
        tqdm.write(
            f"{label} {number}: C2ST {values['c2st']:.3f}, SBC p {sbc:.2g}, TARP p {tarp:.2g}"
        )
        records.append(Record(label, str(number), values))
    return records


def _learn(problem: Task, seconds: float) -> tuple[Flow, float]:
    begun = time.process_time()
    assert isinstance(problem.likelihood, Likelihood)
    measured = problem.simulate(problem.prior.sample(1)).shape[1]
    flow = conditional_snf(
        problem.likelihood, problem.prior, measured, layers=5, components=8, mcmc="none"
    )
    learn_posterior(
        flow,
        problem.likelihood,
        problem.prior,
        batch=512,
        steps=10**6,
        seconds=seconds,
        simulations=SIMULATIONS,
    )
    return flow, time.process_time() - begun


@torch.no_grad()
def _calibration_samples(problem: Task, flow: Flow | None) -> tuple[Tensor, Tensor]:
    """Parameters of the prior, and draws of the posterior of a measurement of each: (datasets, draws, dim)."""
    cost = 1 if problem.gradient else 2
    datasets, particles = DATASETS // cost, PARTICLES // cost
    truths = problem.prior.sample(datasets)
    y = problem.simulate(truths)
    if flow is not None:
        x = flow.sample(datasets * DRAWS, y.repeat_interleave(DRAWS, 0))
        return truths, x.view(datasets, DRAWS, -1)
    result = anneal(problem.likelihood + problem.prior, problem.prior, y, particles=particles)
    # Particles may share an ancestor: keep a part of them.
    return truths, result.x[:, torch.randperm(particles)[:DRAWS]]
