r"""Lower an energy in x.

``minimize`` takes one energy, or several that it cycles through: an incremental method for their mean. With
the phases of a patch grid, :math:`E_k = D + w R_k`, each step evaluates a few of the patches and the mean is
the full energy:

.. code-block:: python

    x = pf.minimize([likelihood + 0.1 * phase for phase in prior.phases()], init, condition=y).x

References:
    Kingma, Ba, "Adam: a method for stochastic optimization", 2015, https://arxiv.org/abs/1412.6980
    Liu, Nocedal, "On the limited memory BFGS method for large scale optimization", 1989
    Bertsekas, "Incremental gradient, subgradient, and proximal methods for convex optimization", 2011
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Energy
from patchflow.errors import InputError, NumericalError
from patchflow.progress import progress_line
from patchflow.solution import Solution


def minimize(
    energy: Energy | Sequence[Energy],
    init: Float[Tensor, "batch *event"],
    condition: Tensor | None = None,
    *,
    method: Literal["adam", "lbfgs"] = "adam",
    steps: int = 400,
    lr: float = 0.01,
    schedule: Literal["cosine", "constant"] = "cosine",
    tolerance: float = 0.0,
    callback: Callable[[int, Tensor, float], Mapping[str, str] | None] | None = None,
    progress: bool = False,
) -> Solution:
    r"""Lower :math:`E(x \mid y)` in :math:`x`, starting at ``init``.

    Args:
        energy: The energy, or energies to cycle through (their mean is lowered; Adam only).
        init: The start, with a leading batch axis; not modified.
        condition: The measurement :math:`y`.
        method: ``"adam"``, or ``"lbfgs"`` with a strong Wolfe line search.
        steps: Number of steps (for L-BFGS: iterations).
        lr: Adam's peak step, in units of x. L-BFGS uses a first step of 1.
        schedule: Adam's steps: ``"cosine"`` decays from ``lr`` to zero, ``"constant"`` is the published procedure.
        tolerance: Stop when the relative change of x in one pass over the energies is at most this; with 0, only when
            nothing moves.
        callback: Called after each step with its number, the current x and the energy before the step; what it returns
            is shown in the progress line.
        progress: Show a progress line.

    Returns:
        The last point, the energies (summed over the batch) along the way, and whether ``tolerance`` was reached (None
        if it is 0 and x still moved). When interrupted (Ctrl-C), the point so far.

    Raises:
        InputError: If there is no energy, L-BFGS is given several, or a name is unknown.
        NumericalError: If the energy is not finite.
    """
    energies = [energy] if isinstance(energy, Energy) else list(energy)
    if not energies:
        raise InputError("There is no energy to lower; give one or a sequence of them.")
    if method not in ("adam", "lbfgs") or schedule not in ("cosine", "constant"):
        raise InputError(
            f"The method is {method!r} and the schedule {schedule!r}; use 'adam' or 'lbfgs', 'cosine' or 'constant'."
        )
    if method == "lbfgs" and len(energies) > 1:
        raise InputError(
            f"L-BFGS needs one energy but got {len(energies)}; give their sum, or use method='adam'."
        )
    x = init.detach().clone().requires_grad_(True)
    if method == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam([x], lr=lr)
    else:
        optimizer = torch.optim.LBFGS([x], max_iter=1, line_search_fn="strong_wolfe")
    history: list[float] = []
    converged = interrupted = False
    before = x.detach().clone()
    bar = progress_line(total=steps, shown=progress)
    try:
        for step in range(steps):
            current = energies[step % len(energies)]
            if method == "adam" and schedule == "cosine":
                optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))

            def closure(current: Energy = current, step: int = step) -> float:
                value, x.grad = current.value_and_grad(x, condition)
                total = value.sum().item()
                if not math.isfinite(total):
                    raise NumericalError(
                        f"The energy is {total} at step {step}; try a smaller lr than {lr:g}, or check the data."
                    )
                return total

            # The stubs want a tensor; any float will do, and a tensor would be converted at once.
            history.append(float(optimizer.step(closure)))  # pyright: ignore
            shown = {"energy": f"{history[-1]:.5g}"}
            if callback is not None:
                shown |= callback(step, x.detach(), history[-1]) or {}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if (step + 1) % len(energies) == 0:
                moved = (x.detach() - before).norm() / before.norm().clamp_min(1e-30)
                converged = bool(moved <= tolerance)
                if converged:
                    break
                before.copy_(x.detach())
    except KeyboardInterrupt:
        # What has been computed is worth keeping; the caller sees it.
        interrupted = True
    finally:
        bar.close()
    reached = converged if converged or tolerance > 0 else None
    return Solution(x.detach(), history, len(history), reached, interrupted)
