"""Pictures of a table: the first image of each kind of problem, by all methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from patchflow.papers.comparison import Case, Comparison
from patchflow.papers.image_problems import Region
from patchflow.records import Record
from patchflow.table import Table


class Picture(NamedTuple):
    """The first image of a kind of problem.

    Attributes:
        group: The kind of problem.
        methods: The reconstructions with their captions, by method.
        truth: The image.
        region: Where its figures were taken.
        title: What is shown, for example the values that are black and white.
    """

    group: str
    methods: dict[str, tuple[Tensor, str]]
    truth: Tensor
    region: Region
    title: str


class Outcome(NamedTuple):
    """A table, the figures of each image, and the first image of each kind of problem."""

    table: Table
    records: list[Record]
    pictures: list[Picture]


def first_pictures(
    outcome: Comparison,
    cases: Sequence[Case],
    methods: Sequence[str],
    regions: Mapping[str, Region],
    *,
    show: Callable[[Tensor], Tensor] = lambda image: image,
    shown: str = "",
) -> list[Picture]:
    """The first image of each kind of problem, by all methods that newly reconstructed it.

    Args:
        outcome: What the methods gave.
        cases: The measured images.
        methods: The methods, in order.
        regions: Where figures are taken, by kind of problem.
        show: Maps the values that become black and white to 0 and 1; what lies outside is cut off.
        shown: What it shows, for the title.
    """
    pictures = []
    for group, region in regions.items():
        case = next(case for case in cases if case.group == group)
        drawn = {}
        for method in methods:
            if (method, group) not in outcome.pictures:
                continue
            label = f"{method}, {group}" if group else method
            found = next(r for r in outcome.records if (r.method, r.image) == (label, case.image))
            caption = f"{found.values['psnr']:.2f} dB, SSIM {found.values['ssim']:.3f}"
            drawn[method] = (show(outcome.pictures[method, group]).clamp(0, 1), caption)
        title = ", ".join(part for part in (group, shown) if part)
        pictures.append(Picture(group, drawn, show(case.truth).clamp(0, 1), region, title))
    return pictures
