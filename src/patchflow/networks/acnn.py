r"""The asymmetric convolutional network of super-resolution (ACNN): from a measurement to an image of more pixels.

A layer sums a horizontal, a vertical and a square convolution, which is one convolution with the sum of their kernels:

.. math:: a_k = (C^{1 \times 3}_k + C^{3 \times 1}_k + C^{3 \times 3}_k)\, \rho(a_{k-1}), \qquad
          f = \rho\Big(\sum_k a_k\Big), \qquad \rho = \max(\cdot, 0).

The sum of all layers and the first layer alone are both moved to the fine grid by one sub-pixel convolution (the memory
enhancement), refined apart, added, and mapped to the image by three more convolutions (the high-frequency block).

Published networks predict the image itself. Here they predict what bicubic interpolation misses, and start at zero: so
they are better than interpolation after minutes.

References:
    Tian, Xu, Zuo, Lin, Zhang, "Asymmetric CNN for image superresolution", IEEE Trans. SMC: Systems, 2021,
    https://arxiv.org/abs/2103.13634
    Altekrueger, Hertrich, "WPPNets and WPPFlows: the power of Wasserstein patch priors for superresolution", 2022,
    https://arxiv.org/abs/2201.08157 (the short network)
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from patchflow.errors import InputError
from patchflow.numerics.interpolation import interpolate

# Of the supervised network and of the short one.
PUBLISHED_WIDTH, PUBLISHED_LAYERS, SHORT_LAYERS = 64, 17, 10


class AsymmetricConvolution(nn.Module):
    """The sum of a 1 x 3, a 3 x 1 and a 3 x 3 convolution without bias, computed as one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.row = nn.Conv2d(inputs, outputs, (1, 3), bias=False)
        self.column = nn.Conv2d(inputs, outputs, (3, 1), bias=False)
        self.square = nn.Conv2d(inputs, outputs, 3, bias=False)

    def forward(
        self, x: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch outputs height width"]:
        """Convolve; outside of the image there are zeros."""
        row = functional.pad(self.row.weight, (0, 0, 1, 1))
        column = functional.pad(self.column.weight, (1, 1, 0, 0))
        return functional.conv2d(x, self.square.weight + row + column, padding=1)


class AsymmetricLayers(nn.Module):
    """Asymmetric convolutions one after another; see the module's formula.

    Args:
        channels: Channels of the input.
        width: Channels between.
        layers: Number of layers.
    """

    def __init__(self, channels: int, width: int, layers: int) -> None:
        super().__init__()
        inputs = [channels, *[width] * (layers - 1)]
        self.layers = nn.ModuleList(AsymmetricConvolution(n, width) for n in inputs)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[
        Float[Tensor, "batch features height width"], Float[Tensor, "batch features height width"]
    ]:
        """The features of the first layer, and those of the sum of all."""
        start, *others = self.layers
        total = start(x)
        first = x = functional.relu(total)
        for layer in others:
            before = layer(x)
            total = total + before
            x = functional.relu(before)
        return first, functional.relu(total)


class MeasurementFeatures(nn.Module):
    """Features of a measurement: the sum of asymmetric layers, one vector for each measured pixel.

    Args:
        channels: Channels of the measurement.
        width: Number of features.
        layers: Number of layers.
    """

    def __init__(self, channels: int, width: int, layers: int) -> None:
        super().__init__()
        self.asymmetric = AsymmetricLayers(channels, width, layers)

    def forward(
        self, y: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch features height width"]:
        """The features."""
        return self.asymmetric(y - 0.5)[1].to(y.dtype)


class ACNN(nn.Module):
    """The network: full with 17 layers, short (of WPPNets) with 10.

    Args:
        channels: Channels of the images.
        scale: Pixels of the image per measured pixel, along an axis.
        width: Channels between the layers; published are 64.
        layers: Number of asymmetric layers.

    Raises:
        InputError: If a number is too small.
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        scale: int = 4,
        width: int = PUBLISHED_WIDTH,
        layers: int = PUBLISHED_LAYERS,
    ) -> None:
        super().__init__()
        if min(channels, width, layers) < 1 or scale < 2:
            raise InputError(
                f"Got {channels} channels, width {width}, {layers} layers and scale {scale}; the scale must be at "
                "least 2, the others at least 1."
            )
        self.channels, self.scale = channels, scale
        self.asymmetric = AsymmetricLayers(channels, width, layers)
        steps: list[nn.Module] = []
        for factor in prime_factors(scale):
            steps += [_conv(width, width * factor**2), nn.ReLU(), nn.PixelShuffle(factor)]
        self.upsample = nn.Sequential(*steps)
        self.refine_all = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width))
        self.refine_first = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width))
        self.high_frequency = nn.Sequential(
            *(nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU())
        )
        self.last = _conv(width, channels)
        nn.init.zeros_(self.last.weight)

    def forward(
        self, y: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels rows columns"]:
        """Super-resolve; each measured pixel becomes ``scale`` x ``scale`` pixels around it.

        Raises:
            InputError: If the measurement has other channels.
        """
        if y.shape[1] != self.channels:
            raise InputError(
                f"The measurement has {y.shape[1]} channels but the network was made for {self.channels}; give a "
                "network of the measurement's channels."
            )
        # Around the middle grey, so that the networks see values of both signs.
        first, total = self.asymmetric(y - 0.5)
        total, first = self.upsample(total), self.upsample(first)
        detail = self.high_frequency(self.refine_all(total) + self.refine_first(first))
        return interpolate(y, self.scale) + self.last(detail).to(y.dtype)


def prime_factors(number: int) -> list[int]:
    """The prime factors in increasing order: 4 is 2 times 2, and so a network goes up in two steps.

    >>> prime_factors(12)
    [2, 2, 3]
    """
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
