r"""Proximal alternating linearised minimisation: PALM, iPALM, SPRING and its inertial form, block by block.

.. math:: \min_{x_1, \dots, x_s} H(x_1, \dots, x_s) + \sum_{i=1}^{s} f_i(x_i)

with a smooth :math:`H`, which may be a mean over data, and penalties :math:`f_i` with a proximal map. Step :math:`k`
goes through the blocks; for block :math:`i` it looks ahead and descends,

.. math:: z = x_i + \rho \tfrac{k - 1}{k + 2} (x_i - x_i^{\text{old}}), \qquad
          x_i \leftarrow \operatorname{prox}_{c f_i / L_i}\bigl(z - \tfrac{c}{L_i} g_i\bigr),

where :math:`g_i` is the partial gradient of :math:`H` at :math:`z`, with the blocks before :math:`i` already new, or
an estimate of it from a batch (:mod:`patchflow.numerics.gradient_estimators`), and :math:`L_i` is about the Lipschitz
constant of the partial gradient there. The factor :math:`c` is called ``lr``.

============  ============================  =======  ==========  ============
method        function                      ``lr``   inertia     gradient
============  ============================  =======  ==========  ============
PALM          :func:`palm`                  1        0           all data
iPALM         :func:`palm`                  1        1           all data
SPRING        :func:`spring`                0.5      0           batches
inertial      :func:`spring`                0.4      0.5         batches
============  ============================  =======  ==========  ============

References:
    Bolte, Sabach, Teboulle, "Proximal alternating linearized minimization for nonconvex and nonsmooth problems", 2014
    Pock, Sabach, "Inertial proximal alternating linearized minimization (iPALM)", 2016,
    https://arxiv.org/abs/1702.02505
    Driggs, Tang, Liang, Davies, Schoenlieb, "A stochastic proximal alternating minimization for nonsmooth and
    nonconvex optimization" (SPRING), 2021, https://arxiv.org/abs/2002.12266
    Hertrich, Steidl, "Inertial stochastic PALM and applications in machine learning", 2022,
    https://arxiv.org/abs/2005.02204
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from patchflow.errors import InputError, NumericalError
from patchflow.numerics.gradient_estimators import Estimator, Exact, Saga, Sarah, Smooth
from patchflow.palm_optimizer import Block, Curvature, Palm
from patchflow.progress import progress_line


class PalmResult(NamedTuple):
    r"""The record of a run; the blocks hold the solution.

    Attributes:
        steps: Steps taken; one goes through all blocks.
        objective: :math:`H + \sum_i f_i` at the start and each time it was recorded.
        residual: The norm of the generalised gradient :math:`L_i (x_i - \operatorname{prox}_{f_i / L_i}(x_i -
            \nabla_i H / L_i))` of all blocks at the same times; zero at critical points.
        passes: The gradients that it took until then, products with the Hessian included, in units of one gradient of
            all blocks and all data; those for this record are not counted.
        converged: Whether the residual reached the tolerance; None if there is none.
        interrupted: Whether the user stopped it (Ctrl-C).
    """

    steps: int
    objective: list[float]
    residual: list[float]
    passes: list[float]
    converged: bool | None
    interrupted: bool = False


def palm(
    smooth: Callable[[], Tensor],
    blocks: Sequence[Block],
    *,
    lr: float | int = 1.0,
    inertia: float | int = 0.0,
    curvature: Curvature = "hessian",
    powers: int = 1,
    steps: int = 1000,
    tolerance: float | int | None = 1e-6,
    progress: bool = False,
) -> PalmResult:
    """Minimise by PALM, or by iPALM with ``inertia=1``, recording each step.

    Args:
        smooth: The function :math:`H` at the blocks as they are.
        blocks: The blocks, where to start; changed in place.
        lr: See :class:`patchflow.palm_optimizer.Palm`.
        inertia: See there.
        curvature: See there.
        powers: See there.
        steps: Stop after this many steps in any case.
        tolerance: Stop when the norm of the generalised gradient is at most this; None for never.
        progress: Show a progress line.

    Raises:
        InputError: See :class:`patchflow.palm_optimizer.Palm`; or if the number of steps is not positive.
        NumericalError: If the objective, a curvature or a step is not finite.
    """
    optimizer = Palm(blocks, lr=lr, inertia=inertia, curvature=curvature, powers=powers)
    return _run(optimizer, Exact(smooth), steps, 1, tolerance, progress)


def spring(
    smooth: Smooth,
    blocks: Sequence[Block],
    count: int,
    *,
    batch: int,
    estimator: Literal["sarah", "saga"] = "sarah",
    probability: float | int = 0.05,
    every: int | None = None,
    lr: float | int = 0.5,
    inertia: float | int = 0.0,
    curvature: Curvature = "hessian",
    powers: int = 1,
    epochs: int = 50,
    tolerance: float | int | None = None,
    progress: bool = False,
) -> PalmResult:
    """Minimise by SPRING, or by inertial stochastic PALM with ``inertia=0.5, lr=0.4``, recording each epoch.

    An epoch has as many steps as it takes batches to draw ``count`` summands.

    Args:
        smooth: The mean of the summands of given numbers (of all for None), at the blocks as they are.
        blocks: The blocks, where to start; changed in place.
        count: The number of summands.
        batch: How many a step draws, from torch's global generator.
        estimator: See :mod:`patchflow.numerics.gradient_estimators`.
        probability: Of SARAH: that of a full gradient in a step.
        every: Of SARAH: a full gradient each so many steps in any case.
        lr: See :class:`patchflow.palm_optimizer.Palm`.
        inertia: See there.
        curvature: See there.
        powers: See there.
        epochs: Stop after this many epochs in any case.
        tolerance: See :func:`palm`.
        progress: Show a progress line.

    Raises:
        InputError: See :func:`palm`; or if the batch or the probability is out of range.
        NumericalError: See :func:`palm`.
    """
    if estimator not in ("sarah", "saga"):
        raise InputError(f"There is no estimator {estimator!r}; use 'sarah' or 'saga'.")
    optimizer = Palm(blocks, lr=lr, inertia=inertia, curvature=curvature, powers=powers)
    chosen = (
        Saga(smooth, count, batch)
        if estimator == "saga"
        else Sarah(smooth, count, batch, probability=probability, every=every)
    )
    per_epoch = chosen.steps_per_epoch
    return _run(optimizer, chosen, epochs * per_epoch, per_epoch, tolerance, progress)


def _run(
    optimizer: Palm,
    estimator: Estimator,
    steps: int,
    record_every: int,
    tolerance: float | int | None,
    progress: bool,
) -> PalmResult:
    if steps < 1:
        raise InputError(f"The number of steps is {steps} but must be at least 1.")
    objective, residual, passes = [], [], []
    converged, interrupted, step = False, False, 0
    bar = progress_line(total=steps, shown=progress)

    def record() -> None:
        found = optimizer.measure(estimator.whole)
        if not math.isfinite(found[0]):
            raise NumericalError(
                f"The objective is {found[0]} after {step} steps; use a smaller lr than "
                f"{optimizer.defaults['lr']:g}, or another start."
            )
        objective.append(found[0])
        residual.append(found[1])
        passes.append(estimator.passes / len(optimizer.blocks))
        bar.set_postfix({"objective": f"{found[0]:.6g}"}, refresh=False)

    try:
        record()
        for step in range(1, steps + 1):
            optimizer.advance(estimator)
            bar.update()
            if step % record_every == 0:
                record()
                converged = tolerance is not None and residual[-1] <= tolerance
                if converged:
                    break
    except KeyboardInterrupt:
        interrupted = True
    finally:
        bar.close()
    reached = None if tolerance is None else converged
    return PalmResult(step, objective, residual, passes, reached, interrupted)
