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
from tqdm import tqdm

from patchflow.energy import Energy
from patchflow.errors import InputError, NumericalError
from patchflow.io.checkpoint import load_into, load_state, save_state
from patchflow.numerics.precision import Precision, autocast

# How often the loss is recorded and the progress line renewed.
_REPORT_EVERY = 50


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
    schedule: str = "cosine",
    warmup: int = 500,
    average: float = 0.0,
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

    Adam with a linear warm-up and a cosine decay to zero (``schedule="cosine"``), or at a constant rate
    (``schedule="constant"``, the published procedure). With validation, the parameters end at their best
    validated state. Interrupting (Ctrl-C) keeps the best state so far. A resumed run ends at the same
    parameters as an uninterrupted one, bit by bit, on a CPU and without ``budget``.

    Args:
        energy: The energy; those of its parameters that want gradients are trained.
        batches: Returns a batch (batch, dim), or a pair of batch and conditions, at each call; randomness from torch's
            global generator.
        steps: Number of steps.
        lr: Peak learning rate.
        schedule: ``"cosine"`` or ``"constant"``.
        warmup: Steps of linear warm-up, at most a tenth of ``steps``.
        average: Decay of an exponential moving average of the parameters; when positive, the average is what is
            validated and kept. 0 switches it off.
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
        InputError: If nothing is trainable, the budget not positive, or ``resume`` has no checkpoint to start from.
        NumericalError: If the loss is not finite; the best state so far is kept in ``energy``.
    """
    parameters = {name: p for name, p in energy.named_parameters() if p.requires_grad}
    if budget is not None and not budget > 0:
        raise InputError(f"The time limit is {budget} s but must be positive; or leave it out.")
    if not parameters:
        raise InputError(
            "Nothing is trainable; call requires_grad_(True) to train a fitted model again."
        )
    if schedule not in ("cosine", "constant"):
        raise InputError(f"The schedule is {schedule!r}; use 'cosine' or 'constant'.")
    run = _Run(energy, parameters, average, lr, precision)
    if resume:
        if checkpoint is None:
            raise InputError(
                "There is nothing to resume from; give the interrupted run's checkpoint."
            )
        run.load(checkpoint)
    bar = tqdm(total=steps, initial=run.step, disable=not progress, unit="step", dynamic_ncols=True)
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
            if run.step % _REPORT_EVERY == 0:
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


class _Run:
    """The state of a training run: everything that a resume needs, and nothing else."""

    def __init__(
        self,
        energy: Energy,
        parameters: dict[str, torch.nn.Parameter],
        average: float,
        lr: float,
        precision: Precision,
    ) -> None:
        self.energy, self.parameters, self.average = energy, parameters, average
        self.precision: Precision = precision
        self.optimizer = torch.optim.Adam(list(parameters.values()), lr=lr, fused=True)
        self.step, self.seconds, self.since_best = 0, 0.0, 0
        self.losses: list[float] = []
        self.block: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self.best = math.nan
        self.random = torch.get_rng_state()
        self.best_state: dict[str, Tensor] | None = None
        self.averaged = (
            {name: p.detach().clone() for name, p in parameters.items()} if average else None
        )

    def advance(self, batch: Tensor | tuple[Tensor, Tensor], lr: float) -> None:
        """One step of Adam."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        x, condition = (batch, None) if isinstance(batch, Tensor) else batch
        with autocast(x, self.precision):
            loss = self.energy(x, condition).mean()
        value = loss.item()
        if not math.isfinite(value):
            raise NumericalError(
                f"The training loss is {value} at step {self.step}; the best state so far is kept: use a smaller lr "
                f"than {self.optimizer.defaults['lr']:g}, or check the data."
            )
        loss.backward()
        self.optimizer.step()
        self.step += 1
        self.block.append(value)
        if self.step % _REPORT_EVERY == 0:
            self.losses.append(sum(self.block) / len(self.block))
            self.block.clear()
        if self.averaged is not None:
            # The decay grows to its value, so that the start is forgotten.
            decay = min(self.average, (1 + self.step) / (10 + self.step))
            for name, p in self.parameters.items():
                self.averaged[name].lerp_(p.detach(), 1 - decay)

    def record(self, validate: Callable[[], float]) -> None:
        """Validate, and remember the state if it is the best."""
        current = {name: p.detach().clone() for name, p in self.parameters.items()}
        if self.averaged is not None:
            self._assign(self.averaged)
        with torch.no_grad():
            value = validate()
        candidate = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._assign(current)
        self.validation.append((self.step, value))
        if not value >= self.best:
            self.best, self.best_state, self.since_best = value, candidate, 0
        else:
            self.since_best += 1

    def keep(self, validate: Callable[[], float] | None) -> None:
        """Leave the energy in its best (or averaged, or last) state, frozen."""
        if validate is not None and self.best_state is not None:
            self._assign(self.best_state)
        elif self.averaged is not None:
            self._assign(self.averaged)
        self.energy.requires_grad_(False)
        for parameter in self.parameters.values():
            parameter.grad = None

    def save(self, path: Path) -> None:
        """Write the state; see :func:`patchflow.io.checkpoint.save_state`."""
        tensors = {f"parameter.{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state[p].items():
                tensors[f"adam.{key}.{name}"] = value
        for prefix, group in (("average", self.averaged), ("best", self.best_state)):
            tensors |= {f"{prefix}.{name}": value for name, value in (group or {}).items()}
        tensors["random"] = self.random
        record = {
            "step": self.step,
            "seconds": self.seconds,
            "since_best": self.since_best,
            "losses": self.losses,
            "block": self.block,
            "validation": self.validation,
            "best": None if math.isnan(self.best) else self.best,
        }
        save_state(path, tensors, record)

    def load(self, path: Path) -> None:
        """Read the state that :meth:`save` wrote."""
        tensors, record = load_state(path)

        def group(prefix: str) -> dict[str, Tensor]:
            start = len(prefix) + 1
            return {
                name[start:]: value
                for name, value in tensors.items()
                if name.startswith(f"{prefix}.")
            }

        state = self.energy.state_dict() | group("parameter")
        load_into(self.energy, state, path)
        for name, p in self.parameters.items():
            self.optimizer.state[p] = {
                key: tensors[f"adam.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }
        if self.averaged is not None:
            self.averaged = group("average")
        self.best_state = group("best") or None
        torch.set_rng_state(tensors["random"])
        self.step, self.seconds = record["step"], record["seconds"]
        self.since_best = record["since_best"]
        self.losses, self.block = record["losses"], record["block"]
        self.validation = [(step, value) for step, value in record["validation"]]
        self.best = math.nan if record["best"] is None else record["best"]

    @torch.no_grad()
    def _assign(self, state: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(state[name])
