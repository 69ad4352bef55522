"""Learn the posteriors of all measurements of a problem: simulate, fit, adapt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.chains.adaptation import adapt
from patchflow.chains.flow import Flow, PathKL
from patchflow.chains.kernel import Chain
from patchflow.energy import Density, Energy
from patchflow.errors import InputError
from patchflow.fit import Fit, fit
from patchflow.posterior_models import joint_batches, prepare
from patchflow.problems.likelihood import Likelihood

# Simulations from which features are initialised, and on which training is validated.
_SIMULATIONS = 20_000


def learn_posterior(
    flow: Flow,
    likelihood: Likelihood,
    prior: Density,
    *,
    batch: int = 1024,
    steps: int = 5000,
    seconds: float | None = None,
    lr: float = 2e-3,
    average: float = 0.999,
    reverse: float = 0.0,
    simulations: int | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Fit:
    r"""Fit a conditional flow to the joint law of parameters and measurements, and adapt its Metropolis kernels.

    Lowers the forward path divergence :math:`E_y\, KL(P_{(Y_0..Y_T) \mid y}, P_{(X_0..X_T) \mid y})`, plus
    ``reverse`` times
    the reverse one, over fresh simulations; then the step sizes are adapted over random measurements.

    Args:
        flow: What :func:`patchflow.conditional_snf` returned.
        likelihood: The likelihood that simulates.
        prior: The prior.
        batch: Simulations per step.
        steps: Training steps.
        seconds: Time limit; the learning-rate schedule ends with it.
        lr: Peak learning rate.
        average: Decay of the moving average of the parameters; 0 for none.
        reverse: Weight of the reverse divergence; it needs a differentiable forward model.
        simulations: A fixed number of simulations to train on, a tenth of them for validation; fresh ones by default.
        checkpoint: File for the training state.
        resume: Continue from ``checkpoint``.
        progress: Show a progress line.

    Returns:
        The record of the run.

    Raises:
        InputError: If a simulated measurement is not finite, or an argument is out of range.
        NumericalError: If the loss is not finite, or a Metropolis kernel rejects everything.
    """
    if simulations is not None and simulations < 1000:
        raise InputError(
            f"{simulations} simulations are too few to learn from; give at least 1000."
        )
    count = _SIMULATIONS if simulations is None else simulations
    x, y = joint_batches(prior, likelihood, count)()
    prepare(flow, x, y)
    held = count // 10
    fresh = joint_batches(prior, likelihood, batch)

    def stored() -> tuple[Tensor, Tensor]:
        k = torch.randint(held, count, (batch,))
        return x[k], y[k]

    energy: Energy = PathKL(flow, forward=1.0, reverse=reverse) if reverse else flow
    plain = _learned_part(flow)
    result = fit(
        energy,
        fresh if simulations is None else stored,
        steps=steps,
        lr=lr,
        warmup=min(200, steps // 10),
        average=average,
        validate=lambda: plain(x[:held], y[:held]).mean().item(),
        validate_every=max(50, min(500, steps // 20)),
        budget=seconds,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )
    if result.stopped != "interrupted":
        try:
            adapt(flow, lambda: y[torch.randint(count, (256,))])
        except KeyboardInterrupt:
            # What was learned is worth keeping, with step sizes as far as they have come.
            return result._replace(stopped="interrupted")
    return result


def fit_layerwise(
    flow: Flow,
    batches: Callable[[], tuple[Tensor, Tensor | None]],
    *,
    steps: int,
    lr: float = 1e-3,
) -> list[Fit]:
    r"""Train a chain with Metropolis kernels segment by segment, without differentiating through them.

    The kernels between two Metropolis kernels with energies :math:`E_{k-1}` and :math:`E_k` are to carry
    :math:`e^{-E_{k-1}}` to :math:`e^{-E_k}`. From the data end: data walk back to the segment, and the segment lowers
    the forward divergence with :math:`e^{-E_{k-1}}` (for the first one: the latent law) as its latent law.

    Args:
        flow: A flow whose chain holds Metropolis kernels.
        batches: Batches of the joint law.
        steps: Steps for each segment.
        lr: Peak learning rate.

    Returns:
        The records, from the last segment to the first.

    Raises:
        InputError: If the chain is a single kernel.
    """
    chain = flow.trained
    if not isinstance(chain, Chain):
        raise InputError(
            "Training by layers needs a Chain of several kernels; use fit for a single one."
        )
    results, end = [], len(chain)
    while end > 0:
        start = end
        while start > 0 and chain[start - 1].invariant is None:
            start -= 1
        # The Metropolis kernel before the segment says which law the segment starts from.
        before = flow.latent if start == 0 else chain[start - 1].invariant
        assert before is not None
        if start < end:
            segment = _Segment(before, Chain(*(chain[k] for k in range(start, end))))
            if any(p.requires_grad for p in segment.chain.parameters()):
                results.append(
                    fit(segment, _walked_back(chain, end, batches), steps=steps, lr=lr, warmup=100)
                )
        end = start - 1
    return results


class _Segment(Energy):
    """The forward loss of a part of a chain, whose latent law need not be normalised."""

    def __init__(self, before: Energy, chain: Chain) -> None:
        super().__init__()
        self.chain = chain
        # Not a submodule: what the segment starts from is not trained with it.
        self._before = (before,)

    def forward(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """One path's loss; see :meth:`Energy.forward`."""
        z, log_ratio, _ = self.chain.reverse(x, condition)
        return self._before[0](z, condition) - log_ratio


def _walked_back(
    chain: Chain, end: int, batches: Callable[[], tuple[Tensor, Tensor | None]]
) -> Callable[[], Tensor | tuple[Tensor, Tensor]]:
    @torch.no_grad()
    def draw() -> Tensor | tuple[Tensor, Tensor]:
        x, y = batches()
        for k in range(len(chain) - 1, end - 1, -1):
            x = chain[k].reverse(x, y).x
        return x if y is None else (x, y)

    return draw


def _learned_part(flow: Flow) -> Flow:
    """The flow without its last invariant kernels, whose log-ratios would only add noise to validation."""
    return Flow(flow.latent, flow.trained, target=flow.target)
