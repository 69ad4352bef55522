"""The methods of rows of tables, some of which are variants of a method."""

from __future__ import annotations

from patchflow.methods import METHODS, Method, Task
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.sampling import Mask
from patchflow.reconstruct import plug_and_play
from patchflow.solution import Solution

# Rows of tables that are a method with another model.
_VARIANTS = {
    "wpp-sinkhorn": "wpp",
    "patchnr-90s": "patchnr",
    "patch-gan": "local-ar",
    "single-image-denoiser": "dpir",
}
# Of the row single-image-denoiser, whose denoiser knows levels from .003 to .5: half of the published steps, and turned
# images. Chosen on a part of the validation image of super-resolution, among 8 and 12 steps.
_SHORT_STEPS = 12


def _short_dpir(task: Task) -> Solution:
    assert isinstance(task.likelihood, GaussianLikelihood)
    steps = None if isinstance(task.likelihood.operator, Mask) else _SHORT_STEPS
    levels = plug_and_play.noise_levels(task.likelihood, steps)
    settings = {"levels": levels, "turn": True}
    return METHODS["dpir"].solve(task._replace(settings=settings))


def by_name(name: str) -> Method:
    """The method of a name, or that of which a row of a table is a variant."""
    method = METHODS[_VARIANTS.get(name, name)]
    return method._replace(solve=_short_dpir) if name == "single-image-denoiser" else method
