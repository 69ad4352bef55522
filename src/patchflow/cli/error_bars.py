"""Error bars of images: ``patchflow calibrate IMAGE...`` fits them, ``reconstruct --calibration`` draws them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchflow.cli.config import command_line, write_config
from patchflow.cli.image_methods import Prior, Solver
from patchflow.cli.options import output_folder, start, value_range
from patchflow.cli.problems import Settings
from patchflow.errors import InputError
from patchflow.io.atomic import read_bytes, write_text
from patchflow.io.checkpoint import read_header
from patchflow.io.images import fingerprint, read_image
from patchflow.numerics.patches import common_channels
from patchflow.priors.patch import PatchPrior
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.signature import differs, signature
from patchflow.report import versions
from patchflow.uncertainty.intervals import (
    Intervals,
    check_images,
    coverage,
    fit_intervals,
)
from patchflow.uncertainty.novelty import Novelty, check_rate, fit_novelty

_FILE = "calibration.json"


class Bars(NamedTuple):
    """The error bars of a reconstruction, for its report.

    Attributes:
        low: The lower ends.
        high: The upper ends.
        alarm: The pixels that the prior is wrong about, if it is one of patches.
        notes: What there is to say about them.
    """

    low: Tensor
    high: Tensor
    alarm: Tensor | None
    notes: list[str]


@dataclass(frozen=True)
class Calibration:
    """What a calibration file says.

    Attributes:
        intervals: The intervals of the pixels.
        novelty: The thresholds of the prior's map, for priors on patches.
        measurement: The measurement: :func:`patchflow.problems.signature.signature`.
        method: The method.
        weight: The weight of the prior; None for the default of the method.
        prior: The digest of the model file, if the method has one.
        channels: Channels of the images.
    """

    intervals: Intervals
    novelty: Novelty | None
    measurement: Mapping[str, Any]
    method: str
    weight: float | None
    prior: str | None
    channels: int

    @classmethod
    def read(cls, path: str) -> Calibration:
        """Read the file, or that of a folder.

        Raises:
            InputError: If it is missing or no calibration of images.
        """
        file = Path(path) / _FILE if Path(path).is_dir() else Path(path)
        try:
            document = json.loads(read_bytes(str(file), "calibration file"))
            novelty = document["novelty"]
            return cls(
                Intervals(**document["intervals"]),
                None if novelty is None else Novelty(**novelty),
                document["measurement"],
                document["method"],
                document["weight"],
                document["prior"],
                document["channels"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{file} is no calibration of images; give the folder that patchflow calibrate IMAGE wrote."
            ) from error

    def bars(
        self,
        likelihood: GaussianLikelihood,
        solver: Solver,
        path: str | None,
        x: Tensor,
        prior: Prior | None,
        truth: Tensor | None,
    ) -> Bars:
        """The error bars of a reconstruction, with warnings where it is not what was calibrated.

        Args:
            likelihood: The law of the measurement.
            solver: The method and its flags.
            path: The model file of the prior.
            x: The reconstruction (batch, channels, height, width).
            prior: The prior.
            truth: The truth, if it is known.
        """
        notes = [self.intervals.explain()]
        wrong = differs(signature(likelihood), dict(self.measurement))
        if solver.method != self.method:
            wrong.append(f"method ({self.method}, not {solver.method})")
        if solver.weight != self.weight:
            own, given = ("default" if w is None else w for w in (self.weight, solver.weight))
            wrong.append(f"weight ({own}, not {given})")
        if _digest(path) != self.prior:
            wrong.append("model of the prior")
        if x.shape[1] != self.channels:
            wrong.append("number of channels")
        if solver.changed:
            wrong.append("setting of the solver")
        if wrong:
            notes.append(
                f"Warning: the error bars were calibrated for another {', '.join(wrong)}; they may be wrong, calibrate "
                "again."
            )
        pairs = [self.intervals(image) for image in x.split(1)]
        low, high = (torch.cat(ends) for ends in zip(*pairs, strict=True))
        width = float((high - low).mean())
        notes.append(
            f"Mean width of the {100 * self.intervals.level:.0f} % intervals: {width:.4f}."
        )
        if truth is not None:
            share = float(((low <= truth) & (truth <= high)).to(x).mean())
            notes.append(f"They cover {100 * share:.1f} % of the true pixels.")
        alarm = None
        if self.novelty is not None and isinstance(prior, PatchPrior):
            smooth, surprising = self.novelty(prior.nll_map(x))
            alarm = smooth | surprising
            notes.append(
                f"Unlike the calibration images: {100 * float(surprising.to(x).mean()):.2f} % of the pixels surprise "
                f"the prior, {100 * float(smooth.to(x).mean()):.2f} % are smoother than it knows; of images like them "
                f"{100 * self.novelty.rate:g} % raise this alarm in all."
            )
        return Bars(low, high, alarm, notes)


def calibrate_images(
    paths: Sequence[str],
    solver: Solver,
    problem: Settings,
    settings: Mapping[str, Any],
) -> None:
    """Simulate measurements of images, reconstruct them, fit error bars to the errors, and write the folder.

    Args:
        paths: Images with known truth, which nothing was learned from.
        solver: The reconstruction.
        problem: The measurement.
        settings: All flags of the command.

    Raises:
        InputError: If an image was learned from, does not fit, or is too small; or a flag is out of range.
    """
    prior = solver.prior(settings["prior"])
    folder = output_folder(settings["output"])
    start(settings["seed"], settings["threads"])
    limits = value_range(settings["range"])
    truths = [read_image(path, value_range=limits, grey=settings["grey"]) for path in paths]
    _refuse_training(settings["prior"], paths, truths)
    level = settings["level"]
    channels = common_channels(truths)
    check_rate(truths, settings["false_alarms"])
    for _, judges, _, _, _ in _crosses(truths, truths):
        check_images(judges, level)
    laws = []
    for path, truth in zip(paths, truths, strict=True):
        shape = (truth.shape[2], truth.shape[3])
        laws.append(problem.likelihood(shape, measured=False))
        if laws[-1].operator.domain_shape != shape:
            raise InputError(
                f"{path} has {shape[0]} x {shape[1]} pixels but the operator is made for "
                f"{' x '.join(map(str, laws[-1].operator.domain_shape))}; give images of this size."
            )
        if prior is not None:
            prior.check(truth)
    xs = []
    for path, truth, law in zip(paths, truths, laws, strict=True):
        solution, _, _ = solver.run(law, law.simulate(truth), prior, None)
        if solution.interrupted:
            raise KeyboardInterrupt
        print(f"{path}: reconstructed.")
        xs.append(solution.x)
    intervals = fit_intervals(xs, truths, level=level)
    novelty = None
    if isinstance(prior, PatchPrior):
        novelty = fit_novelty(prior, xs, rate=settings["false_alarms"])
    told = {
        name: coverage(fit_intervals(others, known, level=level), x, truth)
        for name, others, known, x, truth in _crosses(xs, truths)
    }
    document = {
        "intervals": intervals._asdict(),
        "novelty": None if novelty is None else novelty._asdict(),
        "measurement": signature(laws[0]),
        "method": solver.method,
        "weight": solver.weight,
        "prior": _digest(settings["prior"]),
        "channels": channels,
        "coverage": {name: part._asdict() for name, part in told.items()},
        "guarantee": intervals.explain(),
        "command": command_line("calibrate", settings, "images"),
        "versions": versions(),
    }
    write_text(folder / _FILE, json.dumps(document, indent=1))
    write_config(folder / "calibration.yaml", "calibrate", settings)
    for name, part in told.items():
        print(
            f"{name}: {100 * part.share:.1f} % covered by intervals of mean width {part.width:.4f}; of one width for "
            f"all pixels it would take {part.constant:.4f}."
        )
    print(f"{intervals.explain()}\n{folder / _FILE}")


def _refuse_training(prior: str | None, paths: Sequence[str], truths: Sequence[Tensor]) -> None:
    if prior is None:
        return
    try:
        learned = read_header(prior).training.get("images")
    except InputError:  # published weights without our header, which the method has accepted
        learned = None
    if learned is None:
        print(f"{prior} does not say what it was learned from: give images that it was not.")
    for path, truth in zip(paths, truths, strict=True):
        if fingerprint([truth]) in (learned or []):
            raise InputError(
                f"{path} is an image that {prior} was learned from: its errors are smaller than those of new images; "
                "give another image."
            )


def _digest(path: str | None) -> str | None:
    """The digest of a model file."""
    return None if path is None else hashlib.sha256(read_bytes(path)).hexdigest()


def _crosses(
    xs: Sequence[Tensor], truths: Sequence[Tensor]
) -> list[tuple[str, list[Tensor], list[Tensor], Tensor, Tensor]]:
    """Each image, or half of the only one, after the reconstructions and truths of the others that judge it."""
    if len(xs) == 1:
        half = xs[0].shape[-2] // 2
        names = ["upper half by the lower", "lower half by the upper"]
        xs = [xs[0][..., :half, :], xs[0][..., half:, :]]
        truths = [truths[0][..., :half, :], truths[0][..., half:, :]]
    else:
        names = [f"image {k + 1} by the others" for k in range(len(xs))]
    return [
        (name, [*xs[:k], *xs[k + 1 :]], [*truths[:k], *truths[k + 1 :]], xs[k], truths[k])
        for k, name in enumerate(names)
    ]
