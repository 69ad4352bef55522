"""How long 54,000 posterior samples of scatterometry take: our flow against emcee.

References:
    Foreman-Mackey et al., "emcee: the MCMC hammer", 2013, https://arxiv.org/abs/1202.3665
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from patchflow.chains.flow import Flow
from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.papers.hagemann2023_scatterometry import OURS_SNF, measurements
from patchflow.papers.scatterometry import cell_counts, histogram_kl, posterior_by_quadrature
from patchflow.problems.likelihood import Likelihood
from patchflow.progress import progress_line
from patchflow.records import Record
from patchflow.table import Metric, Table, build_table
from patchflow.uncertainty.evidence import sample_posterior

SAMPLES = 54_000
EMCEE = "emcee, 2,000 walkers, thin 20"
RESAMPLED = "spline flow, resampled from twice as many"
METRICS = (
    Metric("excess", "excess over the floor", 3, None),
    Metric("seconds", "54,000 samples", 2, False, "CPU s"),
    Metric("evaluations", "energy evaluations a sample", 1, False),
)


def race(
    snf: Flow, likelihood: Likelihood, training: float, *, observations: int = 10, seed: int = 0
) -> tuple[Table, list[Record]]:
    """Sample by each method in one process, and compare with the exact posterior.

    Args:
        snf: A trained conditional flow whose target is made of ``likelihood``.
        likelihood: The likelihood; its evaluations are counted.
        training: What the training took, in CPU seconds.
        observations: Measurements.
        seed: Seed.

    Raises:
        InputError: If emcee is missing.
    """
    assert snf.target is not None
    target, plain = snf.target, Flow(snf.latent, snf.trained, target=snf.target)
    samplers: dict[str, Callable[[Tensor], Tensor]] = {
        EMCEE: lambda y: _emcee(target, y, seed),
        OURS_SNF: lambda y: snf.sample(SAMPLES, y),
        RESAMPLED: lambda y: sample_posterior(plain, SAMPLES, y, correct="resample", effort=2).x,
        "spline flow": lambda y: plain.sample(SAMPLES, y),
    }
    evaluated = 0

    def count(module: Likelihood, arguments: tuple[Tensor, ...], result: Tensor) -> None:
        nonlocal evaluated
        evaluated += len(result)

    hook = likelihood.register_forward_hook(count)
    records = []
    rows = measurements(likelihood, observations, seed + 1).split(1)
    for k, y in enumerate(progress_line(rows, title="race", unit="measurement")):
        grid = posterior_by_quadrature(target, y)
        reference = grid.counts(SAMPLES)
        floor = histogram_kl(reference, grid.counts(SAMPLES))
        for name, sampler in samplers.items():
            torch.manual_seed(seed)
            evaluated, begun = 0, time.process_time()
            with torch.no_grad():
                x = sampler(y)
            values = {
                "seconds": time.process_time() - begun,
                "excess": histogram_kl(reference, cell_counts(x)) - floor,
                "evaluations": evaluated / SAMPLES,
            }
            records.append(Record(name, str(k), values))
    hook.remove()
    mean = {
        name: sum(r.values["seconds"] for r in records if r.method == name) / observations
        for name in samplers
    }
    saved = mean[EMCEE] - mean[RESAMPLED]
    paid = (
        f"{math.ceil(training / saved)} measurements" if saved > 0 else "no number of measurements"
    )
    ratio = mean[EMCEE] / mean[RESAMPLED]
    protocol = (
        f"{observations} measurements, {torch.get_num_threads()} threads; emcee takes {ratio:.1f} times as long as our "
        f"resampled flow, whose training ({training:.0f} CPU s) has paid off after {paid}"
    )
    return build_table("snf-scatterometry-race", protocol, records, metrics=METRICS), records


def _emcee(energy: Energy, y: Tensor, seed: int) -> Tensor:
    try:
        import emcee
    except ImportError as error:
        raise InputError(
            "The race needs emcee; install it with pip install 'patchflow[bayes]'."
        ) from error
    walkers, thin, burn_in = 2000, 20, 200

    def log_density(points: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(points).to(y)
        return -energy(x, y.expand(len(x), -1)).double().numpy()

    sampler = emcee.EnsembleSampler(walkers, 3, log_density, vectorize=True)
    np.random.seed(seed)
    state = sampler.run_mcmc(np.random.uniform(-1, 1, (walkers, 3)), burn_in)
    sampler.reset()
    sampler.run_mcmc(state, SAMPLES // walkers * thin)
    return torch.from_numpy(sampler.get_chain(thin=thin, flat=True)).to(y)
