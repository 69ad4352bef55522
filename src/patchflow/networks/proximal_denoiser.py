r"""Denoisers made of a convolutional proximal network :math:`\Psi`, with constants that are known.

* **Directly**, :math:`D(x) = \Psi(x - \tfrac12) + \tfrac12`: :math:`K / (K + 1)`-averaged, so that plug and play
  converges.
* **As a residual**, :math:`D(x) = x - \gamma \Psi(x - \tfrac12)`, as published: :math:`\Psi` predicts a part of the
  noise. With :math:`\gamma > 1` it denoises better, but nothing guarantees that :math:`D` is nonexpansive, unless there
  is one layer and :math:`\gamma < 2`; its Lipschitz constant is at most
  :math:`|1 - \gamma (1 - \alpha)| + \gamma \alpha`.

References:
    Hertrich, Neumayer, Steidl, "Convolutional proximal neural networks and plug-and-play algorithms", 2021,
    https://arxiv.org/abs/2011.02281
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from patchflow.networks.denoiser import Denoiser, Images, level_of
from patchflow.networks.proximal_convolution import ConvolutionalProximalNetwork
from patchflow.numerics.averaged import residual_lipschitz


class ProximalDenoiser(Denoiser):
    r"""A denoiser with the Lipschitz constant and the averagedness that its network guarantees.

    Args:
        network: The network :math:`\Psi`.
        channels: Channels of the images.
        level: The noise level :math:`\sigma_0` that it is made for; others by scaling.
        gamma: The factor :math:`\gamma` of the residual form; None for the direct form.

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(
        self,
        network: ConvolutionalProximalNetwork,
        *,
        channels: int = 1,
        level: float | int = 25 / 255,
        gamma: float | int | None = None,
    ) -> None:
        super().__init__(channels, (level, level))
        self.network, self.gamma = network, gamma
        if gamma is not None:
            residual_lipschitz(gamma, network.averagedness)  # refuses factors out of range

    @property
    def lipschitz(self) -> float:
        """The Lipschitz constant that is guaranteed."""
        if self.gamma is None:
            return 1.0
        return residual_lipschitz(self.gamma, self.network.averagedness)

    @property
    def averagedness(self) -> float:
        r"""The averagedness that is guaranteed; infinity if none is.

        With a firmly nonexpansive :math:`\Psi = \tfrac12 (I + R)` it is :math:`I - \gamma\Psi = (1 - \tfrac\gamma2) I -
        \tfrac\gamma2 R`.
        """
        if self.gamma is None:
            return self.network.averagedness
        firm = self.network.averagedness <= 0.5
        return 0.5 * self.gamma if firm and self.gamma < 2 else math.inf

    def forward(self, x: Images, std: float | int | Float[Tensor, " batch"]) -> Images:
        """Remove noise; see :meth:`Denoiser.forward`."""
        scale = self.levels[1] / level_of(x, std)
        # Around mid-grey, where the sign of an activation says something.
        centred = scale * x - 0.5
        found = self.network(centred).to(x.dtype)
        if self.gamma is None:
            return (found + 0.5) / scale
        return x - self.gamma * found / scale
