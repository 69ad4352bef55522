r"""A U-Net of residual blocks: what came down a scale is added on the way up, and each block is added to its input.

On the way down each scale is a few residual blocks and a strided 2 x 2 convolution that halves the image, on the way up
a transposed one and as many blocks. The finest scale may be cells of pixels, their pixels as channels, since most of
the time goes into the finest scale. Sums and small starts keep it stable without normalisation.

References:
    Zhang, Li, Zuo, Zhang, Van Gool, Timofte, "Plug-and-play image restoration with deep denoiser prior", 2021,
    https://arxiv.org/abs/2008.13751
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


class ResidualUNet(nn.Module):
    """The network, from images to images of the same size.

    Args:
        channels: Channels of its input.
        outputs: Channels of its result; by default as many.
        widths: Channels of each scale, finest first.
        blocks: Residual blocks of each scale, on either way.
        cell: Pixels along a side of the cells of the finest scale.
        bias: Whether convolutions have biases; without them it commutes with positive factors.
        told: Whether it is told a number, as one more channel.

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(
        self,
        channels: int = 1,
        outputs: int | None = None,
        *,
        widths: Sequence[int],
        blocks: int = 1,
        cell: int = 2,
        bias: bool = True,
        told: bool = False,
    ) -> None:
        super().__init__()
        outputs = channels if outputs is None else outputs
        if not widths or min(*widths, blocks, cell, channels, outputs) < 1:
            raise InputError(
                f"Got widths {list(widths)}, {blocks} blocks, cells of {cell} pixels, and {channels} to {outputs} "
                "channels; give at least one of each, all positive."
            )
        self.cell = cell
        self.stride = cell * 2 ** (len(widths) - 1)
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.head = nn.Conv2d(channels * cell**2 + told, widths[0], 3, padding=1, bias=bias)
        self.down = nn.ModuleList(
            nn.Sequential(_blocks(i, blocks, bias), nn.Conv2d(i, o, 2, stride=2, bias=bias))
            for i, o in pairs
        )
        self.body = _blocks(widths[-1], blocks, bias)
        self.up = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(o, i, 2, stride=2, bias=bias), _blocks(i, blocks, bias)
            )
            for i, o in pairs
        )
        self.tail = nn.Conv2d(widths[0], outputs * cell**2, 3, padding=1, bias=bias)
        # The layout that convolutions of few channels want on a processor.
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        number: Float[Tensor, "#batch 1 1 1"] | None = None,
    ) -> Float[Tensor, "batch outputs height width"]:
        """Map images to images.

        Args:
            x: Images of any size; sides are continued up to a multiple of the coarsest stride.
            number: What it is told, if it is made for that.
        """
        height, width = x.shape[-2:]
        missing = [-extent % self.stride for extent in (width, height)]
        padded = functional.pad(x, [0, missing[0], 0, missing[1]], mode="replicate")
        u = functional.pixel_unshuffle(padded, self.cell)
        u = u.contiguous(memory_format=torch.channels_last)
        if number is not None:
            u = torch.cat((u, number.expand(len(u), 1, *u.shape[-2:])), 1)
        u = self.head(u)
        levels = []
        for down in self.down:
            levels.append(u)
            u = down(u)
        u = u + self.body(u)
        for came_down, up in reversed(list(zip(levels, self.up, strict=True))):
            u = came_down + up(u)
        return functional.pixel_shuffle(self.tail(u), self.cell)[:, :, :height, :width]


class _Residual(nn.Module):
    """Two convolutions around a ReLU, added to what comes in."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=bias)

    def forward(self, u: Tensor) -> Tensor:
        return u + self.second(self.first(u).relu())


def _blocks(width: int, count: int, bias: bool) -> nn.Sequential:
    return nn.Sequential(*(_Residual(width, bias) for _ in range(count)))
