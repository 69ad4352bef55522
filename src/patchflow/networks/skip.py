r"""The skip network of the deep image prior: an hourglass whose random weights already prefer natural images.

Scale :math:`k` halves the image by a strided convolution; on the way back it is doubled by bilinear interpolation,
joined with a few channels of what came down (the skip), and mixed by a 3x3 and a 1x1 convolution:

.. math:: d_{k+1} = C_3(C_3^{\downarrow 2}(d_k)), \qquad
          u_k = C_1\big(C_3(\mathrm{up}(u_{k+1}), S_k(d_k))\big), \qquad d_0 = z,\ u_K = d_K.

Each :math:`C` and :math:`S` is a convolution with reflected borders, batch normalisation and a leaky ReLU.

References:
    Ulyanov, Vedaldi, Lempitsky, "Deep image prior", 2018, https://arxiv.org/abs/1711.10925
    Baguer, Leuschner, Schmidt, "Computed tomography reconstruction using deep image prior and learned reconstruction
    methods", 2020, https://arxiv.org/abs/2003.04989 (this form of it)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from patchflow.errors import InputError

# Of Baguer, Leuschner and Schmidt: six scales of 128 channels, finest first.
PUBLISHED_CHANNELS = (128,) * 6
PUBLISHED_SKIP = (0, 0, 0, 0, 4, 4)
_SLOPE = 0.2


class SkipNet(nn.Module):
    """The skip network, from noise to an image with values in an interval.

    Statistics of the batch normalisation are always those of the input: the network has no other mode. The weights
    start as torch draws them.

    Args:
        channels: Channels of each scale, finest first; or one number for all. Most of the time goes into the finest
            ones: with half the channels it takes a quarter of the operations.
        skip: Skip channels of each scale, finest first; 0 for none.
        scales: Number of scales, by default that of ``skip``.
        in_channels: Channels of the noise.
        out_channels: Channels of the image.
        interval: The range of the image's values, the image of a sigmoid.

    Raises:
        InputError: If a number is out of range or the sequences have different lengths.
    """

    def __init__(
        self,
        *,
        channels: int | Sequence[int] = PUBLISHED_CHANNELS,
        skip: Sequence[int] = PUBLISHED_SKIP,
        scales: int | None = None,
        in_channels: int = 1,
        out_channels: int = 1,
        interval: tuple[float | int, float | int] = (0, 1),
    ) -> None:
        super().__init__()
        if scales is None:
            scales = len(skip)
        widths = [channels] * scales if isinstance(channels, int) else list(channels)
        if not len(widths) == len(skip) == scales:
            raise InputError(
                f"Got {len(widths)} numbers of channels and {len(skip)} of skip channels for {scales} scales; "
                "give one of each per scale, finest first."
            )
        if scales < 1 or min(widths) < 1 or min(skip) < 0 or min(in_channels, out_channels) < 1:
            raise InputError(
                f"Got channels {widths}, skip channels {list(skip)}, {in_channels} input and {out_channels} output "
                "channels; all must be at least 1 (skip channels 0), at least one scale."
            )
        if not interval[0] < interval[1]:
            raise InputError(f"The interval is {interval}; give the smaller end first.")
        self.in_channels, self.out_channels, self.scales = in_channels, out_channels, scales
        self.interval = interval
        inputs = [in_channels, *widths]
        self.down = nn.ModuleList(
            nn.Sequential(_block(i, o, 3, stride=2), _block(o, o, 3))
            for i, o in zip(inputs, widths, strict=False)
        )
        # Published is a channel of zeros where there is no skip: the same function, at the price of a copy.
        self.skip = nn.ModuleList(
            _block(i, s, 1) if s else nn.Identity() for i, s in zip(inputs, skip, strict=False)
        )
        self.up = nn.ModuleList(
            nn.Sequential(_block(i + s, o, 3), _block(o, o, 1))
            for i, s, o in zip([*widths[1:], widths[-1]], skip, widths, strict=True)
        )
        self.last = nn.Conv2d(widths[0], out_channels, 1)

    def forward(
        self, z: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels height width"]:
        """Map noise to an image.

        Args:
            z: The noise; its height and width are those of the image.

        Raises:
            InputError: If the noise has other channels, or is too small for the scales.
        """
        if z.shape[1] != self.in_channels or min(z.shape[2:]) <= 2**self.scales:
            raise InputError(
                f"The input has shape {tuple(z.shape)} but needs {self.in_channels} channels and more than "
                f"{2**self.scales} pixels along each side for {self.scales} scales; use fewer scales for small images."
            )
        levels = [z]
        for down in self.down:
            levels.append(down(levels[-1]))
        u = levels.pop()
        for level, skip, up in reversed(list(zip(levels, self.skip, self.up, strict=True))):
            height, width = level.shape[2:]
            # Odd sizes are rounded up on the way down, so that one row or column may be too many.
            u = functional.interpolate(u, scale_factor=2.0, mode="bilinear")[:, :, :height, :width]
            if not isinstance(skip, nn.Identity):
                u = torch.cat((u, skip(level)), 1)
            u = up(u)
        # The image itself has eight bits in bfloat16: too few for small noise.
        with torch.autocast(u.device.type, enabled=False):
            # A matrix product: on CPUs torch's convolution with one output channel in float32 is slow.
            pixels = u.movedim(1, -1).to(self.last.weight.dtype)
            x = functional.linear(pixels, self.last.weight[:, :, 0, 0], self.last.bias).movedim(
                -1, 1
            )
        low, high = self.interval
        return low + (high - low) * x.sigmoid()


def _block(inputs: int, outputs: int, size: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        _Convolution(inputs, outputs, size, stride) if size > 1 else nn.Conv2d(inputs, outputs, 1),
        nn.BatchNorm2d(outputs, track_running_stats=False),
        nn.LeakyReLU(_SLOPE, inplace=True),
    )


class _Convolution(nn.Conv2d):
    """A 3x3 convolution with reflected borders."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_Reflect.apply(input))  # pyright: ignore


class _Reflect(torch.autograd.Function):
    """Reflect one row or column on each side, and keep the channels last.

    Torch's own reflection does not keep them, which costs the network a tenth of its time and a fifth of its memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        padded = x.new_empty(batch, height + 2, width + 2, channels).permute(0, 3, 1, 2)
        padded[:, :, 1:-1, 1:-1] = x
        padded[:, :, 0, 1:-1], padded[:, :, -1, 1:-1] = x[:, :, 1], x[:, :, -2]
        padded[..., 0], padded[..., -1] = padded[..., 2], padded[..., -3]
        return padded

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (g,) = grad_outputs
        inner = g[:, :, 1:-1, 1:-1].clone(memory_format=torch.channels_last)
        for end, mirror in ((0, 1), (-1, -2)):
            inner[:, :, mirror] += g[:, :, end, 1:-1]
            inner[..., mirror] += g[:, :, 1:-1, end]
            inner[:, :, mirror, 1] += g[:, :, end, 0]
            inner[:, :, mirror, -2] += g[:, :, end, -1]
        return inner
