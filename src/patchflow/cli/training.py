"""What the commands ``patchflow train`` have in common: images to read, a model to fit and to write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from patchflow import models
from patchflow.cli.config import command_line, write_config
from patchflow.cli.options import check_output, start, value_range
from patchflow.cli.slices import Slices, read_slices
from patchflow.errors import InputError, NumericalError
from patchflow.fit import Fit
from patchflow.io.images import check_varies
from patchflow.numerics.patches import hold_out
from patchflow.priors.patch import PatchPrior
from patchflow.uncertainty.novelty import has_density, novelty_record

# Flags that concern the fit alone, as the arguments of a ``learn_...``.
_FITTING = ("holdout", "batch", "steps", "lr", "average", "patience", "seconds")


@dataclass(frozen=True)
class Training:
    """A training command under way.

    Attributes:
        command: Its name, as ``train patch-nr``.
        settings: Its flags.
        found: The images to learn from, and what their files say of them.
        held: Those to validate on; none to hold out parts of the training images.
    """

    command: str
    settings: Mapping[str, Any]
    found: Slices
    held: list[Tensor]

    @classmethod
    def begin(cls, command: str, settings: Mapping[str, Any]) -> Training:
        """Check the output, set seed and threads, and read the images.

        Raises:
            InputError: If the output cannot be written, a file not be read, an image is constant, or there is no
                state to resume from.
        """
        target = Path(settings["output"])
        check_output(target, (".safetensors",))
        rate = settings.get("false_alarms", 0.5)
        if not 0 < rate < 1:
            raise InputError(f"The rate of false alarms is {rate:g} but must lie between 0 and 1.")
        if settings.get("resume") and not _state(target).exists():
            raise InputError(
                f"There is no {_state(target)} to resume from; start without --resume."
            )
        start(settings["seed"], settings["threads"])
        validation = settings.get("validation")
        held = [] if validation is None else _read([validation], settings).images
        return cls(command, settings, _read(settings["images"], settings), held)

    @property
    def images(self) -> list[Tensor]:
        """The images to learn from."""
        return self.found.images

    @property
    def target(self) -> Path:
        """The model file."""
        return Path(self.settings["output"])

    def split(self, size: int) -> tuple[list[Tensor], list[Tensor]]:
        """The images to learn from, and those that are held out for the validation or for thresholds.

        Args:
            size: Side length of the patches.

        Raises:
            InputError: See :func:`patchflow.numerics.patches.hold_out`.
        """
        if self.held or not self.settings["holdout"]:
            return self.images, self.held
        return hold_out(self.images, self.settings["holdout"], size)

    def novelty(self, model: nn.Module) -> Mapping[str, Any]:
        """What the model file says of novelty: thresholds of a patch density on what was held out, if it suffices.

        Args:
            model: The learned model; of other kinds nothing is said.
        """
        if not isinstance(model, PatchPrior) or not has_density(model):
            return {}
        try:
            rate = self.settings["false_alarms"]
            return novelty_record(model, self.split(model.size)[1], rate=rate)
        except InputError as error:
            print(f"The model will draw no novelty map, give --validation for that: {error}")
            return {}

    def save(self, model: nn.Module, summary: Mapping[str, Any]) -> None:
        """Write the model, and beside it the configuration that repeats the run.

        Args:
            model: The learned model.
            summary: What the file says of the training.
        """
        self._write(model, summary)
        write_config(self.target.with_suffix(".yaml"), self.command, dict(self.settings))

    def fit(
        self,
        model: nn.Module,
        learn: Callable[..., Fit],
        said: Callable[[Fit], str],
        arguments: Mapping[str, Any],
        images: list[Tensor] | None = None,
    ) -> None:
        """Fit a model with the flags that the commands share, write it, and print how it went.

        Its best state is kept after an interruption and where the loss is not finite.

        Args:
            model: The model, changed in place.
            learn: Fits it to the images and validates on those held out.
            said: What is said of the validation loss.
            arguments: Other arguments of ``learn``.
            images: What ``learn`` is given instead of the images of the command.

        Raises:
            InputError: As ``learn``.
            NumericalError: As ``learn``.
        """
        state = _state(self.target)
        shared = {name: self.settings[name] for name in _FITTING if name in self.settings}
        try:
            result = learn(
                model,
                self.images if images is None else images,
                self.held,
                checkpoint=state,
                resume=self.settings["resume"],
                progress=True,
                **shared,
                **arguments,
            )
        except NumericalError:
            self._write(model, {})
            raise
        self.save(
            model,
            {
                "steps": result.steps,
                "seconds": round(result.seconds, 1),
                "validation": result.best,
                "stopped": result.stopped,
                "history": result.validation,
                **self.novelty(model),
            },
        )
        steps = f"{result.steps} step{'s' * (result.steps != 1)}"
        print(
            f"{self.target}: {said(result)} after {steps} in {result.seconds:.0f} s ({result.stopped})."
        )
        if result.stopped == "budget" and len(result.validation) < 3:
            print(
                f"The time limit ended it after so few steps that it was hardly validated; give it more --seconds than "
                f"{self.settings['seconds']:g}."
            )
        if result.stopped == "interrupted":
            again = command_line(self.command, dict(self.settings) | {"resume": True}, "images")
            print(f"Interrupted; {state} holds the state. Continue with: {again}")
        else:
            state.unlink(missing_ok=True)

    def _write(self, model: nn.Module, summary: Mapping[str, Any]) -> None:
        # So that these slices are known again, whatever noise has undone their rounding.
        slices = {"slices": list(self.found.prints)} if self.found.prints else {}
        seed = self.settings["seed"]
        training = {**summary, **slices}
        models.save(self.target, model, images=self.images, seed=seed, training=training)


def _state(target: Path) -> Path:
    return target.with_suffix(".state.safetensors")


def _read(files: list[str], settings: Mapping[str, Any]) -> Slices:
    found = read_slices(
        files,
        units=settings["units"],
        dataset=settings["dataset"],
        dither=True,
        value_range=value_range(settings.get("range")),
        grey=settings.get("grey", False),
    )
    for name, image in zip(found.names, found.images, strict=True):
        check_varies(image, name)
    if found.note:
        print(found.note)
    return found
