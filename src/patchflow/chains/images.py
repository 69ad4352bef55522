r"""Kernels of images: the channels of each pixel are a vector, and convolutions look at its neighbours.

A kernel of vectors serves images pixel by pixel (:class:`Pixelwise`); a coupling whose networks are convolutions
(:class:`ConvolutionalCoupling`) lets pixels depend on each other. All of them take images of any size. A flow of
super-resolution works on the measured grid, with :math:`s^2` channels for the :math:`s \times s` pixels of each
measured one, and ends with :class:`SubPixel`.

References:
    Kingma, Dhariwal, "Glow: generative flow with invertible 1x1 convolutions", 2018, https://arxiv.org/abs/1807.03039
    Lugmayr, Danelljan, Van Gool, Timofte, "SRFlow: learning the super-resolution space with normalizing flow", 2020,
    https://arxiv.org/abs/2006.14200
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from patchflow.chains.kernel import Kernel, Step
from patchflow.chains.nets import joined
from patchflow.energy import Density
from patchflow.errors import InputError
from patchflow.numerics.interpolation import interpolate

Images = Float[Tensor, "batch channels height width"]
# Of the soft clamp, as in the coupling of vectors.
_ATAN = 0.636


class WhiteImages(Density):
    r"""The density :math:`N(0, I)` of images of as many pixels as the condition: the latent law of flows of images.

    Args:
        channels: Channels of the images.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Images, condition: Tensor | None = None) -> Float[Tensor, " batch"]:
        """Evaluate; see :meth:`Energy.forward`. The condition is not used."""
        constant = 0.5 * x[0].numel() * math.log(2 * math.pi)
        return 0.5 * x.flatten(1).square().sum(1) + constant

    def sample(self, count: int, condition: Tensor | None = None) -> Images:
        """Draw samples; see :meth:`Density.sample`.

        Raises:
            InputError: If there is no condition that says the size.
        """
        if condition is None:
            raise InputError("The size of white images is that of the condition; pass one.")
        shape = (count, self.channels, *condition.shape[2:])
        return torch.randn(shape).to(condition)


class Pixelwise(Kernel):
    """A kernel of vectors, applied to the channels of each pixel; the condition is an image of the same size.

    Args:
        kernel: The kernel, for vectors of as many numbers as there are channels.
    """

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    @property
    def bijective(self) -> bool:
        """Whether the kernel is a bijection."""
        return self.kernel.bijective

    def forward(self, x: Images, condition: Tensor | None = None) -> Step:
        """Walk at each pixel; see :meth:`Kernel.forward`."""
        return self._walk(self.kernel, x, condition)

    def reverse(self, x: Images, condition: Tensor | None = None) -> Step:
        """Walk back at each pixel; see :meth:`Kernel.reverse`."""
        return self._walk(self.kernel.reverse, x, condition)

    @staticmethod
    def _walk(step: Callable[..., Step], x: Tensor, condition: Tensor | None) -> Step:
        count, _, height, width = x.shape
        moved, log_ratio, choice = step(
            _vectors(x), None if condition is None else _vectors(condition)
        )
        x = moved.view(count, height, width, -1).permute(0, 3, 1, 2)
        choice = None if choice is None else choice.view(count, -1).sum(1)
        return Step(x, log_ratio.view(count, -1).sum(1), choice)


class ConvolutionalCoupling(Kernel):
    r"""The coupling of :class:`patchflow.chains.bijections.AffineCoupling` with convolutions as networks.

    .. math::
        x_1 = z_1 \odot e^{\sigma(s_2(z_2, y))} + t_2(z_2, y), \qquad
        x_2 = z_2 \odot e^{\sigma(s_1(x_1, y))} + t_1(x_1, y),

    where the halves are channels. It starts as the identity.

    Args:
        channels: Channels of the images, at least 2.
        condition_channels: Channels of the condition, an image of the same size; 0 for none.
        hidden: Width of the networks.
        clamp: The clamp: a coupling scales by at most :math:`e^{\pm c}`.

    Raises:
        InputError: If there are fewer than 2 channels, or the clamp is not positive.
    """

    def __init__(
        self,
        channels: int,
        condition_channels: int = 0,
        *,
        hidden: int = 32,
        clamp: float | int = 1.2,
    ) -> None:
        super().__init__()
        if channels < 2 or not clamp > 0:
            raise InputError(
                f"Got {channels} channels and the clamp {clamp}; a coupling needs at least 2 channels and a positive "
                "clamp."
            )
        self.split, self.clamp = round(channels / 2), float(clamp)
        rest = channels - self.split
        self.net1 = _network(self.split + condition_channels, 2 * rest, hidden)
        self.net2 = _network(rest + condition_channels, 2 * self.split, hidden)

    @property
    def bijective(self) -> bool:
        """Always true."""
        return True

    def forward(self, x: Images, condition: Tensor | None = None) -> Step:
        """Map latent to data; see :meth:`Kernel.forward`."""
        z1, z2 = x[:, : self.split], x[:, self.split :]
        s2, t2 = self._scale_and_shift(self.net2, z2, condition)
        x1 = torch.addcmul(t2, z1, s2.exp())
        s1, t1 = self._scale_and_shift(self.net1, x1, condition)
        x2 = torch.addcmul(t1, z2, s1.exp())
        return Step(torch.cat((x1, x2), 1), s1.flatten(1).sum(1) + s2.flatten(1).sum(1))

    def reverse(self, x: Images, condition: Tensor | None = None) -> Step:
        """Map data to latent; see :meth:`Kernel.reverse`."""
        x1, x2 = x[:, : self.split], x[:, self.split :]
        s1, t1 = self._scale_and_shift(self.net1, x1, condition)
        z2 = (x2 - t1) * (-s1).exp()
        s2, t2 = self._scale_and_shift(self.net2, z2, condition)
        z1 = (x1 - t2) * (-s2).exp()
        return Step(torch.cat((z1, z2), 1), -s1.flatten(1).sum(1) - s2.flatten(1).sum(1))

    def _scale_and_shift(
        self, net: nn.Module, x: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        raw, shift = net(joined(x, condition)).to(x.dtype).chunk(2, 1)
        return self.clamp * _ATAN * raw.atan(), shift


class SubPixel(Kernel):
    r"""From the measured grid to the image, around the interpolated measurement: :math:`x = B y + \tau P z`.

    :math:`P` lays the :math:`s^2` channels of a measured pixel out as :math:`s \times s` pixels;
    :math:`\log|\det| = n \log \tau` for :math:`n` pixels.

    Args:
        scale: The scale :math:`s`.
        spread: The factor :math:`\tau`: the order of what interpolation misses, so that networks see numbers near one.

    Raises:
        InputError: If the scale is below 1, or the factor not positive.
    """

    def __init__(self, scale: int, *, spread: float | int = 0.05) -> None:
        super().__init__()
        if scale < 1 or not spread > 0:
            raise InputError(
                f"Got the scale {scale} and the spread {spread}; the first must be at least 1, the other positive."
            )
        self.scale, self.spread = scale, float(spread)

    @property
    def bijective(self) -> bool:
        """Always true."""
        return True

    def forward(self, x: Images, condition: Tensor | None = None) -> Step:
        """Map to the image; see :meth:`Kernel.forward`."""
        image = self._start(condition) + self.spread * functional.pixel_shuffle(x, self.scale)
        return Step(image, self._ratio(x))

    def reverse(self, x: Images, condition: Tensor | None = None) -> Step:
        """Map to the measured grid; see :meth:`Kernel.reverse`."""
        z = functional.pixel_unshuffle((x - self._start(condition)) / self.spread, self.scale)
        return Step(z, -self._ratio(x))

    def _start(self, condition: Tensor | None) -> Tensor:
        if condition is None:
            raise InputError("Super-resolution needs the measurement; pass the condition.")
        return interpolate(condition, self.scale)

    def _ratio(self, x: Tensor) -> Tensor:
        return x.new_full((len(x),), x[0].numel() * math.log(self.spread))


def _vectors(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _network(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    last = nn.Conv2d(hidden, outputs, 3, padding=1)
    nn.init.zeros_(last.weight)
    assert last.bias is not None
    nn.init.zeros_(last.bias)
    first = nn.Conv2d(inputs, hidden, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(hidden, hidden, 1), nn.ReLU(), last)
