r"""Lower an energy in its parameters.

The mean energy of a flow over data is its maximum-likelihood loss, so one function trains every model:

>>> import torch
>>> from patchflow.chains.bijections import AffineCoupling
>>> from patchflow.chains.flow import Flow
>>> from patchflow.priors.gaussian import StandardNormal
>>> _ = torch.manual_seed(0)
>>> flow = Flow(StandardNormal(2), AffineCoupling(2, hidden=8))
>>> result = fit(flow, lambda: 0.5 * torch.randn(64, 2), steps=200, warmup=5)
>>> result.losses[-1] < result.losses[0]
True
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from patchflow.energy import Energy
from patchflow.errors import InputError, NumericalError
from patchflow.numerics.precision import Precision
from patchflow.progress import progress_line
from patchflow.training_run import REPORT_EVERY, MakeOptimizer, TrainingRun


class Fit(NamedTuple):
    """What a training run did.

    Attributes:
        steps: Steps taken in all, including those before a resume.
        losses: Mean training loss (nats per sample) of each block of 50 steps.
        validation: Pairs of step and validation loss.
        best: The best validation loss, or nan without validation.
        seconds: Time spent in all, including that before a resume.
        stopped: Why it ended: ``"finished"``, ``"budget"``, ``"patience"`` or ``"interrupted"``.
    """

    steps: int
    losses: list[float]
    validation: list[tuple[int, float]]
    best: float
    seconds: float
    stopped: str


def fit(
    energy: Energy,
    batches: Callable[[], Tensor | tuple[Tensor, Tensor]],
    *,
    steps: int,
    lr: float = 1e-3,
    optimizer: MakeOptimizer | None = None,
    schedule: str = "cosine",
    warmup: int = 500,
    average: float = 0.0,
    clip: float | None = None,
    validate: Callable[[], float] | None = None,
    validate_every: int = 500,
    patience: int | None = None,
    budget: float | None = None,
    precision: Precision = "float32",
    checkpoint: Path | None = None,
    checkpoint_every: float = 30.0,
    resume: bool = False,
    progress: bool = False,
) -> Fit:
    r"""Lower the mean of ``energy`` over random batches in its parameters, and leave them frozen.

    Adam (or another optimiser) with a linear warm-up and a cosine decay to zero (``schedule="cosine"``), or at a
    constant rate (``schedule="constant"``, the published procedure). With validation, the parameters end at their best
    validated state. Interrupting (Ctrl-C) keeps the best state so far. A resumed run ends at the same
    parameters as an uninterrupted one, bit by bit, on a CPU and without ``budget``.

    Args:
        energy: The energy; those of its parameters that want gradients are trained.
        batches: Returns a batch (batch, dim), or a pair of batch and conditions, at each call; randomness from torch's
            global generator.
        steps: Number of steps.
        lr: Peak learning rate; of :class:`patchflow.palm_optimizer.Palm` the peak of its factor of the step, about 0.5.
        optimizer: Makes the optimiser of the trainable parameters, given by name; Adam by default. With
            ``lambda parameters: Palm([Block("all", list(parameters.values()))])`` it is PALM on each batch.
        schedule: ``"cosine"`` or ``"constant"``.
        warmup: Steps of linear warm-up, at most a tenth of ``steps``.
        average: Decay of an exponential moving average of the parameters; when positive, the average is what is
            validated and kept. 0 switches it off.
        clip: Shorten gradients whose norm is larger to this norm; PALM chooses its steps itself and takes none.
        validate: Returns the validation loss of the energy as it stands when called.
        validate_every: Steps between validations.
        patience: Stop after this many validations without a new best.
        budget: Stop, with the schedule run to its end, after about this many seconds even if steps remain.
        precision: Precision of the networks during training; validation is exact. See
            :func:`patchflow.numerics.precision.autocast`.
        checkpoint: File for the training state, written every ``checkpoint_every`` seconds and when interrupted.
        checkpoint_every: Seconds between checkpoints.
        resume: Continue from ``checkpoint``.
        progress: Show a progress line.

    Returns:
        The record of the run.

    Raises:
        InputError: If nothing is trainable, the budget or ``clip`` not positive, PALM is to clip, or ``resume`` has no
            checkpoint to start from.
        NumericalError: If the loss is not finite; the best state so far is kept in ``energy``.
    """
    parameters = {name: p for name, p in energy.named_parameters() if p.requires_grad}
    if budget is not None and not budget > 0:
        raise InputError(f"The time limit is {budget} s but must be positive; or leave it out.")
    if not 0 < lr < math.inf or steps < 1:
        raise InputError(
            f"Got {steps} steps at a learning rate of {lr}; use at least one, and a positive rate."
        )
    if not parameters:
        raise InputError(
            "Nothing is trainable; call requires_grad_(True) to train a fitted model again."
        )
    if schedule not in ("cosine", "constant"):
        raise InputError(f"The schedule is {schedule!r}; use 'cosine' or 'constant'.")
    if clip is not None and not clip > 0:
        raise InputError(f"The largest norm of gradients is {clip} but must be positive.")
    run = TrainingRun(energy, parameters, average, lr, precision, optimizer, clip)
    if resume:
        if checkpoint is None:
            raise InputError(
                "There is nothing to resume from; give the interrupted run's checkpoint."
            )
        run.load(checkpoint)
    bar = progress_line(total=steps, initial=run.step, shown=progress)
    warmup = max(1, min(warmup, steps // 10))
    stopped = "finished"
    started = saved = time.perf_counter()
    before = run.seconds
    try:
        while run.step < steps:
            run.seconds = before + time.perf_counter() - started
            done = max(run.step / steps, run.seconds / budget if budget else 0.0)
            if done >= 1:
                stopped = "budget"
                break
            rate = min(1.0, (run.step + 1) / warmup)
            if schedule == "cosine":
                rate *= 0.5 * (1 + math.cos(math.pi * done))
            run.random = torch.get_rng_state()  # an interrupted step is resumed at its beginning
            run.advance(batches(), lr * rate)
            if run.step % REPORT_EVERY == 0:
                bar.update(run.step - bar.n)
                shown = {} if math.isnan(run.best) else {"best": f"{run.best:.2f}"}
                bar.set_postfix(shown, loss=f"{run.losses[-1]:.2f}", refresh=False)
            if validate is not None and (run.step % validate_every == 0 or run.step == steps):
                run.record(validate)
                if patience is not None and run.since_best >= patience:
                    stopped = "patience"
                    break
            if checkpoint is not None and time.perf_counter() - saved > checkpoint_every:
                run.random = torch.get_rng_state()
                run.save(checkpoint)
                saved = time.perf_counter()
    except KeyboardInterrupt:
        stopped = "interrupted"
        if checkpoint is not None:
            run.save(checkpoint)
    except NumericalError:
        run.keep(validate)
        raise
    finally:
        bar.close()
    run.seconds = before + time.perf_counter() - started
    if stopped == "budget" and validate is not None:
        run.record(validate)
    run.keep(validate)
    return Fit(run.step, run.losses, run.validation, run.best, run.seconds, stopped)
