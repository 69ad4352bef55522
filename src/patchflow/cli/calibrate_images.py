"""``patchflow calibrate IMAGE...``: error bars of the problems of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patchflow.cli.error_bars import Recipe
from patchflow.cli.error_bars_fit import (
    check_known,
    refuse_learned,
    refuse_twice,
    write_calibration,
)
from patchflow.cli.image_methods import Solver
from patchflow.cli.image_samples import combined
from patchflow.cli.options import output_folder, start, value_range
from patchflow.cli.problems import Settings
from patchflow.errors import InputError
from patchflow.io.images import read_image
from patchflow.numerics.patches import common_channels
from patchflow.uncertainty.image_samples import check_samples


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
    refuse_twice(paths, truths)
    refuse_learned(settings["prior"], paths, truths)
    channels = common_channels(truths)
    check_known(truths, settings)
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
    xs, checks = [], {}
    for path, truth, law in zip(paths, truths, laws, strict=True):
        y = law.simulate(truth)
        solution, _, _ = solver.run(law, y, prior, None)
        if solution.interrupted:
            raise KeyboardInterrupt
        print(f"{path}: reconstructed.")
        xs.append(solution.x)
        if solution.samples is not None:
            checks[path] = check_samples(solution.samples, truth, law.operator.initial(y))
    recipe = Recipe.of(laws[0], solver, settings["prior"], channels)
    known = list(zip(xs, truths, strict=True))
    checked = combined(checks) if checks else None
    write_calibration(folder, known, recipe, prior, settings, checked=checked)
