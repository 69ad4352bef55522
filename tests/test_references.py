"""Parity with the code that published weights come from: frozen arrays, and FrEIA itself."""

from pathlib import Path

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import numpy as np
import pytest
import torch
from torch import nn

from patchflow.chains.bijections import AffineCoupling, random_permutation
from patchflow.errors import InputError
from patchflow.numerics.patches import extract_patches
from patchflow.papers import altekrueger2023_patchnr as paper
from patchflow.problems.blur import downsample

FROZEN = np.load(Path(__file__).parent / "references" / "glow_block.npz")


@pytest.mark.parametrize("dim", [3, 6])
def test_coupling_equals_frozen_values_of_the_published_block(dim):
    kernel = AffineCoupling(dim, hidden=8, clamp=1.6)
    start = f"{dim}/weights/"
    weights = {
        key.removeprefix(start).replace("subnet", "net"): torch.from_numpy(FROZEN[key])
        for key in FROZEN
        if key.startswith(start)
    }
    kernel.load_state_dict(weights)
    x = torch.from_numpy(FROZEN[f"{dim}/x"])
    for walk, name in ((kernel, "forward"), (kernel.reverse, "reverse")):
        there, log_ratio, _ = walk(x)
        tight = {"rtol": 1e-13, "atol": 1e-13}
        torch.testing.assert_close(there, torch.from_numpy(FROZEN[f"{dim}/{name}"]), **tight)
        expected = torch.from_numpy(FROZEN[f"{dim}/{name}_logdet"])
        torch.testing.assert_close(log_ratio, expected, **tight)


@pytest.mark.parametrize("dim", [3, 6])
def test_permutation_equals_the_published_one(dim):
    order = random_permutation(dim, seed=4).order
    assert order.tolist() == FROZEN[f"{dim}/permutation"].tolist()


@pytest.fixture(scope="module")
def published() -> nn.Module:
    """The published network with random weights, built as its authors describe it."""

    def subnet(inputs, outputs):
        layers = [nn.Linear(inputs, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(512, outputs))

    torch.manual_seed(0)
    net = Ff.SequenceINN(36)
    for k in range(5):
        net.append(Fm.GLOWCouplingBlock, subnet_constructor=subnet, clamp=1.6)
        net.append(Fm.PermuteRandom, seed=k + 1)
    return net


def test_published_weights_load(published):
    prior = paper.load_published(published.state_dict()).double()
    published.double()
    patches = torch.rand(20, 36)
    z, log_det = published(patches, rev=True)
    expected = 0.5 * z.square().sum(1) + 18 * np.log(2 * np.pi) - log_det
    torch.testing.assert_close(prior.patch_energy(patches), expected, rtol=1e-12, atol=1e-10)
    assert not any(p.requires_grad for p in prior.parameters())


def test_objective_is_the_papers(published):
    """The library's weight against the objective as the authors coded it: the same gradient up to one factor."""
    prior = paper.load_published(published.state_dict()).double()
    published.double()
    x = torch.rand(1, 1, 32, 40, requires_grad=True)
    operator = downsample((32, 40), 4)
    y = torch.rand(1, 1, 8, 10)
    patches = nn.functional.unfold(x, 6)[0].T
    z, log_det = published(patches, rev=True)
    theirs = ((operator(x) - y) ** 2).sum() + 0.15 * (0.5 * z.square().sum(1) - log_det).mean()
    weight = paper.weight_of_lambda((32, 40))
    ours = ((operator(x) - y) ** 2).sum() / (2 * 0.01**2) + weight * prior(x).sum()
    gradients = torch.autograd.grad(theirs, x)[0], torch.autograd.grad(ours, x)[0]
    torch.testing.assert_close(gradients[0] / (2 * 0.01**2), gradients[1])
    assert len(extract_patches(x[0], 6)) == len(patches)


def test_weights_of_another_network_are_refused(published):
    state = published.state_dict()
    missing = {key: value for key, value in state.items() if "8.subnet2.4.bias" not in key}
    with pytest.raises(InputError, match=r"lack 'module_list.8.subnet2.4.bias'"):
        paper.load_published(missing)
    wrong = state | {"module_list.2.subnet1.0.weight": torch.zeros(512, 17)}
    with pytest.raises(InputError, match="do not fit block 2"):
        paper.load_published(wrong)
