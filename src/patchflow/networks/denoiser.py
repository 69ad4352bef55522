r"""Denoisers: maps of a noisy image and its noise level, :math:`D(x, \sigma)`.

A network that was made for one level :math:`\sigma_0` serves the others by scaling,
:math:`D(x, \sigma) = \tfrac1\mu D_0(\mu x)` with :math:`\mu = \sigma_0 / \sigma`; this keeps its Lipschitz constant and
its averagedness.

References:
    Xu, Liu, Sun, Wohlberg, Kamilov, "Boosting the performance of plug-and-play priors via denoiser scaling", 2020,
    https://arxiv.org/abs/2002.11546
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.errors import InputError

Images = Float[Tensor, "batch channels height width"]


class Denoiser(nn.Module, ABC):
    """A network that removes white noise of a known level from images in [0, 1].

    Args:
        channels: Channels of the images.
        levels: The smallest and the largest noise level that it is trained for; equal for a network of one level.

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(self, channels: int, levels: tuple[float | int, float | int]) -> None:
        super().__init__()
        low, high = levels
        if channels < 1:
            raise InputError(f"The images have {channels} channels but need at least 1.")
        if not (0 <= low <= high < math.inf and high > 0):
            raise InputError(
                f"The noise levels are {low} to {high} but must be increasing, finite and not negative, such as 0.1 or "
                "0 to 0.2."
            )
        self.channels, self.levels = channels, (float(low), float(high))

    @abstractmethod
    def forward(self, x: Images, std: float | int | Float[Tensor, " batch"]) -> Images:
        """Remove noise.

        Args:
            x: Noisy images.
            std: The standard deviation of the noise, one for all images or one for each.
        """

    def check(self, x: Tensor) -> None:
        """Refuse images that do not fit, before a long computation.

        Raises:
            InputError: If the number of channels is another.
        """
        if x.shape[1] != self.channels:
            raise InputError(
                f"The image has {x.shape[1]} channels but the denoiser was made for {self.channels}; convert the image "
                "or train a denoiser on such images."
            )


def level_of(x: Tensor, std: float | int | Tensor) -> Tensor:
    """The noise level of each image, as a tensor that broadcasts against the images."""
    return torch.as_tensor(std, dtype=x.dtype, device=x.device).expand(len(x)).view(-1, 1, 1, 1)
