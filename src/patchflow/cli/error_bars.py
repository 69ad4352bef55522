"""Error bars of images: ``patchflow calibrate IMAGE...`` fits them, ``reconstruct --calibration`` draws them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from patchflow.cli.config import command_line, write_config
from patchflow.cli.image_methods import Prior, Solver
from patchflow.cli.options import output_folder, start, value_range
from patchflow.cli.problems import Settings
from patchflow.errors import InputError
from patchflow.io.atomic import read_bytes, write_text
from patchflow.io.checkpoint import load_model
from patchflow.io.images import fingerprint, read_image
from patchflow.priors.patch import PatchPrior
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.signature import differs, signature
from patchflow.report import versions
from patchflow.uncertainty.intervals import (
    Coverage,
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
        weight: The weight of the prior.
    """

    intervals: Intervals
    novelty: Novelty | None
    measurement: Mapping[str, Any]
    method: str
    weight: float

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
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{file} is no calibration of images; give the folder that patchflow calibrate IMAGE wrote."
            ) from error

    def bars(
        self,
        likelihood: GaussianLikelihood,
        method: str,
        weight: float,
        x: Tensor,
        prior: Prior | None,
        truth: Tensor | None,
    ) -> Bars:
        """The error bars of a reconstruction, with warnings where it is not what was calibrated.

        Args:
            likelihood: The law of the measurement.
            method: The method.
            weight: The weight of the prior.
            x: The reconstruction (1, channels, height, width).
            prior: The prior.
            truth: The truth, if it is known.
        """
        notes = [self.intervals.explain()]
        wrong = differs(signature(likelihood), dict(self.measurement))
        if method != self.method:
            wrong.append(f"method ({self.method}, not {method})")
        if abs(weight - self.weight) > 1e-3 * self.weight:
            wrong.append(f"weight ({self.weight:g}, not {weight:g})")
        if wrong:
            notes.append(
                f"Warning: the error bars were calibrated for another {', '.join(wrong)}; they may be wrong, calibrate "
                "again."
            )
        low, high = self.intervals(x)
        width = float((high - low).mean())
        notes.append(
            f"Mean width of the {100 * self.intervals.level:.0f} % intervals: {width:.4f}."
        )
        if truth is not None:
            told = coverage(self.intervals, x, truth)
            notes.append(f"They cover {100 * told.share:.1f} % of the true pixels.")
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
    if solver.weight == "auto":
        raise InputError(
            "--weight auto chooses another weight for each image; calibrate the weight of the reconstruction."
        )
    prior = solver.prior(settings["prior"])
    folder = output_folder(settings["output"])
    start(settings["seed"], settings["threads"])
    limits = value_range(settings["range"])
    truths = [read_image(path, value_range=limits, grey=settings["grey"]) for path in paths]
    _refuse_training(settings["prior"], paths, truths)
    # One image is judged by its halves.
    halves = [truths[0][..., : truths[0].shape[-2] // 2, :]] if len(truths) == 1 else truths[1:]
    check_images(halves, settings["level"])
    check_rate(truths, settings["false_alarms"])
    xs, weight, law = [], 0.0, None
    for path, truth in zip(paths, truths, strict=True):
        law = problem.likelihood((truth.shape[2], truth.shape[3]), measured=False)
        if prior is not None:
            prior.check(truth)
        solution, weight, _ = solver.run(law, law.simulate(truth), prior, None)
        print(f"{path}: reconstructed.")
        xs.append(solution.x)
    assert law is not None
    level = settings["level"]
    intervals = fit_intervals(xs, truths, level=level)
    novelty = None
    if isinstance(prior, PatchPrior):
        novelty = fit_novelty(prior, xs, rate=settings["false_alarms"])
    told = _crossed(xs, truths, level)
    document = {
        "intervals": intervals._asdict(),
        "novelty": None if novelty is None else novelty._asdict(),
        "measurement": signature(law),
        "method": solver.method,
        "weight": weight,
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
    header, _ = load_model(prior)
    for path, truth in zip(paths, truths, strict=True):
        if fingerprint([truth]) in header.training.get("images", []):
            raise InputError(
                f"{path} is an image that {prior} was learned from: its errors are smaller than those of new "
                "images; give another image."
            )


def _crossed(xs: Sequence[Tensor], truths: Sequence[Tensor], level: float) -> dict[str, Coverage]:
    """The coverage of each image, or half of the only one, by what the others say."""
    if len(xs) == 1:
        half = xs[0].shape[-2] // 2
        names = ["upper half by the lower", "lower half by the upper"]
        xs = [xs[0][..., :half, :], xs[0][..., half:, :]]
        truths = [truths[0][..., :half, :], truths[0][..., half:, :]]
    else:
        names = [f"image {k + 1} by the others" for k in range(len(xs))]
    told = {}
    for k, name in enumerate(names):
        others = [j for j in range(len(xs)) if j != k]
        fitted = fit_intervals([xs[j] for j in others], [truths[j] for j in others], level=level)
        told[name] = coverage(fitted, xs[k], truths[k])
    return told
