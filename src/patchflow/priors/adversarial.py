r"""Adversarial regularisers: a critic of patches that tells clean from degraded ones.

A critic :math:`E` is a small network on patches, learned to be low on clean patches :math:`q` and high on degraded
ones :math:`\tilde q`, with slopes of about one:

.. math:: \min_E \; \mathbb{E}\, E(q) - \mathbb{E}\, E(\tilde q)
          + \mu \, \mathbb{E} \bigl(\|\nabla E(t q + (1 - t) \tilde q)\| - 1\bigr)^2, \qquad t \sim U(0, 1).

Minus the first two terms is then about the Wasserstein-1 distance of the two laws, and going down :math:`E` moves
degraded patches to clean ones. :math:`E` has the unit of a pixel value; summed over an image by
:class:`patchflow.priors.patch.PatchPrior`, or faster by :class:`patchflow.priors.critic.CriticPrior`, its weight is in
nats per that unit.

References:
    Lunz, Oektem, Schoenlieb, "Adversarial regularizers in inverse problems", 2018, https://arxiv.org/abs/1805.11572
    Prost, Houdard, Almansa, Papadakis, "Learning local regularization for variational image restoration", 2021,
    https://arxiv.org/abs/2102.06155
    Gulrajani et al., "Improved training of Wasserstein GANs", 2017, https://arxiv.org/abs/1704.00028
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from patchflow.energy import Energy
from patchflow.errors import InputError


class Layer(NamedTuple):
    """A convolution.

    Attributes:
        width: Channels of its output.
        kernel: Side length of its kernel.
        stride: Distance of its outputs.
        padding: Zeros around its input.
    """

    width: int
    kernel: int
    stride: int = 1
    padding: int = 0


class PatchCritic(Energy):
    """Convolutions with (leaky) ReLUs between them, down to one position, and the mean over the last channels.

    Args:
        layers: The convolutions.
        size: Side length of the patches.
        channels: Number of channels; a colour patch is one vector.
        slope: Slope of the activation for negative numbers; 0 is ReLU.
        bias: Whether the convolutions have biases.

    Raises:
        InputError: If the layers do not end in one position.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        size: int,
        channels: int = 1,
        *,
        slope: float = 0.2,
        bias: bool = False,
    ) -> None:
        super().__init__()
        extent, width, convolutions = size, channels, []
        # The patch that the last position looks at, and the distance of neighbouring positions.
        self.field, self.stride = 1, 1
        for layer in layers:
            convolutions.append(nn.Conv2d(width, *layer, bias=bias))
            room = extent + 2 * layer.padding - layer.kernel
            if room < 0:
                extent = 0
                break
            extent = room // layer.stride + 1
            self.field += (layer.kernel - 1) * self.stride
            self.stride *= layer.stride
            width = layer.width
        if extent != 1:
            raise InputError(
                f"Patches of {size} x {size} leave {extent} positions a side after the last layer but must leave 1; "
                "change the patch size, or the kernels and strides."
            )
        self.layers, self.slope = tuple(layers), slope
        self.size, self.channels = size, channels
        self.convolutions = nn.ModuleList(convolutions)

    def forward(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Criticise patches; see :meth:`Energy.forward`. The condition is not used."""
        return self._walk(x.view(-1, self.channels, self.size, self.size))[:, 0, 0]

    def on_grid(
        self, x: Float[Tensor, "batch channels height width"], stride: int
    ) -> Float[Tensor, "batch rows columns"]:
        """Criticise all patches of a grid at once, for critics without padding on patches of their own field.

        Neighbouring patches share most of their convolutions. The convolutions keep their strides if ``stride`` is a
        multiple of the critic's own; else they are dilated instead, which leaves no position out.

        Args:
            x: Images.
            stride: Distance of neighbouring patches.
        """
        if stride % self.stride:
            return self._walk(x, dilated=True)[:, ::stride, ::stride]
        step = stride // self.stride
        return self._walk(x)[:, ::step, ::step]

    def _walk(self, x: Tensor, *, dilated: bool = False) -> Tensor:
        hidden, dilation = x, 1
        for layer, convolution in zip(self.layers, self.convolutions, strict=True):
            assert isinstance(convolution, nn.Conv2d)
            if hidden is not x:
                hidden = functional.leaky_relu(hidden, self.slope, inplace=True)
            hidden = functional.conv2d(
                hidden,
                convolution.weight,
                convolution.bias,
                1 if dilated else layer.stride,
                layer.padding,
                dilation,
            )
            if dilated:
                dilation *= layer.stride
        # Sums over patches are taken in the precision of the data.
        return hidden.to(x.dtype).mean(1)


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    clean: Float[Tensor, "batch *event"],
    degraded: Float[Tensor, "batch *event"],
) -> Tensor:
    r"""The mean of :math:`(\|\nabla E\| - 1)^2` at random points between the pairs of a batch, for training.

    Args:
        critic: The critic :math:`E`.
        clean: Clean points.
        degraded: Degraded points, in pairs with the clean ones.
    """
    t = torch.rand(len(clean), *[1] * (clean.ndim - 1), dtype=clean.dtype, device=clean.device)
    between = torch.lerp(degraded, clean, t).detach().requires_grad_(True)
    (slopes,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    # The norm has no derivative where the slope vanishes, as in front of dead ReLUs.
    norms = (slopes.flatten(1).square().sum(1) + 1e-12).sqrt()
    return (norms - 1).square().mean()


def adversarial_loss(
    critic: Callable[[Tensor], Tensor],
    clean: Float[Tensor, "batch *event"],
    degraded: Float[Tensor, "batch *event"],
    *,
    penalty: float | int = 10.0,
) -> tuple[Tensor, Tensor]:
    r"""The loss of the module's formula on a batch, and the distance that it maximises.

    Args:
        critic: The critic :math:`E`.
        clean: Clean points.
        degraded: Degraded points; interpolation is between those of the same place in the batch.
        penalty: The weight :math:`\mu` of the gradient penalty.

    Returns:
        The loss, and its part :math:`\mathbb{E}\, E(\tilde q) - \mathbb{E}\, E(q)`, about the Wasserstein-1 distance.
    """
    distance = critic(degraded).mean() - critic(clean).mean()
    return penalty * gradient_penalty(critic, clean, degraded) - distance, distance
