"""Transport against exact solutions of small problems, and the prior built on it against finite differences."""

import math

import pytest
import torch

import patchflow as pf
from patchflow.errors import InputError
from patchflow.numerics import transport
from patchflow.numerics.patches import extract_patches
from patchflow.priors.multiscale import MultiscalePrior, shrink
from patchflow.priors.wasserstein import TransportCost
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.operator import Identity
from patchflow.reconstruct import wasserstein_patch


def clouds(count=40, size=40, dim=3):
    return torch.randn(count, dim), 0.5 + 1.5 * torch.randn(size, dim)


def value(points, reference, psi, epsilon=0.0, rho=math.inf):
    found = transport.assign(points, reference, psi, epsilon)
    return float(transport.dual_value(found, psi, rho))


def test_exact_cost_in_one_dimension_is_that_of_sorting():
    p, q = torch.randn(30, 1), torch.randn(30, 1)
    expected = 0.5 * (p.sort(0).values - q.sort(0).values).square().mean()
    assert math.isclose(transport.exact_cost(p, q), float(expected), rel_tol=1e-12)
    # The linear programme, with every point three or two times.
    doubled = transport.exact_cost(p.repeat(2, 1)[:30], q.repeat(3, 1)[:20])
    expected = transport.exact_cost(
        p.repeat_interleave(2, 0)[:60], q.repeat(3, 1)[:20].repeat_interleave(3, 0)
    )
    assert math.isclose(doubled, expected, rel_tol=1e-9)


@pytest.mark.parametrize("size", [40, 25])
def test_ascent_and_sinkhorn_reach_the_exact_cost(size):
    p, q = clouds(size=size)
    exact = transport.exact_cost(p, q)
    psi = transport.ascend(p, q, torch.zeros(size), rate=0.3, steps=4000)
    assert exact * (1 - 5e-3) < value(p, q, psi) <= exact * (1 + 1e-12)
    entropic = transport.sinkhorn(p, q, epsilon=1e-2, steps=500)
    assert exact * (1 - 5e-3) < value(p, q, entropic) <= exact * (1 + 1e-12)
    assert value(p, q, torch.zeros(size)) < 0.9 * exact


def test_any_potential_is_a_lower_bound():
    p, q = clouds()
    exact = transport.exact_cost(p, q)
    assert all(value(p, q, torch.randn(40)) <= exact for _ in range(50))


@pytest.mark.parametrize("rho", [math.inf, 0.7])
def test_sinkhorn_is_stationary(rho):
    """At the maximum the reference is used as its marginal wants, and the gradient is that of the objective."""
    p, q = clouds(50, 30)
    psi = transport.sinkhorn(p, q, epsilon=0.3, rho=rho, steps=300)
    use = transport.assign(p, q, psi, 0.3).use
    assert transport.ascent_direction(psi, use, rho).abs().max() < 1e-9
    warm = transport.sinkhorn(p, q, epsilon=0.3, rho=rho, psi=psi, steps=1)
    torch.testing.assert_close(warm, psi)
    other = 0.3 * torch.randn(30)
    use = transport.assign(p, q, other, 0.3).use
    direction = transport.ascent_direction(other, use, rho) / 30
    for j in range(3):
        bump = torch.zeros(30)
        bump[j] = 1e-5
        slope = value(p, q, other + bump, 0.3, rho) - value(p, q, other - bump, 0.3, rho)
        assert math.isclose(slope / 2e-5, float(direction[j]), rel_tol=1e-5, abs_tol=1e-9)


@pytest.mark.parametrize("rho", [1e-6, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("rate", [1e-6, 1e-3, 1.0])
def test_a_step_is_implicit_in_the_marginal(rate, rho):
    psi, use = 0.1 * torch.randn(200), torch.rand(200).pow(20)
    use = use / use.sum()
    new = transport.climb(psi, use, rate, rho)
    below = psi - rate * 200 * use
    # The equation in logarithms, where the step is more than rounding.
    up = new - below
    seen = up > 1e-9 * (1 + below.abs())
    left, right = (up[seen] / rate).log(), -new[seen] / rho
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6 * (1 + 0.1 / rho))
    assert new.isfinite().all()
    if rho == 1e6:
        torch.testing.assert_close(new, transport.climb(psi, use, rate), rtol=1e-5, atol=1e-5)


def test_entropic_plan_is_that_of_plain_scaling():
    p, q = clouds(20, 15)
    epsilon = 0.5
    kernel = torch.exp(-0.5 * torch.cdist(p, q).square() / epsilon)
    v = torch.ones(15)
    for _ in range(2000):
        u = 1 / 20 / (kernel @ v)
        v = 1 / 15 / (kernel.T @ u)
    psi = transport.sinkhorn(p, q, epsilon=epsilon, steps=2000)
    plan = u[:, None] * kernel * v
    target = plan @ q / plan.sum(1, keepdim=True)
    torch.testing.assert_close(transport.assign(p, q, psi, epsilon).target, target)


def test_relaxed_marginals_interpolate_to_nearest_neighbours():
    p, q = clouds()
    balanced = transport.sinkhorn(p, q, epsilon=0.1)
    torch.testing.assert_close(
        transport.sinkhorn(p, q, epsilon=0.1, rho=1e9), balanced, rtol=1e-6, atol=1e-6
    )
    assert transport.sinkhorn(p, q, epsilon=0.1, rho=1e-9).abs().max() < 1e-7
    nearest = q[torch.cdist(p, q).argmin(1)]
    assert torch.equal(transport.assign(p, q, torch.zeros(40)).target, nearest)


def test_chunks_do_not_matter(monkeypatch):
    p, q = clouds(33, 21)
    psi = 0.1 * torch.randn(21)
    whole = [transport.assign(p, q, psi, epsilon) for epsilon in (0.0, 0.2)]
    monkeypatch.setattr(transport, "_CHUNK", 100)
    for epsilon, expected in zip((0.0, 0.2), whole, strict=True):
        for a, b in zip(transport.assign(p, q, psi, epsilon), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_stochastic_ascent_uses_the_reference_evenly():
    """Frequencies of fresh points deviate from uniform by no more than their standard error allows."""
    reference = torch.randn(8, 2)
    psi = torch.zeros(8)
    for rate in (0.3, 0.1, 0.03):
        psi = transport.ascend(
            torch.randn(20_000, 2), reference, psi, rate=rate, steps=400, batch=500
        )
    fresh = torch.randn(20_000, 2)
    error = math.sqrt(1 / 8 * 7 / 8 / 20_000)
    deviation = (transport.assign(fresh, reference, psi).use - 1 / 8) / error
    before = (transport.assign(fresh, reference, torch.zeros(8)).use - 1 / 8) / error
    assert deviation.abs().max() < 12
    assert before.abs().max() > 40


@pytest.mark.parametrize(("epsilon", "rho"), [(0.0, None), (0.05, None), (0.05, 0.2)])
def test_gradient_of_the_prior(epsilon, rho):
    images = [torch.rand(1, 1, 20, 18)]
    prior = pf.learn_wpp(images, size=3, count=30, scales=2, epsilon=epsilon, rho=rho)
    for cost in wasserstein_patch.transport_costs(prior):
        cost.psi.copy_(0.02 * torch.randn(30))
    x = torch.rand(2, 1, 16, 17)
    _, gradient = prior.value_and_grad(x)
    direction = torch.randn_like(x)
    step = 1e-6
    change = (prior(x + step * direction) - prior(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), change)


def test_prior_is_half_the_squared_distance_of_the_patches():
    """At its best potential: N / p^2 times the exact cost of transport."""
    image, x = torch.rand(1, 1, 9, 9), torch.rand(1, 1, 9, 9)
    prior = pf.learn_wpp([image], size=3, count=49)
    (cost,) = wasserstein_patch.transport_costs(prior)
    patches = extract_patches(x[0], 3)
    cost.psi.copy_(transport.ascend(patches, cost.reference, cost.psi, rate=0.1, steps=3000))
    expected = 49 / 9 * transport.exact_cost(patches, cost.reference)
    assert math.isclose(float(prior(x)), expected, rel_tol=1e-2)
    cost.reset()
    assert float(prior(x)) < 0.9 * expected


def test_phases_average_to_the_prior():
    prior = pf.learn_wpp([torch.rand(1, 1, 20, 20)], size=3, count=20, scales=2)
    x = torch.rand(1, 1, 19, 22)
    mean = torch.stack([phase(x) for phase in prior.phases()]).mean(0)
    torch.testing.assert_close(mean, prior(x))


def test_shrinking_keeps_means_and_halves():
    assert shrink(torch.full((1, 2, 20, 31), 0.3)).shape == (1, 2, 9, 14)
    torch.testing.assert_close(shrink(torch.full((1, 1, 8, 8), 0.3)), torch.full((1, 1, 3, 3), 0.3))


def test_potentials_rise_only_when_asked():
    prior = pf.learn_wpp([torch.rand(1, 1, 20, 20)], size=3, count=20)
    (cost,) = wasserstein_patch.transport_costs(prior)
    x = torch.rand(1, 1, 12, 12)
    before = float(prior(x))
    assert float(prior(x)) == before
    with cost.rising(1e-3):
        for _ in range(20):
            prior(x)
    assert float(prior(x)) > before
    torch.testing.assert_close(cost.psi.mean(), torch.zeros(()), atol=1e-12, rtol=0)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_reconstruction_removes_noise(epsilon):
    i, j = torch.meshgrid(torch.arange(48.0), torch.arange(96.0), indexing="ij")
    image = (0.5 + 0.25 * torch.sin(0.7 * i) + 0.25 * torch.cos(0.4 * j))[None, None]
    learned, held = image[..., :48], image[..., 48:]
    prior = pf.learn_wpp([learned], size=4, count=500, epsilon=epsilon)
    likelihood = GaussianLikelihood(Identity((48, 48)), 0.1)
    y = likelihood.simulate(held)
    x = wasserstein_patch.reconstruct(likelihood, prior, y, y, weight=500.0, rate=1e-4).x
    assert (x - held).square().mean() < 0.3 * (y - held).square().mean()


@pytest.mark.parametrize("rho", [1e-5, 1.0])
def test_semi_unbalanced_ascent_reaches_sinkhorn(rho):
    """Also where the penalty is far below the potentials, as in the survey's settings."""
    p, q = clouds(50, 30)
    best = transport.sinkhorn(p, q, epsilon=0.1, rho=rho, steps=500)
    psi = transport.ascend(p, q, torch.zeros(30), rate=0.5, steps=600, epsilon=0.1, rho=rho)
    reached, most = value(p, q, psi, 0.1, rho), value(p, q, best, 0.1, rho)
    assert abs(reached - most) < 1e-3 * abs(most)


def test_identical_patches_are_one():
    prior = pf.learn_wpp([torch.full((1, 1, 10, 10), 0.4)], size=3, count=5)
    x = torch.rand(1, 1, 6, 6)
    (cost,) = wasserstein_patch.transport_costs(prior)
    with cost.rising(1e-2):
        for _ in range(10):
            found = prior(x)
    assert found.isfinite().all()
    _, gradient = prior.value_and_grad(x)
    torch.testing.assert_close(gradient[0, 0, 2:4, 2:4], x[0, 0, 2:4, 2:4] - 0.4)


def test_files_keep_the_prior(tmp_path):
    prior = pf.learn_wpp(
        [torch.rand(1, 1, 20, 20)], size=3, count=20, scales=2, epsilon=0.1, rho=1.0
    )
    pf.save(tmp_path / "wpp.safetensors", prior)
    loaded = pf.load(tmp_path / "wpp.safetensors", MultiscalePrior)
    x = torch.rand(1, 1, 15, 15)
    torch.testing.assert_close(loaded(x), prior(x))


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="but got 0"):
        TransportCost(torch.zeros(0, 9))
    with pytest.raises(InputError, match="1 values are not finite"):
        TransportCost(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(InputError, match="smoothing -1"):
        TransportCost(torch.zeros(2, 9), epsilon=-1)
    with pytest.raises(InputError, match="0 scales"):
        pf.learn_wpp([torch.rand(1, 1, 9, 9)], scales=0)
    with pytest.raises(InputError, match="smaller than a patch"):
        pf.learn_wpp([torch.rand(1, 1, 9, 9)], scales=2)
    with pytest.raises(InputError, match="0 scales with patches"):
        MultiscalePrior([])
    flow = MultiscalePrior([pf.patch_nr(size=3, hidden=4)])
    likelihood, x = GaussianLikelihood(Identity((8, 8)), 0.1), torch.rand(1, 1, 8, 8)
    with pytest.raises(InputError, match="needs transport but a scale has a Flow"):
        wasserstein_patch.reconstruct(likelihood, flow, x, x)
    prior = pf.learn_wpp([torch.rand(1, 1, 9, 9)], size=3, count=5)
    with pytest.raises(InputError, match="0 steps"):
        wasserstein_patch.reconstruct(likelihood, prior, x, x, steps=0)
    with pytest.raises(InputError, match="stack of 2 images"):
        wasserstein_patch.reconstruct(likelihood, prior, x.repeat(2, 1, 1, 1), x.repeat(2, 1, 1, 1))
    for options in ({"epsilon": 0.0}, {"epsilon": 0.1, "scaling": 1.0}):
        with pytest.raises(InputError, match="inside"):
            transport.sinkhorn(torch.rand(3, 2), torch.rand(4, 2), **options)


@pytest.mark.parametrize(("count", "size"), [(0, 3), (3, 0), (0, 0)])
def test_transport_of_nothing_is_refused(count, size):
    p, q, psi = torch.rand(count, 2), torch.rand(size, 2), torch.zeros(size)
    for call in (
        lambda: transport.assign(p, q, psi),
        lambda: transport.ascend(p, q, psi, rate=0.1, steps=2, batch=2),
        lambda: transport.sinkhorn(p, q, epsilon=0.1),
        lambda: transport.exact_cost(p, q),
    ):
        with pytest.raises(InputError, match=f"got {count} and {size} reference"):
            call()
    with pytest.raises(InputError, match="smoothing is inf"):
        transport.assign(torch.rand(2, 2), torch.rand(2, 2), torch.zeros(2), math.inf)


def test_the_smallest_image_is_one_patch():
    prior = pf.learn_wpp([torch.rand(1, 1, 3, 3)], size=3, count=1)
    prior.check(torch.rand(1, 1, 3, 3))
