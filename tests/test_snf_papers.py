"""The tables of stochastic flows: published sizes, scores against closed forms, and a tiny run of each table."""

import math

import pytest
import torch

from patchflow.chains.flow import Flow
from patchflow.errors import InputError
from patchflow.papers import hagemann2023_mixture as mixture
from patchflow.papers import hagemann2023_scatterometry as talk
from patchflow.papers import lueckmann2021_sbibm as sbibm
from patchflow.papers import scatterometry
from patchflow.priors.gaussian import Gaussian, StandardNormal


def trainable(flow: Flow) -> int:
    return sum(p.numel() for p in flow.chain.parameters() if p.requires_grad)


def test_published_networks_have_their_sizes():
    sizes = {"INN": 779_840, "INN+MALA": 779_840, "VAE": 882_240, "VAE+MALA": 882_240}
    sizes |= {"VAE+INN": 831_040, "INN+VAE+MALA": 831_040}
    for name, size in sizes.items():
        assert trainable(mixture.published_flow(name, StandardNormal(100))[0]) == size
    assert trainable(talk.published_flow("INN", StandardNormal(3))) == 47_896
    assert trainable(talk.published_flow("VAE", StandardNormal(3))) == 48_664


def test_mixture_table_runs():
    methods = ("INN", "INN+MALA", "VAE+MALA", mixture.OURS, mixture.OURS_METROPOLIS)
    methods = (*methods, mixture.OURS_RESAMPLED, *mixture.BASELINES)
    table, records = mixture.run(methods=methods, mixtures=1, observations=1, steps=2, our_steps=60)
    values = {record.method: record.values for record in records}
    assert list(values) == list(methods)
    assert all(math.isfinite(v["w1"]) for v in values.values())
    assert values["exact posterior"]["w1"] < values["prior"]["w1"]
    assert values[mixture.OURS_METROPOLIS]["w1"] < 0.6 * values["INN"]["w1"]
    assert table.rows[0].published == {"w1": 3.55}
    with pytest.raises(InputError, match="GAN"):
        mixture.run(methods=("GAN",))


def test_quadrature_of_a_posterior_in_closed_form():
    covariance = torch.tensor([[0.02, 0.005, 0.0], [0.005, 0.01, 0.0], [0.0, 0.0, 0.03]])
    law = Gaussian(torch.tensor([0.2, -0.1, 0.0]), covariance)
    grid = scatterometry.posterior_by_quadrature(law, torch.zeros(1, 1))
    assert float(grid.masses.sum()) == pytest.approx(1)
    mean = (grid.weights[:, None] * grid.points).sum(0)
    torch.testing.assert_close(mean, law.mean, atol=1e-4, rtol=0)
    centred = grid.points - mean
    second = (grid.weights[:, None, None] * centred[:, :, None] * centred[:, None]).sum(0)
    torch.testing.assert_close(second, covariance, atol=2e-4, rtol=0)
    torch.testing.assert_close(grid.log_density, -law(grid.points), atol=1e-3, rtol=0)
    # Exact samples of the law fall into the cells as the quadrature says.
    counts = scatterometry.cell_counts(law.sample(200_000))
    expected = grid.masses * counts.sum()
    large = expected > 20
    chi = ((counts - expected) ** 2 / expected)[large].sum()
    assert abs(float(chi) - int(large.sum())) < 6 * math.sqrt(2 * int(large.sum()))
    # Exact against exact scores the floor of the published metric, not zero.
    floor = scatterometry.histogram_kl(grid.counts(20_000), grid.counts(20_000))
    assert floor > 0.1
    assert scatterometry.histogram_kl(counts, counts) == 0


def test_scatterometry_table_runs(data_dir, monkeypatch):
    monkeypatch.setattr(talk, "SAMPLES", 2000)
    monkeypatch.setattr(scatterometry, "_BUDGET", 15_000)
    table, records, flows = talk.run(
        data_dir,
        methods=("INN", "VAE+MALA", talk.OURS, talk.OURS_SNF, talk.EXACT),
        observations=1,
        steps=2,
        seconds=1.0,
    )
    values = {record.method: record.values for record in records}
    assert values["exact posterior, wall 1000"]["excess"] == 0
    assert values["INN, wall 100"]["kl"] > values["exact posterior, wall 100"]["kl"]
    snf, plain = flows[talk.OURS_SNF][0], flows[talk.OURS][0]
    assert len(snf.chain) == len(plain.chain) + 1, "independence Metropolis"
    assert table.rows


def test_sbibm_table_runs(data_dir, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sbibm, "SAMPLES", 300)
    monkeypatch.setattr(sbibm, "SIMULATIONS", 2000)
    monkeypatch.setattr(sbibm, "DATASETS", 40)
    monkeypatch.setattr(sbibm, "c2st", lambda a, b: 0.5 + 0 * float(a.mean() + b.mean()))
    names = ("gaussian_mixture", "gaussian_mixture" + sbibm.SIMULATOR)
    table, records = sbibm.run(data_dir, methods=names, observations=1, seconds=1.0)
    assert [row.method for row in table.rows] == list(names)
    assert records[0].values["evaluations"] > 0
    assert records[1].values["evaluations"] == 0
    assert records[0].values["sbc"] > 1e-4
    with pytest.raises(InputError, match="nonsense"):
        sbibm.run(data_dir, methods=("nonsense",))
