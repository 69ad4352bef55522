r"""Convolutional proximal neural networks: Parseval layers whose matrix is a convolution with short filters.

:math:`T` takes :math:`c` channels to :math:`f` by correlations with :math:`k \times k` filters, periodic at the border.
On images of at least :math:`2k - 1` pixels along each side, :math:`T^\top T` is a convolution too, with the filters

.. math:: G_{c c'}(\delta) = \sum_{f, u} w_{f c}(u)\, w_{f c'}(u + \delta),

and :math:`T^\top T = I` is :math:`G = \delta I`: finitely many equations, whatever the size of the images. The Parseval
penalty is :math:`\|G - \delta I\|^2`, the squared Frobenius norm of :math:`T^\top T - I` per pixel. The polar factor of
:math:`T` has long filters; the iteration towards it, :math:`T \leftarrow T - \tfrac12 T (T^\top T - I)`, with its
filters cut off at their length, is gradient descent on a quarter of the penalty. It leaves an error
:math:`E = T^\top T - I`, of whose largest eigenvalue a bound is computed: the symbol of E is a matrix of trigonometric
polynomials of degree :math:`d = k - 1`, which between the points of a grid of :math:`N` frequencies are at most
:math:`\cos^{-2}(\pi d / N)` times as large as there (Ehlich, Zeller). Divided by the bound of its norm, :math:`T` makes
a layer that is firmly nonexpansive for certain.

References:
    Hertrich, Neumayer, Steidl, "Convolutional proximal neural networks and plug-and-play algorithms", 2021,
    https://arxiv.org/abs/2011.02281
    Bjorck, Bowie, "An iterative algorithm for computing the best estimate of an orthogonal matrix", 1971
    Ehlich, Zeller, "Schwankung von Polynomen zwischen Gitterpunkten", 1964
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from patchflow.errors import InputError
from patchflow.networks.proximal import Activation, StableActivation
from patchflow.numerics.averaged import composed_averagedness
from patchflow.numerics.stiefel import polar

Filters = Float[Tensor, "features channels size size"]


def parseval_error(filters: Filters) -> Float[Tensor, "inner inner width width"]:
    r"""The filters of :math:`T^\top T - I`, of :math:`2k - 1` pixels (of :math:`T T^\top - I` with fewer features)."""
    tall = filters if filters.shape[0] >= filters.shape[1] else _transposed(filters)
    size = tall.shape[-1]
    moved = tall.transpose(0, 1)
    gram = functional.conv2d(moved, moved, padding=size - 1)
    one = torch.zeros_like(gram)
    one[:, :, size - 1, size - 1] = torch.eye(tall.shape[1]).to(gram)
    return gram - one


def parseval_penalty(filters: Filters) -> Float[Tensor, ""]:
    r"""The penalty :math:`\|T^\top T - I\|^2` per pixel, differentiable in the filters."""
    return parseval_error(filters).square().sum()


def norm_bound(filters: Filters) -> float:
    r"""An upper bound of :math:`\|T\|` on images of any size of at least :math:`2k - 1` pixels along each side.

    With the smallest and the largest eigenvalue :math:`m \mp h` of :math:`\hat E` on a grid of :math:`N = 16 d`
    frequencies along each axis, it is :math:`(1 + m + h / \cos^2(\pi d / N))^{1/2}`; the last factor is 1.04.
    """
    error = parseval_error(filters.detach())
    if not bool(error.isfinite().all()):
        return math.nan
    degree = filters.shape[-1] - 1
    count = max(8, 16 * degree)
    # A shift by the middle makes the symbol Hermitian; conjugate frequencies have the same norms.
    padded = functional.pad(error, [0, count - 2 * degree - 1] * 2)
    shifted = padded.roll((-degree, -degree), (2, 3))
    symbol = torch.fft.rfft2(shifted).permute(2, 3, 0, 1)
    values = torch.linalg.eigvalsh(symbol)
    low, high = float(values.min()), float(values.max())
    middle, half = 0.5 * (low + high), 0.5 * (high - low)
    return math.sqrt(1 + middle + half / math.cos(math.pi * degree / count) ** 2)


@torch.no_grad()
def towards_polar(filters: Filters, iterations: int) -> Filters:
    r"""Iterate towards the polar factor with filters of the same length.

    Args:
        filters: The filters; those of a large norm are divided by it first.
        iterations: Steps of :math:`T \leftarrow T - \tfrac12 T (T^\top T - I)`, cut off at the length of the filters.
    """
    if filters.shape[0] < filters.shape[1]:
        return _transposed(towards_polar(_transposed(filters), iterations))
    size = filters.shape[-1]
    # Long enough for T T'T: nothing wraps around onto the first `size` pixels. All in the Fourier domain: short
    # convolutions of many channels with themselves are slow.
    count = 3 * size - 2
    one = torch.eye(filters.shape[1]).to(filters)
    for _ in range(iterations):
        symbol = torch.fft.rfft2(filters, s=(count, count)).permute(2, 3, 0, 1)
        gram = symbol.mH @ symbol
        # It converges below |T|^2 = 3; the trace bounds the norm.
        if float(gram.diagonal(dim1=-2, dim2=-1).real.sum(-1).max()) > 2.5:
            squared = float(torch.linalg.eigvalsh(gram).max())
            if squared > 2.5:
                filters, symbol, gram = (
                    filters / squared**0.5,
                    symbol / squared**0.5,
                    gram / squared,
                )
        step = torch.fft.irfft2((symbol @ (gram - one)).permute(2, 3, 0, 1), s=(count, count))
        filters = filters - 0.5 * step[:, :, :size, :size]
    return filters


class ParsevalConvolution(nn.Module):
    r"""The map :math:`T`: correlations with short filters, periodic at the border, close to :math:`T^\top T = I`.

    Args:
        channels: Channels of the images.
        features: Number of filters.
        size: Side length of the filters, odd.

    Raises:
        InputError: If a number is not positive or the length even.
    """

    def __init__(self, channels: int, features: int, size: int) -> None:
        super().__init__()
        if min(channels, features, size) < 1 or size % 2 == 0:
            raise InputError(
                f"Got {channels} channels, {features} features and filters of {size} x {size}; all must be positive "
                "and the length odd."
            )
        self.size = size
        # An orthonormal mixture of channels is exactly Parseval; as much noise gives the filters their length.
        start = 1 / size * torch.randn(features, channels, size, size) / math.sqrt(features)
        start[:, :, size // 2, size // 2] += polar(torch.randn(features, channels))
        self.weight = nn.Parameter(towards_polar(start, 20))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Apply :math:`T`."""
        return functional.conv2d(self._wrapped(x), self.weight)

    def adjoint(self, u: Float[Tensor, "batch features height width"]) -> Tensor:
        r"""Apply :math:`T^\top`."""
        return functional.conv2d(self._wrapped(u), _transposed(self.weight))

    @property
    def error(self) -> float:
        r"""A bound on how far :math:`\|T\|` is above one."""
        return norm_bound(self.weight) - 1

    @torch.no_grad()
    def constrain_(self, iterations: int = 1) -> None:
        """Move the filters towards the polar factor, after a step of an optimiser."""
        self.weight.copy_(towards_polar(self.weight, iterations))

    @torch.no_grad()
    def finish_(self, iterations: int = 200) -> None:
        r"""Move the filters towards the polar factor, and divide them by the bound that is left of :math:`\|T\|`."""
        self.constrain_(iterations)
        self.weight.div_(norm_bound(self.weight))

    def _wrapped(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < 2 * self.size - 1:
            raise InputError(
                f"The image has {x.shape[-2]} x {x.shape[-1]} pixels but filters of {self.size} x {self.size} need at "
                f"least {2 * self.size - 1} along each side; use larger images or shorter filters."
            )
        return functional.pad(x, [self.size // 2] * 4, mode="circular")


class ConvolutionalLayer(nn.Module):
    r"""The layer :math:`x \mapsto T^\top \sigma(T x + b)` with a :class:`ParsevalConvolution`.

    Args:
        channels: Channels of the images.
        features: Number of filters.
        size: Side length of the filters, odd.
        activation: See :class:`patchflow.networks.proximal.StableActivation`.
    """

    def __init__(self, channels: int, features: int, size: int, activation: Activation) -> None:
        super().__init__()
        self.convolution = ParsevalConvolution(channels, features, size)
        self.activation = StableActivation(features, activation)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Apply the layer."""
        return self.convolution.adjoint(self.activation(self.convolution(x)))


class ConvolutionalProximalNetwork(nn.Module):
    r"""A convolutional PNN, :math:`\Psi = P^\top \Phi_K \circ \dots \circ \Phi_1 P`, :math:`K / (K + 1)`-averaged.

    :math:`P` lifts the image to more channels by a :class:`ParsevalConvolution`: with :math:`\|P\| \le 1` and
    :math:`P^\top P = I` the composition has the averagedness of the layers between. Published is a lift that copies the
    image to 64 channels.

    Args:
        channels: Channels of the images.
        width: Channels that the layers work in, at least as many.
        features: Features of each layer, at least ``width``.
        size: Side length of the filters, odd.
        layers: Number of layers :math:`K`.
        activation: See :class:`patchflow.networks.proximal.StableActivation`.

    Raises:
        InputError: If there is no layer, or fewer features than channels.
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        width: int = 8,
        features: int = 32,
        size: int = 5,
        layers: int = 4,
        activation: Activation = "shrink",
    ) -> None:
        super().__init__()
        if layers < 1 or not channels <= width <= features:
            raise InputError(
                f"Got {layers} layers, {channels} channels, width {width} and {features} features; there must be at "
                "least one layer, and not fewer features than width and not less width than channels."
            )
        self.lift = ParsevalConvolution(channels, width, size)
        self.layers = nn.ModuleList(
            ConvolutionalLayer(width, features, size, activation) for _ in range(layers)
        )

    @property
    def averagedness(self) -> float:
        """The averagedness constant that the layers guarantee."""
        return composed_averagedness([0.5] * len(self.layers))

    @property
    def error(self) -> float:
        """A bound on how far the norm of a convolution is above one."""
        return max(convolution.error for convolution in self._convolutions())

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Apply the network."""
        x = self.lift(x)
        for layer in self.layers:
            x = layer(x)
        return self.lift.adjoint(x)

    def penalty(self) -> Float[Tensor, ""]:
        """The sum of the Parseval penalties of all convolutions, differentiable."""
        return torch.stack([parseval_penalty(c.weight) for c in self._convolutions()]).sum()

    def constrain_(self) -> None:
        """Move all filters towards the polar factors, after a step of an optimiser."""
        for convolution in self._convolutions():
            convolution.constrain_()

    def finish_(self, iterations: int = 200) -> None:
        """Move all filters to the polar factors as far as it goes, and bound their norms by one."""
        for convolution in self._convolutions():
            convolution.finish_(iterations)

    def _convolutions(self) -> list[ParsevalConvolution]:
        return [module for module in self.modules() if isinstance(module, ParsevalConvolution)]


def _transposed(filters: Tensor) -> Tensor:
    """The filters of the adjoint."""
    return filters.transpose(0, 1).flip(2, 3)
