"""``patchflow calibrate``: error bars fitted to the errors of images or slices whose truth is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from patchflow.cli.config import command_line, write_config
from patchflow.cli.error_bars import FILE, Recipe
from patchflow.errors import InputError
from patchflow.io.atomic import write_text
from patchflow.io.checkpoint import read_header
from patchflow.io.images import fingerprint
from patchflow.priors.patch import PatchPrior
from patchflow.report import versions
from patchflow.uncertainty.image_samples import Check
from patchflow.uncertainty.intervals import check_images, coverage, fit_intervals
from patchflow.uncertainty.novelty import check_rate, fit_novelty

Item = TypeVar("Item")


def check_known(truths: Sequence[Tensor], settings: Mapping[str, Any]) -> None:
    """Refuse images that :func:`write_calibration` cannot be given, before they are reconstructed.

    Args:
        truths: Images with known truth.
        settings: All flags of the command.

    Raises:
        InputError: If they are too small or too few, or a flag is out of range.
    """
    check_rate(truths, settings["false_alarms"])
    for _, judges, _, _, _ in _crosses(truths, truths):
        check_images(_mixed(judges), settings["level"])


def refuse_learned(
    prior: str | None, names: Sequence[str], truths: Sequence[Tensor], prints: Sequence[str] = ()
) -> None:
    """Refuse images that a model was learned from.

    Args:
        prior: The model file.
        names: What the images are called.
        truths: The images.
        prints: If they were converted, the fingerprints of what their files hold.

    Raises:
        InputError: If one is among those that the model file names.
    """
    if prior is None:
        return
    kind = "slices" if prints else "images"
    try:
        training = read_header(prior).training
    except InputError:  # published weights without our header, which the method has accepted
        training = {}
    if training.get(kind) is None:
        print(f"{prior} does not say what it was learned from: give images that it was not.")
    known = {*training.get("images", []), *training.get("slices", [])}
    for k, (name, truth) in enumerate(zip(names, truths, strict=True)):
        if known & {fingerprint([truth]), *prints[k : k + 1]}:
            raise InputError(
                f"{name} is an image that {prior} was learned from: its errors are smaller than those of new images; "
                "give another image."
            )


def write_calibration(
    folder: Path,
    xs: Sequence[Tensor],
    truths: Sequence[Tensor],
    recipe: Recipe,
    prior: nn.Module | None,
    settings: Mapping[str, Any],
    show: Callable[[float], str] = "{:.4f}".format,
    checked: Check | None = None,
) -> None:
    """Fit error bars to the errors of reconstructions, write the folder, and print how each fares by the others.

    Args:
        folder: The folder.
        xs: The reconstructions.
        truths: The images.
        recipe: How they were measured and reconstructed.
        prior: The prior.
        settings: All flags of the command.
        show: Writes a difference of values with its unit.
        checked: How samples fared.
    """
    level = settings["level"]
    intervals = fit_intervals(_mixed(xs), _mixed(truths), level=level)
    novelty = None
    if isinstance(prior, PatchPrior):
        novelty = fit_novelty(prior, xs, rate=settings["false_alarms"])
    told = {
        name: coverage(fit_intervals(_mixed(others), _mixed(known), level=level), x, truth)
        for name, others, known, x, truth in _crosses(xs, truths)
    }
    document = {
        "intervals": intervals._asdict(),
        "novelty": None if novelty is None else novelty._asdict(),
        "checked": None if checked is None else checked._asdict(),
        **recipe._asdict(),
        "coverage": {name: part._asdict() for name, part in told.items()},
        "guarantee": intervals.explain(),
        "command": command_line("calibrate", settings, "images"),
        "versions": versions(),
    }
    write_text(folder / FILE, json.dumps(document, indent=1))
    write_config(folder / "calibration.yaml", "calibrate", settings)
    for name, part in told.items():
        print(
            f"{name}: {100 * part.share:.1f} % covered by intervals of mean width {show(part.width)}; of one width for "
            f"all pixels it would take {show(part.constant)}."
        )
    if checked is not None:
        print(checked.explain())
    print(f"{intervals.explain()}\n{folder / FILE}")


def _mixed(images: Sequence[Item]) -> list[Item]:
    """In another order, always the same one: neighbouring slices shall not all serve the same end."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0), device="cpu")
    return [images[k] for k in order.tolist()]


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
