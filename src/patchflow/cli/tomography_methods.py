"""How ``patchflow reconstruct --problem ct`` makes an image of a sinogram."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from patchflow import models
from patchflow.cli.notes import choose
from patchflow.cli.scan import Scan
from patchflow.cli.slices import Units
from patchflow.errors import InputError
from patchflow.io.atomic import digest
from patchflow.papers import altekrueger2023_patchnr as paper
from patchflow.priors.multiscale import MultiscalePrior
from patchflow.priors.patch import PatchPrior
from patchflow.scan_network import ScanNetwork
from patchflow.solution import Solution
from patchflow.tomography_methods import Options, Task, TomographyMethod, method_of

# What a model file of a method holds.
Learned = PatchPrior | MultiscalePrior | ScanNetwork


@dataclass(frozen=True)
class Choices:
    """What the flags of ``reconstruct`` say, beside those of the scan.

    Attributes:
        method: The method.
        prior: The model file.
        weight: The weight of the prior; None for the default of the method, ``"auto"`` for a choice without a ground
            truth.
        steps: Number of steps; None for the default.
        lr: Adam's peak step; None for the default.
        stride: Stride of the patch grid.
        solver: The solver of methods with a patch energy.
        preset: Whether to take the published procedure.
        truth: The true slices.
        units: The units of truth and output.
        template: The DICOM series whose headers the output takes.
        report: Folder for the report.
        calibration: What ``patchflow calibrate`` wrote.
        start: The model file of networks for this scan, where methods with a patch energy start.

    Raises:
        InputError: If a flag does not concern the method or is out of range.
    """

    method: str
    prior: str | None
    weight: float | str | None
    steps: int | None
    lr: float | None
    stride: int | None
    solver: Literal["adam", "lbfgs"]
    preset: Literal["default", "paper"]
    truth: str | None
    units: Units
    template: str | None
    report: str | None
    calibration: str | None = None
    start: str | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "steps", "lr", "stride", "solver"):
            value = getattr(self, name)
            published = self.preset == "paper" and name in ("lr", "stride", "solver")
            if value not in (None, "adam") and (published or name not in self.chosen.takes):
                who = "preset paper" if published else f"method {self.method}"
                raise InputError(f"--{name} {value} says nothing about the {who}; leave it out.")
        if self.preset == "paper" and self.method != "patchnr":
            raise InputError(f"The preset paper is that of patchnr, not of {self.method}.")
        if self.prior is None:
            self.chosen.check_prior(None)
        elif not self.chosen.learned:
            raise InputError(
                f"--prior {self.prior} says nothing about the method {self.method}; leave it out."
            )
        if self.start is not None and (not self.chosen.refines or self.preset == "paper"):
            who = "preset paper" if self.preset == "paper" else f"method {self.method}"
            raise InputError(f"--start {self.start} says nothing about the {who}; leave it out.")
        if isinstance(self.weight, str) and self.weight != "auto":
            raise InputError(f"The weight is {self.weight!r} but must be a number or auto.")
        for flag, value in (("--weight", self.weight), ("--lr", self.lr)):
            if isinstance(value, float | int) and not 0 < value < math.inf:
                raise InputError(
                    f"{flag} is {value:g} but must be positive; leave it out for the default."
                )
        for flag, value in (("--steps", self.steps), ("--stride", self.stride)):
            if value is not None and value < 1:
                raise InputError(f"{flag} is {value} but must be at least 1.")

    @property
    def chosen(self) -> TomographyMethod:
        """The method of this name."""
        return method_of(self.method)

    @property
    def setting(self) -> dict[str, object]:
        """What is not as by default, for error bars, which hold for one setting; of networks to start at the digest."""
        names = ("steps", "lr", "stride", "solver", "preset")
        given = {name: getattr(self, name) for name in names}
        if self.start is not None:
            given["start"] = digest(self.start)
        return {
            name: value for name, value in given.items() if value not in (None, "adam", "default")
        }

    @property
    def _options(self) -> Options:
        return Options(
            weight=None if isinstance(self.weight, str) else self.weight,
            steps=self.steps,
            lr=self.lr,
            stride=self.stride,
            solver=self.solver,
        )

    def options(self, scan: Scan) -> Options:
        """The options of the method for a scan."""
        return self._options._replace(
            shape=scan.operator.domain_shape,
            limited=scan.limited,
            photons=scan.photons,
            start=self._network(scan),
        )

    def _network(self, scan: Scan) -> ScanNetwork | None:
        """Read the networks to start at."""
        if self.start is None:
            return None
        network = models.load(self.start, nn.Module)
        if not isinstance(network, ScanNetwork):
            raise InputError(
                f"--start {self.start} is no model of patchflow train single-scan or fbp-unet; give one of these."
            )
        return network

    def load(self, scan: Scan) -> Learned | None:
        """Read the model that the method needs.

        Args:
            scan: The measurement.

        Raises:
            InputError: If it is that of another method, of other images, or of another scan.
        """
        if not self.chosen.learned or self.prior is None:
            return None
        prior = models.load(self.prior, nn.Module)
        self.chosen.check_prior(prior)
        assert isinstance(prior, Learned)
        if isinstance(prior, ScanNetwork):
            prior.check(scan.operator, scan.photons)
        else:
            prior.check(torch.zeros(1, 1, *scan.operator.domain_shape))
        return prior


class Result(NamedTuple):
    """The reconstruction of a slice, and the filtered backprojection of it."""

    solution: Solution
    fbp: Tensor


Follow = Callable[[int, Tensor, float], Mapping[str, str] | None]


class SliceSolver:
    """What reconstructs slices; an automatic weight is chosen on the first one, for all.

    Args:
        scan: The measurement and its law.
        prior: What :meth:`Choices.load` read.
        choices: What the flags say.

    Attributes:
        weight: The weight; a default as long as it is not chosen.
        notes: What there is to say about its choice, or about the model.
    """

    def __init__(self, scan: Scan, prior: Learned | None, choices: Choices) -> None:
        self.scan, self.prior, self.choices = scan, prior, choices
        self.method, self.options = choices.chosen, choices.options(scan)
        self.notes: list[str] = []
        for network in (prior, self.options.start):
            if isinstance(network, ScanNetwork):
                warning = network.check(scan.operator, scan.photons)
                self.notes += [warning] if warning else []
        self._waits = choices.weight == "auto"
        # An automatic weight is sought with two sinograms, the measured one and a disturbed one.
        self._first = lru_cache(maxsize=2)(self._begin)
        # Published with this prior; :meth:`Choices.load` has checked that it is one of patches.
        self._published = choices.preset == "paper" and isinstance(prior, PatchPrior)
        self.weight, self._steps = self.method.setting(self.options)
        if self._published and isinstance(prior, PatchPrior):
            limited = paper.CT_LIMITED_STEPS if self.options.limited else paper.CT_STEPS
            self._steps = limited if choices.steps is None else choices.steps
            if self.options.weight is None:
                self.weight = paper.weight_of_mean(paper.CT_LAMBDA, self.options.shape, prior)

    def __call__(self, y: Tensor, follow: Follow | None) -> Result:
        """Reconstruct a slice.

        Args:
            y: Its sinogram (1, 1, angles, bins).
            follow: Called after each step.

        Raises:
            NumericalError: If there is no automatic weight, or the energy is not finite.
        """
        fbp = self.scan.operator.initial(y)
        if not self._waits:
            return Result(self._solve(y, self.weight, follow), fbp)
        choice, told = choose(
            lambda measurement, weight: self._solve(measurement, weight, None),
            self.scan.likelihood,
            y,
            start=self.weight,
            level="--photons",
        )
        self.weight, self._waits = choice.weight, False
        self.notes += told
        if len(self.scan.y) > 1:
            self.notes.append("The weight was chosen on the first slice, for all.")
        return Result(choice.solution, fbp)

    def describe(self) -> str:
        """A sentence that says how it is done."""
        if self._published:
            said = (
                f"patchNR as published, weight {self.weight:.4g}, {self._steps} steps of {paper.CT_RANDOM_PATCHES} "
                "random patches from filtered backprojection."
            )
        else:
            said = self.method.describe(self.options._replace(weight=self.weight))
            said = said if self.method.name == "patchnr" else said[0].upper() + said[1:]
        # The number is only where the search starts.
        return (
            said.replace(", weight ", ", weight to be chosen around ", 1) if self._waits else said
        )

    def _solve(self, y: Tensor, weight: float, follow: Follow | None) -> Solution:
        fbp = self.scan.operator.initial(y)
        if self._published and isinstance(self.prior, PatchPrior):
            return paper.reconstruct_ct(
                self.scan.likelihood,
                self.prior,
                y,
                fbp,
                weight=weight,
                steps=self._steps,
                callback=follow,
                progress=True,
            )
        task = Task(self.scan.likelihood, y, fbp, self.prior, callback=follow, progress=True)
        first = self._first(y, follow) if self.method.refines else None
        return self.method.run(task, self.options._replace(weight=weight), first)

    def _begin(self, y: Tensor, follow: Follow | None) -> Solution:
        fbp = self.scan.operator.initial(y)
        task = Task(self.scan.likelihood, y, fbp, callback=follow, progress=True)
        return self.method.first(task, self.options)
