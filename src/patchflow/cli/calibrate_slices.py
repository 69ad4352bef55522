"""``patchflow calibrate SLICES... --problem ct``: error bars of computed tomography."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from patchflow.cli.error_bars import Recipe
from patchflow.cli.error_bars_fit import (
    check_known,
    refuse_learned,
    refuse_twice,
    write_calibration,
)
from patchflow.cli.notes import convergence
from patchflow.cli.options import output_folder, start
from patchflow.cli.scan import Scan, ScanFlags
from patchflow.cli.scanner import check_angles_flag, scanner_for
from patchflow.cli.slices import SLACK, check_grey, read_slices
from patchflow.cli.tomography_methods import Choices, SliceSolver
from patchflow.papers import leuschner2021_lodopab as lodopab
from patchflow.problems.attenuation import HU_RANGE
from patchflow.progress import progress_line
from patchflow.uncertainty.noise_level import noise_level


def calibrate_slices(
    paths: Sequence[str], flags: ScanFlags, choices: Choices, settings: Mapping[str, Any]
) -> None:
    """Simulate scans of slices, reconstruct them, fit error bars to the errors, and write the folder.

    They are measured as by ``patchflow simulate``: rounded Hounsfield units get noise, the grid is a finer one.

    Args:
        paths: Files of slices with known truth, which nothing was learned from.
        flags: What the flags say about the scan.
        choices: What they say about the reconstruction.
        settings: All flags of the command.

    Raises:
        InputError: If a slice was learned from, does not fit, or is too small; or a flag is out of range.
    """
    if settings["scan"] is None:
        check_angles_flag(flags)
    folder = output_folder(settings["output"])
    start(settings["seed"], settings["threads"])
    found = read_slices(paths, units=choices.units, dataset=flags.dataset, dither=True, slack=SLACK)
    check_grey(found)
    refuse_twice(found.names, found.images, found.prints)
    for model in (choices.prior, choices.start):
        refuse_learned(model, found.names, found.images, found.prints)
    scanner = scanner_for(found, paths, flags, settings["scan"], settings["bins"], settings["fine"])
    operator = scanner.operator
    scan = Scan(torch.zeros(0, 1, *operator.range_shape), operator, scanner.photons, ())
    prior = choices.load(scan)
    check_known(found.images, settings)
    print(
        *filter(None, [found.note]),
        f"Measured on a finer grid: {scanner.fine.describe()}.",
        sep="\n",
    )
    sinograms = [
        lodopab.simulate(x, scanner.fine, scanner.photons)
        for x in progress_line(found.images, unit="slice")
    ]
    solve = SliceSolver(replace(scan, y=torch.cat(sinograms)), prior, choices)
    print(solve.describe(), *solve.notes, sep="\n")
    solutions = []
    for name, y in zip(found.names, sinograms, strict=True):
        solution = solve(y, None).solution
        if solution.interrupted:
            raise KeyboardInterrupt
        print(f"{name}: reconstructed.")
        solutions.append(solution)
    for note in convergence(solutions):
        print(note)
    recipe = Recipe.of(scan.likelihood, choices, choices.prior, channels=1)
    levels = noise_level(scan.likelihood, torch.cat(sinograms)).split(1)
    xs = [solution.x for solution in solutions]
    known = list(zip(xs, found.images, levels, strict=True))
    write_calibration(folder, known, recipe, prior, settings, show_difference)


def show_difference(value: float) -> str:
    """A difference of attenuations, in units of the largest and in Hounsfield units."""
    return f"{value:.4f} ({value * HU_RANGE:.3g} HU)"
