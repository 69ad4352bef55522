"""ZSSR: what it learns from, the self-ensemble, back-projection, a photograph, and what is refused."""

import numpy as np
import pytest
import skimage.data
import torch

import patchflow as pf
from patchflow.networks.zssr import ResidualConvolutions
from patchflow.numerics.dihedral import DIHEDRAL, symmetries
from patchflow.problems.resolution import low_resolution
from patchflow.reconstruct import zssr

NOISE = 0.01


def photograph(rows=86, columns=98):
    """A part of a photograph with edges, and its likelihood for x2."""
    truth = torch.from_numpy(skimage.data.camera() / 255.0)[80 : 80 + rows, 180 : 180 + columns]
    operator = pf.downsample((rows, columns), 2, kernel_size=6, boundary="valid")
    return truth[None, None], pf.GaussianLikelihood(operator, NOISE)


def ramp(rows, columns):
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return (0.2 + 0.004 * i + 0.003 * j)[None, None].to(torch.get_default_dtype())


def test_symmetries_are_eight_different_ones_and_are_undone():
    image = torch.rand(1, 2, 5, 5)
    turned = [g(image) for g in DIHEDRAL]
    assert len({tuple(t.flatten().tolist()) for t in turned}) == 8
    for g, t in zip(DIHEDRAL, turned, strict=True):
        assert torch.equal(g.undo(t), image)


def test_only_symmetries_of_the_kernel_serve_the_ensemble():
    assert symmetries(pf.gaussian_kernel(16, 1.0)) == DIHEDRAL
    line = torch.zeros(5, 5)
    line[2] = 0.2  # motion along a row: as it is, upside down, half a turn, mirrored
    assert len(symmetries(line)) == 4
    assert symmetries(torch.arange(12.0).view(3, 4)) == DIHEDRAL[:1]


def test_self_ensemble_turns_with_the_image():
    network = ResidualConvolutions(width=4, depth=3)
    image = torch.rand(1, 1, 7, 9)
    expected = zssr.self_ensemble(network, image)
    for g in DIHEDRAL:
        torch.testing.assert_close(zssr.self_ensemble(network, g(image)), g(expected))
    assert not torch.allclose(g(network(image)), network(g(image)))  # the network alone does not


def test_back_projection_lowers_the_residual_down_to_the_noise():
    truth, likelihood = photograph()
    y = likelihood.simulate(truth)
    x = likelihood.operator.initial(y)
    residuals = [
        float((likelihood.operator(zssr.back_project(likelihood, y, x, steps=k)) - y).norm())
        for k in range(4)
    ]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[3] < 0.7 * residuals[0]
    done = zssr.back_project(likelihood, y, x, steps=100)
    remains = float((likelihood.operator(done) - y).square().mean().sqrt())
    assert 0.5 * NOISE < remains <= NOISE
    # Nothing is done where the residual is noise already.
    assert torch.equal(zssr.back_project(likelihood, y, done), done)


@pytest.mark.parametrize("boundary", ["valid", "circular"])
def test_pairs_are_aligned(boundary):
    """Of a ramp the degraded image is the ramp again; displaced by half a pixel, a pair would differ by .0035."""
    operator = low_resolution((38, 30), 2, kernel_size=6, boundary=boundary).operator
    y = ramp(38, 30)
    pairs = zssr.Pairs(operator, y, 0.0, 16)
    for _ in range(20):
        wanted, given = pairs()
        assert wanted.shape == given.shape == (1, 1, 16, 16)
        inside = (slice(None), slice(None), slice(4, -4), slice(4, -4))
        torch.testing.assert_close(wanted[inside], given[inside], rtol=0, atol=8e-4)


def test_pairs_carry_the_noise_and_keep_the_kernel():
    kernel = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # takes one pixel of four
    operator = pf.Blur(kernel, (20, 24), "valid", stride=2)
    y = torch.rand(1, 1, *operator.range_shape)
    pairs = zssr.Pairs(operator, y, 0.0, 8)
    for g, son in zip(DIHEDRAL, pairs.sons, strict=True):
        assert torch.equal(son, g(y)[:, :, ::2, ::2][:, :, : son.shape[2], : son.shape[3]])
    noisy = zssr.Pairs(operator, torch.full_like(y, 0.5), 0.1, 8)
    deviations = torch.cat(
        [(given - wanted).flatten() for wanted, given in (noisy() for _ in range(50))]
    )
    assert 0.05 < float(deviations.std()) < 0.11  # interpolation lowers it a little


def test_a_line_tells_whether_the_loss_falls():
    noise = 0.1 * (-1.0) ** np.arange(256)
    assert zssr.is_flat(list(1 + noise))
    assert not zssr.is_flat(list(np.linspace(2, 1, 256) + noise))


def test_better_than_bicubic_on_a_photograph():
    truth, likelihood = photograph()
    y = likelihood.simulate(truth)
    network = ResidualConvolutions(width=16, depth=6)
    found = zssr.reconstruct(
        likelihood, y, network=network, crop=24, steps=250, lr=4e-3, seconds=None
    )
    (top, bottom), (left, right) = likelihood.operator.covered

    def quality(x):
        region = (slice(None), slice(None), slice(top, bottom), slice(left, right))
        return float(pf.psnr(x[region], truth[region]))

    assert quality(found.x) > quality(likelihood.operator.initial(y)) + 0.8
    assert found.history[-1] < found.history[0]
    assert found.converged
    assert not any(p.requires_grad for p in network.parameters())


def test_published_training_and_colour(monkeypatch):
    monkeypatch.setattr(zssr, "PUBLISHED_STEPS", 3)
    monkeypatch.setattr(zssr, "WIDTH", 4)
    likelihood = low_resolution((24, 20), 3, kernel_size=5)
    y = torch.rand(1, 3, 24, 20)
    found = zssr.reconstruct(likelihood, y, preset="paper")
    assert found.x.shape == (1, 3, 24 * 3 + 2, 20 * 3 + 2)
    assert found.steps == len(found.history) == 3


def test_published_rate_falls_until_it_ends(monkeypatch):
    """With a loss that does not fall, three divisions by ten reach the least rate."""
    monkeypatch.setattr(zssr, "WIDTH", 2)
    monkeypatch.setattr(zssr, "is_flat", lambda losses: True)
    monkeypatch.setattr(zssr, "PUBLISHED_CROP", 8)
    monkeypatch.setattr(zssr, "_SLOPE_RANGE", 8)
    monkeypatch.setattr(zssr, "_LOOK_EVERY", 3)
    y = torch.rand(1, 1, 20, 20)
    found = zssr.reconstruct(low_resolution((20, 20), 2, kernel_size=4), y, preset="paper")
    assert found.steps == 3 * 9  # looked at every 3 steps, from 8 steps after the last change


def test_bad_input_is_refused():
    likelihood = low_resolution((20, 20), 2, kernel_size=4)
    y = torch.rand(1, 1, 20, 20)

    def refused(message, law=likelihood, measured=y, network=None, steps=1):
        with pytest.raises(pf.InputError, match=message):
            zssr.reconstruct(law, measured, network=network, steps=steps)

    identity = pf.GaussianLikelihood(pf.Identity((20, 20)), NOISE)
    refused("Identity that does not lower the resolution", law=identity)
    refused("gives one image of 20 x 20 pixels", measured=y[:, :, 1:])
    refused("gives one image", measured=torch.cat([y, y]))
    refused("1 of 400 values of the measurement are not finite", measured=_spoilt(y))
    refused("Got 0 steps", steps=0)
    refused("has 1 channels but the network was made for 3", network=ResidualConvolutions(3))
    small = low_resolution((20, 20), 2)
    refused("a kernel of 16 x 16 leaves 4 to learn from, but 8 are needed", law=small)
    with pytest.raises(pf.InputError, match="depth 1"):
        ResidualConvolutions(depth=1)


def _spoilt(y):
    y = y.clone()
    y[0, 0, 3, 3] = torch.nan
    return y
