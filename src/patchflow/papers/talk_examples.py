r"""Two examples of a talk in the plane: an inverse problem, and the densities on which flows leave bridges.

The inverse problem is the talk's: :math:`F(x_1, x_2) = x_2`, noise :math:`N(0, 0.1^2)`, :math:`y = 0`. The prior and
the densities are ours, for the talk does not name its own: the prior is :func:`two_moons`, turned, so that the
line :math:`x_2 = 0` cuts it four times at different angles. The comparison of flows is in
:mod:`patchflow.papers.talk_multimodal`.

References:
    Steidl, "Stochastic normalizing flows and the power of patches in inverse problems", talk, 2022
    Hagemann, Hertrich, Steidl, "Stochastic normalizing flows for inverse problems: a Markov chains viewpoint", 2022,
    https://arxiv.org/abs/2109.11375
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from patchflow.chains.flow import Flow
from patchflow.energy import Density, Energy
from patchflow.learn_posterior import learn_posterior
from patchflow.posterior_models import conditional_snf
from patchflow.priors.mixture import GaussianMixture
from patchflow.problems.likelihood import GaussianNoise, Likelihood
from patchflow.sample_metrics import wasserstein1

NOISE, MEASURED = 0.1, 0.0
TURN = 0.55
# Samples for one W1, their repetitions, and samples of the histogram.
COUNT, REPEATS, MANY = 1000, 10, 40_000
# Half the width of what is drawn.
EXTENT = 3.0
_INK = "#14457a"


class Rings(Density):
    r"""Circles around the origin, blurred by :math:`N(0, \sigma^2 I)`, each weighted by its length.

    A blurred circle of radius :math:`R` has the density
    :math:`I_0(\|x\| R / \sigma^2)\, e^{-(\|x\|^2 + R^2) / (2 \sigma^2)} / (2 \pi \sigma^2)`.

    Args:
        radii: The radii :math:`R`.
        std: The standard deviation :math:`\sigma`.
    """

    radii: Tensor

    def __init__(self, radii: Sequence[float], std: float) -> None:
        super().__init__()
        self.register_buffer("radii", torch.tensor(radii))
        self.std = std

    def forward(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate; see :meth:`Energy.forward`."""
        variance, r = self.std**2, x.norm(dim=1, keepdim=True)
        # The exponentially scaled Bessel function leaves (r - R)^2 in the exponent.
        scaled = torch.special.i0e(r * self.radii / variance).log()
        log_p = scaled - 0.5 * (r - self.radii).square() / variance
        weights = (self.radii / self.radii.sum()).log()
        return math.log(2 * math.pi * variance) - (weights + log_p).logsumexp(1)

    def sample(self, count: int, condition: Tensor | None = None) -> Float[Tensor, "count dim"]:
        """Draw samples; see :meth:`Density.sample`."""
        radius = self.radii[torch.multinomial(self.radii, count, replacement=True)]
        angle = 2 * math.pi * torch.rand(count).to(radius)
        circle = radius[:, None] * torch.stack((angle.cos(), angle.sin()), 1)
        return circle + self.std * torch.randn(count, 2).to(radius)


def two_moons(turn: float = 0.0) -> Density:
    """Two half circles of radius 1.5, each of 20 normal laws, turned by an angle around the origin."""
    angles = math.pi * (torch.arange(20) + 0.5) / 20
    upper = 1.5 * torch.stack((angles.cos(), angles.sin()), 1) - torch.tensor([0.75, 0.375])
    cos, sin = math.cos(turn), math.sin(turn)
    return alike(torch.cat((upper, -upper)) @ torch.tensor([[cos, sin], [-sin, cos]]), 0.15)


def rings() -> Density:
    """Two circles of radius 1 and 2, one inside the other."""
    return Rings((1.0, 2.0), 0.12)


def eight_gaussians() -> Density:
    """Eight normal laws on a circle of radius 2."""
    angles = math.pi * torch.arange(8) / 4
    return alike(2 * torch.stack((angles.cos(), angles.sin()), 1), 0.15)


def alike(means: Tensor, std: float) -> GaussianMixture:
    """Normal laws of one width and equal weights, frozen."""
    mixture = GaussianMixture(torch.ones(len(means)), means, torch.full_like(means, std**2))
    return mixture.requires_grad_(False)


def on_grid(
    density: Energy, condition: Tensor | None = None, *, size: int = 400
) -> tuple[Tensor, Tensor, float]:
    """The points of a grid over [-4, 4]^2, exp(-energy) there, (size, size) with x2 first, and a cell's area."""
    width = 8 / size
    places = width * (torch.arange(size) + 0.5) - 4
    x2, x1 = torch.meshgrid(places, places, indexing="ij")
    points = torch.stack((x1, x2), 2).view(-1, 2)
    with torch.no_grad():
        energies = torch.cat([density(block, condition) for block in points.split(20_000)])
    return points, (-energies).exp().view(size, size), width**2


def prior_and_posterior() -> tuple[Density, Likelihood]:
    r"""The prior and the likelihood of the talk's problem; their sum is the posterior's energy at ``condition`` y."""
    return two_moons(TURN), Likelihood(lambda x: x[:, 1:], GaussianNoise(NOISE))


def exact_posterior(y: float = MEASURED) -> GaussianMixture:
    """The posterior in closed form: the prior is a normal mixture and the forward model is linear."""
    prior = two_moons(TURN)
    assert isinstance(prior, GaussianMixture)
    return prior.posterior(torch.tensor([[0.0, 1.0]]), NOISE, torch.tensor([y]))


def learn_example(
    *, seed: int = 0, steps: int = 600, seconds: float | None = None, progress: bool = False
) -> Flow:
    """Train a conditional stochastic flow for every measurement of the problem.

    Args:
        seed: The seed.
        steps: Training steps.
        seconds: Time limit.
        progress: Show a progress line.
    """
    torch.manual_seed(seed)
    prior, likelihood = prior_and_posterior()
    flow = conditional_snf(likelihood, prior, 1, layers=3, hidden=32, components=8, mcmc_steps=10)
    learn_posterior(
        flow,
        likelihood,
        prior,
        batch=512,
        steps=steps,
        seconds=seconds,
        lr=5e-3,
        average=0.99,
        progress=progress,
    )
    return flow


@torch.no_grad()
def measure_posterior(flow: Flow) -> tuple[float, float]:
    """W1 of the flow's samples at y = 0 to exact ones, and that of exact samples to each other: means of repeats."""
    exact, y = exact_posterior(), torch.tensor([[MEASURED]])
    pairs = [
        (flow.sample(COUNT, y), exact.sample(COUNT), exact.sample(COUNT)) for _ in range(REPEATS)
    ]
    ours = sum(wasserstein1(x, reference) for x, reference, _ in pairs) / REPEATS
    return ours, sum(wasserstein1(other, reference) for _, reference, other in pairs) / REPEATS


def draw_posterior(flow: Flow, w1: float, floor: float, *, seed: int = 0) -> bytes:
    """One PNG: prior, likelihood, posterior by quadrature, samples of the flow, and the marginals of x1.

    Args:
        flow: What :func:`learn_example` returned.
        w1: Its distance to the posterior, from :func:`measure_posterior`.
        floor: That of exact samples.
        seed: The seed of the samples.
    """
    torch.manual_seed(seed + 1)
    prior, likelihood = prior_and_posterior()
    y = torch.tensor([[MEASURED]])
    with torch.no_grad():
        x = flow.sample(MANY, y)
    laws = (prior, likelihood, likelihood + prior)
    panels = [on_grid(law, y)[1] for law in laws]
    figure = Figure(figsize=(12, 6.3), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2, 4, height_ratios=(3, 2.1))
    titles = (
        ("prior $p(x)$", "two moons (ours)"),
        ("likelihood $p(y = 0 \\mid x)$", "$F(x_1, x_2) = x_2$, noise 0.1"),
        ("posterior $p(x \\mid y = 0)$", "by quadrature"),
        ("stochastic flow, $y = 0$", f"samples: W1 {w1:.3f} (exact {floor:.3f})"),
    )
    for place, (title, caption) in enumerate(titles):
        axes = plain_axes(figure.add_subplot(grid[0, place]))
        axes.set_title(title, size=13, weight="bold", pad=8)
        axes.set_xlabel(caption, size=11)
        if place < 3:
            values = panels[place].numpy()
            axes.imshow(
                values,
                origin="lower",
                extent=(-4, 4, -4, 4),
                cmap="Blues",
                norm=PowerNorm(0.6, 0, values.max()),
            )
        else:
            axes.scatter(*x[:4000].T.numpy(), s=3, color=_INK, linewidths=0, alpha=0.6)
        if place != 1:
            axes.axhline(MEASURED, color="#d55e00", lw=0.8, ls=(0, (4, 3)))
        axes.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT))
    below = figure.add_subplot(grid[1, :])
    size = panels[2].shape[0]
    places = 8 / size * (np.arange(size) + 0.5) - 4
    marginal = panels[2].sum(0).numpy()
    marginal = marginal / (marginal.sum() * 8 / size)
    bins = np.linspace(-EXTENT, EXTENT, 121).tolist()
    below.hist(
        x[:, 0].numpy(), bins=bins, density=True, color="#9db9d8", label=f"flow, {len(x):,} samples"
    )
    below.plot(places, marginal, color="#d55e00", lw=2, label="quadrature")
    below.set(xlim=(-EXTENT, EXTENT), xlabel="$x_1$", yticks=[])
    below.set_ylabel("$p(x_1 \\mid y = 0)$", size=12)
    below.spines[["top", "right", "left"]].set_visible(False)
    below.legend(frameon=False, fontsize=11)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi="figure")
    return buffer.getvalue()


def plain_axes(axes: Axes) -> Axes:
    """Square axes without ticks, in a light frame."""
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_color("#bbbbbb")
    return axes
