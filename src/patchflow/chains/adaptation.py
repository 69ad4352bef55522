"""Step sizes that accept neither everything nor nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from patchflow.chains.flow import Flow
from patchflow.chains.kernel import Chain, Kernel
from patchflow.chains.proposals import StepSize
from patchflow.errors import NumericalError

# Acceptance at which random walks and MALA mix well (0.23 and 0.57 in high dimensions, more in low ones).
TARGET = 0.6


def adapt(
    flow: Flow,
    conditions: Callable[[], Tensor | None],
    *,
    count: int = 256,
    rounds: int = 60,
    target: float = TARGET,
) -> dict[int, float]:
    r"""Adapt the step sizes of the Metropolis kernels in a chain to an acceptance rate, from the first to the last.

    Robbins-Monro steps on :math:`\log\tau`, or on the network of :math:`\log\tau(y)`, that raise it where more than
    ``target`` is accepted and lower it where less is. Afterwards the step sizes are constants, so that weights and
    invariance hold exactly.

    Args:
        flow: The flow; its chain is walked from the latent law.
        conditions: Returns measurements, (count, ...), (1, ...) or ``None``, at each call: always the same for one
            measurement, random ones for step sizes that depend on them.
        count: Walks at a time.
        rounds: Steps of adaptation for each kernel.
        target: The acceptance rate to reach.

    Returns:
        The acceptance rate of each kernel, by its place in the chain.

    Raises:
        NumericalError: If a kernel accepts less than 1 % after the adaptation.
    """
    kernels = list(flow.chain) if isinstance(flow.chain, Chain) else [flow.chain]
    rates: dict[int, float] = {}

    @torch.no_grad()
    def walk(place: int) -> tuple[Tensor, Tensor | None]:
        y = conditions()
        y = None if y is None else y.expand(count, *y.shape[1:])
        x = flow.latent.sample(count, y)
        for kernel in kernels[:place]:
            x = kernel(x, y).x
        return x, y

    for place, kernel in enumerate(kernels):
        steps = [module for module in kernel.modules() if isinstance(module, StepSize)]
        if not steps or kernel.walk(*walk(place))[1] is None:
            continue
        _adapt_one(kernel, steps, lambda place=place: walk(place), rounds, target)
        with torch.no_grad():
            _, accepted = kernel.walk(*walk(place))
        assert accepted is not None
        rates[place] = accepted.mean().item()
        if rates[place] < 0.01:
            raise NumericalError(
                f"Kernel {place} of the chain accepts {100 * rates[place]:.2g} % of its steps even after adaptation; "
                "start it nearer to its target: more intermediate targets, or a longer training."
            )
    return rates


def _adapt_one(
    kernel: Kernel,
    steps: list[StepSize],
    start: Callable[[], tuple[Tensor, Tensor | None]],
    rounds: int,
    target: float,
) -> None:
    optimizers = [
        torch.optim.Adam(step.net.parameters(), lr=3e-3) for step in steps if step.net is not None
    ]
    x, y = start()
    for k in range(rounds):
        # Several rounds on one start: walking there is the expensive part of a long chain.
        if k % 4 == 0:
            x, y = start()
        with torch.no_grad():
            moved, accepted = kernel.walk(x, y)
        assert accepted is not None
        x = moved.x
        surplus = accepted - target
        for step in steps:
            with torch.no_grad():
                step.log_value += 4 * surplus.mean() / (1 + k) ** 0.6
            if step.net is not None and y is not None:
                step.net.requires_grad_(True)
                loss = -(surplus * step.net(y)[:, 0]).mean()
                loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for step in steps:
        if step.net is not None:
            step.net.requires_grad_(False)
