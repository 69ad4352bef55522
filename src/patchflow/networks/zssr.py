r"""The network of zero-shot super-resolution: a few convolutions that correct an interpolated image.

.. math:: G(u) = u + C_K(\rho(C_{K-1}(\cdots \rho(C_1(u)) \cdots)))

with 3x3 convolutions :math:`C_k` and :math:`\rho = \max(\cdot, 0)`. Inside one image there is little to learn, compared
with what is to be learned from all photographs: so it is small.

References:
    Shocher, Cohen, Irani, "Zero-shot super-resolution using deep internal learning", CVPR 2018,
    https://arxiv.org/abs/1712.06087
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from patchflow.errors import InputError


class ResidualConvolutions(nn.Module):
    """The network; as it starts, it nearly leaves the image as it is.

    Args:
        channels: Channels of the image.
        width: Channels between the convolutions.
        depth: Number of convolutions, at least 2; published are 8.

    Raises:
        InputError: If a number is too small.
    """

    def __init__(self, channels: int = 1, *, width: int = 64, depth: int = 8) -> None:
        super().__init__()
        if channels < 1 or width < 1 or depth < 2:
            raise InputError(
                f"Got {channels} channels, width {width} and depth {depth}; channels and width must be at least 1, "
                "the depth at least 2."
            )
        self.channels, self.width, self.depth = channels, width, depth
        widths = [channels, *[width] * (depth - 1), channels]
        layers: list[nn.Module] = []
        for k, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            # Replicated borders: zeros would be an edge around each training crop.
            layers.append(nn.Conv2d(before, after, 3, padding=1, padding_mode="replicate"))
            if k < depth - 1:
                layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)

    def forward(
        self, u: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Correct interpolated images.

        Raises:
            InputError: If they have other channels.
        """
        if u.shape[1] != self.channels:
            raise InputError(
                f"The image has {u.shape[1]} channels but the network was made for {self.channels}; give a network of "
                "the image's channels."
            )
        return u + self.layers(u)
