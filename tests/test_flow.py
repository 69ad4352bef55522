"""Flows: exact values and gradients, sampling, and a density that training must find."""

import math

import pytest
import torch

from patchflow.chains.bijections import AffineCoupling
from patchflow.chains.flow import Flow
from patchflow.chains.kernel import Chain
from patchflow.fit import fit
from patchflow.models import coupling_flow
from patchflow.priors.gaussian import StandardNormal


def small_flow() -> Flow:
    flow = coupling_flow(6, layers=3, hidden=16)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow


def test_energy_is_minus_log_density_by_change_of_variables():
    flow = small_flow()
    x = torch.randn(4, 6)
    for k in range(4):
        jacobian = torch.autograd.functional.jacobian(
            lambda v: flow.chain.reverse(v[None]).x[0], x[k]
        )
        z = flow.chain.reverse(x[k : k + 1]).x
        expected = 0.5 * z.square().sum() + 3 * math.log(2 * math.pi)
        expected = expected - torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(flow(x)[k], expected)


def test_density_integrates_to_one():
    flow = coupling_flow(2, layers=2, hidden=8).requires_grad_(False)
    axis = torch.linspace(-9, 9, 401)
    grid = torch.cartesian_prod(axis, axis)
    total = (-flow(grid)).exp().sum() * (axis[1] - axis[0]) ** 2
    assert float(total) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_equal_autograd(frozen, monkeypatch):
    monkeypatch.setattr("patchflow.chains.flow._BLOCK", 5)  # several blocks and a rest
    flow = small_flow().requires_grad_(not frozen)
    x = torch.randn(13, 6, requires_grad=True)
    weights = torch.rand(13)
    wanted = [x, *(p for p in flow.parameters() if p.requires_grad)]
    found = torch.autograd.grad((flow(x) * weights).sum(), wanted)
    z, log_ratio, _ = flow.chain.reverse(x)
    expected = torch.autograd.grad(((flow.latent(z) - log_ratio) * weights).sum(), wanted)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("frozen", [True, False])
def test_second_derivatives(frozen):
    flow = coupling_flow(2, layers=1, hidden=4).requires_grad_(not frozen)
    x = torch.randn(3, 2, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v: flow(v).sum(), x)


def test_bfloat16_is_close_and_only_where_asked():
    flow = coupling_flow(36, layers=5, hidden=64).float().requires_grad_(False)
    x = torch.rand(200, 36, dtype=torch.float32)
    exact, slope = flow.value_and_grad(x)
    torch.testing.assert_close(exact, flow.double()(x.double()).float(), atol=1e-3, rtol=1e-5)
    flow.float()
    with torch.autocast("cpu", torch.bfloat16):
        low, low_slope = flow.value_and_grad(x)
    assert low.dtype == torch.float32
    assert 0 < float((low - exact).abs().mean()) < 0.1
    assert 0 < float((low_slope - slope).norm() / slope.norm()) < 0.1


def test_samples_follow_the_density():
    flow = small_flow().requires_grad_(False)
    samples = flow.sample(20_000)
    # E[exp(E - E_Z)] over the flow's own samples is one: an importance-weight identity that a wrong sign breaks.
    log_weight = flow(samples) - StandardNormal(6).to(samples)(samples)
    log_weight = log_weight.clamp(max=30)
    mean, error = log_weight.exp().mean(), log_weight.exp().std() / math.sqrt(len(samples))
    assert abs(float(mean) - 1) < 5 * float(error)
    assert float(error) < 0.1


def test_training_recovers_a_known_density():
    torch.manual_seed(1)
    shape = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    target = torch.distributions.MultivariateNormal(torch.tensor([1.0, -1.0]), scale_tril=shape)
    flow = coupling_flow(2, layers=3, hidden=32)
    fit(flow, lambda: target.sample((256,)), steps=200, lr=8e-3, warmup=20)
    x = target.sample((4000,))
    excess = flow(x) + target.log_prob(x)
    # Zero for the true density; the entropy of its coordinates taken apart would leave 0.5 nats.
    assert float(excess.mean()) < 0.03
    assert not any(p.requires_grad for p in flow.parameters())


def test_condition_is_repeated_for_samples():
    flow = Flow(StandardNormal(2), Chain(AffineCoupling(2, 3, hidden=8)))
    assert flow.sample(7, torch.randn(1, 3)).shape == (7, 2)
