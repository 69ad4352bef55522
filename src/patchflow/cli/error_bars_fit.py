"""``patchflow calibrate``: error bars fitted to the errors of images or slices whose truth is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
from patchflow.uncertainty.intervals import Intervals, check_images, coverage, fit_intervals
from patchflow.uncertainty.novelty import check_rate, fit_novelty

# A reconstruction, its truth and, where it varies, the noise level at each pixel.
Known = tuple[Tensor, ...]


def check_known(truths: Sequence[Tensor], settings: Mapping[str, Any]) -> None:
    """Refuse images that :func:`write_calibration` cannot be given, before they are reconstructed.

    Args:
        truths: Images with known truth.
        settings: All flags of the command.

    Raises:
        InputError: If they are too small or too few, or a flag is out of range.
    """
    check_rate(truths, settings["false_alarms"])
    for _, judges, _ in _crosses([(truth, truth) for truth in truths]):
        check_images([truth for _, truth in _mixed(judges)], settings["level"])


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


def refuse_twice(
    names: Sequence[str], truths: Sequence[Tensor], prints: Sequence[str] = ()
) -> None:
    """Refuse an image that is given twice: it says nothing new, and counts for the guarantee.

    Args:
        names: What the images are called.
        truths: The images.
        prints: If they were converted, the fingerprints of what their files hold.

    Raises:
        InputError: If two are the same.
    """
    seen: dict[str, str] = {}
    for name, given in zip(
        names, prints or [fingerprint([truth]) for truth in truths], strict=True
    ):
        if given in seen:
            raise InputError(
                f"{name} is the same image as {seen[given]}; give each calibration image once."
            )
        seen[given] = name


def write_calibration(
    folder: Path,
    images: Sequence[Known],
    recipe: Recipe,
    prior: nn.Module | None,
    settings: Mapping[str, Any],
    show: Callable[[float], str] = "{:.4f}".format,
    checked: Check | None = None,
) -> None:
    """Fit error bars to the errors of reconstructions, write the folder, and print how each fares by the others.

    Args:
        folder: The folder.
        images: Of each image the reconstruction, the truth and, where it varies, the noise level at each pixel.
        recipe: How they were measured and reconstructed.
        prior: The prior.
        settings: All flags of the command.
        show: Writes a difference of values with its unit.
        checked: How samples fared.
    """
    level = settings["level"]
    intervals = _fit(images, level)
    novelty = None
    if isinstance(prior, PatchPrior):
        novelty = fit_novelty(prior, [x for x, *_ in images], rate=settings["false_alarms"])
    told = {name: coverage(_fit(others, level), *image) for name, others, image in _crosses(images)}
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
            f"all pixels as many would take {show(part.constant)}. Of its tenths by brightness "
            f"{100 * min(part.intensities):.0f} to {100 * max(part.intensities):.0f} % are covered."
        )
    if checked is not None:
        print(checked.explain())
    print(f"{intervals.explain()}\n{folder / FILE}")


def _fit(images: Sequence[Known], level: float) -> Intervals:
    return fit_intervals(*(list(parts) for parts in zip(*_mixed(images), strict=True)), level=level)


def _mixed(images: Sequence[Known]) -> list[Known]:
    """In another order, always the same one: neighbouring slices shall not all serve the same end."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0), device="cpu")
    return [images[k] for k in order.tolist()]


def _crosses(images: Sequence[Known]) -> list[tuple[str, list[Known], Known]]:
    """Each image, or half of the only one, after the others that judge it."""
    if len(images) == 1:
        half = images[0][0].shape[-2] // 2
        names = ["upper half by the lower", "lower half by the upper"]
        images = [
            tuple(part[..., rows, :] for part in images[0])
            for rows in (slice(half), slice(half, None))
        ]
    else:
        names = [f"image {k + 1} by the others" for k in range(len(images))]
    return [
        (name, [*images[:k], *images[k + 1 :]], image)
        for k, (name, image) in enumerate(zip(names, images, strict=True))
    ]
