"""``patchflow benchmark``."""

from __future__ import annotations

import difflib
from pathlib import Path

from patchflow import models
from patchflow.cli.options import check_output, start
from patchflow.errors import InputError
from patchflow.papers import (
    hagemann2023_mixture,
    lueckmann2021_sbibm,
    patchnr_superresolution,
    patchnr_tomography,
)
from patchflow.papers import hagemann2023_scatterometry as scatterometry
from patchflow.papers.scatterometry_race import race
from patchflow.priors.patch import PatchPrior
from patchflow.table import Record, Table, write_csv

NAMES = (
    "patchnr-superresolution",
    "ct-low-dose",
    "ct-limited-angle",
    "snf-mixture",
    "snf-scatterometry",
    "sbibm",
)


def benchmark(
    name: str,
    *,
    data: str | None = None,
    methods: list[str] | None = None,
    images: int | None = None,
    full: bool = False,
    json: str | None = None,
    csv: str | None = None,
    model: str | None = None,
    seconds: float = 300.0,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Rerun a table and print ours beside the published numbers.

    Args:
        name: patchnr-superresolution, ct-low-dose, ct-limited-angle, snf-mixture, snf-scatterometry, sbibm.
        data: Folder with the data, where the table needs some; a missing file is named, with its public origin. Of
            ct-low-dose and ct-limited-angle also that of the unpacked LoDoPaB files: the paper's table.
        methods: Methods, as [a,b]; all by default. Of patchnr-superresolution: bicubic, tv,
            patchnr-90s, patchnr; of ct-low-dose and ct-limited-angle: fbp, tv, patchnr; of sbibm: the tasks.
        images: Number of test images, or of slices of each kernel (ct-...); all by default.
        full: The published number of repetitions and training steps (hours).
        json: File for the table.
        csv: File for the figures of each image or measurement.
        model: Model file of patchflow train patch-nr for the row patchnr; without it one is learned first.
        seconds: Training time of that model; patchnr-90s always learns for 90 seconds.
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
    if name == "snf-mixture":
        table, records = hagemann2023_mixture.run(
            methods=hagemann2023_mixture.METHODS if methods is None else tuple(methods),
            mixtures=5 if full else 2,
            observations=100 if full else 20,
            seed=seed,
        )
    elif name == "snf-scatterometry":
        table, records = _scatterometry(_folder(data, name), methods, full, seed, json)
    elif name == "sbibm":
        table, records = lueckmann2021_sbibm.run(
            _folder(data, name),
            methods=lueckmann2021_sbibm.METHODS if methods is None else tuple(methods),
            seed=seed,
        )
    elif name in ("ct-low-dose", "ct-limited-angle"):
        table, records = patchnr_tomography.run(
            _folder(data, name),
            name,
            methods=patchnr_tomography.METHODS if methods is None else tuple(methods),
            images=images,
            prior=None if model is None else models.load(model, PatchPrior),
            seconds=seconds,
            seed=seed,
        )
    else:
        table, records = patchnr_superresolution.run(
            _folder(data, name),
            methods=patchnr_superresolution.METHODS if methods is None else tuple(methods),
            images=images,
            prior=None if model is None else models.load(model, PatchPrior),
            seconds=seconds,
            seed=seed,
        )
    if json is not None:
        table.write_json(json)
    if csv is not None:
        write_csv(csv, records)
    print(table)


def _scatterometry(
    data: Path, methods: list[str] | None, full: bool, seed: int, json: str | None
) -> tuple[Table, list[Record]]:
    table, records, flows = scatterometry.run(
        data,
        methods=scatterometry.METHODS if methods is None else tuple(methods),
        steps=40_000 if full else 10_000,
        seed=seed,
    )
    if json is not None:
        table.write_json(json)  # before the race, which may lack a library
    if scatterometry.OURS_SNF in flows:
        snf, training = flows[scatterometry.OURS_SNF]
        second, _ = race(snf, scatterometry.likelihood_of(snf), training, seed=seed)
        if json is not None:
            second.write_json(Path(json).with_stem(f"{Path(json).stem}-race"))
        print(second, end="\n\n")
    return table, records


def _folder(data: str | None, name: str) -> Path:
    if data is None:
        raise InputError(f"The benchmark {name} needs --data, the folder with its data.")
    return Path(data)
