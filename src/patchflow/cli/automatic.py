"""``reconstruct --method auto``: the method that the given models, the measurement, samples and time allow.

The order is that of the tables in ``benchmarks/README.md``: a network that was trained for this operator and noise is
the most accurate and the fastest for images, then come the priors of patches, then a denoiser, which is better than
they are only after a longer training, and total variation needs no model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchflow import models
from patchflow.cli.image_methods import ImageMethod
from patchflow.cli.scan import Scan
from patchflow.errors import InputError
from patchflow.image_models import SingleImage
from patchflow.io.checkpoint import read_header
from patchflow.networks.denoiser import Denoiser
from patchflow.priors.patch import PatchPrior
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.reconstruct import plug_and_play, single_image
from patchflow.scan_network import ScanNetwork
from patchflow.uncertainty.novelty import read_novelty

# Methods by the models that they take, in the order of preference.
_ORDER: dict[str, ImageMethod] = {
    "single_image": "single-image",
    "patch_nr": "patchnr",
    "epll": "epll",
    "drunet": "dpir",
}
_FOR_SAMPLES: dict[str, ImageMethod] = {"drunet": "dpir", "patch_nr": "patchnr"}
# Densities of patches: for any CT scan, and for the novelty map beside another method.
_DENSITIES: dict[str, ImageMethod] = {"patch_nr": "patchnr", "epll": "epll"}
_KINDS = {*_ORDER, *_FOR_SAMPLES, *_DENSITIES, "single_scan"}
# Evaluations of the prior that a reconstruction takes.
_EVALUATIONS = {"patchnr": 400, "epll": 40}


class Choice(NamedTuple):
    """What was chosen.

    Attributes:
        method: The method.
        prior: Its model file.
        reason: Why.
        start: The networks that it starts at, if any.
        novelty: The density of patches whose novelty map the report shows; None for that of the method itself.
    """

    method: ImageMethod
    prior: str | None
    reason: str
    start: str | None = None
    novelty: str | None = None

    def adopt(self, settings: dict[str, object]) -> tuple[ImageMethod, str | None, list[str]]:
        """Write it into the settings of the command, whose configuration then repeats it, and say it."""
        settings |= {"method": self.method, "prior": self.prior, "budget": None}
        told = f"Method {self.method}" + (f" with {self.prior}" if self.prior else "")
        return self.method, self.prior, [f"{told}, chosen automatically: {self.reason}."]


def choose_method(
    path: str | None,
    law: Callable[[], tuple[Tensor, GaussianLikelihood]],
    *,
    samples: bool,
    budget: float | None,
    ensemble: bool | None = None,
    shown: bool = False,
) -> Choice:
    """Choose for images.

    Args:
        path: A model file, or a folder of some; None for no model.
        law: Reads the measurement, and makes its law.
        samples: Whether samples of the posterior are wished for.
        budget: Seconds that the reconstruction may take, by an estimate on this machine.
        ensemble: As of :func:`patchflow.reconstruct.single_image.reconstruct`.
        shown: Whether a report shows the novelty map of what is found.

    Raises:
        InputError: If there is no such file or folder, samples are wished for without a model that draws them, or the
            budget is not positive.
    """
    if budget is not None and not budget > 0:
        raise InputError(
            f"--budget {budget} must be positive, in seconds; leave it out for no limit."
        )
    found, passed = _models(path)
    y, likelihood = law()

    def choice(method: ImageMethod, path: str | None, why: str) -> Choice:
        novelty = None
        if shown and method not in _DENSITIES.values():
            novelty = _density(found, likelihood.operator.initial(y), passed)
        return Choice(method, path, "; ".join([why, *passed]), novelty=novelty)

    if samples:
        for kind, method in _FOR_SAMPLES.items():
            if kind in found and _draws(found[kind]):
                why = f"samples are wished for, and {found[kind]} draws them"
                return choice(method, found[kind], why)
        told = f" ({'; '.join(passed)})" if passed else ""
        raise InputError(
            f"--samples with --method auto need a model that draws them in --prior{told}; train one with patchflow "
            "train denoiser --low 0.003 --high 0.5 --spread log-uniform IMAGE."
        )
    for kind, method in _ORDER.items():
        if kind not in found:
            continue
        model = models.load(found[kind], nn.Module)
        wrong = _unfit(model, y, likelihood)
        if wrong:
            passed.append(f"{found[kind]} is for another measurement")
            continue
        seconds = 0.0 if budget is None else _seconds(model, method, likelihood, y, ensemble)
        if budget is not None and seconds > budget:
            passed.append(f"{method} would take about {seconds:.0f} s")
            continue
        reason = {
            "single-image": "it was trained for this operator and noise",
            "patchnr": "a density of patches serves any operator",
            "epll": "a density of patches serves any operator",
            "dpir": "a denoiser serves any operator",
        }[method]
        return choice(method, found[kind], reason)
    return choice("tv", None, "total variation needs no model")


def choose_for_scan(
    path: str | None, read: Callable[[], Scan], free: bool = True, shown: bool = False
) -> Choice:
    """Choose for CT scans, as the tables of low dose and of missing directions prefer.

    Args:
        path: A model file, or a folder of some; None for no model.
        read: Reads the scan.
        free: Whether the start may be chosen, too: nobody said it, and the procedure is not the published one.
        shown: As of :func:`choose_method`.

    Raises:
        InputError: If there is no such file or folder.
    """
    found, passed = _models(path)
    own = found.get("single_scan")
    if own is not None:
        scan = read()
        if not _for_this(own, scan):
            passed.append(f"{own} is for another scan")
        elif not scan.limited or "patch_nr" not in found:
            why = "it was trained for this very scan"
            image = torch.zeros(1, 1, *scan.operator.domain_shape)
            novelty = _density(found, image, passed) if shown else None
            return Choice("single-image", own, "; ".join([why, *passed]), novelty=novelty)
        elif free:
            why = f"with missing directions it improves the result of {own}, which was trained for this very scan"
            return Choice("patchnr", found["patch_nr"], "; ".join([why, *passed]), own)
    for kind, method in _DENSITIES.items():
        if kind in found:
            why = "a density of patches serves any scan"
            return Choice(method, found[kind], "; ".join([why, *passed]))
    why = "total variation needs no model, and no density of patches was given"
    return Choice("tv", None, "; ".join([why, *passed]))


def _for_this(own: str, scan: Scan) -> bool:
    try:
        models.load(own, ScanNetwork).check(scan.operator, scan.photons)
    except InputError:
        return False
    return True


def _models(path: str | None) -> tuple[dict[str, str], list[str]]:
    """Files by the names of their models, of several of one kind the last by name, and what is passed over and why.

    Raises:
        InputError: If there is no such file or folder, the folder has no models, or the one file that was given is
            damaged.
    """
    if path is None:
        return {}, []
    given = Path(path)
    files, folder = [given], given.is_dir()
    if folder:  # beside models there may be the states of interrupted trainings
        files = [f for f in sorted(given.glob("*.safetensors")) if ".state." not in f.name]
    if not files:
        raise InputError(
            f"The folder {path} has no model files (.safetensors); train one (patchflow train), or leave --prior out."
        )
    found, passed = {}, []
    for file in files:
        try:
            kind = read_header(file).model
            if kind in _KINDS:
                models.load(file, nn.Module)
                found[kind] = str(file)
            elif not folder:
                passed.append(f"{file} holds the model {kind}, which is never chosen")
        except InputError:
            if not folder:
                raise
            passed.append(f"{file} cannot be read")
    return found, passed


def _density(found: dict[str, str], x: Tensor, passed: list[str]) -> str | None:
    """A density of patches for images like ``x``: the first that has thresholds of novelty, or else the first."""
    fitting = []
    for path in [found[kind] for kind in _DENSITIES if kind in found]:
        try:
            models.load(path, PatchPrior).check(x)
        except InputError:
            passed.append(f"{path} is for other images")
        else:
            fitting.append(path)
    return next(filter(read_novelty, fitting), next(iter(fitting), None))


def _draws(path: str) -> bool:
    """Whether a model draws samples: denoisers must know large noise."""
    model = models.load(path, nn.Module)
    return not isinstance(model, Denoiser) or model.levels[1] >= 0.3


def _unfit(model: nn.Module, y: Tensor, likelihood: GaussianLikelihood) -> bool:
    try:
        if isinstance(model, SingleImage):
            model.check_measurement(likelihood)
        elif isinstance(model, PatchPrior | Denoiser):
            model.check(likelihood.operator.initial(y))
    except InputError:
        return True
    return False


@torch.no_grad()
def _seconds(
    model: nn.Module, method: str, likelihood: GaussianLikelihood, y: Tensor, ensemble: bool | None
) -> float:
    """How long a reconstruction will take, by one evaluation; of networks, which are done with it, by the whole."""
    init, evaluations = likelihood.operator.initial(y), _EVALUATIONS.get(method, 1)
    begun = time.perf_counter()
    if isinstance(model, PatchPrior):
        model.phases()[0].value_and_grad(init)
    elif isinstance(model, Denoiser):
        model(init, model.levels[1])
        evaluations = len(plug_and_play.noise_levels(likelihood))
    elif isinstance(model, SingleImage):
        single_image.reconstruct(likelihood, model, y, ensemble=ensemble)
    return evaluations * (time.perf_counter() - begun)
