r"""The talk's argument for stochastic layers: a flow of bounded Lipschitz constant leaves bridges between modes.

Three targets of known density in the plane; couplings with clamped scales alone, the same couplings with Metropolis
layers of interpolated laws between them, the same couplings from a learned mixture, and exact samples. If
:math:`T_\# N(0, I)` puts mass on two sets at distance :math:`\delta`, then by the Gaussian isoperimetric inequality the
mass in between is bounded below in terms of :math:`\delta / \mathrm{Lip}(T)`, so bridges vanish only as the constant
grows; Metropolis layers, like a latent law of several modes, have no such bound. But they cost energies of the target,
in training and for each sample, while couplings alone need its samples only. The targets are ours: the talk names none.

References:
    Hagemann, Neumayer, "Stabilizing invertible neural networks using mixture models", 2021,
    https://arxiv.org/abs/2009.02994
    Cornish, Caterini, Deligiannidis, Doucet, "Relaxing bijectivity constraints with continuously indexed normalising
    flows", 2020, https://arxiv.org/abs/1909.13833
    Hagemann, Hertrich, Steidl, "Stochastic normalizing flows for inverse problems: a Markov chains viewpoint", 2022,
    https://arxiv.org/abs/2109.11375
"""

from __future__ import annotations

import io
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from patchflow.chains.adaptation import adapt
from patchflow.chains.bijections import AffineCoupling
from patchflow.chains.flow import Flow
from patchflow.chains.kernel import Chain, Kernel
from patchflow.chains.proposals import RandomWalk
from patchflow.chains.stochastic import Metropolis
from patchflow.energy import Density, Interpolation
from patchflow.errors import InputError
from patchflow.fit import fit
from patchflow.papers.talk_examples import (
    EXTENT,
    alike,
    eight_gaussians,
    on_grid,
    plain_axes,
    rings,
    two_moons,
)
from patchflow.priors.gaussian import StandardNormal
from patchflow.priors.mixture import ConditionalMixture
from patchflow.records import Record
from patchflow.sample_metrics import wasserstein1
from patchflow.table import SECONDS, Metric, Table, build_table

METHODS = ("coupling flow", "stochastic flow", "flow of a mixture", "exact samples")
METRICS = (
    Metric("bridge", "low density", 2, None, "%"),
    Metric("ratio", "over exact", 2, None),
    Metric("w1", "W1", 3, None),
    Metric("lipschitz", "Lip T", 1, None),
    Metric("inverse", "Lip inverse", 1, None),
    SECONDS,
    Metric("sampling", "1,000 samples", 1, None, "ms"),
)
# Couplings of every flow, in blocks of which each ends with a Metropolis layer in the stochastic flow.
BLOCKS, COUPLINGS, HIDDEN, CLAMP = 4, 2, 64, 1.0
METROPOLIS_STEPS, LAST_STEPS, STEP = 5, 20, 0.3
# The laws of the layers interpolate from N(0, START^2 I), as wide as the targets, rather than from the latent law:
# from N(0, I) the inner ring got too much mass, which no later layer can carry across (W1 0.25 instead of 0.15).
START = 2.0
COMPONENTS = 8
# The share of the exact mass outside the region of low density.
MASS = 0.99
REPEATS, COUNT, MANY = 5, 1000, 40_000
_INK, _LOST = "#14457a", "#d55e00"


TARGETS: Mapping[str, Callable[[], Density]] = {
    "two moons": two_moons,
    "rings": rings,
    "eight Gaussians": eight_gaussians,
}


@dataclass(frozen=True)
class Example:
    """A target, the flows that were trained for it by method, and the seconds of their training."""

    name: str
    target: Density
    flows: Mapping[str, Flow]
    seconds: Mapping[str, float]


def highest_energy(target: Density) -> float:
    """The energy below which the target has :data:`MASS` of its mass; above it is the region of low density."""
    _, density, area = on_grid(target)
    values = density.double().flatten().sort(descending=True).values
    return -math.log(values[(values.cumsum(0) * area < MASS).sum().clamp_max(len(values) - 1)])


def lipschitz(kernel: Kernel, z: Float[Tensor, "batch 2"]) -> tuple[float, float]:
    r"""Lower estimates of the Lipschitz constants of a bijection and of its inverse.

    The largest :math:`\sigma_{\max}(\nabla T(z))` and :math:`1 / \sigma_{\min}(\nabla T(z))` over the points: the
    constants are suprema over all points.

    Args:
        kernel: The bijection :math:`T`.
        z: The points.

    Raises:
        InputError: If the kernel is not a bijection.
    """
    if not kernel.bijective:
        raise InputError("A stochastic kernel has no Lipschitz constant; give its bijective part.")
    slope = torch.func.vmap(torch.func.jacrev(lambda point: kernel(point[None]).x[0]))(z)
    values = torch.linalg.svdvals(slope.detach().double())
    return values.max().item(), 1 / values.min().item()


def learn(
    *,
    seed: int = 0,
    steps: int = 1200,
    seconds: float | None = None,
    batch: int = 256,
    progress: bool = False,
) -> list[Example]:
    """Train the flows of all targets: the same couplings, batches and steps for each method.

    Args:
        seed: The seed.
        steps: Training steps of each flow.
        seconds: Time limit of each training.
        batch: Fresh samples of the target in a step.
        progress: Show progress lines.
    """
    torch.manual_seed(seed)
    examples = []
    for name, make in TARGETS.items():
        target, flows, times = make(), {}, {}
        for method in METHODS[:3]:
            begun = time.perf_counter()
            flows[method] = flow = _flow(method, target)
            fit(
                flow,
                lambda target=target: target.sample(batch),
                steps=steps,
                lr=3e-3,
                warmup=100,
                budget=seconds,
                progress=progress,
            )
            if not flow.exact:
                adapt(flow, lambda: None)
            times[method] = time.perf_counter() - begun
        examples.append(Example(name, target, flows, times))
    return examples


def _flow(method: str, target: Density) -> Flow:
    latent: Density = StandardNormal(2)
    start = alike(torch.zeros(1, 2), START)
    if method == "flow of a mixture":
        latent = ConditionalMixture(2, COMPONENTS)
        latent.initialize(target.sample(5000))
    kernels: list[Kernel] = []
    for block in range(1, BLOCKS + 1):
        for _ in range(COUPLINGS):
            coupling = AffineCoupling(2, hidden=HIDDEN, clamp=CLAMP)
            for net in (coupling.net1, coupling.net2):  # start near the identity
                nn.init.zeros_(net.linears[-1].bias)
                net.linears[-1].weight.data.mul_(0.1)
            kernels.append(coupling)
        if method == "stochastic flow":
            last = block == BLOCKS
            law = target if last else Interpolation(start, target, block / BLOCKS)
            count = LAST_STEPS if last else METROPOLIS_STEPS
            kernels.append(Metropolis(law, RandomWalk(STEP), count))
    return Flow(latent, Chain(*kernels), target=target, accept_gradient="biased")


def compare(examples: Sequence[Example], *, seed: int = 0) -> tuple[Table, list[Record]]:
    """Measure the flows and exact samples.

    Args:
        examples: What :func:`learn` returned.
        seed: The seed of the samples.

    Returns:
        The table, with means over targets, and the figures of each method and target.
    """
    torch.manual_seed(seed + 1)
    records, noise = [], []
    for example in examples:
        top = highest_energy(example.target)
        laws: dict[str, Density] = {**example.flows, METHODS[3]: example.target}
        for method, law in laws.items():
            values, spread = _measure(law, example.target, top)
            if method in example.seconds:
                values["seconds"] = example.seconds[method]
            records.append(Record(method, example.name, values))
            noise += [spread] if method == METHODS[3] else []
    count = math.sqrt(len(examples))
    chance = 100 * math.sqrt(MASS * (1 - MASS) / MANY) / count
    floor = {"bridge": chance, "ratio": chance / (100 * (1 - MASS))}
    floor["w1"] = statistics.mean(noise) / math.sqrt(REPEATS) / count
    protocol = (
        f"means over {len(examples)} targets, {BLOCKS * COUPLINGS} couplings with clamp {CLAMP:g}; samples where the "
        f"density is below what holds {100 * MASS:g} % of the exact mass, of {MANY}; W1 of {COUNT} samples, mean of "
        f"{REPEATS}; Lipschitz constants at {COUNT} points; {torch.get_num_threads()} threads"
    )
    return build_table("talk-multimodal", protocol, records, floor=floor, metrics=METRICS), records


def run(
    *, seed: int = 0, steps: int = 1200, seconds: float | None = None
) -> tuple[Table, list[Record]]:
    """Train and measure; see :func:`learn` and :func:`compare`."""
    return compare(learn(seed=seed, steps=steps, seconds=seconds), seed=seed)


@torch.no_grad()
def _measure(law: Density, target: Density, top: float) -> tuple[dict[str, float], float]:
    low = 100 * (target(law.sample(MANY)) > top).double().mean().item()
    begun = time.perf_counter()
    for _ in range(REPEATS):
        law.sample(COUNT)
    sampling = (time.perf_counter() - begun) * 1e3 / REPEATS
    w1 = [wasserstein1(law.sample(COUNT), target.sample(COUNT)) for _ in range(REPEATS)]
    values = {"bridge": low, "ratio": low / (100 * (1 - MASS)), "w1": statistics.mean(w1)}
    values["sampling"] = sampling
    if isinstance(law, Flow) and law.chain.bijective:
        points = law.latent.sample(COUNT)
        values["lipschitz"], values["inverse"] = lipschitz(law.chain, points)
    return values, statistics.stdev(w1)


def draw(examples: Sequence[Example], records: Sequence[Record], *, seed: int = 0) -> bytes:
    """One PNG: by target its density, the coupling flow's density, and samples of both flows.

    Densities are on a scale that shows a thousandth of the maximum; samples in the region of low density are orange.

    Args:
        examples: What :func:`learn` returned.
        records: Their figures, from :func:`compare`.
        seed: The seed of the samples.
    """
    torch.manual_seed(seed + 2)
    found = {(record.image, record.method): record.values for record in records}
    figure = Figure(figsize=(12, 3.3 * len(examples) + 0.35), dpi=150, layout="constrained")
    grid = figure.subplots(len(examples), 4, squeeze=False)
    titles = ("target density", "coupling flow: density", "coupling flow: samples")
    for axes, title in zip(grid[0], (*titles, "stochastic flow: samples"), strict=True):
        axes.set_title(title, size=13, weight="bold", pad=8)
    for row, example in zip(grid, examples, strict=True):
        top = highest_energy(example.target)
        flows = [example.flows[method] for method in METHODS[:2]]
        densities = [on_grid(law)[1] for law in (example.target, flows[0])]
        values = [found[example.name, method] for method in METHODS[:2]]
        lipschitz = f"Lip T ≥ {values[0]['lipschitz']:.0f}, Lip T⁻¹ ≥ {values[0]['inverse']:.0f}"
        exact = f"{example.name}: {100 - 100 * MASS:.1f} % in low density"
        captions = [exact, lipschitz]
        captions += [f"{v['bridge']:.1f} % in low density, W1 {v['w1']:.2f}" for v in values]
        for axes, caption in zip(row, captions, strict=True):
            plain_axes(axes)
            axes.set_xlabel(caption, size=11)
        norm = PowerNorm(0.4, 0, densities[0].max().item(), clip=True)
        for axes, density in zip(row, densities, strict=False):
            axes.imshow(
                density.numpy(), origin="lower", extent=(-4, 4, -4, 4), cmap="Blues", norm=norm
            )
        for axes, flow in zip(row[2:], flows, strict=True):
            with torch.no_grad():
                x = flow.sample(4000)
                low = example.target(x) > top
            for points, colour in ((x[~low], _INK), (x[low], _LOST)):
                axes.scatter(*points.T.numpy(), s=3, color=colour, linewidths=0, alpha=0.7)
        for axes in row:
            axes.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT))
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi="figure")
    return buffer.getvalue()
