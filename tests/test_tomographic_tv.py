"""Total variation of sinograms: proximal maps of noise, the preconditioner, and solutions against other solvers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import torch

import patchflow as pf
from patchflow.papers.leuschner2021_lodopab import LIMITED
from patchflow.priors.variation import image_gradient
from patchflow.problems.likelihood import GaussianNoise, ProximableNoise
from patchflow.problems.poisson import CountWeightedNoise, PoissonNoise
from patchflow.problems.tomography import ParallelBeam
from patchflow.reconstruct import total_variation

NOISES = {
    "gaussian": GaussianNoise(0.3),
    "one std per value": GaussianNoise(torch.tensor([0.1, 0.5, 1.0, 2.0])),
    "poisson": PoissonNoise(50, 2.0),
    "few photons": PoissonNoise(2, 1.0),
    "count-weighted": CountWeightedNoise(50, 2.0),
}
noises = pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)


@noises
@pytest.mark.parametrize("step", [1e-3, 0.1, 10.0])
def test_prox_solves_its_problem(noise: ProximableNoise, step: float) -> None:
    b = torch.rand(3, 4)
    # Far to both sides: what an over-relaxed dual step may ask for.
    v = torch.tensor([-6.0, 0.2, 9.0])[:, None] + torch.randn(3, 4)
    z = noise.prox(v, step, b).requires_grad_()
    (slope,) = torch.autograd.grad(-noise.log_prob(b, z).sum(), z)
    residual = slope + (z.detach() - v) / step
    assert float((residual / (1 + slope.abs())).abs().max()) < 1e-9


@noises
def test_precision_is_the_curvature_at_the_measurement(noise: ProximableNoise) -> None:
    b = torch.rand(1, 4)
    curvature = torch.autograd.functional.hessian(lambda a: -noise.log_prob(b, a).sum(), b)
    assert torch.allclose(torch.as_tensor(curvature).view(4, 4).diag(), noise.precision(b)[0])


def _problem(limited: bool = False) -> tuple[pf.Likelihood, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    angles = (torch.arange(24, dtype=torch.float64) + 0.5) * math.pi / 24
    operator = ParallelBeam((16, 16), angles[4:20] if limited else angles, 23, pixel=0.01)
    likelihood = pf.Likelihood(operator, PoissonNoise(3000, 30.0))
    x = torch.zeros(1, 1, 16, 16)
    x[..., 3:13, 4:12] = 0.3
    x[..., 6:9, 6:9] = 0.6
    return likelihood, x, likelihood.simulate(x)


@pytest.mark.parametrize("limited", [False, True])
def test_solution_is_that_of_a_general_solver(limited: bool) -> None:
    likelihood, _, y = _problem(limited)
    weight, smooth = 20.0, 1e-7

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(flat).view(1, 1, 16, 16).requires_grad_()
        squares = image_gradient(x).square().sum(0)
        value = likelihood(x, y).sum() + weight * (squares + smooth).sqrt().sum()
        value.backward()
        assert x.grad is not None
        return value.item(), x.grad.flatten().numpy()

    init = likelihood.operator.initial(y)
    best = scipy.optimize.minimize(
        objective,
        init.flatten().numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 1500, "maxfun": 2500, "ftol": 1e-14, "gtol": 1e-6},
    )
    ours = total_variation.reconstruct(
        likelihood, y, init, weight=weight, max_iterations=1500, tolerance=1e-4
    )
    assert ours.converged

    def energy(x: torch.Tensor) -> float:
        return float(likelihood(x, y).sum() + weight * pf.TotalVariation()(x).sum())

    other = energy(torch.from_numpy(best.x).view(1, 1, 16, 16))
    assert energy(ours.x) <= other + 1e-4 * abs(other)
    assert energy(ours.x) == pytest.approx(other, rel=1e-4)


def test_gap_bounds_the_distance_to_the_optimum() -> None:
    likelihood, _, y = _problem()
    init = likelihood.operator.initial(y)
    rough = total_variation.reconstruct(likelihood, y, init, weight=20.0, tolerance=1e-2)
    fine = total_variation.reconstruct(
        likelihood, y, init, weight=20.0, tolerance=1e-5, max_iterations=2000
    )
    assert rough.converged
    assert rough.steps < fine.steps
    assert 0 <= rough.history[-1] - fine.history[-1] <= 1e-2 * rough.history[-1]


def test_a_large_weight_gives_a_constant() -> None:
    likelihood, _, y = _problem()
    init = likelihood.operator.initial(y)
    x = total_variation.reconstruct(
        likelihood, y, init, weight=1e5, tolerance=1e-4, max_iterations=1000
    ).x
    assert float(x.std()) < 1e-3 * float(init.std())


def test_it_improves_on_filtered_backprojection() -> None:
    likelihood, truth, y = _problem()
    init = likelihood.operator.initial(y)
    x = total_variation.reconstruct(likelihood, y, init, weight=15.0).x
    assert float(pf.psnr(x, truth)) > float(pf.psnr(init, truth)) + 3


def test_spectrum_is_that_of_the_operator() -> None:
    operator = ParallelBeam((48, 48), (torch.arange(60) + 0.5) * math.pi / 60, 71)
    spectrum = operator.normal_spectrum((48, 48))
    # A wave under a window that vanishes at the border: the Rayleigh quotient is the factor of its frequency.
    grid = torch.arange(48.0)
    window = torch.sin(math.pi * (grid + 0.5) / 48)
    wave = window[:, None] * window * torch.cos(2 * math.pi * (6 * grid[:, None] + 3 * grid) / 48)
    wave = wave[None, None]
    quotient = operator(wave).square().sum() / wave.square().sum()
    assert float(quotient) == pytest.approx(float(spectrum[6, 3]), rel=0.1)


def test_unmeasured_directions_are_known() -> None:
    angles = (torch.arange(100, dtype=torch.float64) + 0.5) * math.pi / 100
    operator = ParallelBeam((32, 32), angles[LIMITED.start // 10 : LIMITED.stop // 10], 47)
    spectrum, full = (
        op.normal_spectrum((32, 32)) for op in (operator, ParallelBeam((32, 32), angles, 47))
    )
    ratio = spectrum / full
    # Along axis 0 (angle 0) nothing was measured, along axis 1 (a quarter turn) all was.
    assert float(ratio[8, 0] / ratio[0, 8]) == pytest.approx(0.1)
    assert float(ratio[8, 8] / ratio[0, 8]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"weight": 0.0}, "must be positive"),
        ({"operator": pf.Identity((16, 16))}, "a projector with"),
    ],
)
def test_refused(change: dict[str, object], fault: str) -> None:
    likelihood, x, y = _problem()
    if "operator" in change:
        likelihood = pf.Likelihood(change["operator"], likelihood.noise)
    with pytest.raises(pf.InputError, match=fault):
        total_variation.reconstruct(likelihood, y, x, weight=float(change.get("weight", 1.0)))


def test_nan_stops_with_advice() -> None:
    likelihood, x, y = _problem()
    with pytest.raises(pf.NumericalError, match="number of photons"):
        total_variation.reconstruct(likelihood, y * math.nan, x, weight=1.0)
