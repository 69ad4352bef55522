"""PALM as an optimiser of torch, whose parameter groups are blocks; the theory is in :mod:`patchflow.palm`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from patchflow.errors import InputError, NumericalError
from patchflow.numerics.gradient_estimators import (
    Estimator,
    Exact,
    Terms,
    assign,
    gradient,
    hessian_product,
    value,
)
from patchflow.numerics.proximal_maps import Penalty, free

Curvature = Literal["hessian", "backtracking"]
# Doublings of the constant in one step before backtracking gives up.
_TRIES = 60


class Block(NamedTuple):
    """A block of variables.

    Attributes:
        name: What messages call it.
        tensors: Its tensors, leaves that want gradients, which the methods change in place.
        penalty: The penalty of each tensor, or one for each in their order; none by default.
    """

    name: str
    tensors: Sequence[Tensor]
    penalty: Penalty | Sequence[Penalty] = free()  # noqa: B008 - a constant

    @property
    def penalties(self) -> list[Penalty]:
        """One penalty for each tensor."""
        one = isinstance(self.penalty, Penalty)
        return [self.penalty] * len(self.tensors) if one else list(self.penalty)  # pyright: ignore


class Palm(torch.optim.Optimizer):
    r"""PALM and its inertial form as an optimiser of torch; the parameter groups are the blocks.

    ``step`` takes a closure that returns the loss *without* calling ``backward``. It is evaluated once or more for
    each block, so it must not draw anew.

    >>> import torch
    >>> from patchflow.numerics.proximal_maps import l1
    >>> x = torch.zeros(2, requires_grad=True)
    >>> optimizer = Palm([Block("x", [x], l1(1.0))])
    >>> for _ in range(50):
    ...     loss = optimizer.step(lambda: 0.5 * (x - torch.tensor([3.0, 0.5])).square().sum())
    >>> x.detach().round(decimals=3)
    tensor([2., 0.])

    Args:
        blocks: The blocks.
        lr: The factor :math:`c` of the steps :math:`c / L_i`.
        inertia: The factor :math:`\rho` of the look ahead.
        curvature: How :math:`L_i` is found: ``"hessian"``, by power iteration with products of the partial Hessian
            of the batch, from its gradient; or ``"backtracking"``, the smallest tried :math:`L` with
            :math:`H(x) \le H(z) + \langle \nabla H(z), x - z\rangle + \tfrac L2 \|x - z\|^2`, for losses that cannot be
            differentiated twice.
        powers: Products of the power iteration; 1 as published. Fewer give a smaller constant, and never one that is
            too large.

    Raises:
        InputError: If there is no block, the blocks do not fit together or start where a penalty is infinite, or a
            number is out of range.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        lr: float | int = 1.0,
        inertia: float | int = 0.0,
        curvature: Curvature = "hessian",
        powers: int = 1,
    ) -> None:
        if not 0 < lr < math.inf or not 0 <= inertia <= 1 or powers < 1:
            raise InputError(
                f"Got lr {lr}, inertia {inertia} and {powers} powers; give a positive lr, an inertia in [0, 1], and at "
                "least 1 power."
            )
        if curvature not in ("hessian", "backtracking"):
            raise InputError(
                f"There is no curvature {curvature!r}; use 'hessian' or 'backtracking'."
            )
        _check(blocks)
        super().__init__([{"params": list(b.tensors), "name": b.name} for b in blocks], {"lr": lr})
        self.blocks, self.inertia, self.powers = list(blocks), inertia, powers
        self.curvature: Curvature = curvature

    @property
    def lipschitz(self) -> list[float]:
        """The constants :math:`L_i` of the last step; nan before the first."""
        return [
            float(self.state.get(group["params"][0], {}).get("lipschitz", math.nan))
            for group in self.param_groups
        ]

    def step(self, closure: Callable[[], Tensor]) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Go through all blocks once, with the gradients of a closure.

        Args:
            closure: Returns the loss at the parameters as they are.

        Returns:
            The loss where the first block looked ahead to.

        Raises:
            NumericalError: If a curvature or a step is not finite.
        """
        return self.advance(Exact(closure))

    @torch.no_grad()
    def advance(self, estimator: Estimator) -> float:
        """Go through all blocks once, with estimated gradients; see :meth:`step`.

        Args:
            estimator: What estimates them.
        """
        everything = [p for block in self.blocks for p in block.tensors]
        begun = [p.clone() for p in everything]
        states = {p: dict(self.state[p]) for p in everything}
        try:
            return self._sweep(estimator, everything)
        except BaseException:
            # In between, parameters stand where only a gradient was wanted.
            assign(everything, begun)
            self.state.update(states)
            raise

    def _sweep(self, estimator: Estimator, everything: list[Tensor]) -> float:
        estimator.begin()
        loss = math.nan
        for number, (block, group) in enumerate(zip(self.blocks, self.param_groups, strict=True)):
            params = group["params"]
            old = [p.clone() for p in params]
            for p in params:
                state = self.state[p]
                state["step"] = state.get("step", torch.zeros(())) + 1
                ahead = self.inertia * (state["step"].item() - 1) / (state["step"].item() + 2)
                p.add_(p - state.get("previous", p), alpha=ahead)
            z = [p.clone() for p in params]
            slope, seen = estimator.estimate(number, params, everything)
            if number == 0:
                loss = estimator.seen
            constant = self._constant(number, estimator, params, z, slope, seen)
            # In the state, so that a resume knows it.
            self.state[params[0]]["lipschitz"] = torch.tensor(constant, dtype=torch.float64)
            new = _descend(block, z, slope, group["lr"] / constant)
            assign(params, new)
            for p, before in zip(params, old, strict=True):
                self.state[p]["previous"] = before
        return loss

    @torch.no_grad()
    def measure(self, terms: Terms) -> tuple[float, float]:
        """The objective and the norm of the generalised gradient at the blocks as they are.

        See :class:`patchflow.palm.PalmResult`.

        Args:
            terms: All summands of :math:`H`. Before the first step the constants :math:`L_i` are 1.
        """
        everything = [p for block in self.blocks for p in block.tensors]
        objective, slopes = gradient(terms, everything)
        objective += sum(
            f.value(p) for b in self.blocks for f, p in zip(b.penalties, b.tensors, strict=True)
        )
        if not math.isfinite(objective):
            return objective, math.nan
        squared, rest = 0.0, slopes
        for block, constant in zip(self.blocks, self.lipschitz, strict=True):
            scale = 1.0 if math.isnan(constant) else constant
            own, rest = rest[: len(block.tensors)], rest[len(block.tensors) :]
            moved = _descend(block, block.tensors, own, 1 / scale)
            squared += scale**2 * _distance(block.tensors, moved) ** 2
        return objective, math.sqrt(squared)

    def _constant(
        self,
        number: int,
        estimator: Estimator,
        params: list[Tensor],
        z: list[Tensor],
        slope: list[Tensor],
        seen: list[Tensor],
    ) -> float:
        block, last = self.blocks[number], self.lipschitz[number]
        length = _norm(slope)
        if not math.isfinite(length):
            raise NumericalError(
                f"The gradient in block {block.name!r} is {length}; use a smaller lr than "
                f"{self.param_groups[number]['lr']:g}, or check the data."
            )
        if length == 0:  # nothing to measure, and nothing but the proximal map to do
            return 1.0 if math.isnan(last) else last
        if self.curvature == "backtracking":
            constant = 1.0 if math.isnan(last) else last / 2
            for trial in range(_TRIES):
                new = _descend(block, z, seen, 1 / constant)
                assign(params, new)
                moves = [n - p for n, p in zip(new, z, strict=True)]
                inner = sum(float((g * m).sum()) for g, m in zip(seen, moves, strict=True))
                length = _norm(moves)
                bound = estimator.seen + inner + 0.5 * constant * length**2
                slack = 10 * torch.finfo(z[0].dtype).eps * abs(estimator.seen)
                if trial == 0 and 0.5 * constant * length**2 <= 100 * slack:
                    # Rounding hides the curvature of so small a step: keep the last one.
                    return constant if math.isnan(last) else last
                estimator.passes += estimator.share
                if length > 0 and value(estimator.terms) <= bound + slack:
                    return constant
                constant *= 2
            constant = math.inf
        else:
            direction, constant = seen if _norm(seen) > 0 else slope, math.nan
            for _ in range(self.powers):
                scale = _norm(direction)
                direction = hessian_product(estimator.terms, params, [d / scale for d in direction])
                estimator.passes += estimator.share
                constant = _norm(direction)
                if not 0 < constant < math.inf:
                    break
        if not 0 < constant < math.inf:
            raise NumericalError(
                f"The Lipschitz constant of block {block.name!r} is estimated as {constant}; use "
                "curvature='backtracking', a smaller lr, or another start."
            )
        return constant


def _descend(
    block: Block, z: Sequence[Tensor], slope: Sequence[Tensor], step: float
) -> list[Tensor]:
    new = []
    for f, p, g in zip(block.penalties, z, slope, strict=True):
        moved = f.prox(p - step * g, step)
        if moved.shape != p.shape:
            raise InputError(
                f"The proximal map of block {block.name!r} makes {tuple(moved.shape)} of {tuple(p.shape)}; it must "
                "keep the shape."
            )
        if not bool(moved.isfinite().all()):
            raise NumericalError(
                f"A step of {step:g} in block {block.name!r} is not finite; use a smaller lr, or check its map."
            )
        if math.isinf(f.value(moved)):
            raise InputError(
                f"The proximal map of block {block.name!r} leaves the set where its penalty is finite; give the map "
                "that belongs to the penalty."
            )
        new.append(moved)
    return new


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return _norm([s - t for s, t in zip(a, b, strict=True)])


def _check(blocks: Sequence[Block]) -> None:
    if not any(block.tensors for block in blocks):
        raise InputError("There is no block to minimise in; give at least one, with a tensor.")
    kind = next((t.device, t.dtype) for block in blocks for t in block.tensors)
    for block in blocks:
        if len(block.penalties) != len(block.tensors):
            raise InputError(
                f"Block {block.name!r} has {len(block.tensors)} tensors but {len(block.penalties)} penalties; give one "
                "for each, or one for all."
            )
        for t, f in zip(block.tensors, block.penalties, strict=True):
            if (t.device, t.dtype) != kind:
                raise InputError(
                    f"Block {block.name!r} has a tensor on {t.device} of {t.dtype} but the first one is on {kind[0]} "
                    f"of {kind[1]}; move all blocks to one device and type."
                )
            if not t.requires_grad or not t.is_leaf:
                raise InputError(
                    f"Block {block.name!r} has a tensor that is no leaf with a gradient; call requires_grad_(True) on "
                    "the tensor itself."
                )
            if math.isinf(f.value(t.detach())):
                raise InputError(
                    f"Block {block.name!r} starts where its penalty is infinite; start with its proximal map."
                )
