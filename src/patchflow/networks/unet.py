r"""The U-Net that corrects a first reconstruction: an hourglass with a few channels of each scale passed across.

Scale :math:`k` halves the image by a strided convolution; on the way back it is doubled by bilinear interpolation and
joined with a few channels of what came down (the skip):

.. math:: d_0 = C(z), \quad d_{k+1} = C(C^{\downarrow 2}(d_k)), \qquad
          u_k = C(C(\mathrm{up}(u_{k+1}), S_k(d_k))), \quad u_K = d_K,

with 3x3 convolutions :math:`C` followed by a leaky ReLU, and 1x1 convolutions :math:`S_k`. The last 1x1 convolution
starts at zero: added to its input, the network starts as the identity. There is no batch normalisation, which the
published implementation has for its batches of 32 whole images: its statistics would depend on the crops.

References:
    Ronneberger, Fischer, Brox, "U-Net: convolutional networks for biomedical image segmentation", 2015,
    https://arxiv.org/abs/1505.04597
    Jin, McCann, Froustey, Unser, "Deep convolutional neural network for inverse problems in imaging", IEEE TIP 26(9),
    2017, https://arxiv.org/abs/1611.03679
    Baguer, Leuschner, Schmidt, "Computed tomography reconstruction using deep image prior and learned reconstruction
    methods", 2020, https://arxiv.org/abs/2003.04989 (the published widths)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from patchflow.errors import InputError

# Of Baguer, Leuschner and Schmidt: 0.6 million weights.
PUBLISHED_WIDTHS, PUBLISHED_SKIP = (32, 32, 64, 64, 128), 4
_SLOPE = 0.2


class UNet(nn.Module):
    """The network, from images to images of the same size.

    Args:
        channels: Channels of its input.
        outputs: Channels of its result; by default as many.
        widths: Channels of each scale, finest first.
        skip: Channels that each scale passes across; 0 for none.

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(
        self,
        channels: int = 1,
        outputs: int | None = None,
        *,
        widths: Sequence[int] = PUBLISHED_WIDTHS,
        skip: int = PUBLISHED_SKIP,
    ) -> None:
        super().__init__()
        if min(channels, outputs or 1) < 1 or not widths or min(widths) < 1 or skip < 0:
            raise InputError(
                f"Got {channels} channels, widths {list(widths)} and {skip} skip channels; all must be at least 1, "
                "the skip channels at least 0."
            )
        self.channels, self.stride = channels, 2 ** (len(widths) - 1)
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.head = _convolution(channels, widths[0])
        self.down = nn.ModuleList(
            nn.Sequential(_convolution(i, o, stride=2), _convolution(o, o)) for i, o in pairs
        )
        self.skip = nn.ModuleList(
            nn.Conv2d(i, skip, 1) if skip else nn.Identity() for i, _ in pairs
        )
        self.up = nn.ModuleList(
            nn.Sequential(_convolution(o + skip, i), _convolution(i, i)) for i, o in pairs
        )
        self.tail = nn.Conv2d(widths[0], outputs or channels, 1)
        nn.init.zeros_(self.tail.weight)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, z: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch outputs height width"]:
        """Map images to images.

        Args:
            z: Images of any size; sides are continued up to a multiple of the coarsest stride.

        Raises:
            InputError: If they have other channels.
        """
        if z.shape[1] != self.channels:
            raise InputError(
                f"The image has {z.shape[1]} channels but the network was made for {self.channels}; give a network of "
                "the image's channels."
            )
        height, width = z.shape[-2:]
        missing = [-extent % self.stride for extent in (width, height)]
        padded = functional.pad(z, [0, missing[0], 0, missing[1]], mode="replicate")
        u = self.head(padded)
        levels = []
        for down in self.down:
            levels.append(u)
            u = down(u)
        for level, skip, up in reversed(list(zip(levels, self.skip, self.up, strict=True))):
            # Corners are not aligned: that would stretch crops and whole images differently.
            u = functional.interpolate(u, scale_factor=2.0, mode="bilinear", align_corners=False)
            if not isinstance(skip, nn.Identity):
                u = torch.cat((u, skip(level)), 1)
            u = up(u)
        return self.tail(u)[:, :, :height, :width]


def _convolution(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    # Replicated borders: zeros would be an edge around each training crop.
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, padding_mode="replicate")
    return nn.Sequential(convolution, nn.LeakyReLU(_SLOPE, inplace=True))
