"""Variational autoencoders against quadrature and probabilistic PCA; generators against the law of their patches."""

import math
from pathlib import Path

import pytest
import torch

import patchflow as pf
from patchflow import models
from patchflow.chains.autoencoder import Autoencoder
from patchflow.chains.flow import Flow
from patchflow.chains.stochastic import Transition
from patchflow.cli import main
from patchflow.errors import InputError
from patchflow.io.images import read_image, write_image
from patchflow.learn_gan import learn_gan
from patchflow.numerics.patches import extract_patches
from patchflow.priors.adversarial import Layer, PatchCritic
from patchflow.priors.gaussian import StandardNormal
from patchflow.priors.patch_gan import PatchGAN


def disturbed(dim=3, latent=2, **options):
    """An autoencoder whose decoder bends and whose encoder is not the posterior."""
    model = Autoencoder(dim, latent, hidden=8, std=0.5, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.requires_grad_(False)


def probabilistic_pca(dim=5, latent=2, std=0.3):
    r"""A linear decoder with orthogonal columns, so that its posterior is a diagonal normal law, the encoder's."""
    model = Autoencoder(dim, latent, depth=0, std=std)
    columns = torch.linalg.qr(torch.randn(dim, latent))[0] * (torch.arange(latent) + 1.0)
    offset = torch.randn(dim)
    precision = columns.square().sum(0) + std**2
    decoder, encoder = model.decoder.net[0], model.encoder.net[0]
    with torch.no_grad():
        for layer in (decoder, encoder):
            layer.weight.zero_()
            layer.bias.zero_()
        decoder.weight[:dim], decoder.bias[:dim] = columns, offset
        encoder.weight[:latent] = columns.T / precision[:, None]
        encoder.bias[:latent] = -encoder.weight[:latent] @ offset
        # The logarithm of the posterior's deviation, through the clamp 4 tanh(raw / 4) around log 0.5.
        wanted = 0.5 * (std**2 / precision).log() - math.log(0.5)
        encoder.bias[latent:] = 4 * (wanted / 4).atanh()
    law = torch.distributions.MultivariateNormal(
        offset, columns @ columns.T + std**2 * torch.eye(dim)
    )
    return model.requires_grad_(False), law


def test_nodes_have_the_moments_of_the_normal_law():
    nodes = Autoencoder(4, 5).nodes
    assert nodes.shape == (6, 5)
    torch.testing.assert_close(nodes.mean(0), torch.zeros(5))
    torch.testing.assert_close(nodes.T @ nodes / 6, torch.eye(5))
    torch.testing.assert_close(nodes.norm(dim=1), torch.full((6,), math.sqrt(5)))


def test_energy_is_exact_for_probabilistic_pca():
    model, law = probabilistic_pca()
    x = 2 * torch.randn(40, 5)
    energy, slope = model.value_and_grad(x)
    torch.testing.assert_close(energy, -law.log_prob(x))
    torch.testing.assert_close(slope, (x - law.mean) @ law.precision_matrix)
    assert not model.exact
    # One draw scatters around it, importance weights do not.
    drawn = model.sampled()(x)
    assert float((drawn - energy).abs().max()) > 0.1
    value, error = model.log_density(x, 3)
    torch.testing.assert_close(value, law.log_prob(x))
    assert float(error.max()) < 1e-8


def test_bound_is_below_the_density_by_the_divergence_from_the_posterior():
    """For one latent variable, by quadrature: log p(x) and the bound, to ten digits."""
    model = disturbed(dim=3, latent=1)
    model.encoder.net[-1].bias[1] += (
        1  # wider than the posterior, so that the weights have a small variance
    )
    x, z = torch.randn(3, 3), torch.linspace(-12, 12, 20_001)[:, None]
    step = float(z[1] - z[0])
    normal = torch.distributions.Normal(0.0, 1.0)
    mean, log_std = model.encoder.law(x)
    for k in range(len(x)):
        logs = model.decoder.log_prob(x[k].expand(len(z), 3), z)
        log_density = (logs + normal.log_prob(z[:, 0])).logsumexp(0) + math.log(step)
        encoder = torch.distributions.Normal(mean[k, 0], log_std[k, 0].exp())
        q = encoder.log_prob(z[:, 0])
        bound = float((q.exp() * (logs + normal.log_prob(z[:, 0]) - q)).sum() * step)
        assert bound < float(log_density)
        draws = model.sampled(40_000)(x[k : k + 1])
        again = torch.stack([model.sampled(1000)(x[k : k + 1])[0] for _ in range(40)])
        deviation = float(again.std()) / math.sqrt(40)
        assert abs(float(again.mean()) + bound) < 5 * deviation
        assert abs(float(draws) + bound) < 5 * deviation
        assert deviation < 0.1 * (float(log_density) - bound)
        value, error = model.log_density(x[k : k + 1], 20_000)
        assert abs(float(value - log_density)) < 5 * float(error)


def test_cubature_is_close_to_the_bound_and_below_the_density():
    """A trained autoencoder on curved data: the energy is above minus the log-density, patch by patch."""
    torch.manual_seed(3)
    u = torch.randn(2000, 1)
    data = torch.cat((u, 0.5 * u.square()), 1) + 0.2 * torch.randn(2000, 2)
    model = Autoencoder(2, 1, hidden=16, std=0.3)
    start = model(data).mean().item()
    pf.fit(
        model.sampled(), lambda: data[torch.randint(2000, (128,))], steps=250, lr=1e-2, warmup=10
    )
    assert float(model(data).mean()) < start - 1
    x = data[:60]
    energy = model(x)
    bounds = torch.stack([model.sampled(200)(x) for _ in range(20)])
    scatter = bounds.std(0) / math.sqrt(20)
    value, error = model.log_density(x, 4000)
    # The bound holds for each point, within five standard errors. The energy is within a tenth of a nat of it in the
    # mean; at single points its error has both signs.
    assert (bounds.mean(0) > -value - 5 * (scatter + error)).all()
    assert float((energy - bounds.mean(0)).mean().abs()) < 0.1
    assert float((energy + value).min()) > -0.2


def test_sampled_bound_is_that_of_the_vae_layer():
    """A flow of one VAE layer draws its divergence as well: same mean, more scatter."""
    model = disturbed()
    flow = Flow(StandardNormal(2), Transition(model.decoder, model.encoder))
    x = torch.randn(1, 3).expand(20_000, 3)
    ours, theirs = model.sampled()(x), flow(x)
    difference = float(ours.mean() - theirs.mean())
    error = math.sqrt(float(ours.var() + theirs.var()) / 20_000)
    assert abs(difference) < 5 * error
    assert error < 0.1 * float(ours.mean().abs())
    assert float((ours + 1.0).mean() - theirs.mean()) > 5 * error


def test_samples_have_the_law_of_probabilistic_pca():
    model, law = probabilistic_pca()
    drawn = model.sample(20_000)
    error = law.covariance_matrix.diagonal().sqrt() / math.sqrt(20_000)
    assert ((drawn.mean(0) - law.mean).abs() < 5 * error).all()
    variance = law.covariance_matrix.diagonal()
    assert ((drawn.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / 20_000)).all()


def test_gradient_of_the_patch_prior_against_finite_differences():
    prior = models.patch_vae(size=3, latent=2, hidden=8).requires_grad_(False)
    x, direction = torch.rand(2, 1, 9, 10)
    _, slope = prior.value_and_grad(x[None])
    ahead, behind = (prior((x + s * 1e-6 * direction)[None]) for s in (1, -1))
    torch.testing.assert_close(
        (slope[0] * direction).sum(), (ahead - behind)[0] / 2e-6, rtol=1e-5, atol=1e-6
    )


def test_learning_patches_validates_without_randomness():
    torch.manual_seed(0)
    prior = models.patch_vae(size=3, latent=2, hidden=16)
    image = torch.rand(1, 1, 40, 40)
    record = pf.learn_patches(prior, [image], [image], steps=200, lr=5e-3)
    patches = extract_patches(image[0], 3)
    assert float(prior.patch_energy(patches).mean()) == pytest.approx(record.best, abs=1e-9)
    assert record.validation[-1][1] < record.validation[0][1]
    assert not any(p.requires_grad for p in prior.parameters())


def test_generator_learns_the_law_of_the_patches():
    """White noise of mean 0.5 and deviation 0.1, around which the generator goes; at the start it is far away."""
    torch.manual_seed(0)
    critic = PatchCritic([Layer(32, 2), Layer(32, 1), Layer(1, 1)], 2, bias=True)
    gan = PatchGAN(critic, latent_dim=4, hidden=16)
    prior = pf.PatchPrior(gan, 2)
    image = 0.5 + 0.1 * torch.randn(1, 1, 60, 60)
    before = gan.generate(2000).detach()
    record = learn_gan(prior, [image], steps=1000, lr=1e-3)
    after = gan.generate(2000)
    assert float((before.mean(0) - 0.5).abs().mean()) > 0.4
    assert float((after.mean(0) - 0.5).abs().mean()) < 0.2
    assert 0.05 < float(after.std(0).mean()) < 0.2
    sizes = [abs(loss) for loss in record.losses]
    assert sum(sizes[-5:]) / 5 < 0.4 * max(sizes)  # the critic's distance has fallen
    assert (record.stopped, record.steps) == ("finished", 1000)
    assert not any(p.requires_grad for p in prior.parameters())


def test_critic_of_a_frozen_generator_is_high_on_its_patches():
    torch.manual_seed(0)
    prior = models.patch_gan(size=4)
    image = torch.rand(1, 1, 30, 30)
    learn_gan(prior, [image], steps=4)  # the generator has not moved yet
    gan = prior.patch_energy
    other = models.patch_gan(size=4).patch_energy
    other.load_state_dict(gan.state_dict())
    x = torch.rand(5, 16)
    torch.testing.assert_close(gan(x), gan.critic(x), rtol=0, atol=0)
    torch.testing.assert_close(other(x), gan(x), rtol=0, atol=0)
    prior.requires_grad_(True)
    learn_gan(prior, [image], steps=40, spoilt=0.5, batch=16)
    values = gan(gan.generate(500)).mean() - gan(extract_patches(image[0], 4)).mean()
    assert float(values) > 0


@pytest.mark.parametrize("make", [models.patch_vae, models.patch_gan])
def test_files_bring_models_back(make, tmp_path):
    prior = make(size=4, channels=3, latent=2, hidden=8, padding=1)
    pf.save(tmp_path / "m.safetensors", prior)
    again = pf.load(tmp_path / "m.safetensors", pf.PatchPrior)
    x = torch.rand(1, 3, 9, 8)
    torch.testing.assert_close(again(x), prior(x), rtol=0, atol=0)


def waves(rows, columns, shift=0.0):
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    wave = 0.5 + 0.25 * torch.sin(0.5 * i + shift) + 0.2 * torch.cos(0.3 * j)
    return wave[None, None].float()


@pytest.mark.usefixtures("as_users_do")
@pytest.mark.parametrize(
    ("train", "method", "weight"),
    [
        (["patch-vae", "--steps=400", "--latent=3", "--size=4"], "patch-vae", 0.5),
        (["patch-gan", "--steps=150", "--batch=32", "--spoilt=0.5"], "local-ar", 60.0),
    ],
)
def test_train_and_reconstruct(train, method, weight, capsys):
    write_image("train.tif", waves(48, 48))
    truth = waves(40, 44, 0.7)
    torch.manual_seed(1)
    write_image("y.tif", truth + 0.1 * torch.randn_like(truth))
    assert (
        main(["train", train[0], "train.tif", *train[1:], "--threads=1", "-o", "m.safetensors"])
        == 0
    )
    run = ["reconstruct", "y.tif", "--problem=denoising", "--noise=0.1", f"--method={method}"]
    assert main([*run, "--prior=m.safetensors", f"--weight={weight}", "-o", "x.tif"]) == 0
    errors = [
        float((read_image(path, slack=1) - truth).square().mean()) for path in ("x.tif", "y.tif")
    ]
    assert errors[0] < 0.75 * errors[1]
    assert f"{method}, weight {weight:g}" in capsys.readouterr().out
    assert Path("m.yaml").exists()
    assert main([*run, "-o", "x.tif"]) == 2
    assert f"patchflow train {method}" in capsys.readouterr().err


def test_bad_input():
    with pytest.raises(InputError, match="latent dimension 0; both must"):
        Autoencoder(4, 0)
    with pytest.raises(InputError, match="0 draws for each point"):
        Autoencoder(4, 2).sampled(0)
    with pytest.raises(InputError, match="1 draws tell no standard error"):
        Autoencoder(4, 2).log_density(torch.zeros(1, 4), 1)
    with pytest.raises(InputError, match="latent dimension 0 and width 3"):
        PatchGAN(models.alr().patch_energy, latent_dim=0, hidden=3)
    image = torch.rand(1, 1, 9, 9)
    with pytest.raises(InputError, match="has a PatchCritic and no generator"):
        learn_gan(models.alr(), [image])
    with pytest.raises(InputError, match="share of spoilt patches is 1"):
        learn_gan(models.patch_gan(), [image], spoilt=1.0)
    with pytest.raises(InputError, match="generator has no trainable"):
        learn_gan(models.patch_gan().requires_grad_(False), [image])
    with pytest.raises(InputError, match="have 3 channels"):
        learn_gan(models.patch_gan(), [torch.rand(1, 3, 9, 9)])
