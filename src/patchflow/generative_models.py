"""Premade generative models of patches: a variational autoencoder, and a generator with its critic."""

from __future__ import annotations

from patchflow.chains.autoencoder import Autoencoder
from patchflow.patch_models import alr, named
from patchflow.priors.adversarial import PatchCritic
from patchflow.priors.patch import PatchPrior
from patchflow.priors.patch_gan import PatchGAN


def patch_vae(
    *,
    size: int = 6,
    channels: int = 1,
    latent: int = 12,
    hidden: int = 64,
    std: float = 0.05,
    padding: int = 0,
) -> PatchPrior:
    r"""A variational autoencoder on all patches of an image: minus the evidence lower bound of each.

    Train it with :func:`patchflow.learn_patches`.

    Args:
        size: Side length of the patches in pixels.
        channels: Channels of the images; a colour patch is one vector.
        latent: Dimension of the latent variables.
        hidden: Width of the two hidden layers of encoder and decoder.
        std: Standard deviation of the decoder at the start of the training, in units of the images.
        padding: Reflected pixels around the image; see :class:`patchflow.priors.patch.PatchPrior`.

    References:
        Kingma, Welling, "Auto-encoding variational Bayes", 2014, https://arxiv.org/abs/1312.6114
    """
    arguments = dict(locals())
    # On a part of the validation image of super-resolution, after 90 s on a loaded core (2,600 steps): 12 latent
    # variables 28.40 dB, 20 of them 28.29 dB (weight 0.1; 0.05 and 0.2 are worse); bicubic interpolation 25.75 dB.
    energy = Autoencoder(channels * size**2, latent, hidden=hidden, std=std)
    return named(PatchPrior(energy, size, channels, padding=padding), "patch_vae", arguments)


def patch_gan(
    *,
    size: int = 6,
    channels: int = 1,
    latent: int = 16,
    hidden: int = 128,
    padding: int = 0,
) -> PatchPrior:
    """The adversarial local regulariser :func:`patchflow.alr` with a generator that its critic learns from.

    Train it with :func:`patchflow.learn_gan.learn_gan`.

    Args:
        size: Side length of the patches in pixels, at least 3.
        channels: Channels of the images; a colour patch is one vector.
        latent: Number of random numbers the generator makes a patch of.
        hidden: Width of the generator's two hidden layers.
        padding: Reflected pixels around the image; see :class:`patchflow.priors.patch.PatchPrior`.

    References:
        Gulrajani et al., "Improved training of Wasserstein GANs", 2017, https://arxiv.org/abs/1704.00028
    """
    arguments = dict(locals())
    critic = alr(size=size, channels=channels).patch_energy
    assert isinstance(critic, PatchCritic)
    energy = PatchGAN(critic, latent_dim=latent, hidden=hidden)
    return named(PatchPrior(energy, size, channels, padding=padding), "patch_gan", arguments)
