"""``patchflow benchmark``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from patchflow.cli.options import check_output, output_folder, start
from patchflow.errors import InputError
from patchflow.figures import figure_grid
from patchflow.io.atomic import write_bytes
from patchflow.panels import Panel, Region
from patchflow.papers import (
    hagemann2023_mixture,
    image_tables,
    lueckmann2021_sbibm,
    patchnr_tomography,
    zero_shot_table,
)
from patchflow.papers import hagemann2023_scatterometry as scatterometry
from patchflow.papers.image_problems import PROBLEMS
from patchflow.papers.pictures import Picture
from patchflow.papers.scatterometry_race import race
from patchflow.records import Record, read_csv, write_csv
from patchflow.table import Table

NAMES = (
    "patchnr-superresolution",
    "deblurring",
    "inpainting",
    "denoising",
    "zero-shot-superresolution",
    "ct-low-dose",
    "ct-limited-angle",
    "snf-mixture",
    "snf-scatterometry",
    "sbibm",
)
_TOMOGRAPHY = ("ct-low-dose", "ct-limited-angle")
# Tables of images: their file of figures grows image by image, and the first image can be drawn.
_DRAWN = (*PROBLEMS, zero_shot_table.NAME, *_TOMOGRAPHY)
# Training time of patchNR on a training image.
_SECONDS = 300.0


def benchmark(
    name: str,
    *,
    data: str | None = None,
    methods: list[str] | None = None,
    images: int | None = None,
    full: bool = False,
    json: str | None = None,
    csv: str | None = None,
    models: str | None = None,
    figure: str | None = None,
    resume: bool = False,
    intervals: bool = False,
    seconds: float | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Rerun a table and print ours beside the published numbers.

    Args:
        name: patchnr-superresolution, deblurring, inpainting, denoising, zero-shot-superresolution, ct-low-dose,
            ct-limited-angle, snf-mixture, snf-scatterometry, sbibm.
        data: Folder with the data, where the table needs some; a missing file is named, with its public origin. Of
            ct-low-dose and ct-limited-angle also that of the unpacked LoDoPaB files: the paper's table.
        methods: Methods, as [a,b]. Of images: bicubic (the start), tikhonov, tv, tgv, bm3d, wpp, wpp-sinkhorn,
            local-ar, patch-gan, epll, student-t, patch-vae, pnp-pnn, dpir, acnn, wpp-net, wpp-flow,
            single-image-denoiser, single-image, patchnr-90s, patchnr, dip-tv; by default bicubic, tv, tgv, wpp,
            wpp-sinkhorn, local-ar, epll and patchnr. Of zero-shot-superresolution: bicubic, tv, tgv, wpp, epll, zssr,
            dual-sr, patchnr, patchnr-paper (hours), dip-tv, by default bicubic, tv, zssr, patchnr, dip-tv. Of
            ct-low-dose and ct-limited-angle: fbp, tv, tgv, dip-tv, wpp, wpp-sinkhorn, local-ar, epll, patchnr,
            fbp-unet, single-image, by default all but dip-tv; of sbibm: the tasks, all by default.
        images: Number of test images, or of slices of each kernel (ct-...); by default all of super-resolution
            (zero-shot, too) and ct, two of the others.
        full: The published number of repetitions and training steps (hours).
        json: File for the table.
        csv: File for the figures of each image or measurement; of images and ct it grows while the table runs.
        resume: Keep the figures in the file of --csv and take only those that it lacks: after an interruption, or
            to add methods to a table of the same images and seed.
        intervals: Of patchnr-superresolution, deblurring, inpainting and denoising: add the share of the pixels in 90 %
            intervals, which are fitted on the validation image alone, and their mean width.
        models: Folder in which learned models are looked for and kept; without it they are learned anew.
        figure: PNG file for a picture of the first image (tables of images and ct), by all methods that ran and
            enlarged; a table of several kinds of problems writes one for each, ct one for each kernel.
        seconds: Training time of patchnr and of the networks, 300 by default; patchnr-90s always learns for 90
            seconds. Of zero-shot-superresolution the time in which patchnr, zssr and dual-sr learn from each image,
            120 by default.
        seed: Seed of training and noise.
        threads: Number of threads; by default all cores.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1, cutoff=0.3)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(NAMES)}."
        raise InputError(f"There is no benchmark named {name!r}; {hint}")
    for path, suffix in ((json, ".json"), (csv, ".csv"), (figure, ".png")):
        if path is not None:
            check_output(Path(path), (suffix,))
    if figure is not None and name not in _DRAWN:
        raise InputError(f"The table {name} has no images to draw; leave --figure out.")
    if intervals and name not in PROBLEMS:
        raise InputError(
            f"--intervals is for the tables {', '.join(PROBLEMS)}, not for {name}; leave it out."
        )
    before, keep = _records(name, csv, resume)
    pictures: list[Picture] = []
    folder = None if models is None else output_folder(models)
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
    elif name == "ct-low-dose" or name == "ct-limited-angle":
        table, records, pictures = patchnr_tomography.run(
            _folder(data, name),
            name,
            methods=patchnr_tomography.USUAL if methods is None else tuple(methods),
            images=images,
            models=folder,
            seconds=_SECONDS if seconds is None else seconds,
            seed=seed,
            before=before,
            keep=keep,
        )
    elif name == zero_shot_table.NAME:
        table, records, pictures = zero_shot_table.run(
            _folder(data, name),
            methods=zero_shot_table.USUAL if methods is None else tuple(methods),
            images=images,
            seconds=seconds,
            seed=seed,
            before=before,
            keep=keep,
        )
    else:
        table, records, pictures = image_tables.run(
            _folder(data, name),
            name,
            methods=image_tables.USUAL if methods is None else tuple(methods),
            images=images,
            models=folder,
            seconds=_SECONDS if seconds is None else seconds,
            seed=seed,
            intervals=intervals,
            before=before,
            keep=keep,
        )
    for picture in pictures if figure is not None else ():
        _draw(Path(str(figure)), picture)
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


def _records(
    name: str, csv: str | None, resume: bool
) -> tuple[list[Record], Callable[[Sequence[Record]], None] | None]:
    """The figures of an interrupted run, and what writes the file while the table grows."""
    if resume and (csv is None or name not in _DRAWN):
        raise InputError(
            f"--resume needs --csv and a table of images or ct, but the table is {name} and the file {csv}; "
            "leave --resume out."
        )
    if csv is None:
        return [], None
    return (
        read_csv(csv) if resume and Path(csv).exists() else [],
        lambda records: write_csv(csv, records),
    )


def _draw(path: Path, picture: Picture) -> None:
    """Draw a picture; the kind of problem joins the file's name where there are several."""
    words = "".join(c if c.isalnum() else "-" for c in picture.group.lower()).strip("-")
    panels = [Panel(name, *shown) for name, shown in picture.methods.items()]
    rows, columns = picture.region
    zoom = None  # the busiest region
    if rows.stop is not None and rows.stop > 0:  # a hole, with as much around it
        side = rows.stop - rows.start
        zoom = Region(rows.start - side // 2, columns.start - side // 2, 2 * side, 2 * side)
    drawn = figure_grid(
        [*panels, Panel("truth", picture.truth)], zoom=zoom, columns=5, title=picture.title
    )
    write_bytes(path.with_stem(f"{path.stem}-{words}") if words else path, drawn)


def _folder(data: str | None, name: str) -> Path:
    if data is None:
        raise InputError(f"The benchmark {name} needs --data, the folder with its data.")
    return Path(data)
