r"""Generative adversarial networks of patches: a critic that learns from the best forgeries there are.

A generator :math:`G` makes patches of normal random numbers :math:`z`; a critic :math:`E` learns to be low on patches
of the images and high on generated ones, see :mod:`patchflow.priors.adversarial`, while the generator learns to be
low under the critic:

.. math:: \min_G \; \mathbb{E}_z\, E(G(z)).

So the negatives of the critic become harder as it learns. The critic is an adversarial regulariser.

References:
    Goodfellow et al., "Generative adversarial networks", 2014, https://arxiv.org/abs/1406.2661
    Gulrajani et al., "Improved training of Wasserstein GANs", 2017, https://arxiv.org/abs/1704.00028
    Lunz, Oektem, Schoenlieb, "Adversarial regularizers in inverse problems", 2018, https://arxiv.org/abs/1805.11572
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.priors.adversarial import PatchCritic


class PatchGAN(Energy):
    """A generator of patches and its critic; as an energy it is the critic.

    Args:
        critic: The critic, whose patches the generator makes.
        latent_dim: Number of normal random numbers a patch is made of.
        hidden: Width of the generator's two hidden layers.

    Raises:
        InputError: If ``latent_dim`` or ``hidden`` is not positive.
    """

    def __init__(self, critic: PatchCritic, *, latent_dim: int = 16, hidden: int = 128) -> None:
        super().__init__()
        if latent_dim < 1 or hidden < 1:
            raise InputError(
                f"Got latent dimension {latent_dim} and width {hidden}; both must be at least 1."
            )
        self.critic, self.latent_dim = critic, latent_dim
        self.generator = nn.Sequential(
            nn.Linear(latent_dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, critic.channels * critic.size**2),
        )

    def forward(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Criticise patches; see :meth:`Energy.forward`. The condition is not used."""
        return self.critic(x)

    def generate(self, count: int) -> Float[Tensor, "count dim"]:
        """Make patches of random numbers from torch's global generator.

        Args:
            count: The number of patches.
        """
        weight = next(self.generator.parameters())
        return self.generator(torch.randn(count, self.latent_dim).to(weight))
