r"""Flows: a latent density pushed through a chain of kernels.

A flow is an energy. For a bijective chain it is exact,

.. math:: E(x) = E_Z(T^{-1}(x)) - \log|\det \nabla T^{-1}(x)|,

so its mean over data is the forward Kullback-Leibler loss, and the same function is the regulariser on patches. For a
stochastic chain it is one path's bound, whose mean over data is the loss of the pair of chains up to a constant.

References:
    Hagemann, Hertrich, Steidl, "Stochastic normalizing flows for inverse problems: a Markov chains viewpoint", 2022,
    https://arxiv.org/abs/2109.11375
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.chains.kernel import Kernel, Slopes
from patchflow.energy import Density

# Points per block of the graph-free gradient: large enough for full matmul speed, small enough for the cache.
_BLOCK = 4096


class Flow(Density):
    r"""A latent density through a chain of kernels.

    Gradients of bijective chains come from the kernels' hand-written backward; when the parameters are frozen, as
    :func:`patchflow.fit` leaves them, block by block with constant memory. Values and gradients are those of
    autograd up to rounding, unless the caller asks for lower precision with ``torch.autocast``. Second
    derivatives work, by autograd.

    Args:
        latent: The latent density.
        chain: The kernel from latent to data.
    """

    def __init__(self, latent: Density, chain: Kernel) -> None:
        super().__init__()
        self.latent, self.chain = latent, chain

    def forward(
        self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Minus the log-density of a bijective chain, one path's bound otherwise; see :meth:`Energy.forward`."""
        if torch.is_grad_enabled() and self._by_hand(condition):
            learned = [p for p in self.chain.parameters() if p.requires_grad]
            if learned:
                return _Learning.apply(x, condition, self, *learned)
            if x.requires_grad:
                return _Frozen.apply(x, condition, self)
        return self._by_autograd(x, condition)

    def sample(self, count: int, condition: Tensor | None = None) -> Float[Tensor, "count *event"]:
        """Walk latent samples through the chain; see :meth:`Density.sample`."""
        if condition is not None:
            condition = condition.expand(count, *condition.shape[1:])
        return self.chain(self.latent.sample(count, condition), condition).x

    def _by_autograd(self, x: Tensor, condition: Tensor | None) -> Tensor:
        z, log_ratio = self.chain.reverse(x, condition)
        return self.latent(z, condition) - log_ratio

    def _by_hand(self, condition: Tensor | None) -> bool:
        constant = condition is None or not condition.requires_grad
        latent = not any(p.requires_grad for p in self.latent.parameters())
        return self.chain.bijective and constant and latent


class _Frozen(torch.autograd.Function):
    """A frozen flow's energy, whose gradient in x is computed along with its value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, condition: Tensor | None, flow: Flow) -> Tensor:
        values, gradient = x.new_empty(len(x)), torch.empty_like(x)
        for start in range(0, len(x), _BLOCK):
            block = slice(start, start + _BLOCK)
            y = None if condition is None else condition[block]
            (z, log_ratio), pull = flow.chain.reverse_with_pullback(x[block], y)
            latent, g_z = flow.latent.value_and_grad(z, y)
            values[block] = latent - log_ratio
            gradient[block] = pull(g_z, torch.full_like(log_ratio, -1), None)
        ctx.save_for_backward(x, gradient)
        ctx.flow, ctx.condition = flow, condition
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, gradient = ctx.saved_tensors
        (g,) = grad_outputs
        if torch.is_grad_enabled():  # create_graph: somebody wants second derivatives
            return _differentiable(ctx.flow, x, ctx.condition, g, [])[0], None, None
        return gradient * g.view(-1, *[1] * (x.ndim - 1)), None, None


class _Learning(torch.autograd.Function):
    """A flow's energy with the hand-written backward in x and in the chain's parameters."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, condition: Tensor | None, flow: Flow, *learned: nn.Parameter
    ) -> Tensor:
        (z, log_ratio), ctx.pull = flow.chain.reverse_with_pullback(x, condition)
        latent, g_z = flow.latent.value_and_grad(z, condition)
        ctx.save_for_backward(x, g_z, *learned)
        ctx.flow, ctx.condition = flow, condition
        return latent - log_ratio

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, g_z, *learned = ctx.saved_tensors
        (g,) = grad_outputs
        if torch.is_grad_enabled():
            g_x, *slopes = _differentiable(ctx.flow, x, ctx.condition, g, learned)
            return g_x, None, None, *slopes
        found: Slopes = {}
        g_x = ctx.pull(g_z * g.view(-1, *[1] * (g_z.ndim - 1)), -g, found)
        return g_x, None, None, *(found.get(parameter) for parameter in learned)


def _differentiable(
    flow: Flow, x: Tensor, condition: Tensor | None, g: Tensor, learned: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients by autograd, as a graph."""
    value = flow._by_autograd(x, condition)
    wanted = [tensor for tensor in (x, *learned) if tensor.requires_grad]
    found = iter(torch.autograd.grad(value, wanted, g, create_graph=True, allow_unused=True))
    return tuple(next(found) if tensor.requires_grad else None for tensor in (x, *learned))
