"""The skip network against a hand count, and the deep image prior: best image, average, early stop, refusals."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from patchflow.errors import InputError, NumericalError
from patchflow.metrics import psnr
from patchflow.networks.skip import SkipNet
from patchflow.priors.variation import TotalVariation
from patchflow.problems.likelihood import GaussianLikelihood, Likelihood
from patchflow.problems.operator import Identity
from patchflow.problems.poisson import PoissonNoise
from patchflow.reconstruct.deep_image_prior import MovingVariance, reconstruct


@pytest.fixture(autouse=True)
def one_thread():
    """On such small images threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def count(model):
    return sum(p.numel() for p in model.parameters())


def block(inputs, outputs, size):
    """Weights and bias of the convolution, scale and shift of the normalisation."""
    return inputs * outputs * size**2 + outputs + 2 * outputs


def test_published_network():
    """Six scales of 128: in 1, out 1, four skip channels at the two coarsest scales."""
    down = block(1, 128, 3) + 5 * block(128, 128, 3) + 6 * block(128, 128, 3)
    up = 4 * block(128, 128, 3) + 2 * block(132, 128, 3) + 6 * block(128, 128, 1)
    skips = 2 * block(128, 4, 1)
    assert count(SkipNet()) == down + up + skips + 128 + 1
    # Counted with the published code. Where there is no skip it joins the channel of a block times zero; and it has a
    # normalisation after the last layer that is not used.
    idle = block(1, 1, 1) + 3 * block(128, 1, 1) + 4 * 9 * 128 + 2
    assert count(SkipNet()) + idle == 2_630_824


def test_channels_of_each_scale():
    model = SkipNet(channels=(4, 6, 8), skip=(2, 0, 3), in_channels=5, out_channels=2)
    down = block(5, 4, 3) + block(4, 4, 3) + block(4, 6, 3) + block(6, 6, 3)
    down += block(6, 8, 3) + block(8, 8, 3)
    up = block(8 + 3, 8, 3) + block(8, 8, 1) + block(8, 6, 3) + block(6, 6, 1)
    up += block(6 + 2, 4, 3) + block(4, 4, 1)
    assert count(model) == down + up + block(5, 2, 1) + block(6, 3, 1) + 4 * 2 + 2
    assert count(SkipNet(channels=4, skip=(0, 0))) == count(SkipNet(channels=(4, 4), skip=(0, 0)))


@pytest.mark.parametrize("size", [(65, 65), (71, 130), (96, 67)])
def test_any_size(size):
    model = SkipNet(channels=4)
    x = model(torch.randn(2, 1, *size))
    assert x.shape == (2, 1, *size)
    assert 0 < x.min() < x.max() < 1


def by_hand(model, z):
    """The same function from the formula, with numpy: loops over pixels instead of convolutions."""
    p = {name: value.detach().numpy() for name, value in model.state_dict().items()}

    def block(a, name, size, stride=1):
        weight, bias = p[f"{name}.0.weight"], p[f"{name}.0.bias"]
        h, w = a.shape[1:]
        a = np.pad(a, [(0, 0), (size // 2,) * 2, (size // 2,) * 2], mode="reflect")
        rows, columns = range(0, h, stride), range(0, w, stride)
        b = np.array(
            [
                [(weight * a[:, i : i + size, j : j + size]).sum((1, 2, 3)) for j in columns]
                for i in rows
            ]
        )
        b = np.moveaxis(b, 2, 0) + bias[:, None, None]
        b = (b - b.mean((1, 2), keepdims=True)) / np.sqrt(b.var((1, 2), keepdims=True) + 1e-5)
        b = b * p[f"{name}.1.weight"][:, None, None] + p[f"{name}.1.bias"][:, None, None]
        return np.where(b > 0, b, 0.2 * b)

    def double(a):
        """Bilinear with half-pixel centres: 3/4 of the nearer pixel, 1/4 of the farther."""
        for axis in (1, 2):
            a = np.moveaxis(a, axis, 0)
            left, right = a[[0, *range(len(a) - 1)]], a[[*range(1, len(a)), -1]]
            a = np.stack((0.75 * a + 0.25 * left, 0.75 * a + 0.25 * right), 1).reshape(
                -1, *a.shape[1:]
            )
            a = np.moveaxis(a, 0, axis)
        return a

    levels = [z]
    for k in range(model.scales):
        levels.append(block(block(levels[-1], f"down.{k}.0", 3, 2), f"down.{k}.1", 3))
    u = levels.pop()
    for k in reversed(range(model.scales)):
        u = double(u)[:, : levels[k].shape[1], : levels[k].shape[2]]
        if f"skip.{k}.0.weight" in p:
            u = np.concatenate((u, block(levels[k], f"skip.{k}", 1)))
        u = block(block(u, f"up.{k}.0", 3), f"up.{k}.1", 1)
    u = np.einsum("oi,ihw->ohw", p["last.weight"][:, :, 0, 0], u) + p["last.bias"][:, None, None]
    return -1 + 3 / (1 + np.exp(-u))


def test_network_against_numpy():
    model = SkipNet(channels=(3, 4), skip=(0, 2), in_channels=2, out_channels=2, interval=(-1, 2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    z = torch.randn(1, 2, 9, 11)
    with torch.no_grad():
        found = model.eval()(z)[0].numpy()
    np.testing.assert_allclose(found, by_hand(model, z[0].numpy()), atol=1e-12)


@pytest.mark.parametrize("size", [(5, 6), (8, 5)])
def test_gradient_of_the_network(size):
    """The reflected borders have a hand-written one."""
    model = SkipNet(channels=2, skip=(0, 1))
    weights = list(model.parameters())
    z = torch.randn(1, 1, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, *_: model.double()(z), (z, *weights))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"channels": (4, 4)}, "6 scales"),
        ({"channels": 4, "scales": 3}, "3 scales"),
        ({"channels": 0}, "at least 1"),
        ({"skip": (-1,), "channels": 4}, "at least 1"),
        ({"out_channels": 0}, "at least 1"),
        ({"interval": (1, 1)}, "smaller end"),
    ],
)
def test_network_refuses(options, sentence):
    with pytest.raises(InputError, match=sentence):
        SkipNet(**options)


def test_network_refuses_small_images():
    with pytest.raises(InputError, match="more than 64 pixels"):
        SkipNet(channels=2)(torch.zeros(1, 1, 64, 80))
    with pytest.raises(InputError, match="needs 1 channels"):
        SkipNet(channels=2)(torch.zeros(1, 3, 80, 80))


def test_moving_variance():
    images = [10 + torch.randn(1, 2, 4, 5) for _ in range(12)]
    spread = MovingVariance(5)
    found = [spread.push(x) for x in images]
    assert all(math.isinf(value) for value in found[:4])
    expected = [np.var(np.stack(images[k - 4 : k + 1]), axis=0).mean() for k in range(4, 12)]
    np.testing.assert_allclose(found[4:], expected, rtol=1e-12)


def problem(size=24, std=0.15):
    """A noisy disc."""
    grid = torch.arange(size) - size / 2
    truth = 0.2 + 0.6 * (grid[:, None] ** 2 + grid[None] ** 2 < (size / 3) ** 2)
    truth = truth[None, None].to(torch.get_default_dtype())
    likelihood = GaussianLikelihood(Identity((size, size)), std)
    return truth, likelihood, likelihood.simulate(truth)


# As published: constant steps, a fixed input, the image of lowest energy.
PLAIN = {"schedule": "constant", "learn_input": False, "average": 0.0, "isotropic": False}


def small(**options):
    return SkipNet(channels=8, skip=(0, 0, 4), **options)


def test_denoising_beats_its_input():
    truth, likelihood, y = problem(48)
    solution = reconstruct(likelihood, y, weight=2.0, network=small(), steps=120, lr=0.02, clip=1.0)
    assert solution.steps == len(solution.history) == 120
    assert solution.x.shape == truth.shape
    assert not solution.x.requires_grad
    assert psnr(solution.x, truth) > psnr(y, truth) + 8


def test_poisson_and_colour():
    """Two channels, counts around 20, and a forward model that is no operator."""
    truth = problem()[0].repeat(1, 2, 1, 1)
    likelihood = Likelihood(lambda x: x, PoissonNoise(20.0))
    y = likelihood.simulate(truth)
    model = small(out_channels=2, in_channels=3)
    solution = reconstruct(
        likelihood, y, weight=3.0, network=model, shape=(24, 24), steps=100, lr=0.02
    )
    assert solution.x.shape == truth.shape
    assert psnr(solution.x, truth) > psnr(y, truth) + 3


def record(**options):
    """A run, its images and its energies."""
    _, likelihood, y = problem()
    images = []
    z = 0.1 * torch.randn(1, 1, 24, 24)
    solution = reconstruct(
        likelihood,
        y,
        weight=1.0,
        z=z,
        network=small(),
        callback=lambda step, x, energy: images.append(x),
        **PLAIN | {"lr": 0.02} | options,
    )
    return solution, images, likelihood + TotalVariation(isotropic=False), y


def test_history_is_the_energy_and_the_lowest_is_kept():
    # Perturbed inputs, so that the energy goes up and down.
    solution, images, energy, y = record(steps=40, perturbation=0.3, lr=0.2)
    expected = [float(energy(x, y)) for x in images]
    np.testing.assert_allclose(solution.history, expected, rtol=1e-12)
    best = int(np.argmin(expected))
    assert best < 39, "the last image is the best one: the test is blind"
    assert torch.equal(solution.x, images[best])
    assert not solution.converged


def test_average():
    single, images, _, _ = record(steps=30)
    torch.manual_seed(0)
    averaged, means, _, _ = record(steps=30, average=0.7)
    assert single.history == averaged.history
    mean = images[0]
    for step, x in enumerate(images):
        weight = min(0.7, (1 + step) / (10 + step))
        mean = weight * mean + (1 - weight) * x
        torch.testing.assert_close(means[step], mean)
    assert torch.equal(averaged.x, means[-1])


def test_early_stop_where_the_variance_is_smallest():
    solution, images, _, _ = record(steps=400, patience=7, window=5)
    assert solution.converged
    assert solution.steps == len(images) < 400
    variances = [
        np.var(np.stack(images[k - 4 : k + 1]), axis=0).mean() for k in range(4, len(images))
    ]
    best = int(np.argmin(variances))
    assert torch.equal(solution.x, images[best + 4])
    assert solution.steps == best + 4 + 7 + 1


def test_too_few_steps_to_stop():
    solution, images, _, _ = record(steps=20, patience=1000, window=20)
    assert not solution.converged
    assert torch.equal(solution.x, images[-1])


def test_published_procedure():
    """Adam on normalised gradients, written out: the sum of nats is so steep that clipping at 1 always acts."""
    _, likelihood, y = problem()
    model, z = small(), 0.1 * torch.randn(1, 1, 24, 24)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"weight": 2.0, "z": z, "steps": 3, "lr": 0.01, "clip": 0.01}
    reconstruct(likelihood, y, network=model, **PLAIN | options)
    other = small()
    other.load_state_dict(start)
    parameters = list(other.parameters())
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    for step in range(1, 4):
        x = other(z)
        across = (x[..., 1:] - x[..., :-1]).abs().sum() + (
            x[..., 1:, :] - x[..., :-1, :]
        ).abs().sum()
        loss = ((x - y) / 0.15).square().sum() / 2 + 2.0 * across
        gradient = torch.autograd.grad(loss / 24**2, parameters)
        norm = torch.cat([g.flatten() for g in gradient]).norm()
        assert norm > 0.01
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradient, first, second, strict=True):
                g = 0.01 * g / (norm + 1e-6)
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g**2)
                p -= 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    for p, q in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_learned_input():
    """The given input is not touched; a network without weights to speak of fits by its input alone."""

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(()))

        def forward(self, z):
            return z + self.shift

    _, likelihood, y = problem()
    z = 0.1 * torch.randn(1, 1, 24, 24)
    before = z.clone()
    options = {"weight": 0, "steps": 300, "lr": 0.02, "schedule": "cosine", "z": z}
    x = reconstruct(likelihood, y, network=Shift(), learn_input=True, **options).x
    torch.testing.assert_close(x, y, rtol=0, atol=1e-3)
    assert torch.equal(z, before)
    fixed = reconstruct(likelihood, y, network=Shift(), learn_input=False, **options).x
    torch.testing.assert_close(fixed - z, (y - z).mean().expand_as(y), rtol=0, atol=1e-3)


def test_interrupted_keeps_the_best():
    def stop(step, x, energy):
        if step == 4:
            raise KeyboardInterrupt

    _, likelihood, y = problem()
    solution = reconstruct(likelihood, y, weight=1.0, network=small(), steps=50, callback=stop)
    assert solution.steps == 5
    assert bool(solution.x.isfinite().all())


def test_single_precision_stays(single_precision):
    _, likelihood, y = problem()
    model = small()
    for precision in ("float32", "bfloat16"):
        x = reconstruct(likelihood, y, weight=1.0, network=model, steps=2, precision=precision).x
        assert x.dtype == torch.float32
        # More values than bfloat16 has between 1/4 and 1.
        assert len(x.unique()) > 300
    assert next(model.parameters()).dtype == torch.float32


def test_not_a_number():
    _, likelihood, y = problem()
    y[0, 0, 3, 3] = math.nan
    with pytest.raises(NumericalError, match="nan at step 0; try a smaller lr"):
        reconstruct(likelihood, y, weight=1.0, network=small(), steps=5)


def test_small_images_have_fewer_scales():
    _, likelihood, y = problem()
    found = reconstruct(likelihood, y, steps=2)
    assert found.x.shape[2:] == (24, 24)
    assert not found.x.requires_grad


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weight": -1.0}, "weight -1.0"),
        ({"steps": 0}, "0 steps"),
        ({"lr": 0.0}, "lr 0.0"),
        ({"clip": 0.0}, "clip 0.0"),
        ({"perturbation": -0.1}, "perturbation -0.1"),
        ({"average": 1.0}, "average is 1.0"),
        ({"patience": 0}, "patience 0"),
        ({"patience": 5, "window": 30}, "window of 30"),
        ({"z": torch.zeros(1, 1, 20, 24)}, "24 x 24"),
        ({"z": torch.zeros(2, 1, 24, 24)}, "one input"),
        ({"network": nn.Conv2d(1, 1, 1)}, "input of a Conv2d"),
    ],
)
def test_refuses(options, sentence):
    _, likelihood, y = problem()
    with pytest.raises(InputError, match=sentence):
        reconstruct(likelihood, y, **({"weight": 1.0, "steps": 20, "network": small()} | options))


def test_refuses_measurements():
    _, likelihood, y = problem()
    with pytest.raises(InputError, match="batch of 2"):
        reconstruct(likelihood, y.repeat(2, 1, 1, 1), weight=1.0, network=small())
    with pytest.raises(InputError, match="shape of the image"):
        reconstruct(Likelihood(lambda x: x, likelihood.noise), y, weight=1.0, network=small())
