"""The talk's examples: densities by quadrature, the posterior, Lipschitz constants, the comparison and its figures."""

import math

import pytest
import scipy.stats
import torch

from patchflow.chains.bijections import InvertibleLinear
from patchflow.chains.kernel import Chain
from patchflow.chains.proposals import RandomWalk
from patchflow.chains.stochastic import Metropolis
from patchflow.errors import InputError
from patchflow.papers import talk_examples, talk_multimodal
from patchflow.papers.talk_examples import Rings, on_grid, two_moons
from patchflow.papers.talk_multimodal import METHODS, METRICS, TARGETS, highest_energy, lipschitz
from patchflow.priors.gaussian import StandardNormal

PNG = b"\x89PNG\r\n\x1a\n"


def z_score(values, expected):
    values = values.double()
    return abs(float((values.mean() - expected) / (values.std() / math.sqrt(len(values)))))


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_integrates_to_one(name):
    _, density, area = on_grid(TARGETS[name]())
    assert float(density.double().sum() * area) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", TARGETS)
def test_samples_follow_the_density(name):
    target, wide = TARGETS[name](), StandardNormal(2)
    x = target.sample(40_000)
    points, density, area = on_grid(target)
    # The identity E_p[q / p] = 1 would have infinite variance; E_p[q] = E_q[p] has none of that.
    mass = density.double().flatten() * area
    for function in (
        lambda x: (-wide(x)).exp(),
        lambda x: x[:, 0].square(),
        lambda x: (x[:, 0] - 0.3 * x[:, 1]).sin(),
        lambda x: (-target(x)).exp(),
    ):
        assert z_score(function(x), float((mass * function(points).double()).sum())) < 4


@pytest.mark.parametrize("name", TARGETS)
def test_weights_of_normal_proposals_have_mean_one(name):
    target, scale = TARGETS[name](), 1.6
    z = scale * torch.randn(40_000, 2)
    proposal = 0.5 * (z / scale).square().sum(1) + math.log(2 * math.pi * scale**2)
    assert z_score((proposal - target(z)).exp(), 1.0) < 4


def test_a_blurred_circle_has_the_law_of_rice():
    x = torch.randn(20, 2).double()
    rings = Rings((0.9,), 0.3).double()
    r = x.norm(dim=1)
    rice = scipy.stats.rice.logpdf(r.numpy(), 0.9 / 0.3, scale=0.3)
    expected = torch.from_numpy(rice) - (2 * math.pi * r).log()
    torch.testing.assert_close(-rings(x), expected, rtol=1e-6, atol=1e-6)


def test_a_turned_target_is_the_target_at_turned_points():
    x, turn = torch.randn(20, 2), 0.4
    matrix = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    torch.testing.assert_close(two_moons(turn)(x @ matrix.T), two_moons()(x), rtol=1e-4, atol=1e-4)


def test_the_posterior_is_the_product_of_prior_and_likelihood():
    prior, likelihood = talk_examples.prior_and_posterior()
    y = torch.tensor([[talk_examples.MEASURED]])
    _, product, area = on_grid(likelihood + prior, y)
    _, exact, _ = on_grid(talk_examples.exact_posterior())
    evidence = product.double().sum() * area
    torch.testing.assert_close(product / evidence, exact.double(), rtol=1e-3, atol=1e-3)
    # By Bayes' rule the evidence is the law of y: x2 + noise.
    simulated = likelihood.simulate(prior.sample(100_000))[:, 0].numpy()
    assert float(evidence) == pytest.approx(scipy.stats.gaussian_kde(simulated)(0)[0], rel=0.05)


@pytest.mark.parametrize("name", TARGETS)
def test_a_hundredth_of_exact_samples_is_in_low_density(name):
    target = TARGETS[name]()
    low = (target(target.sample(40_000)) > highest_energy(target)).float()
    assert z_score(low, 0.01) < 4


def test_the_lipschitz_estimate_of_a_linear_map_is_its_norm():
    linear = InvertibleLinear(2)
    with torch.no_grad():
        linear.log_diagonal.add_(torch.tensor([1.0, -0.5]))
        linear.upper.add_(torch.tensor([[0.0, 0.7], [0.0, 0.0]]))
        matrix = linear(torch.eye(2)).x.T
    estimate = lipschitz(Chain(linear), torch.randn(10, 2))
    expected = [torch.linalg.matrix_norm(m, 2).item() for m in (matrix, matrix.inverse())]
    assert estimate == pytest.approx(expected, rel=1e-4)


def test_a_stochastic_kernel_has_no_lipschitz_constant():
    kernel = Metropolis(StandardNormal(2), RandomWalk(0.1))
    with pytest.raises(InputError, match="has no Lipschitz constant"):
        lipschitz(kernel, torch.randn(10, 2))


def test_the_comparison_has_finite_rows_and_a_picture(monkeypatch):
    monkeypatch.setattr(talk_multimodal, "MANY", 4000)
    monkeypatch.setattr(talk_multimodal, "METROPOLIS_STEPS", 1)
    monkeypatch.setattr(talk_multimodal, "LAST_STEPS", 1)
    monkeypatch.setattr(talk_multimodal, "TARGETS", {"rings": talk_examples.rings})
    monkeypatch.setattr(talk_multimodal, "COUNT", 200)
    examples = talk_multimodal.learn(steps=4, batch=64)
    table, records = talk_multimodal.compare(examples)
    assert [row.method for row in table.rows] == list(METHODS)
    assert len(records) == len(METHODS)
    needed = {metric.name for metric in METRICS} - {"lipschitz", "inverse", "seconds"}
    for record in records:
        assert needed <= set(record.values)
        assert all(math.isfinite(value) for value in record.values.values())
        assert ("lipschitz" in record.values) == (
            "flow of" in record.method or "coupling" in record.method
        )
    share = table.rows[-1].mean["bridge"]
    assert share == pytest.approx(1, abs=4 * table.floor["bridge"])
    assert table.rows[-1].mean["w1"] < table.rows[0].mean["w1"]
    assert talk_multimodal.draw(examples, records).startswith(PNG)


def test_couplings_of_all_methods_have_as_many_parameters():
    target = two_moons()
    counts = {
        sum(p.numel() for p in talk_multimodal._flow(method, target).chain.parameters() if p.ndim)
        for method in METHODS[:3]
    }
    assert len(counts) == 1


def test_the_posterior_has_a_picture(monkeypatch):
    monkeypatch.setattr(talk_examples, "MANY", 2000)
    monkeypatch.setattr(talk_examples, "COUNT", 200)
    flow = talk_examples.learn_example(steps=10)
    w1, floor = talk_examples.measure_posterior(flow)
    assert 0 < floor < 1
    assert 0 < w1 < 2
    assert talk_examples.draw_posterior(flow, w1, floor).startswith(PNG)
