"""The talk's table of stochastic normalizing flows on scatterometry.

The published score saturates: two exact samples score about 0.6. Beside it stand the excess over that floor on the same
measurement, the divergence from the exact posterior to the model's density by quadrature, the effective sample
size, and the mass outside the box, which the published histogram cannot see.

References:
    Hagemann, Hertrich, Steidl, "Generalized normalizing flows via Markov chains", 2023,
    https://arxiv.org/abs/2111.12506 (layers and training; the values are those of the talk)
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from patchflow.chains.bijections import AffineCoupling
from patchflow.chains.flow import Flow
from patchflow.chains.gaussian import vae_layer
from patchflow.chains.kernel import Chain, Kernel, Reversed
from patchflow.chains.proposals import LangevinProposal
from patchflow.chains.stochastic import Metropolis
from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.fit import fit
from patchflow.learn_posterior import learn_posterior
from patchflow.papers.scatterometry import (
    MEASURED,
    GridPosterior,
    cell_counts,
    histogram_kl,
    posterior_by_quadrature,
    problem,
)
from patchflow.posterior_models import conditional_snf, joint_batches
from patchflow.priors.gaussian import StandardNormal
from patchflow.priors.uniform import Uniform
from patchflow.problems.likelihood import Likelihood
from patchflow.progress import progress_line
from patchflow.records import Record
from patchflow.table import Metric, Table, build_table
from patchflow.uncertainty.evidence import sample_posterior

PUBLISHED = {"INN": 0.76, "INN+MALA": 0.59, "VAE": 0.98, "VAE+MALA": 0.69}
# Ours: the spline flow alone, and with five steps of independence Metropolis.
OURS, OURS_SNF = "spline flow", "spline flow + independence Metropolis"
EXACT = "exact posterior"
METHODS = (*PUBLISHED, OURS, OURS_SNF, EXACT)
TALK_WALL, OUR_WALL = 100, 1000
SAMPLES = 160_000
METRICS = (
    Metric("kl", "KL of histograms", 3, False),
    Metric("excess", "excess over the floor", 3, None),
    Metric("density", "KL to the density", 3, False),
    Metric("ess", "ESS", 0, True, "%"),
    Metric("outside", "outside the box", 2, None, "%"),
    Metric("training", "training", 0, None, "CPU s"),
)


def published_flow(name: str, target: Energy) -> Flow:
    """A network of the talk's table, untrained: four couplings or four VAE layers of width 64, and MALA."""
    kernels: list[Kernel]
    if name.startswith("INN"):
        kernels = [Reversed(AffineCoupling(3, MEASURED, hidden=64, clamp=1.4)) for _ in range(4)]
    else:
        last = 0.1 if name.endswith("MALA") else 0.01
        kernels = [
            vae_layer(3, MEASURED, std=last if k == 3 else 0.1, learned=False, hidden=64)
            for k in range(4)
        ]
    if name.endswith("MALA"):
        kernels.append(Metropolis(target, LangevinProposal(1e-3), 3))
    return Flow(StandardNormal(3), Chain(*kernels), target=target)


def run(
    data: Path,
    *,
    methods: Sequence[str] = METHODS,
    observations: int = 20,
    steps: int = 40_000,
    seconds: float = 180.0,
    seed: int = 0,
) -> tuple[Table, list[Record], dict[str, tuple[Flow, float]]]:
    """Run the table: the published rows with wall 100, ours with wall 1000, each beside the exact posterior.

    Args:
        data: The folder with ``scatterometry/``.
        methods: Which rows.
        observations: Measurements.
        steps: Training steps of the published networks; published: 40,000 of 1,600 fresh simulations.
        seconds: Training time of ours.
        seed: Seed of training and measurements.

    Returns:
        The table, the figures of each measurement, and the flows by method with their training in CPU seconds.

    Raises:
        InputError: If a method is unknown, a number is not positive, or the data are missing.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or observations < 1 or steps < 1:
        raise InputError(
            f"Got the methods {unknown}, {observations} measurements and {steps} steps; use positive numbers and "
            f"methods of {', '.join(METHODS)}."
        )
    records: list[Record] = []
    trained: dict[str, tuple[Flow, float]] = {}
    for wall, names in ((TALK_WALL, tuple(PUBLISHED)), (OUR_WALL, (OURS, OURS_SNF))):
        chosen = [name for name in names if name in methods]
        if not chosen:
            continue
        likelihood, prior = problem(data, wall)
        flows = _train(chosen, likelihood, prior, steps, seconds, seed)
        trained |= flows
        records += _score(flows, likelihood, prior, wall, observations, EXACT in methods, seed)
    protocol = (
        f"{observations} measurements, {SAMPLES:,} samples in 50^3 cells, published networks {steps:,} steps of 1,600 "
        f"simulations (wall {TALK_WALL}), ours {seconds:.0f} s on {torch.get_num_threads()} threads (wall {OUR_WALL})"
    )
    published = {
        f"{name}, wall {TALK_WALL}": {"kl": value}
        for name, value in PUBLISHED.items()
        if name in methods
    }
    table = build_table(
        "snf-scatterometry", protocol, records, published=published, metrics=METRICS
    )
    return table, records, trained


def learn_ours(
    likelihood: Likelihood, prior: Uniform, seconds: float, seed: int
) -> tuple[Flow, float]:
    """Our conditional flow and its training in CPU seconds."""
    torch.manual_seed(seed)
    begun = time.process_time()
    flow = conditional_snf(likelihood, prior, MEASURED, layers=4, hidden=64)
    learn_posterior(
        flow, likelihood, prior, steps=10**6, seconds=seconds, batch=2000, progress=True
    )
    return flow, time.process_time() - begun


def _train(
    names: Sequence[str],
    likelihood: Likelihood,
    prior: Uniform,
    steps: int,
    seconds: float,
    seed: int,
) -> dict[str, tuple[Flow, float]]:
    target, flows, ours = likelihood + prior, {}, None
    for name in names:
        if name in (OURS, OURS_SNF):
            if ours is None:
                ours = learn_ours(likelihood, prior, seconds, seed)
            snf, spent = ours
            plain = Flow(snf.latent, snf.trained, target=snf.target)
            flows[name] = (plain if name == OURS else snf), spent
            continue
        torch.manual_seed(seed)
        flow = published_flow(name, target)
        # The last MALA layer is not trained: INN+MALA is trained as INN. VAE+MALA has another last layer than VAE.
        if name == "INN+MALA" and "INN" in flows:
            inn, spent = flows["INN"]
            flow.load_state_dict(inn.state_dict(), strict=False)
            flows[name] = flow.requires_grad_(False), spent
            continue
        begun = time.process_time()
        batches = joint_batches(prior, likelihood, 1600)
        fit(flow, batches, steps=steps, lr=1e-3, schedule="constant", warmup=1, progress=True)
        flows[name] = flow, time.process_time() - begun
    return flows


def likelihood_of(flow: Flow) -> Likelihood:
    """The likelihood in the target of a flow."""
    assert flow.target is not None
    return next(module for module in flow.target.modules() if isinstance(module, Likelihood))


def measurements(likelihood: Likelihood, count: int, seed: int) -> Tensor:
    """Measurements of parameters drawn uniformly from the box."""
    torch.manual_seed(10_000 + seed)
    return likelihood.simulate(2 * torch.rand(count, 3) - 1)


def _score(
    flows: dict[str, tuple[Flow, float]],
    likelihood: Likelihood,
    prior: Uniform,
    wall: int,
    observations: int,
    exact: bool,
    seed: int,
) -> list[Record]:
    records = []
    target = likelihood + prior
    for k, y in enumerate(
        progress_line(measurements(likelihood, observations, seed).split(1), title="measurement")
    ):
        grid = posterior_by_quadrature(target, y)
        reference = grid.counts(SAMPLES)
        floor = histogram_kl(reference, grid.counts(SAMPLES))
        if exact:
            values = {"kl": floor, "excess": 0.0, "density": 0.0, "ess": 100.0, "outside": 0.0}
            records.append(Record(f"{EXACT}, wall {wall}", str(k), values))
        for name, (flow, training) in flows.items():
            draws = sample_posterior(flow, SAMPLES, y)
            kl = histogram_kl(reference, cell_counts(draws.x))
            values = {
                "kl": kl,
                "excess": kl - floor,
                "density": density_kl(flow, grid, y) if flow.exact else math.nan,
                "ess": 100 * draws.ess,
                "outside": 100 * float((draws.x.abs() > 1).any(1).double().mean()),
                "training": training,
            }
            records.append(Record(f"{name}, wall {wall}", str(k), values))
    return records


@torch.no_grad()
def density_kl(flow: Flow, grid: GridPosterior, y: Tensor, samples: int = 20_000) -> float:
    r"""The divergence :math:`\int_{box} p \log(p / q)` from the quadrature posterior to the density of a flow."""
    drawn = torch.multinomial(grid.weights, samples, replacement=True)
    energies = flow(grid.points[drawn], y.expand(samples, -1)).double()
    return float((grid.log_density[drawn] + energies).mean())
