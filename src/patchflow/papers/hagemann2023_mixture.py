r"""The talk's table of stochastic normalizing flows: the posterior of a mixture in 100 dimensions.

:math:`X \sim \frac15 \sum_k N(m_k, 10^{-4} I)` with :math:`m_k \sim U[-1, 1]^{100}`, :math:`Y = AX + \Xi` with
:math:`A = \mathrm{diag}(0.1 / i)` and noise of standard deviation 0.05. The score is the exact Wasserstein-1
distance of
1,024 samples to 1,024 samples of the exact posterior, so exact sampling scores about 0.33. Shapes within a mode are 0.1
wide and modes 8 apart: the score is the error of the mode weights.

References:
    Hagemann, Hertrich, Steidl, "Generalized normalizing flows via Markov chains", 2023,
    https://arxiv.org/abs/2111.12506 (layers and widths; the values are those of the talk)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.chains.bijections import AffineCoupling
from patchflow.chains.features import NormalScores
from patchflow.chains.flow import Flow
from patchflow.chains.gaussian import vae_layer
from patchflow.chains.kernel import Chain, Kernel, Reversed
from patchflow.chains.proposals import Independent, LangevinProposal
from patchflow.chains.stochastic import Metropolis
from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.fit import fit
from patchflow.numerics.weights import resample
from patchflow.posterior_models import joint_batches, prepare
from patchflow.priors.gaussian import StandardNormal
from patchflow.priors.mixture import ConditionalMixture, GaussianMixture
from patchflow.problems.likelihood import GaussianNoise, Likelihood
from patchflow.progress import progress_line
from patchflow.records import Record
from patchflow.sample_metrics import wasserstein1
from patchflow.table import Metric, Table, build_table

DIM = 100
MODES = 5
VARIANCE = 1e-4
NOISE = 0.05
SAMPLES = 1024
# Published values; the talk prints no standard deviations.
PUBLISHED = {
    "INN": 3.55,
    "INN+MALA": 2.92,
    "VAE": 1.22,
    "VAE+INN": 1.18,
    "VAE+MALA": 0.80,
    "INN+VAE+MALA": 0.82,
}
OURS = "mixture flow"
OURS_METROPOLIS = "mixture flow + independence Metropolis"
OURS_RESAMPLED = "mixture flow, resampled"
BASELINES = ("prior", "prior, resampled by the likelihood", "exact posterior")
METHODS = (*PUBLISHED, OURS, OURS_METROPOLIS, OURS_RESAMPLED, *BASELINES)
METRICS = (
    Metric("w1", "W1", 3, False),
    Metric("modes", "TV of mode weights", 3, False),
    Metric("ess", "ESS", 0, True, "%"),
    Metric("training", "training", 0, None, "CPU s"),
    Metric("sampling", "sampling", 2, None, "CPU s"),
)
Sampler = Callable[[Tensor], tuple[Tensor, float]]


def problem(seed: int) -> tuple[Likelihood, GaussianMixture, Tensor]:
    """The likelihood, the prior of one draw of the modes, and the matrix."""
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.rand(MODES, DIM, generator=generator) - 1
    prior = GaussianMixture(torch.ones(MODES), means, torch.full((MODES, DIM), VARIANCE))
    scales = 0.1 / torch.arange(1, DIM + 1)
    return Likelihood(lambda x: x * scales, GaussianNoise(NOISE)), prior, torch.diag(scales)


def published_flow(name: str, target: Energy) -> tuple[Flow, float]:
    """A network of the table, untrained, and its learning rate.

    Args:
        name: A row of :data:`PUBLISHED`.
        target: The posterior energy.
    """

    def inn() -> Kernel:
        # The published code samples through the reverse of FrEIA's blocks; there are no permutations between them.
        return Reversed(AffineCoupling(DIM, DIM, hidden=128, clamp=1.4))

    def vae(std: float) -> Kernel:
        return vae_layer(DIM, DIM, std=std, learned=False, hidden=128)

    def mala() -> Kernel:
        return Metropolis(target, LangevinProposal(5e-5), 3)

    kernels: list[Kernel]
    if name in ("INN", "INN+MALA"):
        kernels, lr = [inn() for _ in range(8)], 5e-4
    elif name == "VAE":
        kernels, lr = [vae(0.01 if k == 7 else 0.1) for k in range(8)], 6e-4
    elif name == "VAE+INN":
        kernels, lr = [f for k in range(4) for f in (inn(), vae(0.01 if k == 3 else 0.1))], 5e-4
    elif name == "VAE+MALA":
        kernels, lr = [vae(0.1) for _ in range(8)], 1e-3
    else:
        kernels, lr = [f for _ in range(4) for f in (inn(), vae(0.1))], 1e-3
    if name.endswith("MALA"):
        kernels.append(mala())
    return Flow(StandardNormal(DIM), Chain(*kernels), target=target), lr


def our_flow(target: Energy) -> Flow:
    """Sixteen components whose weights depend on y, as latent law of two couplings; it is not told that there are 5."""
    latent = ConditionalMixture(DIM, 16, DIM, hidden=128, features=NormalScores(DIM))
    chain = Chain(*(AffineCoupling(DIM, DIM, hidden=32) for _ in range(2)))
    return Flow(latent, chain, target=target)


def run(
    *,
    methods: Sequence[str] = METHODS,
    mixtures: int = 2,
    observations: int = 20,
    steps: int = 5000,
    our_steps: int = 3000,
    seed: int = 0,
) -> tuple[Table, list[Record]]:
    """Run the table.

    Args:
        methods: Which rows; the rows of one network share its training.
        mixtures: Draws of the modes, each with its own training; published: 5.
        observations: Measurements per mixture; published: 100.
        steps: Training steps of the published networks; published: 5000 of 1,024 fresh simulations.
        our_steps: Training steps of ours, of the same batches.
        seed: Seed of modes, training and measurements.

    Returns:
        The table, and the figures of each measurement.

    Raises:
        InputError: If a method is unknown or a number is not positive.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or min(mixtures, observations, steps, our_steps) < 1:
        raise InputError(
            f"Got the methods {unknown} and {mixtures} mixtures of {observations} measurements; use positive numbers "
            f"and methods of {', '.join(METHODS)}."
        )
    records = []
    for draw in range(mixtures):
        likelihood, prior, matrix = problem(seed + draw)
        samplers = _samplers(methods, likelihood, prior, matrix, steps, our_steps, seed + draw)
        torch.manual_seed(1000 + seed + draw)
        _, measurements = joint_batches(prior, likelihood, observations)()
        for k in range(observations):
            y = measurements[k : k + 1]
            exact = prior.posterior(matrix, NOISE, y[0])
            reference = exact.sample(SAMPLES)
            for method in methods:
                torch.manual_seed(seed + k)  # the same latents for all models
                sampler, training = samplers[method]
                begun = time.process_time()
                with torch.no_grad():
                    x, ess = sampler(y)
                seconds = time.process_time() - begun
                modes = _modes(x, prior) - exact.weights
                values = {
                    "w1": wasserstein1(x, reference),
                    "modes": 0.5 * float(modes.abs().sum()),
                    "ess": 100 * ess,
                    "training": training,
                    "sampling": seconds,
                }
                records.append(Record(method, f"{draw}.{k}", values))
    protocol = (
        f"{mixtures} mixtures x {observations} measurements, {SAMPLES} against {SAMPLES} samples, published networks "
        f"{steps} steps, ours {our_steps} steps of 1,024 fresh simulations"
    )
    published = {name: {"w1": value} for name, value in PUBLISHED.items() if name in methods}
    table = build_table("snf-mixture", protocol, records, published=published, metrics=METRICS)
    return table, records


def _samplers(
    methods: Sequence[str],
    likelihood: Likelihood,
    prior: GaussianMixture,
    matrix: Tensor,
    steps: int,
    our_steps: int,
    seed: int,
) -> dict[str, tuple[Sampler, float]]:
    target, found = likelihood + prior, {}
    batches = joint_batches(prior, likelihood, SAMPLES)
    trained: dict[str, tuple[Flow, float]] = {}
    for method in progress_line([m for m in methods if m in PUBLISHED], title="training"):
        torch.manual_seed(seed)
        flow, lr = published_flow(method, target)
        # The last MALA layer leaves the posterior invariant: INN+MALA is trained exactly as INN.
        if method == "INN+MALA" and "INN" in trained:
            inn, seconds = trained["INN"]
            flow.load_state_dict(inn.state_dict(), strict=False)
            flow.requires_grad_(False)
        else:
            begun = time.process_time()
            fit(flow, batches, steps=steps, lr=lr, schedule="constant", warmup=1)
            seconds = time.process_time() - begun
        trained[method] = flow, seconds
        found[method] = partial(_plain, flow), seconds
    if any(m in methods for m in (OURS, OURS_METROPOLIS, OURS_RESAMPLED)):
        torch.manual_seed(seed)
        begun = time.process_time()
        flow = our_flow(target)
        prepare(flow, *joint_batches(prior, likelihood, 5000)())
        fit(flow, batches, steps=our_steps, lr=2e-3, warmup=50)
        seconds = time.process_time() - begun
        kernel = Metropolis(target, Independent(flow), 10)
        corrected = Flow(flow, kernel, target=target)
        found[OURS] = partial(_plain, flow), seconds
        found[OURS_METROPOLIS] = partial(_plain, corrected), seconds
        found[OURS_RESAMPLED] = partial(_resampled, flow, 4 * SAMPLES), seconds
    found["prior"] = partial(_plain, Flow(prior, Chain(), target=target)), 0.0
    found["prior, resampled by the likelihood"] = (
        partial(_resampled, Flow(prior, Chain(), target=target), 20_000),
        0.0,
    )
    found["exact posterior"] = (
        lambda y: (prior.posterior(matrix, NOISE, y[0]).sample(SAMPLES), 1.0),
        0.0,
    )
    return found


def _plain(flow: Flow, y: Tensor) -> tuple[Tensor, float]:
    walk = flow.walk(SAMPLES, y)
    return walk.x, _share(walk.log_weights)


def _resampled(flow: Flow, count: int, y: Tensor) -> tuple[Tensor, float]:
    walk = flow.walk(count, y)
    return walk.x[resample(walk.log_weights, SAMPLES)], _share(walk.log_weights)


def _share(log_weights: Tensor) -> float:
    weights = log_weights.double().softmax(0)
    share = 1 / (weights.square().sum() * len(weights))
    return share.item() if math.isfinite(share) else 0.0


def _modes(x: Float[Tensor, "batch dim"], prior: GaussianMixture) -> Float[Tensor, " modes"]:
    nearest = torch.cdist(x, prior.means).argmin(1)
    return nearest.bincount(minlength=MODES) / len(x)
