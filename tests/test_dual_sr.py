"""DualSR: its networks, the parts of its loss, a photograph, colour, and what is refused."""

import pytest
import skimage.data
import torch
from torch.nn import functional

import patchflow as pf
from patchflow.networks.dual_sr import LinearDownsampler, PatchCritic
from patchflow.problems.resolution import low_resolution
from patchflow.reconstruct import dual_sr

NOISE = 0.01


def photograph(rows=86, columns=98):
    """A part of a photograph with edges, and its likelihood for x2."""
    truth = torch.from_numpy(skimage.data.camera() / 255.0)[80 : 80 + rows, 180 : 180 + columns]
    operator = pf.downsample((rows, columns), 2, kernel_size=6, boundary="valid")
    truth = truth[None, None].to(torch.get_default_dtype())
    return truth, pf.GaussianLikelihood(operator, NOISE)


@pytest.mark.parametrize(("even", "side"), [(True, 14), (False, 13)])
def test_the_kernel_is_the_product_of_the_factors(even, side):
    down = LinearDownsampler(3, even=even, width=4)
    kernel = down.kernel()
    assert kernel.shape == (side, side)
    x = torch.rand(2, 3, 40, 37)
    factors = down._correlate(x.flatten(0, 1)[:, None])[..., ::3, ::3]
    torch.testing.assert_close(down(x), factors.view(2, 3, *factors.shape[2:]))
    one = functional.conv2d(x[:1, :1], kernel[None, None], stride=3)
    torch.testing.assert_close(down(x)[:1, :1], one)
    # At the start the middle of the support.
    assert abs(float(kernel.detach().sum()) - 1) < 0.3
    middle = slice((side - 1) // 2, side // 2 + 1)
    assert float(kernel.detach()[middle, middle].sum()) > 0.5


def test_the_critic_sees_seven_pixels_and_no_channel_is_left_out():
    critic = PatchCritic(3).eval()
    x = torch.rand(1, 3, 20, 18, requires_grad=True)
    out = critic(x)
    assert out.shape == (1, 1, 14, 12)
    (slope,) = torch.autograd.grad(out[0, 0, 4, 5], x)
    seen = (slope != 0).nonzero()
    assert seen.min(0).values.tolist() == [0, 0, 4, 5]
    assert seen.max(0).values.tolist() == [0, 2, 10, 11]


def test_the_penalty_of_a_kernel():
    assert float(dual_sr.irregularity(torch.full((4, 4), 1 / 16))) == pytest.approx(0, abs=1e-12)
    beside = torch.zeros(5, 5)
    beside[2, 3] = 1.5  # one pixel to the right, half too heavy
    assert float(dual_sr.irregularity(beside)) == pytest.approx(0.5 + 1.5)


def test_the_mask_is_one_half_at_the_edge_slope():
    ramp = dual_sr.EDGE * torch.arange(8.0).expand(1, 2, 6, 8)
    assert torch.equal(dual_sr.flatness(ramp.clone() * 0), torch.ones(1, 1, 6, 8))
    inside = dual_sr.flatness(ramp)[..., 1:-1]
    torch.testing.assert_close(inside, torch.full_like(inside, 0.5))


@pytest.mark.parametrize("kernel_size", [6, 7])
def test_both_samplers_agree_where_pixels_lie(kernel_size):
    """A symmetric kernel leaves a ramp alone, and interpolation gives it back; displaced, it would differ by .0035."""
    operator = low_resolution((40, 40), 2, kernel_size=kernel_size).operator
    model = dual_sr.Dual(1, operator, 0.0, 40)
    i, j = torch.meshgrid(torch.arange(model.crop), torch.arange(model.crop), indexing="ij")
    ramp = (0.2 + 0.004 * i + 0.003 * j)[None, None].to(torch.get_default_dtype())
    box = torch.full((1, 1, model.down.side, model.down.side), 1 / model.down.side**2)
    start = model.grid.initial(functional.conv2d(ramp, box, stride=2))
    inside = (slice(None), slice(None), slice(12, -12), slice(12, -12))
    torch.testing.assert_close(start[inside], ramp[inside], rtol=0, atol=8e-4)


def test_the_critic_learns_what_the_image_is_like():
    torch.manual_seed(0)
    truth, likelihood = photograph()
    model = dual_sr.Dual(1, likelihood.operator, NOISE, 40)
    c, b = torch.rand(1, 1, model.crop, model.crop), torch.rand(1, 1, model.small, model.small)
    real, made = model.critic(b), model.critic(model.coarse(c))
    expected = (real - 1).square().mean() + made.square().mean()
    found = model.critic_loss(c, b)
    assert abs(float(found.detach()) - float(expected.detach())) < 0.1 * float(expected.detach())
    found.backward()
    assert all(p.grad is None for p in model.down.parameters())


@pytest.mark.usefixtures("single_precision")
def test_learns_from_a_photograph_and_does_not_harm_it():
    truth, likelihood = photograph(122, 134)
    torch.manual_seed(0)
    y = likelihood.simulate(truth)
    found = dual_sr.reconstruct(likelihood, y, crop=40, steps=120, seconds=None)
    (top, bottom), (left, right) = likelihood.operator.covered

    def quality(x):
        region = (slice(None), slice(None), slice(top, bottom), slice(left, right))
        return float(pf.psnr(x[region], truth[region]))

    start = likelihood.operator.initial(y)
    # So few steps gain nothing yet; the loss is what tells that it learns.
    assert quality(found.x) > quality(start) - 0.1
    assert not torch.equal(found.x, start)
    assert sum(found.history[-20:]) < 0.8 * sum(found.history[:20])
    assert found.steps == 120
    assert found.converged is None


def test_colour_and_a_time_limit():
    likelihood = low_resolution((30, 36), 2, kernel_size=5)
    y = torch.rand(1, 3, 30, 36)
    found = dual_sr.reconstruct(likelihood, y, seconds=0.05)
    assert found.x.shape == (1, 3, 30 * 2 + 3, 36 * 2 + 3)
    assert found.x.isfinite().all()
    assert 1 <= found.steps < 100


def test_bad_input_is_refused():
    likelihood = low_resolution((40, 40), 2, kernel_size=4)
    y = torch.rand(1, 1, 40, 40)

    def refused(message, law=likelihood, measured=y, steps=1):
        with pytest.raises(pf.InputError, match=message):
            dual_sr.reconstruct(law, measured, steps=steps)

    refused("Identity that does not lower", pf.GaussianLikelihood(pf.Identity((40, 40)), NOISE))
    refused("gives one image of 40 x 40 pixels", measured=y[:, :, 1:])
    refused("1600 of 1600 values", measured=y * torch.nan)
    refused("Got 0 steps", steps=0)
    small = low_resolution((20, 20), 2, kernel_size=4)
    refused("leave 4 x 4, but 8 are needed", small, y[:, :, :20, :20])
    with pytest.raises(pf.InputError, match="Got the stride 1"):
        LinearDownsampler(1, even=True)
