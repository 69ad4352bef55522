"""The small networks inside kernels, with a hand-written backward in the input.

A patch flow spends nine tenths of its time in the square matrices of these networks, so their backward pass is
written by
hand: no autograd graph, masks from the activations themselves, everything in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.chains.kernel import Slopes, add_slope


class MLP(nn.Sequential):
    r"""A fully connected network with ReLU between its linear layers.

    The linear layers have the keys ``0, 2, 4, ...``, as in the subnetworks of the published code, so that published
    weights load.

    Args:
        inputs: Size of the input.
        outputs: Size of the output.
        hidden: Width of the hidden layers.
        depth: Number of hidden layers.
    """

    def __init__(self, inputs: int, outputs: int, *, hidden: int = 256, depth: int = 2) -> None:
        sizes = [inputs, *[hidden] * depth]
        layers: list[nn.Module] = []
        for before, after in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers, nn.Linear(sizes[-1], outputs))

    @property
    def linears(self) -> list[nn.Linear]:
        """The linear layers, first to last."""
        return [layer for layer in self if isinstance(layer, nn.Linear)]

    def forward_with_pullback(
        self, x: Float[Tensor, "batch inputs"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "batch outputs"], Callable[[Tensor, Slopes | None], Tensor]]:
        r"""Evaluate the network in ``dtype`` and return its pullback :math:`g \mapsto J(x)^\top g`.

        Args:
            x: Inputs.
            dtype: The type of the matrix products. In bfloat16 the input enters as the sum of a high and a low part, so
                that only weights and hidden activations are rounded. Results have the type of ``x``.

        Returns:
            The outputs, and a function from gradients in the outputs to gradients in the inputs, which adds
            those in the parameters to its second argument unless that is ``None``; it can be called once.
        """
        first, *middle, last = self.linears
        weight = first.weight.detach().to(dtype)
        if dtype == x.dtype:
            h = torch.addmm(first.bias.detach(), x, weight.T)
        else:
            high = x.to(dtype)
            low = (x - high).to(dtype)
            both = torch.cat((weight, weight), 1)
            h = torch.addmm(first.bias.detach().to(dtype), torch.cat((high, low), 1), both.T)
        activations, weights = [h.relu_()], [weight]
        for linear in (*middle, last):
            weights.append(linear.weight.detach().to(dtype))
            h = torch.addmm(linear.bias.detach().to(dtype), h, weights[-1].T)
            if linear is not last:
                activations.append(h.relu_())

        def pull(g: Tensor, slopes: Slopes | None) -> Tensor:
            g = g.to(dtype)
            for linear in reversed(self.linears):
                before = activations.pop() if activations else x.to(dtype)
                if slopes is not None:
                    add_slope(slopes, linear.weight, (g.T @ before).to(x.dtype))
                    add_slope(slopes, linear.bias, g.sum(0, dtype=x.dtype))
                g = g @ weights.pop()
                if linear is not first:
                    # One pass, in place: g[before == 0] = 0.
                    torch.ops.aten.threshold_backward.grad_input(g, before, 0, grad_input=g)
            return g.to(x.dtype)

        return h.to(x.dtype), pull


def joined(x: Tensor, condition: Tensor | None) -> Tensor:
    """The input of a network that also sees the condition."""
    return x if condition is None else torch.cat((x, condition), 1)
