"""Adversarial regularisers: sizes by hand, losses in closed form, and critics whose optimum is known."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import patchflow as pf
from patchflow import models
from patchflow.energy import Energy
from patchflow.errors import InputError, NumericalError
from patchflow.learn_critic import blur_and_noise, learn_critic, noise
from patchflow.numerics.patches import extract_patches
from patchflow.papers import prost2021_local_ar as paper
from patchflow.papers.altekrueger2023_patchnr import weight_of_lambda
from patchflow.priors.adversarial import Layer, PatchCritic, adversarial_loss, gradient_penalty
from patchflow.priors.critic import CriticPrior
from patchflow.problems.blur import downsample
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.reconstruct import variational


def small_critic(**options):
    """Two strides, so that the dilations multiply; 13 x 13 patches."""
    layers = [Layer(6, 3), Layer(5, 3, 2), Layer(4, 2, 3), Layer(2, 2)]
    return CriticPrior(PatchCritic(layers, 13, slope=0.1, bias=True), **options)


class Linear(Energy):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x, condition=None):
        return x @ self.weight


def test_sizes_of_the_networks():
    shapes = [tuple(p.shape) for p in models.alr().parameters()]
    assert shapes == [(64, 1, 3, 3), (128, 64, 3, 3), (1, 128, 3, 3)]
    assert sum(p.numel() for p in models.alr().parameters()) == 576 + 73_728 + 1152
    assert sum(p.numel() for p in models.alr(channels=3).parameters()) == 3 * 576 + 73_728 + 1152
    weights = 9 * (128 + 128 * 64 + 64 * 64 + 64 * 64) + 64 * 32 + 32 * 32
    biases = 128 + 64 + 64 + 64 + 32 + 32
    original = models.local_ar()
    assert sum(p.numel() for p in original.parameters()) == weights + biases
    assert (original.size, original.critic.stride) == (13, 3)


def test_the_original_network_sees_13_of_15_pixels():
    layers = models.local_ar().critic.layers
    critic = PatchCritic(layers, 15, slope=1.0)
    _, slope = critic.value_and_grad(torch.randn(1, 225))
    seen = slope.view(15, 15) != 0
    assert seen[:13, :13].all()
    assert seen.sum() == 169


@pytest.mark.parametrize("size", [3, 4, 6, 7, 8])
def test_small_form_equals_a_network_of_torch(size):
    prior = models.alr(size=size, channels=2)
    weights = list(prior.parameters())
    x = torch.randn(5, 2 * size**2)
    hidden = functional.leaky_relu(
        functional.conv2d(x.view(5, 2, size, size), weights[0], padding=1), 0.2
    )
    hidden = functional.leaky_relu(functional.conv2d(hidden, weights[1], stride=2, padding=1), 0.2)
    expected = functional.conv2d(hidden, weights[2], stride=2)
    assert expected.shape == (5, 1, 1, 1)
    torch.testing.assert_close(prior.patch_energy(x), expected.flatten())


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("stride", [1, 2, 4, 6, 12])
def test_whole_images_give_the_same_as_patches(stride, padding, monkeypatch):
    monkeypatch.setattr("patchflow.priors.critic._PIXELS", 250)  # several strips
    prior = small_critic(padding=padding)
    patchwise = pf.PatchPrior(prior.critic, 13, padding=padding)
    x = torch.randn(2, 1, 47, 25)
    for learning in (True, False):
        prior.requires_grad_(learning)
        pairs = zip(prior.phases(stride), patchwise.phases(stride), strict=True)
        for dense, single in [*pairs][:5]:
            for a, b in zip(dense.value_and_grad(x), single.value_and_grad(x), strict=True):
                torch.testing.assert_close(a, b)
    torch.testing.assert_close(prior.nll_map(x), patchwise.nll_map(x))
    assert len(prior.phases()) == prior.critic.stride**2 == 36


def test_phase_of_an_image_without_patches_is_zero():
    prior = small_critic().requires_grad_(False)
    phases = prior.phases(4)
    value, _ = phases[[p.phase for p in phases].index((3, 3))].value_and_grad(
        torch.randn(1, 1, 14, 14)
    )
    assert value == 0


@pytest.mark.parametrize("make", [models.alr, models.local_ar])
def test_gradient_against_finite_differences(make):
    prior = make(padding=2).requires_grad_(False)
    x, direction = torch.rand(2, 1, 15, 16)
    value, gradient = prior.value_and_grad(x[None])
    step = 1e-6
    ahead, behind = (prior((x + sign * step * direction)[None]) for sign in (1, -1))
    torch.testing.assert_close(
        (gradient[0] * direction).sum(), ((ahead - behind) / (2 * step))[0], rtol=1e-5, atol=1e-8
    )
    total = prior.patch_energy(
        extract_patches(functional.pad(x[None], [2] * 4, mode="reflect")[0], prior.size)
    ).sum()
    torch.testing.assert_close(value[0], total / prior.size**2)


def test_penalty_and_loss_of_a_linear_critic():
    weight = torch.randn(4)
    critic, clean, degraded = Linear(weight), torch.randn(50, 4), torch.randn(50, 4)
    expected = (weight.norm() - 1) ** 2
    penalty = gradient_penalty(critic, clean, degraded)
    torch.testing.assert_close(penalty, expected)
    (slope,) = torch.autograd.grad(penalty, critic.parameters())
    torch.testing.assert_close(slope, 2 * (weight.norm() - 1) * weight / weight.norm())
    loss, distance = adversarial_loss(critic, clean, degraded, penalty=3)
    torch.testing.assert_close(distance, (degraded - clean).mean(0) @ weight)
    torch.testing.assert_close(loss, 3 * expected - distance)


def test_penalty_is_taken_between_the_points():
    """The slope of a half square at t a + (1 - t) b with |a| = 1, b = 3 a is 3 - 2 t, so the mean is 4 / 3."""
    clean = functional.normalize(torch.randn(4000, 3), dim=1)
    penalty = gradient_penalty(lambda x: 0.5 * x.square().sum(1), clean, 3 * clean)
    assert penalty.item() == pytest.approx(4 / 3, abs=0.08)


def trained(degrade, perturb=None, *, penalty=1.0, steps=400):
    torch.manual_seed(1)
    critic = PatchCritic([Layer(32, 2), Layer(1, 1)], 2, bias=True)
    prior = pf.PatchPrior(critic, 2)
    image = 0.3 * torch.randn(1, 1, 40, 40)
    record = learn_critic(
        prior, [image], degrade=degrade, perturb=perturb, penalty=penalty, steps=steps, lr=5e-3
    )
    return prior, record, image


def test_shift_has_its_known_critic():
    r"""Patches moved by d: the loss is lowest for <d, x> / |d| (1 + |d| / (2 mu)), d = 0.4 (1, 1, 1, 1)."""
    prior, record, image = trained(lambda x: x + 0.4)
    patches = extract_patches(image[0], 2)
    _, slopes = prior.patch_energy.value_and_grad(patches)
    # The length of d is the exact distance of the two laws.
    scale = 1 + 0.8 / 2
    torch.testing.assert_close(slopes.mean(0), scale * torch.full((4,), 0.5), rtol=0.06, atol=0.0)
    difference = prior.patch_energy(patches + 0.4) - prior.patch_energy(patches)
    assert difference.mean().item() == pytest.approx(0.8 * scale, rel=0.05)
    assert -record.losses[-1] == pytest.approx(0.8 * scale, rel=0.05)
    assert (record.stopped, record.steps, len(record.losses)) == ("finished", 400, 8)
    assert not any(p.requires_grad for p in prior.parameters())


def test_stretched_gaussian_has_its_known_distance_and_critic():
    """N(0, I) and N(0, 4 I) in four dimensions: the critic is |x|, the distance its mean, 1.88."""
    torch.manual_seed(1)
    prior = pf.PatchPrior(PatchCritic([Layer(64, 2), Layer(1, 1)], 2, bias=True), 2)
    images = [torch.randn(1, 1, 60, 60)]
    learn_critic(prior, images, degrade=lambda x: 2 * x, penalty=30, batch=128, steps=400, lr=2e-2)
    x = torch.randn(20000, 4)
    values, slopes = prior.patch_energy.value_and_grad(x)
    exact = math.sqrt(2) * math.gamma(2.5) / math.gamma(2)
    found = prior.patch_energy(2 * x).mean() - values.mean()
    assert found.item() == pytest.approx(exact, rel=0.04)
    assert functional.cosine_similarity(slopes, x).mean() > 0.96
    # The penalty leaves slopes of 1 + W / (2 mu) = 1.03.
    lengths = slopes.norm(dim=1)
    assert lengths.median().item() == pytest.approx(1.03, abs=0.02)
    assert 0.8 < lengths.min() < lengths.max() < 1.1


def test_critic_prefers_clean_images_and_restores():
    """Trained against the operator's own start images, the prior pulls from them towards the truth."""
    torch.manual_seed(0)
    x = torch.linspace(0, 12, 32)
    image = (torch.outer(x.sin(), (1.3 * x).cos()) > 0).to(x)[None, None]
    likelihood = GaussianLikelihood(downsample((32, 32), 2, kernel_size=4), 0.01)
    layers = [Layer(16, 3, 1, 1), Layer(32, 3, 2, 1), Layer(1, 3)]
    prior = pf.PatchPrior(PatchCritic(layers, 6), 6)
    learn_critic(
        prior,
        [image] * 2,
        degrade=lambda x: likelihood.operator.initial(likelihood.simulate(x)),
        dihedral=True,
        steps=100,
        lr=1e-3,
    )
    y = likelihood.simulate(image)
    start = likelihood.operator.initial(y)
    value, slope = prior.value_and_grad(start)
    assert prior(image) < value
    assert (slope * (image - start)).sum() < 0
    solution = variational.reconstruct(likelihood, prior, y, start, weight=20.0, steps=40)
    assert pf.psnr(solution.x, image) > pf.psnr(start, image) + 0.5


def test_degradations_have_the_published_levels():
    flat = torch.full((20000, 1, 5, 5), 0.5)
    levels = noise(flat).flatten(1).std(1)
    # The mean square of U(a, b) is (a^2 + a b + b^2) / 3.
    assert levels.square().mean().item() == pytest.approx(0.1075 / 3, rel=0.02)
    levels = (blur_and_noise(flat) - flat).flatten(1).std(1)
    assert levels.square().mean().item() == pytest.approx(0.04 / 3, rel=0.02)
    # One pixel of weight 1 keeps at least 1 / (1 + 2 exp(-1 / 0.18))^2 of it in its place.
    spike = torch.zeros(40000, 1, 5, 5)
    spike[:, :, 2, 2] = 1.0
    mean = blur_and_noise(spike).mean(0)[0]
    assert 0.98 < mean[2, 2] < 1.01
    assert mean.sum().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("make", "options", "kind"),
    [
        (models.alr, {"size": 5, "channels": 3}, pf.PatchPrior),
        (models.local_ar, {"padding": 2, "precision": "float32"}, CriticPrior),
    ],
)
def test_files_bring_critics_back(make, options, kind, tmp_path):
    prior = make(**options)
    models.save(tmp_path / "critic.safetensors", prior, training={"steps": 3})
    again = models.load(tmp_path / "critic.safetensors", kind)
    x = torch.rand(1, prior.channels, 17, 18)
    torch.testing.assert_close(again(x), prior(x), rtol=0, atol=0)
    assert (type(again), again.padding) == (kind, prior.padding)
    assert not any(p.requires_grad for p in again.parameters())


def test_budget_and_interruption():
    prior = models.alr()
    assert learn_critic(prior, [torch.rand(1, 1, 9, 9)], seconds=1e-9).stopped == "budget"
    calls = 0

    def perturb(patches):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return noise(patches)

    prior.requires_grad_(True)
    record = learn_critic(prior, [torch.rand(1, 1, 9, 9)], perturb=perturb)
    assert (record.stopped, record.steps) == ("interrupted", 3)
    assert not any(p.requires_grad for p in prior.parameters())


def test_same_seed_same_critic():
    priors = [
        trained(lambda x: x + 0.1 * torch.randn_like(x), noise, steps=20)[0] for _ in range(2)
    ]
    for a, b in zip(*(p.parameters() for p in priors), strict=True):
        assert torch.equal(a, b)


def test_loss_that_is_not_finite_says_what_to_do():
    with pytest.raises(NumericalError, match="nan at step 1; use a smaller lr than 0.0001"):
        learn_critic(models.alr(), [torch.rand(1, 1, 9, 9)], perturb=lambda p: p * math.nan)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"images": []}, "There are no training images"),
        ({"images": [torch.rand(1, 3, 9, 9)]}, "have 3 channels but the model was made for 1"),
        ({"images": [torch.rand(1, 1, 5, 9)]}, "smaller than a patch of 6 x 6"),
        ({"degrade": lambda x: x[..., ::2]}, r"degraded image is \(1, 1, 9, 5\) but the image is"),
        ({"degrade": lambda x: x / 0}, "not finite; check degrade"),
        ({"penalty": 0}, "penalty is 0"),
        ({"lr": -1.0}, "lr -1.0; both must be positive"),
        ({"batch": 0}, "a batch of 0"),
        ({"steps": 0}, "and 0 steps"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
    ],
)
def test_bad_input_of_training(options, sentence):
    images = options.pop("images", [torch.rand(1, 1, 9, 9)])
    with pytest.raises(InputError, match=sentence):
        learn_critic(models.alr(), images, **options)


def test_bad_input():
    with pytest.raises(InputError, match="no trainable parameters"):
        learn_critic(models.alr().requires_grad_(False), [torch.rand(1, 1, 9, 9)])
    with pytest.raises(InputError, match="leave 4 positions a side"):
        PatchCritic([Layer(1, 3)], 6)
    with pytest.raises(InputError, match="looks at 13 x 13 pixels"):
        CriticPrior(PatchCritic(models.local_ar().critic.layers, 15))
    with pytest.raises(InputError, match="with or without padding"):
        CriticPrior(PatchCritic([Layer(1, 3, 1, 1), Layer(1, 4)], 4))
    with pytest.raises(InputError, match="Patches of 2 x 2 have no structure"):
        models.alr(size=2)
    with pytest.raises(InputError, match="smaller than a patch of 13 x 13"):
        models.local_ar()(torch.rand(1, 1, 12, 20))


def test_published_weight_in_our_units():
    """At any x the two objectives are multiples of each other, up to a constant."""
    shape, noise_level = (24, 24), 0.01
    likelihood = GaussianLikelihood(downsample(shape), noise_level)
    prior = models.alr(precision="float32").requires_grad_(False)
    weight = weight_of_lambda(shape, noise=noise_level, lam=paper.LAMBDA)
    x, y = torch.rand(3, 1, *shape), torch.rand(1, 1, 6, 6)
    ours = (likelihood + weight * prior)(x, y)
    means = torch.stack([prior.patch_energy(extract_patches(image, 6)).mean() for image in x])
    theirs = (likelihood.operator(x) - y).square().flatten(1).sum(1) + paper.LAMBDA * means
    torch.testing.assert_close(ours.diff(), theirs.diff() / (2 * noise_level**2))
    assert weight_of_lambda((600, 600), lam=paper.LAMBDA) == pytest.approx(35.6, abs=0.05)


@pytest.mark.parametrize("recipe", [paper.SMALL, paper.ORIGINAL])
def test_recipes_run(recipe):
    image = torch.rand(1, 1, 20, 20)
    likelihood = GaussianLikelihood(downsample((20, 20)), 0.01)
    prior, record = paper.learn(recipe._replace(seconds=0.05, batch=4), [image])
    y = likelihood.simulate(image)
    solution = paper.reconstruct(
        recipe._replace(steps=2), likelihood, prior, y, likelihood.operator.initial(y)
    )
    assert record.steps >= 1
    assert solution.steps == 2
    assert solution.x.isfinite().all()
