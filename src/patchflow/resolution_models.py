"""Premade networks of super-resolution by name, and what each was trained for: an operator and a level of noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.chains.bijections import InvertibleLinear
from patchflow.chains.coordinates import ConditionalAffine
from patchflow.chains.flow import Flow
from patchflow.chains.images import ConvolutionalCoupling, Pixelwise, SubPixel, WhiteImages
from patchflow.chains.kernel import Chain, Conditioned, Kernel
from patchflow.errors import InputError
from patchflow.networks.acnn import (
    ACNN,
    PUBLISHED_LAYERS,
    PUBLISHED_WIDTH,
    SHORT_LAYERS,
    MeasurementFeatures,
)
from patchflow.problems.blur import Blur
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.resolution import lowers_resolution

Model = TypeVar("Model", bound=nn.Module)

# A network serves noise between its own divided by this factor and times it, and kernels that differ by so much of
# their largest value.
_NOISE_FACTOR, _KERNEL_TOLERANCE = 1.25, 1e-3


class SuperResolver(nn.Module):
    """A network that maps a measurement to the cells of its pixels, and the measurement that it was trained for.

    Args:
        network: The network: (batch, channels, height, width) to ``scale`` times as many rows and columns.
        channels: Channels of the images.
        scale: Pixels of the image per measured pixel, along an axis.
        kernel_shape: Rows and columns of the blur's kernel, which :meth:`trained_for` sets.
        noise: The standard deviation of the noise.

    Raises:
        InputError: If the kernel is smaller than the scale, or the noise not positive.
    """

    kernel: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        channels: int,
        scale: int,
        kernel_shape: Sequence[int],
        noise: float | int,
    ) -> None:
        super().__init__()
        if min(kernel_shape) < scale or not noise > 0:
            raise InputError(
                f"Got a kernel of {' x '.join(map(str, kernel_shape))} pixels at scale {scale} and the noise {noise}; "
                "the kernel must be at least as large as the scale, the noise positive."
            )
        self.network, self.channels, self.scale, self.noise = network, channels, scale, float(noise)
        # Not a number until it is set, so that a forgotten one is noticed.
        self.register_buffer("kernel", torch.full(tuple(kernel_shape), math.nan))

    def trained_for(self, kernel: Float[Tensor, "rows columns"]) -> SuperResolver:
        """Set the kernel of the blur, and return the model.

        Raises:
            InputError: If it has another shape.
        """
        if kernel.shape != self.kernel.shape:
            raise InputError(
                f"The kernel has {tuple(kernel.shape)} pixels but the model was made for {tuple(self.kernel.shape)}; "
                "make a model for this kernel."
            )
        self.kernel.copy_(kernel)
        return self

    def check_kernel(self, kernel: Float[Tensor, "rows columns"]) -> None:
        """Refuse another kernel than the model's, and a model that was given none.

        Raises:
            InputError: As said.
        """
        own = self.kernel.to(kernel)
        if not bool(own.isfinite().all()):
            raise InputError("The model knows no blur yet; call trained_for(kernel) first.")
        tolerance = _KERNEL_TOLERANCE * float(own.abs().max())
        if kernel.shape != own.shape or not torch.allclose(kernel, own, rtol=0, atol=tolerance):
            raise InputError(
                f"The network was trained for another blur, of {own.shape[0]} x {own.shape[1]} pixels, than that of "
                f"the operator, of {kernel.shape[0]} x {kernel.shape[1]}; train a network for this operator."
            )

    def forward(
        self, y: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels rows columns"]:
        """The cells of a measurement."""
        return self.network(y)

    def check(self, x: Tensor) -> None:
        """Refuse images that do not fit, before a long computation.

        Raises:
            InputError: If the number of channels is another.
        """
        if x.shape[1] != self.channels:
            raise InputError(
                f"The image has {x.shape[1]} channels but the network was made for {self.channels}; convert the image "
                "or train a network on such images."
            )

    def operator_of(self, likelihood: GaussianLikelihood) -> Blur:
        """The operator of a likelihood, if it is what the network was trained for.

        The size of the image and its boundary are free.

        Raises:
            InputError: If the operator is none of super-resolution, or its scale, its kernel or the noise is another.
        """
        operator = likelihood.operator
        if not lowers_resolution(operator) or operator.stride != self.scale:
            found = (
                f"scale {operator.stride}"
                if isinstance(operator, Blur)
                else f"no scale (a {type(operator).__name__})"
            )
            raise InputError(
                f"The network was trained for super-resolution with scale {self.scale} but the operator has {found}; "
                "train a network for this operator."
            )
        self.check_kernel(operator.kernel)
        if not 1 / _NOISE_FACTOR <= likelihood.std / self.noise <= _NOISE_FACTOR:
            raise InputError(
                f"The network was trained for the noise {self.noise:g} but the measurement has {likelihood.std:g}; "
                "train a network for this noise."
            )
        return operator


class FlowNetwork(nn.Module):
    """A conditional flow as a network: each call draws one sample for each measurement.

    Args:
        flow: The flow, whose condition is the measurement.
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(
        self, y: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels rows columns"]:
        """Draw, from torch's global generator."""
        return self.flow.sample(len(y), y)


def acnn(
    *,
    channels: int = 1,
    scale: int = 4,
    kernel_shape: Sequence[int] = (16, 16),
    noise: float = 0.01,
    width: int = 32,
    layers: int = PUBLISHED_LAYERS,
    preset: Literal["default", "paper"] = "default",
) -> SuperResolver:
    """The asymmetric network of super-resolution; train it with :func:`patchflow.learn_pairs`.

    Set what it is trained for with :meth:`SuperResolver.trained_for`.

    Args:
        channels: Channels of the images.
        scale: Pixels of the image per measured pixel, along an axis.
        kernel_shape: Rows and columns of the blur's kernel.
        noise: The standard deviation of the noise.
        width: Channels between the layers.
        layers: Number of asymmetric layers.
        preset: ``"paper"`` is the published network, of 64 channels; it overrides ``width`` and ``layers``.

    Raises:
        InputError: If a number is out of range.

    References:
        Tian, Xu, Zuo, Lin, Zhang, "Asymmetric CNN for image superresolution", 2021, https://arxiv.org/abs/2103.13634
    """
    arguments = dict(locals()) | {"kernel_shape": list(kernel_shape)}
    if preset == "paper":
        width, layers = PUBLISHED_WIDTH, PUBLISHED_LAYERS
    network = ACNN(channels=channels, scale=scale, width=width, layers=layers)
    model = SuperResolver(
        network, channels=channels, scale=scale, kernel_shape=kernel_shape, noise=noise
    )
    return _named(model, "acnn", arguments)


def wpp_net(
    *,
    channels: int = 1,
    scale: int = 4,
    kernel_shape: Sequence[int] = (16, 16),
    noise: float = 0.01,
    width: int = 32,
    layers: int = SHORT_LAYERS,
) -> SuperResolver:
    """A short asymmetric network; train it on measurements alone with :func:`patchflow.learn_wpp_net`.

    Published is a width of 64.

    Args:
        channels: Channels of the images.
        scale: Pixels of the image per measured pixel, along an axis.
        kernel_shape: Rows and columns of the blur's kernel.
        noise: The standard deviation of the noise.
        width: Channels between the layers.
        layers: Number of asymmetric layers.

    Raises:
        InputError: If a number is out of range.

    References:
        Altekrueger, Hertrich, "WPPNets and WPPFlows: the power of Wasserstein patch priors for superresolution", 2022,
        https://arxiv.org/abs/2201.08157
    """
    arguments = dict(locals()) | {"kernel_shape": list(kernel_shape)}
    network = ACNN(channels=channels, scale=scale, width=width, layers=layers)
    model = SuperResolver(
        network, channels=channels, scale=scale, kernel_shape=kernel_shape, noise=noise
    )
    return _named(model, "wpp_net", arguments)


def wpp_flow(
    *,
    channels: int = 1,
    scale: int = 4,
    kernel_shape: Sequence[int] = (16, 16),
    noise: float = 0.01,
    width: int = 32,
    layers: int = SHORT_LAYERS,
    blocks: int = 4,
    hidden: int = 32,
    clamp: float = 1.2,
) -> SuperResolver:
    """A conditional flow of super-resolution; train it on measurements with :func:`patchflow.learn_wpp_flow`.

    It works on the measured grid: couplings with convolutions and invertible mixtures of the channels in turn, then an
    affine map of each pixel, all of which see features of the measurement. Published are flows of two or three scales
    with 16 or 10 blocks each, of width 128, which see the interpolated measurement.

    Args:
        channels: Channels of the images.
        scale: Pixels of the image per measured pixel, along an axis.
        kernel_shape: Rows and columns of the blur's kernel.
        noise: The standard deviation of the noise.
        width: Number of features of the measurement.
        layers: Asymmetric layers that make them.
        blocks: Coupling blocks.
        hidden: Width of the couplings' networks.
        clamp: Soft clamp of their log-scales.

    Raises:
        InputError: If a number is out of range.

    References:
        Altekrueger, Hertrich, "WPPNets and WPPFlows: the power of Wasserstein patch priors for superresolution", 2022,
        https://arxiv.org/abs/2201.08157
    """
    arguments = dict(locals()) | {"kernel_shape": list(kernel_shape)}
    if min(channels, width, layers, hidden) < 1 or blocks < 0 or scale < 2:
        raise InputError(
            f"Got {channels} channels, scale {scale}, width {width}, {layers} layers, {blocks} blocks and hidden width "
            f"{hidden}; the scale must be at least 2, the blocks 0 or more, the others at least 1."
        )
    cells = channels * scale**2
    kernels: list[Kernel] = []
    for _ in range(blocks):
        kernels.append(ConvolutionalCoupling(cells, width, hidden=hidden, clamp=clamp))
        kernels.append(Pixelwise(InvertibleLinear(cells)))
    kernels.append(Pixelwise(ConditionalAffine(cells, width)))
    features = MeasurementFeatures(channels, width, layers)
    flow = Flow(WhiteImages(cells), Chain(Conditioned(features, Chain(*kernels)), SubPixel(scale)))
    model = SuperResolver(
        FlowNetwork(flow), channels=channels, scale=scale, kernel_shape=kernel_shape, noise=noise
    )
    return _named(model, "wpp_flow", arguments)


def _named(model: Model, name: str, arguments: dict[str, Any]) -> Model:
    model.made_by = (name, arguments)  # pyright: ignore[reportArgumentType]
    return model
