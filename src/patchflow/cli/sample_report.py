"""What ``reconstruct --samples`` says of its samples, and writes beside its output."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from patchflow.cli.error_bars import Bars
from patchflow.cli.image_samples import LEVEL
from patchflow.io.images import write_image
from patchflow.solution import Samples, Solution
from patchflow.uncertainty.image_samples import Check, check_samples, diagnose, summarise


def notes_of(
    samples: Samples, truth: Tensor | None, reference: Tensor, checked: Check | None
) -> list[str]:
    """What there is to say about samples: acceptance, whether the chains have met, and the check.

    Args:
        samples: The samples.
        truth: The truth, if it is known.
        reference: The start image.
        checked: The check of the same sampler on images with known truth, if a calibration has one.
    """
    notes = diagnose(samples)
    if samples.acceptance is not None:
        notes.append(f"{100 * samples.acceptance:.0f} % of the steps were accepted.")
    if checked is not None:
        notes.append(checked.explain())
    elif truth is not None:
        notes.append(check_samples(samples, truth, reference).explain())
    else:
        notes.append(
            "Nobody has checked these samples: patchflow calibrate IMAGE --samples does, on images with known truth."
        )
    return notes


def write_samples(target: Path, solution: Solution) -> Bars:
    """Write the samples and their standard deviation beside the output, and make their interval the error bars.

    Args:
        target: The output.
        solution: What :meth:`Sampling.draw` returned.
    """
    assert solution.samples is not None
    assert solution.std is not None
    write_image(target.with_name(f"{target.stem}-std.tif"), solution.std)
    write_image(target.with_name(f"{target.stem}-samples.npy"), solution.samples.images)
    found = summarise(solution.samples, level=LEVEL)
    width = float((found.high - found.low).mean())
    note = (
        f"{100 * LEVEL:.0f} % of the samples of each pixel lie in intervals of mean width {width:.4f}; as error bars "
        "they are as good as the sampler."
    )
    return Bars(found.low, found.high, None, [note])
