"""Error bars of any problem: what a calibration file holds, and what ``reconstruct --calibration`` draws of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from patchflow.cli.image_methods import Solver
from patchflow.cli.tomography_methods import Choices
from patchflow.errors import InputError
from patchflow.io.atomic import digest, read_bytes
from patchflow.priors.patch import PatchPrior
from patchflow.problems.likelihood import Likelihood
from patchflow.problems.signature import PHOTONS, disagreements, signature
from patchflow.uncertainty.image_samples import Check
from patchflow.uncertainty.intervals import Intervals
from patchflow.uncertainty.novelty import Novelty, novel_shares

FILE = "calibration.json"
# Up to 1.5 times the noise of calibrated scans error bars were measured to hold (benchmarks/README.md).
_NOISIER = 1.6


class Bars(NamedTuple):
    """The error bars of a reconstruction, for its report.

    Attributes:
        low: The lower ends.
        high: The upper ends.
        novelty: The novelty map, if the prior is one of patches.
        notes: What there is to say about them.
    """

    low: Tensor
    high: Tensor
    novelty: Tensor | None
    notes: list[str]


class Recipe(NamedTuple):
    """How an image was measured and reconstructed: error bars hold for one recipe.

    Attributes:
        measurement: The measurement: :func:`patchflow.problems.signature.signature`.
        method: The method.
        weight: The weight of the prior; None for the default of the method.
        prior: The digest of the model file, if the method has one.
        channels: Channels of the images.
        setting: What of the solver is not as by default.
        sampler: What draws samples, if it does.
    """

    measurement: Mapping[str, Any]
    method: str
    weight: float | str | None
    prior: str | None
    channels: int
    setting: Mapping[str, Any] = {}
    sampler: str | None = None

    @classmethod
    def of(
        cls, likelihood: Likelihood, solver: Solver | Choices, prior: str | None, channels: int
    ) -> Recipe:
        """The recipe of a method and its flags.

        Args:
            likelihood: The law of the measurement.
            solver: The method and its flags.
            prior: The model file.
            channels: Channels of the images.
        """
        measured = signature(likelihood)
        sampling = solver.sampling if isinstance(solver, Solver) else None
        return cls(
            measured,
            solver.method,
            solver.weight,
            None if prior is None else digest(prior),
            channels,
            solver.setting,
            None if sampling is None else sampling.name,
        )

    def differences(self, given: Recipe) -> list[str]:
        """In words, what is not the same in a given recipe."""
        told = disagreements(dict(self.measurement), dict(given.measurement))
        if given.method != self.method:
            told.append(f"method ({self.method}, not {given.method})")
        if given.weight != self.weight:
            weights = ("default" if w is None else w for w in (self.weight, given.weight))
            told.append("weight ({}, not {})".format(*weights))
        if given.prior != self.prior:
            told.append("model of the prior")
        if given.channels != self.channels:
            told.append("number of channels")
        if given.sampler != self.sampler:
            told.append(f"sampler ({self.sampler}, not {given.sampler})")
        elif given.setting != self.setting:
            own, other = dict(self.setting), dict(given.setting)
            keys = [key for key in {**own, **other} if own.get(key) != other.get(key)]
            told.append(f"setting of the solver ({', '.join(keys)})")
        return told


@dataclass(frozen=True)
class Calibration:
    """What a calibration file says.

    Attributes:
        intervals: The intervals of the pixels.
        novelty: The thresholds of the prior's map, for priors on patches.
        recipe: What they hold for.
        checked: How the samples fared on the images, of methods that draw some.
    """

    intervals: Intervals
    novelty: Novelty | None
    recipe: Recipe
    checked: Check | None

    @classmethod
    def read(cls, path: str, *, tomography: bool = False) -> Calibration:
        """Read the file, or that of a folder.

        Args:
            path: The file or folder.
            tomography: Whether it is for computed tomography.

        Raises:
            InputError: If it is missing, damaged, or of computed tomography and not for it, or the reverse.
        """
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        content = read_bytes(str(file), "calibration file")
        try:
            document = json.loads(content)
            novelty, checked = document["novelty"], document["checked"]
            found = cls(
                Intervals(**document["intervals"]),
                None
                if novelty is None
                else Novelty(*(float(novelty[name]) for name in Novelty._fields)),
                Recipe(
                    document["measurement"],
                    document["method"],
                    document["weight"],
                    document["prior"],
                    document["channels"],
                    document["setting"],
                    document["sampler"],
                ),
                None if checked is None else Check(**checked),
            )
            sound = _sound(found.intervals)
            # A problem file may have the same projector with other noise, which counts as one of images.
            scanned = PHOTONS in dict(found.recipe.measurement)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{file} is damaged, or no calibration of images or slices; give the folder that patchflow calibrate "
                "wrote, or calibrate again."
            ) from error
        if not sound:
            raise InputError(
                f"{file} has intervals that no calibration gives (their ends, edges, level, factor or noise); "
                "calibrate again."
            )
        if scanned != tomography:
            kinds = ["images", "computed tomography"]
            raise InputError(
                f"{file} is a calibration of {kinds[not tomography]}, not of {kinds[tomography]}; give the folder that "
                "patchflow calibrate wrote for this problem."
            )
        return found

    def watches(self, prior: nn.Module | None) -> bool:
        """Whether there are thresholds for the novelty map of a prior.

        Args:
            prior: The model of the method.
        """
        return self.novelty is not None and isinstance(prior, PatchPrior)

    def bars(
        self,
        given: Recipe,
        x: Tensor,
        prior: nn.Module | None,
        truth: Tensor | None,
        show: Callable[[float], str] = "{:.4f}".format,
        noise: Tensor | None = None,
    ) -> Bars:
        """The error bars of a reconstruction, with a warning where it is not what was calibrated.

        Args:
            given: How it was measured and reconstructed.
            x: The reconstruction (batch, channels, height, width).
            prior: The prior.
            truth: The truth, if it is known.
            show: Writes a difference of values with its unit.
            noise: Of computed tomography, the noise level at each pixel.
        """
        notes = []
        wrong = self.recipe.differences(given)
        if wrong:
            notes.append(
                f"Warning: the error bars were calibrated for another {', '.join(wrong)}; they may be wrong, calibrate "
                "again."
            )
        elif noise is not None:
            notes += self._noise_notes(noise)
        notes.append(self.intervals.explain())
        levels: Sequence[Tensor | None] = [None] * len(x)
        if noise is not None and self.intervals.noise is not None:
            levels = noise.split(1)
        pairs = [self.intervals(*image) for image in zip(x.split(1), levels, strict=True)]
        low, high = (torch.cat(ends) for ends in zip(*pairs, strict=True))
        width = show(float((high - low).mean()))
        notes.append(f"Mean width of the {100 * self.intervals.level:.0f} % intervals: {width}.")
        if truth is not None:
            share = float(((low <= truth) & (truth <= high)).to(x).mean())
            notes.append(f"They cover {100 * share:.1f} % of the true pixels.")
        novelty = None
        if self.novelty is not None and isinstance(prior, PatchPrior):
            novelty = self.novelty(prior.nll_map(x))
            surprising, smooth = novel_shares(novelty)
            notes.append(
                f"Unlike the calibration images: {100 * surprising:.2f} % of the pixels surprise "
                f"the prior, {100 * smooth:.2f} % are smoother than it knows; of images like them "
                f"{100 * self.novelty.rate:g} % raise this alarm in all."
            )
        return Bars(low, high, novelty, notes)

    def _noise_notes(self, noise: Tensor) -> list[str]:
        """What there is to say about the noise of scans: nothing if it is like that of the calibration."""
        if self.intervals.noise is None:
            return [
                "The error bars go by the contrast of the image alone, without the noise of the scan, as those of "
                "earlier versions; calibrate again."
            ]
        ratio = float(noise.mean((1, 2, 3)).max()) / self.intervals.noise[1]
        if ratio <= _NOISIER:
            return []
        return [
            f"Warning: a scan is {ratio:.1f} times as noisy as the noisiest that was calibrated on, and its error bars "
            "may be too narrow; calibrate on slices that absorb as much."
        ]


def _sound(intervals: Intervals) -> bool:
    """Whether the numbers can be those of a fit: in a file that was changed or damaged they may be anything."""
    edges, low, high = intervals.edges, intervals.low, intervals.high
    if not len(low) == len(high) == len(edges) + 1:
        return False
    noise = (1.0, 1.0) if intervals.noise is None else tuple(intervals.noise)
    values = [*edges, *low, *high, intervals.level, intervals.factor, *noise]
    if not all(isinstance(value, float | int) and math.isfinite(value) for value in values):
        return False
    return (
        0 < intervals.level < 1
        and intervals.factor >= 0
        and all(one <= other for one, other in zip(low, high, strict=True))
        and all(one < other for one, other in pairwise(edges))
        and len(noise) == 2
        and 0 < noise[0] <= noise[1]
    )
