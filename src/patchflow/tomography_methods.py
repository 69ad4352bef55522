"""The reconstructions of computed tomography by name, each a function of sinogram, start, prior and setting.

Methods that descend a learned energy start at total variation, or at what networks for this scan make of it: from
filtered backprojection Adam takes thousands of steps to fill in directions that were not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from patchflow import methods
from patchflow.errors import InputError
from patchflow.problems.likelihood import Likelihood
from patchflow.reconstruct import deep_image_prior
from patchflow.scan_network import ScanNetwork
from patchflow.solution import Solution
from patchflow.tomography_models import TUNED_PHOTONS, VARIATION

# The scans that the weights were chosen on are LoDoPaB's.
TUNED_SHAPE = (362, 362)
# Peak step of Adam, and ascent of transport's potentials, for images whose details are a few thousandths.
STEP_SIZE, RATE = 0.003, 1e-3
# Steps from the result of networks, the best of 100, 300 and 1,000 on one tuning slice (benchmarks/start_ct.py).
FROM_NETWORK = 300


class Setting(NamedTuple):
    """The weight of a method, in nats, and the number of its steps."""

    weight: float
    steps: int


class Task(NamedTuple):
    """What a method is given.

    Attributes:
        likelihood: The law of the sinogram; its operator is a projector.
        y: The sinogram (1, 1, angles, bins).
        fbp: Filtered backprojection (1, 1, height, width), where methods without a prior start.
        prior: The learned prior or network, for methods that need one.
        callback: Called after each step, see :func:`patchflow.solve.minimize`; not by splitting methods.
        progress: Show a progress line.
    """

    likelihood: Likelihood
    y: Tensor
    fbp: Tensor
    prior: nn.Module | None = None
    callback: Callable[[int, Tensor, float], Mapping[str, str] | None] | None = None
    progress: bool = False


class Options(NamedTuple):
    """The kind of scan, and what is chosen instead of defaults (None for the default).

    Attributes:
        shape: Height and width of the image.
        limited: Whether directions are missing.
        photons: Mean number of photons per bin without an object.
        weight: The weight of the prior, in nats.
        steps: Number of steps.
        lr: Adam's peak step.
        stride: Stride of the patch grid.
        solver: Adam or L-BFGS.
        start: Networks for this scan, where methods that descend a learned energy start in place of total variation.
    """

    shape: tuple[int, int] = TUNED_SHAPE
    limited: bool = False
    photons: float = TUNED_PHOTONS
    weight: float | None = None
    steps: int | None = None
    lr: float | None = None
    stride: int | None = None
    solver: Literal["adam", "lbfgs"] = "adam"
    start: ScanNetwork | None = None


# The arguments of a solver for a number of steps and options.
Arguments = Callable[[int, Options], Mapping[str, Any]]


class TomographyMethod(NamedTuple):
    """A reconstruction.

    Attributes:
        name: What it is called on the command line and in tables.
        title: Its full name.
        solve: Does it.
        arguments: The solver's arguments for the number of steps and the options.
        low_dose: The default setting where all directions were measured.
        limited: The one where 36 of 180 degrees are missing.
        takes: The :class:`Options` that concern it: weight, steps, lr, stride, solver.
        learned: What checks the prior, if it needs one; if it has steps, it then :attr:`refines`.
    """

    name: str
    title: str
    solve: Callable[[methods.Task], Solution]
    arguments: Arguments = lambda steps, options: {}
    low_dose: Setting = Setting(0, 0)
    limited: Setting = Setting(0, 0)
    takes: tuple[str, ...] = ()
    learned: methods.Method | None = None

    @property
    def refines(self) -> bool:
        """It starts at total variation, or at what networks for the scan make of it."""
        return self.learned is not None and "steps" in self.takes

    def setting(self, options: Options) -> Setting:
        """What the options say, and the default for the rest.

        Weights of variation grow with the root of the photons, as the noise falls with it; those of patch priors are of
        the mean over all patches, as in the paper.
        """
        weight, steps = self.limited if options.limited else self.low_dose
        if self.refines and options.start is not None:
            steps = min(steps, FROM_NETWORK)
        if self.learned:
            weight *= math.prod(TUNED_SHAPE) / math.prod(options.shape)
        else:
            weight *= math.sqrt(options.photons / TUNED_PHOTONS)
        return Setting(
            weight if options.weight is None else options.weight,
            steps if options.steps is None else options.steps,
        )

    def first(self, task: Task, options: Options) -> Solution:
        """Where a method that :attr:`refines` starts, whatever its own weight."""
        if options.start is not None:
            return Solution(options.start(task.y, ensemble=True), [], 0, None)
        steps = VARIATION[options.limited].steps
        setting = METHODS["tv"].setting(options._replace(weight=None, steps=steps))
        return METHODS["tv"]._solve(task, setting, options)

    def run(self, task: Task, options: Options, first: Solution | None = None) -> Solution:
        """Reconstruct; ``first`` is what :meth:`first` returns, where that is known."""
        if self.refines:
            first = self.first(task, options) if first is None else first
            if first.interrupted:
                return first
            task = task._replace(fbp=first.x)
        return self._solve(task, self.setting(options), options)

    def _solve(self, task: Task, setting: Setting, options: Options) -> Solution:
        return self.solve(
            methods.Task(
                task.likelihood,
                task.y,
                task.fbp,
                setting.weight,
                task.prior,
                callback=task.callback,
                progress=task.progress,
                settings=self.arguments(setting.steps, options),
            )
        )

    def describe(self, options: Options) -> str:
        """A sentence that says how."""
        if not self.takes:
            return f"{self.title}."
        weight, steps = self.setting(options)
        most = "" if "lr" in self.takes else "at most "
        first = "total variation" if options.start is None else "the networks"
        start = f", from {first}" if self.refines else ""
        return f"{self.title}, weight {weight:.4g}, {most}{steps} steps{start}."

    def check_prior(self, prior: nn.Module | None) -> None:
        """Refuse a missing prior, and that of another method, with an :class:`InputError`."""
        if self.learned is not None:
            self.learned.check_prior(prior)


def _network(name: str, title: str, model: str, *, ensemble: bool) -> TomographyMethod:
    """A method whose model learns from simulated scans, not from images."""

    def solve(task: methods.Task) -> Solution:
        assert isinstance(task.prior, ScanNetwork)
        return Solution(task.prior(task.y, ensemble=ensemble), [], 0, True)

    learned = methods.Method(name, solve, lambda *_: 0.0, models=(model,))
    return TomographyMethod(name, title, solve, learned=learned)


def _splitting(steps: int, options: Options) -> Mapping[str, Any]:
    return {"max_iterations": steps}


def _deep_image_prior(steps: int, options: Options) -> Mapping[str, Any]:
    return {"steps": steps, "lr": deep_image_prior.LR if options.lr is None else options.lr}


def _transport(steps: int, options: Options) -> Mapping[str, Any]:
    lr = STEP_SIZE if options.lr is None else options.lr
    return {"steps": steps, "lr": lr, "rate": RATE, "stride": options.stride}


def _patches(steps: int, options: Options) -> Mapping[str, Any]:
    lr = STEP_SIZE if options.lr is None else options.lr
    return {"steps": steps, "lr": lr, "stride": options.stride, "method": options.solver}


# Of images EPLL splits, which needs the exact proximal map of the data term; of sinograms it descends.
_VARIATIONAL = methods.METHODS["patchnr"].solve
_PATCH_OPTIONS = ("weight", "steps", "lr", "stride", "solver")
# Weights with the best PSNR on a tuning slice of papers/tomography_cases.py, by benchmarks/tune_ct.py (of tv on
# three of them). The paper's weight of patchNR, 700 for the mean over all patches, would be 0.19.
_METHODS = (
    TomographyMethod(
        "fbp", "filtered backprojection", lambda task: Solution(task.init, [], 0, True)
    ),
    TomographyMethod(
        "tv",
        "total variation",
        methods.METHODS["tv"].solve,
        _splitting,
        low_dose=Setting(VARIATION[False].weight, 1000),
        limited=Setting(VARIATION[True].weight, 1000),
        takes=("weight", "steps"),
    ),
    TomographyMethod(
        "tgv",
        "total generalised variation",
        methods.METHODS["tgv"].solve,
        _splitting,
        low_dose=Setting(30, 1000),
        limited=Setting(20, 1000),
        takes=("weight", "steps"),
    ),
    TomographyMethod(
        "dip-tv",
        "deep image prior with total variation",
        methods.METHODS["dip-tv"].solve,
        _deep_image_prior,
        low_dose=Setting(30, 1000),
        limited=Setting(160, 1000),
        takes=("weight", "steps", "lr"),
    ),
    TomographyMethod(
        "wpp",
        "Wasserstein patch prior",
        methods.METHODS["wpp"].solve,
        _transport,
        low_dose=Setting(4000, 200),
        limited=Setting(4000, 200),
        takes=("weight", "steps", "lr", "stride"),
        learned=methods.METHODS["wpp"],
    ),
    TomographyMethod(
        "local-ar",
        "local adversarial regulariser",
        _VARIATIONAL,
        _patches,
        low_dose=Setting(320, 200),
        limited=Setting(320, 500),
        takes=_PATCH_OPTIONS,
        learned=methods.METHODS["local-ar"],
    ),
    *(
        TomographyMethod(
            name,
            title,
            _VARIATIONAL,
            _patches,
            low_dose=Setting(0.38, 400),
            limited=Setting(0.19, 1000),
            takes=_PATCH_OPTIONS,
            learned=methods.METHODS[name],
        )
        for name, title in (("epll", "expected patch log-likelihood"), ("patchnr", "patchNR"))
    ),
    _network(
        "fbp-unet", "filtered backprojection corrected by a U-Net", "fbp_unet", ensemble=False
    ),
    _network(
        "single-image",
        "an unrolled network, learned from a few slices",
        "single_scan",
        ensemble=True,
    ),
)
METHODS = {method.name: method for method in _METHODS}


def method_of(name: str) -> TomographyMethod:
    """A method by name.

    Raises:
        InputError: If there is none of this name for tomography.
    """
    if name not in METHODS:
        raise InputError(f"{name} is not made for ct; use one of {', '.join(METHODS)}.")
    return METHODS[name]
