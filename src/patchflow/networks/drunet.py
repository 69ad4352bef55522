r"""A U-Net of residual blocks that is told the noise level, after DRUNet.

The level is one more channel of the input. On the way down each scale is a few residual blocks and a strided 2 x 2
convolution that halves the image, on the way up a transposed one and as many blocks; what came down is added. There are
no biases, so that :math:`D(t x, t \sigma) = t D(x, \sigma)` for :math:`t > 0`: what is learned at one level serves
others too. It predicts the noise, :math:`D(x, \sigma) = x - f(x, \sigma)`. The finest scale may be cells of pixels,
their pixels as channels, since most of the time goes into the finest scale.

References:
    Zhang, Li, Zuo, Zhang, Van Gool, Timofte, "Plug-and-play image restoration with deep denoiser prior", 2021,
    https://arxiv.org/abs/2008.13751
    Mohan, Kadkhodaie, Simoncelli, Fernandez-Granda, "Robust and interpretable blind image denoising via bias-free
    convolutional neural networks", 2020, https://arxiv.org/abs/1906.05478
    Zhang, Zuo, Zhang, "FFDNet: toward a fast and flexible solution for CNN based image denoising", 2018,
    https://arxiv.org/abs/1710.04026 (cells of pixels)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from patchflow.errors import InputError
from patchflow.networks.denoiser import Denoiser, Images, level_of

# Of Zhang et al.: 32 million weights.
PUBLISHED_WIDTHS, PUBLISHED_BLOCKS = (64, 128, 256, 512), 4
WIDTHS = (32, 64, 64)


class DRUNet(Denoiser):
    """The network; by default 0.3 million weights on cells of 2 x 2 pixels, which a processor trains in minutes.

    Args:
        channels: Channels of the images.
        widths: Channels of each scale, finest first.
        blocks: Residual blocks of each scale, on either way.
        cell: Pixels along a side of the cells of the finest scale; published is 1.
        levels: The noise levels that it is trained for; published are 0 to 50/255.

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        widths: Sequence[int] = WIDTHS,
        blocks: int = 1,
        cell: int = 2,
        levels: tuple[float | int, float | int] = (0.0, 50 / 255),
    ) -> None:
        super().__init__(channels, levels)
        if not widths or min(*widths, blocks, cell) < 1:
            raise InputError(
                f"Got widths {list(widths)}, {blocks} blocks and cells of {cell} pixels; give at least one of each, "
                "all positive."
            )
        self.cell = cell
        self.stride = cell * 2 ** (len(widths) - 1)
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.head = nn.Conv2d(channels * cell**2 + 1, widths[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            nn.Sequential(_blocks(i, blocks), nn.Conv2d(i, o, 2, stride=2, bias=False))
            for i, o in pairs
        )
        self.body = _blocks(widths[-1], blocks)
        self.up = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(o, i, 2, stride=2, bias=False), _blocks(i, blocks))
            for i, o in pairs
        )
        self.tail = nn.Conv2d(widths[0], channels * cell**2, 3, padding=1, bias=False)

    def forward(self, x: Images, std: float | int | Float[Tensor, " batch"]) -> Images:
        """Remove noise; see :meth:`Denoiser.forward`."""
        height, width = x.shape[-2:]
        # Sides are made divisible by the coarsest stride.
        missing = [-extent % self.stride for extent in (width, height)]
        padded = functional.pad(x, [0, missing[0], 0, missing[1]], mode="replicate")
        cells = functional.pixel_unshuffle(padded, self.cell)
        level = level_of(x, std).expand(-1, 1, *cells.shape[-2:])
        u = self.head(torch.cat((cells, level), 1))
        levels = []
        for down in self.down:
            levels.append(u)
            u = down(u)
        u = u + self.body(u)
        for came_down, up in reversed(list(zip(levels, self.up, strict=True))):
            u = came_down + up(u)
        # The image itself has eight bits in bfloat16: too few for small noise.
        noise = functional.pixel_shuffle(self.tail(u), self.cell)
        return x - noise[:, :, :height, :width].to(x.dtype)


class _Residual(nn.Module):
    """Two convolutions around a ReLU, added to what comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        return u + self.second(self.first(u).relu())


def _blocks(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(_Residual(width) for _ in range(count)))
