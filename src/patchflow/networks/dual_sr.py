r"""The networks of DualSR beside its up-sampler: a linear down-sampler, and a critic of patches.

The down-sampler is a chain of convolutions without anything in between, followed by a stride: one kernel in many
factors, which gradient descent finds more easily than the kernel itself. All channels of an image share it.

References:
    Bell-Kligler, Shocher, Irani, "Blind super-resolution kernel estimation using an internal-GAN", 2019,
    https://arxiv.org/abs/1909.06581 (both networks)
    Emad, Peemen, Corporaal, "DualSR: zero-shot dual learning for real-world super-resolution", WACV 2021
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from patchflow.errors import InputError

Images = Float[Tensor, "batch channels height width"]

# Sides of the factors; one of 2 joins them where the kernel's side must be even. Published: 7, 5, 3, 1, 1, 1.
_SIDES = (7, 5, 3)


class LinearDownsampler(nn.Module):
    """Correlation with a learned kernel where it fits, kept at every ``stride``-th pixel.

    It starts at a kernel that takes the middle of its support.

    Args:
        stride: Distance of the kept pixels.
        even: Whether the side of the kernel is even.
        width: Channels between the factors; published are 64.

    Raises:
        InputError: If a number is too small.
    """

    def __init__(self, stride: int, *, even: bool, width: int = 32) -> None:
        super().__init__()
        if stride < 2 or width < 1:
            raise InputError(
                f"Got the stride {stride} and {width} channels; use at least 2 and at least 1."
            )
        sides = (*_SIDES, 2) if even else _SIDES
        self.stride, self.side = stride, sum(sides) - len(sides) + 1
        widths = [1, *[width] * (len(sides) - 1), 1]
        self.factors = nn.ModuleList(
            nn.Conv2d(i, o, side, bias=False)
            for side, i, o in zip(sides, widths, widths[1:], strict=False)
        )
        with torch.no_grad():
            for factor in self.factors:
                assert isinstance(factor, nn.Conv2d)
                side, outputs = factor.kernel_size[0], factor.out_channels
                inside = slice((side - 1) // 2, side // 2 + 1)
                # Every path carries the same share, disturbed so that they differ.
                share = 1 / factor.in_channels / (2 - side % 2) ** 2
                factor.weight.mul_(0.1 / width)
                factor.weight[:, :, inside, inside] += share * (
                    1 + 0.1 * torch.randn(outputs, 1, 1, 1)
                )

    def kernel(self) -> Float[Tensor, "side side"]:
        """The product of the factors."""
        size = 2 * self.side - 1
        impulse = torch.zeros(1, 1, size, size).to(next(self.parameters()))
        impulse[..., self.side - 1, self.side - 1] = 1
        return self._correlate(impulse)[0, 0].flip(0, 1)

    def _correlate(self, x: Tensor) -> Tensor:
        for factor in self.factors:
            x = factor(x)
        return x

    def forward(self, x: Images) -> Float[Tensor, "batch channels rows columns"]:
        """Lower the resolution of images."""
        flat = x.flatten(0, 1)[:, None]
        # One kernel costs a fraction of its factors.
        y = nn.functional.conv2d(flat, self.kernel()[None, None], stride=self.stride)
        return y.view(*x.shape[:2], *y.shape[2:])


class PatchCritic(nn.Module):
    """Tells patches of an image from others, one number for each pixel: what surrounds it by 7 x 7 pixels.

    Its layers are Lipschitz by their spectral norm; published is batch normalisation, too.

    Args:
        channels: Channels of the images.
        width: Channels between the convolutions; published are 64.
    """

    def __init__(self, channels: int, *, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [spectral_norm(nn.Conv2d(channels, width, 7))]
        for _ in range(3):
            layers += [nn.ReLU(), spectral_norm(nn.Conv2d(width, width, 1))]
        self.layers = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, 1, 1))

    def forward(self, x: Images) -> Float[Tensor, "batch 1 rows columns"]:
        """Judge images: near 1 if they look like the real ones, near 0 if not."""
        return self.layers(x)
