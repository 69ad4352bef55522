r"""A U-Net of residual blocks that is told the noise level, after DRUNet.

The level is one more channel of the input of :class:`patchflow.networks.residual_unet.ResidualUNet`. There are no
biases, so that :math:`D(t x, t \sigma) = t D(x, \sigma)` for :math:`t > 0`: what is learned at one level serves others
too. It predicts the noise, :math:`D(x, \sigma) = x - f(x, \sigma)`.

References:
    Zhang, Li, Zuo, Zhang, Van Gool, Timofte, "Plug-and-play image restoration with deep denoiser prior", 2021,
    https://arxiv.org/abs/2008.13751
    Mohan, Kadkhodaie, Simoncelli, Fernandez-Granda, "Robust and interpretable blind image denoising via bias-free
    convolutional neural networks", 2020, https://arxiv.org/abs/1906.05478
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from patchflow.networks.denoiser import Denoiser, Images, level_of
from patchflow.networks.residual_unet import ResidualUNet

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
        self.network = ResidualUNet(
            channels, widths=widths, blocks=blocks, cell=cell, bias=False, told=True
        )

    def forward(self, x: Images, std: float | int | Float[Tensor, " batch"]) -> Images:
        """Remove noise; see :meth:`Denoiser.forward`."""
        # The image itself has eight bits in bfloat16: too few for small noise.
        return x - self.network(x, level_of(x, std)).to(x.dtype)
