"""Photon counts, units of attenuation, and LoDoPaB's simulation."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

import patchflow as pf
from patchflow.papers import leuschner2021_lodopab as lodopab
from patchflow.problems.attenuation import MU_MAX, from_hounsfield, to_hounsfield
from patchflow.problems.poisson import NO_PHOTON, CountWeightedNoise, PoissonNoise
from patchflow.problems.tomography import ParallelBeam


def _small() -> ParallelBeam:
    return ParallelBeam((12, 12), torch.linspace(0, 3, 7), 19, pixel=0.02)


def test_poisson_log_probability_is_that_of_the_counts() -> None:
    noise = PoissonNoise(50, scale=3.0)
    counts = torch.arange(1.0, 9).view(1, 8)
    a = torch.linspace(0.1, 1.3, 8).view(1, 8)
    b = -(counts / 50).log() / 3
    expected = scipy.stats.poisson.logpmf(counts.numpy(), (50 * torch.exp(-3 * a)).numpy()).sum()
    assert float(noise.log_prob(b, a)) == pytest.approx(expected, rel=1e-12)


def test_poisson_energy_is_that_of_lodopab_up_to_a_constant() -> None:
    # D(a, b) = sum N0 exp(-mu a) - N0 exp(-mu b) (-mu a + log N0), as coded by the patch group.
    b, first, second = torch.rand(3, 1, 1, 4, 5) * 0.05

    def published(a: torch.Tensor) -> torch.Tensor:
        counts = 4096 * torch.exp(-MU_MAX * b)
        return (4096 * torch.exp(-MU_MAX * a) - counts * (-MU_MAX * a + math.log(4096))).sum()

    noise = PoissonNoise(4096, MU_MAX)
    ours = noise.log_prob(b, second) - noise.log_prob(b, first)
    assert torch.allclose(ours, published(first) - published(second), rtol=1e-9)


def test_poisson_likelihood_gradient_through_the_projector() -> None:
    operator = _small()
    likelihood = pf.Likelihood(operator, PoissonNoise(4096, MU_MAX))
    x = (torch.rand(1, 1, 12, 12) * 0.3).requires_grad_()
    y = operator(x.detach()) + 0.001 * torch.randn(1, 1, 7, 19)
    _, slope = likelihood.value_and_grad(x, y)
    residual = torch.exp(-MU_MAX * y) - torch.exp(-MU_MAX * operator(x.detach()))
    assert torch.allclose(slope, operator.adjoint(MU_MAX * 4096 * residual), rtol=1e-9)


def test_poisson_energy_does_not_cancel_in_float32() -> None:
    b = torch.full((1, 1000), 0.01)
    a = b + 1e-5
    noise = PoissonNoise(4096, MU_MAX)
    exact = noise.log_prob(b, b) - noise.log_prob(b, a)
    delta = MU_MAX * (a - b)
    single = (noise.counts(b.float()) * (torch.expm1(-delta.float()) + delta.float())).sum()
    assert float(single) == pytest.approx(float(exact), rel=1e-2)


def test_draws_have_the_mean_and_variance_of_counts() -> None:
    noise = PoissonNoise(100, scale=2.0)
    a = torch.full((1, 40_000), 0.5)
    mean = 100 * math.exp(-1)
    counts = noise.counts(noise.draw(a)[0])
    assert abs(float(counts.mean()) - mean) < 4 * math.sqrt(mean / 40_000)
    fourth = math.sqrt((2 * mean**2 + mean) / 40_000)
    assert abs(float(counts.var()) - mean) < 4 * fourth
    # Not blind: a twentieth fewer photons is seen.
    assert abs(float(PoissonNoise(95, 2.0).counts(noise.draw(a)[0]).mean()) - mean) > 4 * math.sqrt(
        mean / 40_000
    )


def test_a_bin_without_photons_counts_a_tenth() -> None:
    noise = PoissonNoise(2, scale=1.0)
    b, log_prob = noise.draw(torch.full((1, 200), 8.0))
    assert float(noise.counts(b).min()) == pytest.approx(NO_PHOTON)
    assert bool(log_prob.isfinite().all())


def test_count_weighted_noise_is_normal_and_touches_the_poisson_energy() -> None:
    weighted, poisson = CountWeightedNoise(4096, MU_MAX), PoissonNoise(4096, MU_MAX)
    b, a = torch.rand(2, 1, 30) * 0.03
    std = 1 / (MU_MAX * weighted.counts(b).sqrt())
    normal = torch.distributions.Normal(a, std).log_prob(b).sum(1)
    assert torch.allclose(weighted.log_prob(b, a), normal)
    curvature = [
        torch.autograd.functional.hessian(lambda a, noise=noise: -noise.log_prob(b, a).sum(), b)
        for noise in (weighted, poisson)
    ]
    assert torch.allclose(*curvature, rtol=1e-9)


@pytest.mark.parametrize(("photons", "scale"), [(0, 1), (10, -1), (math.inf, 1)])
def test_impossible_photons_are_refused(photons: float, scale: float) -> None:
    with pytest.raises(pf.InputError, match="must be positive"):
        PoissonNoise(photons, scale)


def test_hounsfield_units_are_lodopabs() -> None:
    assert pytest.approx(81.35858) == MU_MAX
    hu = torch.tensor([-1000.0, 0.0, 1000.0, 3071.0])
    expected = torch.tensor([0.02, 20, 39.98, MU_MAX]) / MU_MAX
    assert torch.allclose(from_hounsfield(hu), expected)
    assert torch.allclose(to_hounsfield(from_hounsfield(hu)), hu)
    assert float(from_hounsfield(torch.tensor([-3024.0, 50.0]))[0]) == 0


def test_dither_lies_in_one_unit() -> None:
    hu = torch.arange(-500.0, 1500).repeat(20)
    shift = to_hounsfield(from_hounsfield(hu, dither=True)) - hu
    assert float(shift.min()) >= -1e-9
    assert float(shift.max()) <= 1
    assert abs(float(shift.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / len(hu))


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ([0.0, 0.4], "do not convert them again"),
        ([-0.02, 1.1], "do not convert them again"),
        ([-90_000.0, 0.0], "rescale slope"),
        ([float("nan"), 0.0], "rescale slope"),
    ],
)
def test_what_cannot_be_hounsfield_units_is_refused(values: list[float], fault: str) -> None:
    with pytest.raises(pf.InputError, match=fault):
        from_hounsfield(torch.tensor(values))


def test_lodopab_geometry() -> None:
    operator = lodopab.geometry()
    assert operator.domain_shape == (362, 362)
    assert operator.range_shape == (1000, 513)
    assert operator.angles[0] == pytest.approx(math.pi / 2000)
    half = operator.range_shape[1] * operator.spacing / 2
    assert half == pytest.approx(0.18384776, abs=1e-7)
    missing = 180 - 0.18 * len(operator.angles[lodopab.LIMITED])
    assert missing == pytest.approx(36)


def test_simulation_goes_through_the_finer_grid() -> None:
    fine = ParallelBeam((40, 40), torch.linspace(0.1, 3, 5), 15, pixel=0.005, spacing=0.014)
    x = torch.rand(1, 1, 8, 8).float().double() * 0.2
    torch.manual_seed(0)
    many = lodopab.simulate(x.expand(400, 1, 8, 8), fine, 500, scale=20.0)
    large = torch.nn.functional.interpolate(x, (40, 40), mode="bilinear")
    mean = 500 * torch.exp(-20 * fine(large))
    error = ((500 * torch.exp(-20 * many)).mean(0) - mean) / (mean / 400).sqrt()
    assert float(error.abs().max()) < 5
