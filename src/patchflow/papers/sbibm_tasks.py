r"""Benchmarking simulation-based inference (2021): the eight tasks whose likelihood can be computed.

Every task is a prior, a forward model and a law of the data given its value. The two tasks with a differential
equation share one, because an epidemic is a Lotka-Volterra system whose prey does not multiply.

References:
    Lueckmann, Boelts, Greenberg, Goncalves, Macke, AISTATS 2021, https://arxiv.org/abs/2101.04653
    The details are those of its code, https://github.com/sbi-benchmark/sbibm
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.energy import Conditional, Energy, Transported
from patchflow.errors import InputError
from patchflow.priors.normal import LogNormal, Normal
from patchflow.priors.uniform import Uniform
from patchflow.problems.likelihood import GaussianNoise, Likelihood

# Runge-Kutta steps between two of the ten times of an observation.
STEPS = 100
LOG_2PI = math.log(2 * math.pi)
STD = math.sqrt(0.1)


@dataclass(frozen=True)
class Task:
    r"""One task of the benchmark.

    Args:
        name: Its name, one of ``NAMES``.
        prior: The prior of :math:`\theta`, normalised.
        likelihood: :math:`E(\theta \mid y) = -\log p(y \mid \theta)`; normalised over :math:`y`, but for
            ``bernoulli_glm``, where a constant of :math:`y` is missing.
        simulate: Draws one observation for each parameter.
        condition: Maps observations to features for networks, one to one.
        gradient: Whether the gradient of the likelihood is cheap; ``False`` behind a differential equation.
    """

    name: str
    prior: Transported
    likelihood: Energy
    simulate: Callable[[Tensor], Tensor]
    condition: Callable[[Tensor], Tensor]
    gradient: bool


class _Law(Conditional):
    @abstractmethod
    def sample(self, a: Float[Tensor, "batch _"]) -> Float[Tensor, "batch data"]: ...

    def draw(self, a: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        b = self.sample(a)
        return b, self.log_prob(b, a)


class _FourPoints(_Law):
    r"""SLCP: four independent points of :math:`N((\theta_1, \theta_2), \Sigma)`.

    .. math:: \Sigma = \begin{pmatrix} s_1^2 & \rho s_1 s_2 \\ \rho s_1 s_2 & s_2^2 \end{pmatrix} + 10^{-6} I, \quad
        s_1 = \theta_3^2,\; s_2 = \theta_4^2,\; \rho = \tanh \theta_5.
    """

    def sample(self, a: Float[Tensor, "batch 5"]) -> Float[Tensor, "batch 8"]:
        first, cross, _, determinant = self._covariance(a)
        noise = torch.randn(len(a), 4, 2).to(a)
        left = first.sqrt() * noise[..., 0]
        right = (cross * noise[..., 0] + determinant.sqrt() * noise[..., 1]) / first.sqrt()
        return (torch.stack([left, right], 2) + a[:, None, :2]).flatten(1)

    def log_prob(self, b: Tensor, a: Tensor, condition: Tensor | None = None) -> Tensor:
        first, cross, second, determinant = self._covariance(a)
        x, y = (b.unflatten(1, (4, 2)) - a[:, None, :2]).unbind(2)
        square = (second * x.square() - 2 * cross * x * y + first * y.square()) / determinant
        return -(0.5 * square + 0.5 * determinant.log() + LOG_2PI).sum(1)

    def _covariance(self, a: Tensor) -> tuple[Tensor, ...]:
        # The two variances, the covariance and the determinant, without cancellation for |rho| near 1.
        s1, s2, rho = a[:, 2:3].square(), a[:, 3:4].square(), a[:, 4:5].tanh()
        bare = (s1 * s2 / a[:, 4:5].cosh()).square()
        determinant = bare + 1e-6 * (s1.square() + s2.square()) + 1e-12
        return s1.square() + 1e-6, rho * s1 * s2, s2.square() + 1e-6, determinant


class _Spikes(_Law):
    r"""The sufficient statistics :math:`y = V^\top z` of spikes :math:`z_t \sim B(1, 1 / (1 + e^{-(V \theta)_t}))`.

    .. math:: \log p(y \mid \theta) = \theta \cdot y - \sum_t \log(1 + e^{(V \theta)_t}) + \mathrm{const}(y)

    The first column of the design matrix :math:`V` is one, so :math:`y_1` counts the spikes.
    """

    design: Tensor

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.register_buffer("design", _read(path))

    def sample(self, a: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        return torch.bernoulli((a @ self.design.T).sigmoid()) @ self.design

    def log_prob(self, b: Tensor, a: Tensor, condition: Tensor | None = None) -> Tensor:
        return (a * b).sum(1) - nn.functional.softplus(a @ self.design.T).sum(1)


class _TwoScales(_Law):  # N(theta, I) / 2 + N(theta, 0.01 I) / 2
    def sample(self, a: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        std = torch.where(torch.rand(len(a), 1).to(a) < 0.5, 0.1, 1.0)
        return a + std * torch.randn_like(a)

    def log_prob(self, b: Tensor, a: Tensor, condition: Tensor | None = None) -> Tensor:
        wide, narrow = (GaussianNoise(std).log_prob(b, a) for std in (1, 0.1))
        return torch.logaddexp(wide, narrow) - math.log(2)


class _Moon(_Law):
    r"""Half a ring of radius :math:`r \sim N(0.1, 0.01^2)` with uniform angles around a point :math:`o(\theta)`.

    .. math:: y = o(\theta) + r (\cos\alpha, \sin\alpha), \quad
        o(\theta) = (\tfrac14 - |\theta_1 + \theta_2| / \sqrt2,\; (\theta_2 - \theta_1) / \sqrt2)

    The density is :math:`N(r; 0.1, 0.01^2) / (\pi r)` where :math:`\cos\alpha > 0` and 0 elsewhere.
    A negative radius, of probability 1e-23, is neglected.
    """

    def sample(self, a: Float[Tensor, "batch 2"]) -> Float[Tensor, "batch 2"]:
        radius, angle = 0.1 + 0.01 * torch.randn(len(a)), math.pi * (torch.rand(len(a)) - 0.5)
        return self._origin(a) + torch.stack([radius * angle.cos(), radius * angle.sin()], 1).to(a)

    def log_prob(self, b: Tensor, a: Tensor, condition: Tensor | None = None) -> Tensor:
        u, v = (b - self._origin(a)).unbind(1)
        # where() differentiates both sides, hence a harmless point outside the support.
        r = torch.hypot(torch.where(u > 0, u, 0.1), v)
        log = -0.5 * ((r - 0.1) / 0.01).square() - 0.5 * LOG_2PI - (0.01 * math.pi * r).log()
        return torch.where(u > 0, log, -math.inf)

    def _origin(self, a: Tensor) -> Tensor:
        total, difference = a.sum(1).abs(), a[:, 1] - a[:, 0]
        return torch.stack([0.25 - total / math.sqrt(2), difference / math.sqrt(2)], 1)


class _Counts(_Law):
    r"""Binomial counts :math:`y_i \sim B(1000, e^{a_i})`, with :math:`a` clamped to :math:`[-100, -10^{-6}]`.

    The clamp keeps the energy finite for counts where nobody, or to rounding everybody, is infected.
    """

    total = 1000

    def sample(self, a: Float[Tensor, "batch data"]) -> Float[Tensor, "batch data"]:
        chance = a.clamp(-100, -1e-6).exp()
        return torch.binomial(torch.full_like(chance, self.total), chance)

    def log_prob(self, b: Tensor, a: Tensor, condition: Tensor | None = None) -> Tensor:
        success = a.clamp(-100, -1e-6)
        failure = (-success.expm1()).log()
        ways = math.lgamma(self.total + 1) - (b + 1).lgamma() - (self.total + 1 - b).lgamma()
        return (ways + b * success + (self.total - b) * failure).sum(1)


class _LogNoise(_Law):  # log y ~ N(a, 0.01 I)
    def sample(self, a: Float[Tensor, "batch data"]) -> Float[Tensor, "batch data"]:
        return (a + 0.1 * torch.randn_like(a)).exp()

    def log_prob(self, b: Tensor, a: Tensor, condition: Tensor | None = None) -> Tensor:
        return GaussianNoise(0.1).log_prob(b.log(), a) - b.log().sum(1)


def populations(
    rates: Float[Tensor, "4 batch"], start: tuple[float | int, float | int], interval: float | int
) -> Float[Tensor, "2 batch 10"]:
    r"""Logarithms of the populations at ten times, by ``STEPS`` classical Runge-Kutta steps between two times.

    The logarithms :math:`p` of the prey and :math:`q` of the predators satisfy :math:`\dot p = \alpha - \beta e^q` and
    :math:`\dot q = \delta e^p - \gamma`: populations stay positive and a decay is a straight line.

    Args:
        rates: :math:`\alpha, \beta, \gamma, \delta`, per day.
        start: The populations at the first time, day 0.
        interval: Days between two times.
    """
    alpha, beta, gamma, delta = rates
    drift, gain = torch.stack([alpha, -gamma]), torch.stack([-beta, delta])

    def velocity(state: Tensor) -> Tensor:
        # No solution comes near the clamp; it keeps a wild intermediate state from overflowing to inf - inf.
        return torch.addcmul(drift, gain, state.clamp_max(30).exp().flip(0))

    state = drift.new_tensor(start).log()[:, None].expand_as(drift)
    step, states = interval / STEPS, [state]
    for _ in range(9):
        for _ in range(STEPS):
            k1 = velocity(state)
            k2 = velocity(state + step / 2 * k1)
            k3 = velocity(state + step / 2 * k2)
            k4 = velocity(state + step * k3)
            state = state + step / 6 * (k1 + 2 * (k2 + k3) + k4)
        states.append(state)
    return torch.stack(states, 2)


def task(name: str, data: Path) -> Task:
    """Build a task.

    Args:
        name: One of ``NAMES``.
        data: The folder of the benchmark's files, with a folder for each task.

    Raises:
        InputError: If there is no such task, or the design matrix of ``bernoulli_glm`` is missing.
    """
    if name not in _PARTS:
        raise InputError(f"There is no task {name!r}; choose one of {', '.join(NAMES)}.")
    prior, law = _PARTS[name](data / name)
    model, condition = _MAPS.get(name, (nn.Identity(), nn.Identity()))
    likelihood = Likelihood(model, law)
    return Task(name, prior, likelihood, likelihood.simulate, condition, name not in _MAPS)


def read_observation(data: Path, name: str, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Read an observation (1, data), its true parameters (1, dim) and samples of its posterior (10000, dim).

    Args:
        data: The folder of the benchmark's files, as for :func:`task`.
        name: One of ``NAMES``.
        number: The number of the observation, from 1.

    Raises:
        InputError: If a file is missing.
    """
    folder = data / name / f"num_observation_{number}"
    files = ("observation.csv", "true_parameters.csv", "reference_posterior_samples.csv.bz2")
    first, second, third = (_read(folder / file) for file in files)
    return first, second, third


def _infected(theta: Tensor) -> Tensor:
    # Log-fractions of a population of a million with one infected: the susceptible are prey that does not multiply.
    beta, gamma = theta.unbind(1)
    rates = torch.stack([torch.zeros_like(beta), beta, gamma, beta])
    return populations(rates, (1 - 1e-6, 1e-6), 17)[1]


def _animals(theta: Tensor) -> Tensor:
    # The benchmark clamps the populations, which only matters where the prior is far from the data.
    logs = populations(theta.T, (30, 1), 2.1).clamp(math.log(1e-10), math.log(1e4))
    return torch.cat([logs[0], logs[1]], 1)


def _logit(counts: Tensor) -> Tensor:
    # Half a count more on each side, so that 0 and all have finite features.
    return ((counts + 0.5) / (_Counts.total - counts + 0.5)).log()


def _log_normal(location: list, scale: list) -> LogNormal:
    return LogNormal(torch.tensor(location), torch.tensor(scale))


def _smooth() -> Normal:
    # Variance 2 for the offset; the filter has the precision F^T F, F = D D + sqrt(i / 9) with first differences D.
    difference = torch.eye(9) - torch.ones(8).diag(-1)
    roughness = difference @ difference + (torch.arange(9) / 9).sqrt().diag()
    covariance = torch.block_diag(2 * torch.eye(1), torch.linalg.inv(roughness.T @ roughness))
    return Normal(torch.zeros(10), 0.5 * (covariance + covariance.T))


def _read(path: Path) -> Tensor:
    if not path.is_file():
        raise InputError(f"There is no file {path}; give the folder of the benchmark's files.")
    if path.suffix == ".npy":
        values = np.load(path, allow_pickle=False)
    else:
        values = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)  # unpacks bz2 as well
    return torch.as_tensor(values, dtype=torch.get_default_dtype())


# The folder of the task's files gives the prior and the law.
_PARTS: dict[str, Callable[[Path], tuple[Transported, Conditional]]] = {
    "gaussian_linear": lambda _: (Normal(torch.zeros(10), torch.eye(10) / 10), GaussianNoise(STD)),
    "gaussian_linear_uniform": lambda _: (Uniform(-1, 1, dim=10), GaussianNoise(STD)),
    "slcp": lambda _: (Uniform(-3, 3, dim=5), _FourPoints()),
    "bernoulli_glm": lambda folder: (_smooth(), _Spikes(folder / "design_matrix.npy")),
    "gaussian_mixture": lambda _: (Uniform(-10, 10, dim=2), _TwoScales()),
    "two_moons": lambda _: (Uniform(-1, 1, dim=2), _Moon()),
    "sir": lambda _: (_log_normal([math.log(0.4), math.log(0.125)], [0.5, 0.2]), _Counts()),
    "lotka_volterra": lambda _: (_log_normal([-0.125, -3, -0.125, -3], [0.5] * 4), _LogNoise()),
}
# The differential equations: from parameters to the law's, and from data to features.
_MAPS = {"sir": (_infected, _logit), "lotka_volterra": (_animals, torch.log)}
NAMES: tuple[str, ...] = tuple(_PARTS)
