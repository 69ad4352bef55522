"""``patchflow benchmark``."""

from __future__ import annotations

import difflib
from pathlib import Path

from patchflow import models
from patchflow.cli.options import check_output, start
from patchflow.errors import InputError
from patchflow.papers import patchnr_superresolution
from patchflow.priors.patch import PatchPrior

NAMES = ("patchnr-superresolution",)


def benchmark(
    name: str,
    *,
    data: str,
    methods: list[str] | None = None,
    images: int | None = None,
    json: str | None = None,
    csv: str | None = None,
    model: str | None = None,
    seconds: float = 300.0,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Rerun a table and print ours beside the published numbers.

    Args:
        name: patchnr-superresolution.
        data: Folder with the data; a missing file is named, with its public origin.
        methods: Methods, as [a,b]; all by default. Of patchnr-superresolution: bicubic, tv, patchnr-90s, patchnr.
        images: Number of test images; all by default.
        json: File for the table.
        csv: File for the figures of each image.
        model: Model file of patchflow train patch-nr; without it a patchNR is learned first.
        seconds: Training time of that patchNR; patchnr-90s always learns for 90 seconds.
        seed: Seed of training and noise.
        threads: Number of threads; by default all cores.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1, cutoff=0.3)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(NAMES)}."
        raise InputError(f"There is no benchmark named {name!r}; {hint}")
    for path, suffix in ((json, ".json"), (csv, ".csv")):
        if path is not None:
            check_output(Path(path), (suffix,))
    start(seed, threads)
    table, records = patchnr_superresolution.run(
        Path(data),
        methods=patchnr_superresolution.METHODS if methods is None else tuple(methods),
        images=images,
        prior=None if model is None else models.load(model, PatchPrior),
        seconds=seconds,
        seed=seed,
    )
    if json is not None:
        table.write_json(json)
    if csv is not None:
        patchnr_superresolution.write_csv(csv, records)
    print(table)
