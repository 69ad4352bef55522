r"""Kernels of conditional normal laws: VAE layers and diffusion layers.

References:
    Kingma, Welling, "Auto-encoding variational Bayes", 2014, https://arxiv.org/abs/1312.6114
    Zhang, Chen, "Diffusion normalizing flow", 2021, https://arxiv.org/abs/2110.07579
    Hagemann, Hertrich, Steidl, "Generalized normalizing flows via Markov chains", 2023,
    https://arxiv.org/abs/2111.12506
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.chains.kernel import Chain
from patchflow.chains.nets import MLP, joined
from patchflow.chains.stochastic import Transition
from patchflow.energy import Conditional
from patchflow.errors import InputError

# A learned standard deviation stays within e^(+-4) of its start.
_CLAMP = 4.0


class GaussianStep(Conditional):
    r"""The law :math:`N(\mu(a, y), \mathrm{diag}\,\sigma(a, y)^2)` with networks for mean and standard deviation.

    Args:
        inputs: Dimension of :math:`a`.
        outputs: Dimension of :math:`b`.
        condition_dim: Dimension of the condition; 0 for none.
        std: The standard deviation, at the start if it is learned.
        learned: Whether the standard deviation is learned too, one value per coordinate depending on :math:`a, y`.
        hidden: Width of the hidden layers.
        depth: Number of hidden layers.

    Raises:
        InputError: If ``std`` is not positive.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        condition_dim: int = 0,
        *,
        std: float | int = 0.1,
        learned: bool = True,
        hidden: int = 128,
        depth: int = 2,
    ) -> None:
        super().__init__()
        if not 0 < std < math.inf:
            raise InputError(
                f"The standard deviation is {std} but must be positive; its limit 0 is EulerStep or a coupling."
            )
        self.outputs, self.std, self.learned = outputs, float(std), learned
        width = 2 * outputs if learned else outputs
        self.net = MLP(inputs + condition_dim, width, hidden=hidden, depth=depth)

    def draw(self, a: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw; see :meth:`Conditional.draw`."""
        mean, log_std = self.law(a, condition)
        noise = torch.randn_like(mean)
        return mean + log_std.exp() * noise, log_normal(noise, log_std)

    def log_prob(
        self, b: Tensor, a: Tensor, condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """The normalised log-density; see :meth:`Conditional.log_prob`."""
        mean, log_std = self.law(a, condition)
        return log_normal((b - mean) * (-log_std).exp(), log_std)

    def law(self, a: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The mean and the logarithm of the standard deviation, (batch, outputs) each."""
        out = self.net(joined(a, condition))
        start = math.log(self.std)
        if not self.learned:
            return out, torch.full_like(out, start)
        mean, raw = out.chunk(2, 1)
        return mean, start + _CLAMP * (raw / _CLAMP).tanh()


def vae_layer(
    dim: int,
    condition_dim: int = 0,
    *,
    latent_dim: int | None = None,
    std: float | int = 0.1,
    latent_std: float | int | None = None,
    learned: bool = True,
    hidden: int = 128,
    depth: int = 2,
) -> Transition:
    r"""A VAE as a kernel: the decoder does the step, the encoder undoes it.

    :math:`\ell = \log q_\phi(z \mid x, y) - \log p_\theta(x \mid z, y)`; with a standard normal latent law the
    energy of the one-layer flow is one draw of minus the ELBO.

    Args:
        dim: Dimension of the data side.
        condition_dim: Dimension of the condition; 0 for none.
        latent_dim: Dimension of the latent side; that of the data by default.
        std: Standard deviation of the decoder (at the start, if learned).
        latent_std: Standard deviation of the encoder; that of the decoder by default.
        learned: Whether both covariances are learned; the published layers fix them.
        hidden: Width of the networks.
        depth: Their hidden layers.
    """
    inner = dim if latent_dim is None else latent_dim
    back = std if latent_std is None else latent_std
    decoder = GaussianStep(
        inner, dim, condition_dim, std=std, learned=learned, hidden=hidden, depth=depth
    )
    encoder = GaussianStep(
        dim, inner, condition_dim, std=back, learned=learned, hidden=hidden, depth=depth
    )
    return Transition(decoder, encoder)


class TimeNet(nn.Module):
    r"""A network :math:`g_t(x, y)` with the time as a further input.

    Args:
        dim: Dimension of inputs and outputs.
        condition_dim: Dimension of the condition; 0 for none.
        hidden: Width of the hidden layers.
        depth: Number of hidden layers.
    """

    def __init__(
        self, dim: int, condition_dim: int = 0, *, hidden: int = 128, depth: int = 2
    ) -> None:
        super().__init__()
        self.net = MLP(dim + condition_dim + 1, dim, hidden=hidden, depth=depth)

    def forward(self, x: Tensor, time: float, condition: Tensor | None = None) -> Tensor:
        """Evaluate at one time for all rows."""
        return self.net(joined(torch.cat((x, x.new_full((len(x), 1), time)), 1), condition))


class DiffusionForward(Conditional):
    r"""One Euler-Maruyama step of :math:`dX = g_t(X)\,dt + h_t\,dW`.

    It is :math:`N(x + \epsilon g_t(x),\, \epsilon h_t^2 I)`.

    Args:
        drift: The drift :math:`g`.
        time: The time :math:`t`.
        step: The time step :math:`\epsilon`.
        noise: The level :math:`h_t`.
    """

    def __init__(self, drift: TimeNet, time: float, step: float, noise: float) -> None:
        super().__init__()
        self.drift, self.time, self.step = drift, time, step
        self.log_std = math.log(noise * math.sqrt(step))

    def draw(self, a: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw; see :meth:`Conditional.draw`."""
        noise = torch.randn_like(a)
        b = self.mean(a, condition) + math.exp(self.log_std) * noise
        return b, log_normal(noise, torch.full_like(noise, self.log_std))

    def log_prob(
        self, b: Tensor, a: Tensor, condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """The normalised log-density; see :meth:`Conditional.log_prob`."""
        white = (b - self.mean(a, condition)) * math.exp(-self.log_std)
        return log_normal(white, torch.full_like(white, self.log_std))

    def mean(self, a: Tensor, condition: Tensor | None) -> Tensor:
        """The mean of the step."""
        return a + self.step * self.drift(a, self.time, condition)


class DiffusionReverse(DiffusionForward):
    r"""One step of the reverse equation: :math:`N(x - \epsilon (g_t(x) - h_t^2 s_t(x)),\, \epsilon h_t^2 I)`.

    Args:
        drift: The drift :math:`g`.
        score: The score :math:`s_t \approx \nabla \log p_t`.
        time: The time :math:`t`.
        step: The time step :math:`\epsilon`.
        noise: The level :math:`h_t`.
    """

    def __init__(
        self, drift: TimeNet, score: TimeNet, time: float, step: float, noise: float
    ) -> None:
        super().__init__(drift, time, step, noise)
        self.score, self.noise = score, noise

    def mean(self, a: Tensor, condition: Tensor | None) -> Tensor:
        """The mean of the step."""
        slope = self.drift(a, self.time, condition)
        return a - self.step * (slope - self.noise**2 * self.score(a, self.time, condition))


def diffusion(
    dim: int,
    condition_dim: int = 0,
    *,
    noise: Sequence[float],
    time: float = 1.0,
    hidden: int = 128,
    depth: int = 2,
) -> Chain:
    r"""Diffusion layers that share a learned drift and a learned score.

    Layer :math:`t` steps forward with the noise level :math:`h_{t-1}` and back with :math:`h_t`, so its log-ratio is
    :math:`d \log(h_{t-1} / h_t) + \tfrac12(\|\eta_t\|^2 - \|\tilde\eta_t\|^2)`.

    Args:
        dim: Dimension.
        condition_dim: Dimension of the condition; 0 for none.
        noise: The schedule :math:`h_0, \dots, h_T`, positive: one level more than layers.
        time: The whole time, divided into equal steps.
        hidden: Width of both networks.
        depth: Their hidden layers.

    Raises:
        InputError: If the schedule has fewer than two levels, or one that is not positive.
    """
    if len(noise) < 2 or min(noise) <= 0:
        raise InputError(
            f"The noise schedule is {list(noise)} but needs at least two positive levels; for the limit of no "
            "noise use EulerStep."
        )
    drift = TimeNet(dim, condition_dim, hidden=hidden, depth=depth)
    score = TimeNet(dim, condition_dim, hidden=hidden, depth=depth)
    step = time / (len(noise) - 1)
    return Chain(
        *(
            Transition(
                DiffusionForward(drift, (t - 1) * step, step, noise[t - 1]),
                DiffusionReverse(drift, score, t * step, step, noise[t]),
            )
            for t in range(1, len(noise))
        )
    )


def log_normal(
    white: Float[Tensor, "batch dim"], log_std: Float[Tensor, "batch dim"]
) -> Float[Tensor, " batch"]:
    """The log-density of a normal law with independent coordinates.

    Args:
        white: The points, less the mean and divided by the standard deviation.
        log_std: The logarithm of the standard deviation.
    """
    constant = 0.5 * white.shape[1] * math.log(2 * math.pi)
    return -0.5 * white.square().sum(1) - log_std.sum(1) - constant
