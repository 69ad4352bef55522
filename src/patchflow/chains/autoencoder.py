r"""Variational autoencoders as energies: minus the evidence lower bound, with a Kullback-Leibler term in closed form.

A decoder :math:`p(x \mid z) = N(\mu_\theta(z), \mathrm{diag}\,\sigma_\theta(z)^2)` of normal latent variables
:math:`z \sim N(0, I)` has the density :math:`p(x) = \int p(x \mid z)\, N(z; 0, I)\, dz`. An encoder
:math:`q(z \mid x) = N(m(x), \mathrm{diag}\,s(x)^2)` bounds it from below:

.. math:: -\log p(x) \le \mathrm{KL}\bigl(q(\cdot \mid x) \,\|\, N(0, I)\bigr)
          + \mathbb{E}_{\epsilon \sim N(0, I)} \bigl[-\log p(x \mid m(x) + s(x) \odot \epsilon)\bigr],
          \qquad \mathrm{KL} = \sum_i \tfrac12 (m_i^2 + s_i^2 - 1) - \log s_i.

References:
    Kingma, Welling, "Auto-encoding variational Bayes", 2014, https://arxiv.org/abs/1312.6114
    Tipping, Bishop, "Probabilistic principal component analysis", 1999, https://doi.org/10.1111/1467-9868.00196
    Burda, Grosse, Salakhutdinov, "Importance weighted autoencoders", 2016, https://arxiv.org/abs/1509.00519
    Stroud, "Approximate calculation of multiple integrals", 1971, for the nodes
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.chains.gaussian import GaussianStep, log_normal, vae_layer
from patchflow.energy import Density, Energy
from patchflow.errors import InputError

# Where the standard deviation of the encoder starts.
_ENCODER_STD = 0.5


class Autoencoder(Density):
    r"""Minus the evidence lower bound of a variational autoencoder, as an energy without randomness.

    The mean over :math:`\epsilon` of the module's formula is that over :math:`d + 1` fixed nodes, the corners of a
    regular simplex of radius :math:`\sqrt d`, which have the mean and the covariance of :math:`N(0, I)`. So the energy
    is *exactly* the bound where :math:`\log p(x \mid z)` is quadratic in :math:`z`, as for linear decoders of constant
    variance, and there it is exactly :math:`-\log p(x)` if the encoder is the posterior. Elsewhere it is the bound up
    to the error of this cubature, which has both signs: the energy may fall below :math:`-\log p` at
    single points. :meth:`sampled` has the bound itself as its mean, and
    :meth:`log_density` tells how far both are from the density.

    Args:
        dim: Dimension of the points.
        latent_dim: Dimension :math:`d` of the latent variables.
        hidden: Width of the networks.
        depth: Their hidden layers; 0 is a linear autoencoder.
        std: Standard deviation of the decoder at the start, in units of the points. The learned one depends on the
            latent variables, one value per coordinate, and stays within a factor of :math:`e^4` of it.

    Raises:
        InputError: If a dimension is not positive.
    """

    nodes: Tensor

    def __init__(
        self,
        dim: int,
        latent_dim: int,
        *,
        hidden: int = 128,
        depth: int = 2,
        std: float | int = 0.1,
    ) -> None:
        super().__init__()
        if dim < 1 or latent_dim < 1:
            raise InputError(
                f"Got dimension {dim} and latent dimension {latent_dim}; both must be at least 1."
            )
        layer = vae_layer(
            dim,
            latent_dim=latent_dim,
            std=std,
            latent_std=_ENCODER_STD,
            hidden=hidden,
            depth=depth,
        )
        assert isinstance(layer.do, GaussianStep)
        assert isinstance(layer.undo, GaussianStep)
        self.decoder, self.encoder = layer.do, layer.undo
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(latent_dim + 1, latent_dim, generator=generator, dtype=torch.float64)
        # Orthonormal columns that are orthogonal to the constant one.
        corners = torch.linalg.qr(normal - normal.mean(0))[0]
        nodes = math.sqrt(latent_dim + 1) * corners
        self.register_buffer("nodes", nodes.to(torch.get_default_dtype()), persistent=False)

    @property
    def exact(self) -> bool:
        """False: the energy is a bound of minus the log-density."""
        return False

    def forward(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate the bound by cubature; see :meth:`Energy.forward`. The condition is not used."""
        return self._bound(x, self.nodes[None])

    def sampled(self, draws: int = 1) -> SampledBound:
        """The bound by random draws, anew at each evaluation: what to train with.

        Networks that learn with fixed nodes learn these by heart.

        Args:
            draws: Draws for each point.
        """
        return SampledBound(self, draws)

    def sample(self, count: int, condition: Tensor | None = None) -> Float[Tensor, "count dim"]:
        """Draw from decoded normal latent variables; see :meth:`Density.sample`."""
        return self.decoder.draw(torch.randn(count, self.encoder.outputs).to(self.nodes))[0]

    def log_density(
        self, x: Float[Tensor, "batch dim"], draws: int
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        r"""Estimate :math:`\log p(x)` by importance sampling from the encoder.

        Args:
            x: Points.
            draws: Draws for each point, at least 2.

        Returns:
            The logarithm of the mean weight, which is below :math:`\log p(x)` in the mean and tends to it, and its
            standard error to first order.

        Raises:
            InputError: If there are too few draws.
        """
        if draws < 2:
            raise InputError(f"{draws} draws tell no standard error; use 2 or more.")
        mean, log_std = self.encoder.law(x)
        noise = torch.randn(len(x), draws, mean.shape[1]).to(x)
        z = (mean[:, None] + log_std.exp()[:, None] * noise).flatten(0, 1)
        repeated = x.repeat_interleave(draws, 0)
        prior = log_normal(z, torch.zeros_like(z))
        posterior = log_normal(noise.flatten(0, 1), log_std.repeat_interleave(draws, 0))
        logs = (self.decoder.log_prob(repeated, z) + prior - posterior).view(len(x), draws)
        value = logs.logsumexp(1) - math.log(draws)
        weights = (logs - value[:, None]).exp()
        return value, weights.std(1) / math.sqrt(draws)

    def _bound(self, x: Tensor, noise: Tensor) -> Tensor:
        """The bound with the mean over given noise, (batch or 1, count, latent)."""
        mean, log_std = self.encoder.law(x)
        std = log_std.exp()
        divergence = (0.5 * (mean.square() + std.square() - 1) - log_std).sum(1)
        z = mean[:, None] + std[:, None] * noise
        count = z.shape[1]
        logs = self.decoder.log_prob(x.repeat_interleave(count, 0), z.flatten(0, 1))
        return divergence - logs.view(-1, count).mean(1)


class SampledBound(Energy):
    """Minus the evidence lower bound by random draws from the encoder; built by :meth:`Autoencoder.sampled`.

    Unbiased: its mean over the draws, which come from torch's global generator, is the bound.

    Args:
        autoencoder: The autoencoder.
        draws: Draws for each point.

    Raises:
        InputError: If there is no draw.
    """

    def __init__(self, autoencoder: Autoencoder, draws: int) -> None:
        super().__init__()
        if draws < 1:
            raise InputError(f"Got {draws} draws for each point; use at least 1.")
        self.autoencoder, self.draws = autoencoder, draws

    def forward(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate with new draws; see :meth:`Energy.forward`."""
        latent = self.autoencoder.encoder.outputs
        return self.autoencoder._bound(x, torch.randn(len(x), self.draws, latent).to(x))
