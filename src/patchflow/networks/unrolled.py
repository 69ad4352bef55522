r"""A network from measurements to images: residual networks on the start image, with data steps between them.

.. math:: x_0 = A^+ y, \qquad z_k = x_{k-1} + R_k(x_{k-1}, x_0), \qquad x_k = z_k + t_k (u_k - z_k), \qquad
          u_k = \operatorname*{argmin}_u \tfrac12\|A u - y\|^2 + \tfrac{\rho_k}{2}\|u - z_k\|^2,

where :math:`A^+ y` is the operator's start image (bicubic interpolation, filtered backprojection, ...), the networks
:math:`R_k` and the numbers :math:`t_k` are learned, and the last stage has no data step. The minimiser is exact where
the operator has a closed form, else by conjugate gradients. With one stage the measurement enters by the start alone.

References:
    Monga, Li, Eldar, "Algorithm unrolling", IEEE Signal Processing Magazine 38(2), 2021,
    https://arxiv.org/abs/1912.10557
    Lim, Son, Kim, Nah, Lee, "Enhanced deep residual networks for single image super-resolution", 2017,
    https://arxiv.org/abs/1707.02921 (the residual blocks)
    Shi et al., "Real-time single image and video super-resolution", 2016, https://arxiv.org/abs/1609.05158 (cells of
    pixels as channels)
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from patchflow.errors import InputError


@runtime_checkable
class DataOperator(Protocol):
    """What a network needs of an operator."""

    def initial(self, y: Tensor) -> Tensor:
        """The start image of measurements."""
        ...

    def nearest(self, v: Tensor, y: Tensor, rho: float | int) -> Tensor:
        """The minimiser of the module's formula."""
        ...


class UnrolledNetwork(nn.Module):
    """The network; see the module's formula.

    Args:
        channels: Channels of the images.
        cell: Side length of the cells of pixels that become channels: the scale of super-resolution, else 2.
        width: Channels of the residual blocks.
        blocks: Residual blocks of each stage.
        stages: Number of networks.
        strengths: The numbers rho of the data steps, one less than ``stages``: squares of noise level over image
            uncertainty.

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        cell: int = 4,
        width: int = 64,
        blocks: int = 4,
        stages: int = 1,
        strengths: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        if min(channels, cell, width, blocks, stages) < 1:
            raise InputError(
                f"Got {channels} channels, cells of {cell}, width {width}, {blocks} blocks and {stages} stages; use at "
                "least one of each."
            )
        if len(strengths) != stages - 1 or not all(0 < rho < math.inf for rho in strengths):
            raise InputError(
                f"Got {stages} stages and the strengths {strengths}; give a positive number between any two stages."
            )
        self.channels, self.cell, self.strengths = channels, cell, strengths
        self.stages = nn.ModuleList(
            _Stage(channels * cell**2 * (1 if k == 0 else 2), channels * cell**2, width, blocks)
            for k in range(stages)
        )
        self.steps = nn.Parameter(torch.ones(stages - 1))

    def forward(
        self, y: Float[Tensor, "batch channels *measured"], operator: DataOperator
    ) -> Float[Tensor, "batch channels height width"]:
        """Reconstruct.

        Args:
            y: Measurements.
            operator: What they were made by.
        """
        # The operator is exact whatever the precision of the networks.
        with torch.autocast(y.device.type, enabled=False):
            start = operator.initial(y)
        first = self._cells(start)
        x, cells = start, first
        for k, stage in enumerate(self.stages):
            given = cells if k == 0 else torch.cat((cells, first), 1)
            x = x + self._pixels(stage(given), x)
            if k < len(self.strengths):
                with torch.autocast(y.device.type, enabled=False):
                    near = operator.nearest(x, y, self.strengths[k])
                x = x + self.steps[k] * (near - x)
                cells = self._cells(x)
        return x

    def _cells(self, x: Tensor) -> Tensor:
        missing = [-extent % self.cell for extent in (x.shape[-1], x.shape[-2])]
        padded = functional.pad(x, [0, missing[0], 0, missing[1]], mode="replicate")
        # Around the middle grey, so that the networks see values of both signs. Channels last: otherwise each
        # convolution reorders before and after.
        cells = functional.pixel_unshuffle(padded - 0.5, self.cell)
        return cells.contiguous(memory_format=torch.channels_last)

    def _pixels(self, cells: Tensor, x: Tensor) -> Tensor:
        pixels = functional.pixel_shuffle(cells, self.cell).to(x.dtype)
        return pixels[..., : x.shape[-2], : x.shape[-1]]


class _Stage(nn.Module):
    """Residual blocks between two convolutions, zero at the start."""

    def __init__(self, inputs: int, outputs: int, width: int, blocks: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(inputs, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.tail = nn.Conv2d(width, outputs, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        assert self.tail.bias is not None
        nn.init.zeros_(self.tail.bias)

    def forward(self, u: Tensor) -> Tensor:
        u = self.head(u)
        v = u
        for block in self.blocks:
            v = block(v)
        return self.tail(u + v)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, u: Tensor) -> Tensor:
        return u + self.second(functional.relu(self.first(u)))
