r"""Estimators of the partial gradients of a mean over data, :math:`H(x) = \frac1n \sum_{j=1}^n h_j(x)`.

For block :math:`i`, at the point :math:`z_k` of step :math:`k`, with a random batch :math:`B` of :math:`b` of the
:math:`n` summands and :math:`H_B` their mean:

- :class:`Exact`: :math:`\nabla_i H(z_k)`.
- :class:`Sarah`: :math:`g_k = \nabla_i H(z_k)` in the first step, with probability :math:`1/p`, and each given number
  of steps; else :math:`g_k = g_{k-1} + \nabla_i H_B(z_k) - \nabla_i H_B(z_{k-1})`. Given the past it is biased by the
  error of :math:`g_{k-1}`: :math:`\mathbb{E}[g_k] - \nabla_i H(z_k) = g_{k-1} - \nabla_i H(z_{k-1})`.
- :class:`Saga`: with a partition of the data into :math:`m` batches, of which the j-th has its last gradient
  :math:`t_j` in a table, :math:`g_k = m w_j (\nabla_i H_j(z_k) - t_j) + \sum_l w_l t_l` with the share :math:`w_j` of
  the data in batch :math:`j`, which is drawn uniformly. It is unbiased.

References:
    Nguyen, Liu, Scheinberg, Takac, "SARAH: a novel method for machine learning problems using stochastic recursive
    gradient", 2017, https://arxiv.org/abs/1703.00102
    Defazio, Bach, Lacoste-Julien, "SAGA: a fast incremental gradient method", 2014, https://arxiv.org/abs/1407.0202
    Driggs, Tang, Liang, Davies, Schoenlieb, "A stochastic proximal alternating minimization for nonsmooth and
    nonconvex optimization", 2021, https://arxiv.org/abs/2002.12266
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from patchflow.errors import InputError

# The mean of the summands of given numbers, or of all (None), at the parameters as they are.
Smooth = Callable[[Tensor | None], Tensor]
# Summands of H as weights and functions of the parameters, which the estimators evaluate one after the other.
Terms = list[tuple[float, Callable[[], Tensor]]]


def value(terms: Terms) -> float:
    """The weighted sum of terms."""
    with torch.no_grad():
        return sum(weight * float(term()) for weight, term in terms)


def gradient(terms: Terms, tensors: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """The weighted sum of terms, and its gradient in some of the parameters."""
    total, sums = 0.0, [torch.zeros_like(p) for p in tensors]
    with torch.enable_grad():
        for weight, term in terms:
            h = term()
            total += weight * float(h.detach())
            for s, g in zip(sums, torch.autograd.grad(h, tensors), strict=True):
                s.add_(g, alpha=weight)
    return total, sums


def hessian_product(
    terms: Terms, tensors: Sequence[Tensor], direction: Sequence[Tensor]
) -> list[Tensor]:
    """The product of the Hessian in some of the parameters with a direction, by differentiating twice."""
    sums = [torch.zeros_like(p) for p in tensors]
    with torch.enable_grad():
        for weight, term in terms:
            slopes = torch.autograd.grad(term(), tensors, create_graph=True)
            inner = torch.stack([(s * d).sum() for s, d in zip(slopes, direction, strict=True)])
            if not inner.requires_grad:
                continue  # linear in these parameters
            products = torch.autograd.grad(
                inner.sum(), tensors, allow_unused=True, materialize_grads=True
            )
            for s, h in zip(sums, products, strict=True):
                s.add_(h, alpha=weight)
    return sums


class Estimator(ABC):
    """Estimates partial gradients from batches; called once for each block of each step, in their order.

    Attributes:
        terms: What the estimate of this step looks at, also for the curvature.
        share: The share of all data that is.
        seen: The value of the terms where the last gradient was wanted.
        passes: Gradients evaluated so far, in units of one block's gradient of all data.
    """

    terms: Terms

    def __init__(self) -> None:
        self.terms, self.share, self.seen, self.passes = [], 1.0, math.nan, 0.0

    def _here(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        self.passes += self.share
        self.seen, found = gradient(self.terms, tensors)
        return found

    @abstractmethod
    def begin(self) -> None:
        """Begin a step: draw its batch."""

    @abstractmethod
    def estimate(
        self, block: int, tensors: Sequence[Tensor], everything: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Estimate the partial gradient of a block.

        Args:
            block: The number of the block.
            tensors: The tensors of the block, at the point where the gradient is wanted.
            everything: The tensors of all blocks, which :math:`H` depends on.

        Returns:
            The estimate, and the gradient of the terms alone.
        """

    @property
    @abstractmethod
    def whole(self) -> Terms:
        """All the data, to tell the objective."""


class Exact(Estimator):
    """The gradient of all the data; or of one closure, whatever batch it looks at.

    Args:
        smooth: The function :math:`H`.
    """

    def __init__(self, smooth: Callable[[], Tensor]) -> None:
        super().__init__()
        self.terms = [(1.0, smooth)]

    def begin(self) -> None:
        """Nothing is drawn."""

    def estimate(
        self, block: int, tensors: Sequence[Tensor], everything: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The gradient; see :meth:`Estimator.estimate`."""
        found = self._here(tensors)
        return found, found

    @property
    def whole(self) -> Terms:
        """The terms themselves."""
        return self.terms


class _Batched(Estimator):
    def __init__(self, smooth: Smooth, count: int, batch: int) -> None:
        super().__init__()
        if not 1 <= batch <= count:
            raise InputError(
                f"A batch of {batch} from {count} summands is not possible; use 1 to {count}."
            )
        self.smooth, self.count, self.batch = smooth, count, batch
        self.parts = torch.randperm(count).split(batch)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which as many summands are drawn as there are."""
        return len(self.parts)

    @property
    def whole(self) -> Terms:
        """All data, batch by batch, in bounded memory."""
        return [self._term(part, len(part) / self.count) for part in self.parts]

    def _term(self, index: Tensor, weight: float) -> tuple[float, Callable[[], Tensor]]:
        return weight, lambda: self.smooth(index)


class Sarah(_Batched):
    """The estimator of SARAH; see the module.

    Args:
        smooth: The mean of the summands of given numbers, at the parameters as they are.
        count: The number :math:`n` of summands.
        batch: The batch size :math:`b`.
        probability: The probability :math:`1/p` of a full gradient.
        every: A full gradient each so many steps in any case; None for never but in the first.

    Raises:
        InputError: If the batch, the probability or ``every`` is out of range.
    """

    def __init__(
        self,
        smooth: Smooth,
        count: int,
        batch: int,
        *,
        probability: float | int = 0.05,
        every: int | None = None,
    ) -> None:
        super().__init__(smooth, count, batch)
        if not 0 <= probability <= 1 or (every is not None and every < 1):
            raise InputError(
                f"Got the probability {probability} and a full gradient every {every} steps; give a probability in "
                "[0, 1], and at least 1 step."
            )
        self.probability, self.every, self.step, self.full = probability, every, 0, True
        # Of each block: the last estimate, and the values of all tensors where it was made.
        self.last: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def begin(self) -> None:
        """Draw the batch, and whether to take all data instead."""
        forced = self.step == 0 or (self.every is not None and self.step % self.every == 0)
        self.full = forced or float(torch.rand(())) < self.probability
        self.step += 1
        index = torch.randperm(self.count)[: self.batch]
        self.terms = self.whole if self.full else [self._term(index, 1.0)]
        self.share = 1.0 if self.full else self.batch / self.count

    def estimate(
        self, block: int, tensors: Sequence[Tensor], everything: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The recursive estimate; see :meth:`Estimator.estimate`."""
        found = self._here(tensors)
        result = found
        here = [p.detach().clone() for p in everything]
        if not self.full:
            self.passes += self.share
            before, there = self.last[block]
            assign(everything, there)
            old = gradient(self.terms, tensors)[1]
            assign(everything, here)
            result = [b + f - o for b, f, o in zip(before, found, old, strict=True)]
        self.last[block] = result, here
        return result, found


class Saga(_Batched):
    """The estimator of SAGA on a partition of the data into batches; see the module.

    The table is filled in the first step, by a full gradient; it holds one gradient for each batch and block.

    Args:
        smooth: The mean of the summands of given numbers, at the parameters as they are.
        count: The number :math:`n` of summands.
        batch: The size of a batch; 1 is SAGA as published. The last one may be smaller.

    Raises:
        InputError: If the batch is out of range.
    """

    def __init__(self, smooth: Smooth, count: int, batch: int) -> None:
        super().__init__(smooth, count, batch)
        self.shares = [len(part) / count for part in self.parts]
        self.tables: dict[int, list[list[Tensor]]] = {}
        self.means: dict[int, list[Tensor]] = {}
        self.chosen: int | None = None
        self.started = False

    def begin(self) -> None:
        """Draw a batch of the partition."""
        if not self.started:
            self.started, self.terms = True, self.whole
            return
        self.chosen = int(torch.randint(len(self.parts), ()))
        self.terms = [self._term(self.parts[self.chosen], 1.0)]
        self.share = self.shares[self.chosen]

    def estimate(
        self, block: int, tensors: Sequence[Tensor], everything: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The estimate with the table; see :meth:`Estimator.estimate`."""
        if self.chosen is None:
            self.passes += 1
            single = [gradient([(1.0, term)], tensors) for _, term in self.terms]
            self.seen = sum(w * h for w, (h, _) in zip(self.shares, single, strict=True))
            table = [found for _, found in single]
            mean = [
                torch.stack([w * g for w, g in zip(self.shares, column, strict=True)]).sum(0)
                for column in zip(*table, strict=True)
            ]
            self.tables[block], self.means[block] = table, mean
            return [m.clone() for m in mean], mean
        share = self.share
        found = self._here(tensors)
        old, means = self.tables[block][self.chosen], self.means[block]
        scale = len(self.parts) * share
        result = [m + scale * (f - o) for m, f, o in zip(means, found, old, strict=True)]
        for m, f, o in zip(means, found, old, strict=True):
            m.add_(f - o, alpha=share)
        self.tables[block][self.chosen] = found
        return result, found


@torch.no_grad()
def assign(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Give parameters new values, in place."""
    for p, v in zip(tensors, values, strict=True):
        p.copy_(v)
