"""The state of a training run of :func:`patchflow.fit.fit`: one step, validation, and its file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from patchflow.energy import Energy
from patchflow.errors import InputError, NumericalError
from patchflow.io.checkpoint import load_into, load_state, save_state
from patchflow.numerics.precision import Precision, autocast
from patchflow.palm_optimizer import Palm

# How often the loss is recorded and the progress line renewed.
REPORT_EVERY = 50
# Makes the optimiser of the trainable parameters, which it is given by name.
MakeOptimizer = Callable[[dict[str, torch.nn.Parameter]], torch.optim.Optimizer]


class TrainingRun:
    """The state of a training run: everything that a resume needs, and nothing else."""

    def __init__(
        self,
        energy: Energy,
        parameters: dict[str, torch.nn.Parameter],
        average: float,
        lr: float,
        precision: Precision,
        optimizer: MakeOptimizer | None,
        clip: float | None,
    ) -> None:
        self.clip = clip
        self.energy, self.parameters, self.average = energy, parameters, average
        self.precision: Precision = precision
        self.peak = lr
        self.optimizer = (
            torch.optim.Adam(list(parameters.values()), lr=lr, fused=True)
            if optimizer is None
            else optimizer(parameters)
        )
        if clip is not None and isinstance(self.optimizer, Palm):
            raise InputError(
                f"The largest norm of gradients is {clip} but PALM has no gradients to shorten; leave clip out."
            )
        self.kind = type(self.optimizer).__name__.lower()
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
        """One step of the optimiser."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x, condition = (batch, None) if isinstance(batch, Tensor) else batch

        def loss() -> Tensor:
            with autocast(x, self.precision):
                return self.energy(x, condition).mean()

        if isinstance(self.optimizer, Palm):
            value = self.optimizer.step(loss)
        else:
            self.optimizer.zero_grad(set_to_none=True)
            computed = loss()
            value = computed.item()
            if math.isfinite(value):
                computed.backward()
                if self.clip is not None:
                    torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.clip)
                self.optimizer.step()
        if not math.isfinite(value):
            raise NumericalError(
                f"The training loss is {value} at step {self.step}; the best state so far is kept: use a smaller lr "
                f"than {self.peak:g}, or check the data."
            )
        self.step += 1
        self.block.append(value)
        if self.step % REPORT_EVERY == 0:
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
                tensors[f"{self.kind}.{key}.{name}"] = value
        for prefix, group in (("average", self.averaged), ("best", self.best_state)):
            tensors |= {f"{prefix}.{name}": value for name, value in (group or {}).items()}
        tensors |= {f"buffer.{name}": value for name, value in self._buffers().items()}
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

        state = self.energy.state_dict() | group("parameter") | group("buffer")
        load_into(self.energy, state, path)
        if record["step"] and not any(key.startswith(f"{self.kind}.") for key in tensors):
            raise InputError(
                f"{path} holds the state of another optimiser than {self.kind}; resume with the one it began with."
            )
        for name, p in self.parameters.items():
            self.optimizer.state[p] = {
                key.split(".")[1]: value
                for key, value in tensors.items()
                if key.split(".", 2)[::2] == [self.kind, name]
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

    def _buffers(self) -> dict[str, Tensor]:
        """What the energy learns without gradients, such as the potentials of transport."""
        kept = self.energy.state_dict().keys()
        return {name: value for name, value in self.energy.named_buffers() if name in kept}

    @torch.no_grad()
    def _assign(self, state: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(state[name])
