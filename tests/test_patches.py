"""Patches and patch priors: against torch's unfold, autograd, and themselves in other chunks."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.models import coupling_flow, patch_nr
from patchflow.numerics.patches import (
    PatchSampler,
    add_patches,
    dihedral_orders,
    extract_patches,
    grid_shape,
)
from patchflow.numerics.precision import autocast, fastest_dtype
from patchflow.priors.gaussian import Gaussian
from patchflow.priors.patch import PatchPrior


class Quartic(Energy):
    """An energy with a gradient that differs from patch to patch."""

    def forward(self, x, condition=None):
        return (x**4).sum(1) + x[:, 0] * x[:, -1]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_extraction_is_unfold(stride, channels):
    image = torch.randn(channels, 17, 14)
    expected = functional.unfold(image[None, :, 1:, 2:], 5, stride=stride)[0].T
    assert torch.equal(extract_patches(image, 5, stride, (1, 2)), expected)
    assert len(expected) == torch.tensor(grid_shape((17, 14), 5, stride, (1, 2))).prod()


def test_aggregation_is_the_adjoint():
    image, size = torch.randn(2, 13, 16), 4
    patches = extract_patches(image, size, 3, (2, 1))
    other = torch.randn_like(patches)
    sums = torch.zeros_like(image)
    add_patches(sums, other, size, 3, (2, 1))
    torch.testing.assert_close((sums * image).sum(), (other * patches).sum())


def test_dihedral_orders_are_the_eight_symmetries():
    patch = torch.randn(2, 4, 4)
    turned = {tuple(patch.flatten()[order].tolist()) for order in dihedral_orders(2, 4)}
    expected = {
        tuple(view.flatten().tolist())
        for k in range(4)
        for t in (patch.rot90(k, (1, 2)),)
        for view in (t, t.flip(1))
    }
    assert turned == expected
    assert len(turned) == 8


@pytest.mark.parametrize("dihedral", [False, True])
def test_sampler_draws_all_patches_of_all_images_equally(dihedral):
    images = [torch.arange(30.0).view(1, 1, 5, 6), 100 + torch.arange(28.0).view(1, 1, 4, 7)]
    sampler = PatchSampler(images, 3, 4000, dihedral=dihedral)
    known = torch.cat([extract_patches(image[0], 3) for image in images])
    orders = dihedral_orders(1, 3) if dihedral else torch.arange(9)[None]
    allowed = {tuple(row.tolist()) for order in orders for row in known[:, order]}
    assert len(sampler) == len(known)
    batch = sampler()
    assert {tuple(row.tolist()) for row in batch} <= allowed
    counts = torch.bincount(batch.amin(1).long()).double()
    counts = counts[counts > 0]
    expected = len(batch) / len(known)
    assert len(counts) == len(known)
    # Six binomial standard deviations.
    assert (counts - expected).abs().max() < 6 * expected**0.5


def test_sampler_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="no training images"):
        PatchSampler([], 3)
    with pytest.raises(InputError, match=r"\[1, 3\] channels"):
        PatchSampler([torch.ones(1, 1, 9, 9), torch.ones(1, 3, 9, 9)], 3)
    with pytest.raises(InputError, match="smaller than a patch of 6 x 6"):
        PatchSampler([torch.ones(1, 1, 5, 9)], 6)


@pytest.mark.parametrize("chunk", [1, 40, 10_000])
@pytest.mark.parametrize("padding", [0, 2])
def test_prior_and_gradient_are_the_plain_sum(chunk, padding, monkeypatch):
    monkeypatch.setattr("patchflow.priors.patch._CHUNK", chunk)
    prior = PatchPrior(Quartic(), 4, 2, padding=padding)
    x = torch.randn(2, 2, 12, 15, requires_grad=True)
    padded = functional.pad(x, [padding] * 4, mode="reflect") if padding else x
    patches = functional.unfold(padded, 4).transpose(1, 2)
    expected = torch.stack([Quartic()(rows).sum() for rows in patches]) / 16
    found = prior(x)
    torch.testing.assert_close(found, expected)
    weights = torch.tensor([1.0, -2.0])
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), x),
        torch.autograd.grad((expected * weights).sum(), x),
    )
    with torch.no_grad():
        torch.testing.assert_close(prior(x), expected)


@pytest.mark.parametrize("shape", [(17, 14), (5, 9)])
@pytest.mark.parametrize("stride", [1, 2, 3, None])
def test_phases_average_to_the_prior(stride, shape):
    prior = PatchPrior(Quartic(), 4)
    x = torch.randn(1, 1, *shape)
    phases = prior.phases(stride)
    assert len(phases) == (4 if stride is None else stride) ** 2
    mean = sum(phase.value_and_grad(x)[1] for phase in phases) / len(phases)
    torch.testing.assert_close(mean, prior.value_and_grad(x)[1])
    torch.testing.assert_close(sum(phase(x) for phase in phases) / len(phases), prior(x))


def test_default_phases_see_each_pixel_at_most_once():
    prior = PatchPrior(Gaussian(torch.zeros(16), torch.eye(16)), 4)
    x = torch.randn(1, 1, 24, 20)
    for phase in prior.phases():
        _, gradient = phase.value_and_grad(x)
        seen = gradient != 0
        torch.testing.assert_close(gradient[seen], x[seen])
        assert seen.sum() >= 20 * 16


def test_random_patches_are_unbiased():
    prior = PatchPrior(Quartic(), 4)
    x = torch.randn(1, 1, 10, 12)
    draws = torch.stack([prior.random(20)(x) for _ in range(3000)])
    error = draws.std() / len(draws) ** 0.5
    assert abs(float(draws.mean() - prior(x))) < 5 * float(error)
    assert float(error) < 0.02 * float(prior(x))
    torch.testing.assert_close(prior.random(10**6)(x), prior(x))


def test_weight_does_not_depend_on_the_size_of_the_image():
    prior = PatchPrior(Quartic(), 3)
    tile = torch.randn(1, 1, 30, 30)
    small, large = prior(tile.repeat(1, 1, 2, 2)), prior(tile.repeat(1, 1, 4, 4))
    # Four times the pixels, four times the nats, up to the border.
    assert float(large / small) == pytest.approx(4, rel=0.05)


def test_map_is_the_mean_energy_of_the_patches_over_a_pixel():
    prior = PatchPrior(Quartic(), 3)
    x = torch.randn(2, 1, 7, 8)
    found = prior.nll_map(x)
    assert found.shape == (2, 1, 7, 8)
    for row, column in ((0, 0), (3, 4), (6, 2)):
        energies = [
            Quartic()(x[1, :, i : i + 3, j : j + 3].reshape(1, 9))
            for i in range(max(0, row - 2), min(row, 4) + 1)
            for j in range(max(0, column - 2), min(column, 5) + 1)
        ]
        torch.testing.assert_close(found[1, 0, row, column], torch.cat(energies).mean())


def test_trainable_prior_gives_gradients_to_its_parameters():
    prior = patch_nr(size=3, layers=1, hidden=8)
    x = torch.rand(1, 1, 8, 8)
    prior(x).sum().backward()
    assert all(p.grad is not None for p in prior.parameters())


def test_flow_prior_in_float32_with_bfloat16():
    prior = (
        patch_nr(size=4, layers=2, hidden=32, precision="bfloat16").float().requires_grad_(False)
    )
    x = torch.rand(1, 1, 20, 20, dtype=torch.float32)
    value, gradient = prior.value_and_grad(x)
    exact, slope = prior.double().value_and_grad(x.double())
    assert float((value - exact).abs()) < 0.01 * float(exact.abs())
    assert 1e-5 < float((gradient - slope).norm() / slope.norm()) < 0.05


def test_precision_is_measured_and_leaves_float64_alone():
    assert fastest_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)
    with autocast(torch.ones(1, dtype=torch.float64), "bfloat16"):
        assert not torch.is_autocast_enabled("cpu")
    with autocast(torch.ones(1, dtype=torch.float32), "bfloat16"):
        assert torch.is_autocast_enabled("cpu")


def test_bad_images_and_arguments():
    prior = PatchPrior(coupling_flow(16, layers=1, hidden=4), 4)
    with pytest.raises(InputError, match="3 channels but the patch prior was made for 1"):
        prior(torch.rand(1, 3, 9, 9))
    with pytest.raises(InputError, match="smaller than a patch"):
        prior(torch.rand(1, 1, 3, 9))
    with pytest.raises(InputError, match="size 0"):
        PatchPrior(Quartic(), 0)


def test_memory_does_not_grow_with_the_image():
    """All 483,025 patches of a large image in the memory of one chunk; without chunks it would be some 2.5 GiB."""
    program = """
import resource, torch, patchflow as pf
prior = pf.patch_nr(hidden=64, precision="float32").requires_grad_(False)
prior.value_and_grad(torch.rand(1, 1, 60, 60))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prior.value_and_grad(torch.rand(1, 1, 700, 700))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert float(run.stdout) < 300
