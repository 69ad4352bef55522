"""``patchflow demo``."""

from __future__ import annotations

import time

import skimage.data
import torch
from torch import Tensor

from patchflow import models
from patchflow.cli.novelty import Watch
from patchflow.cli.options import output_folder, start
from patchflow.errors import InputError
from patchflow.io.atomic import write_bytes
from patchflow.io.images import write_image
from patchflow.learn import learn_patches
from patchflow.metrics import crop, psnr, ssim
from patchflow.numerics.patches import hold_out
from patchflow.problems.blur import downsample
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.reconstruct import total_variation
from patchflow.reconstruct.variational import DEFAULT_WEIGHT, reconstruct
from patchflow.records import Record
from patchflow.report import Curve, Panel, Report, figure_grid, write_report
from patchflow.table import PSNR, SECONDS, SSIM, build_table
from patchflow.uncertainty.novelty import novelty_record

NOISE = 0.01
SCALE = 4
# Part of the left half that training is validated on, and that the novelty map compares with.
HOLDOUT = 0.1
# Pixels left out of the metrics on each side: the operator is periodic, the photograph is not.
BORDER = 16
# Highest PSNR on the lower quarter of the training half.
TV_WEIGHT = 6.0


def demo(
    *,
    output: str = "demo",
    training: int = 1500,
    steps: int = 600,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Learn a patchNR from the left half of a photograph of bricks, super-resolve the right half, write a report.

    The photograph ships inside scikit-image; nothing is downloaded.

    Args:
        output: Folder for the report, the images and the model.
        training: Training steps: no time limit, so that a busy machine takes longer and shows the same.
        steps: Steps of the reconstruction.
        seed: Random seed.
        threads: Number of threads; by default all cores.
    """
    if training < 1 or steps < 1:
        raise InputError(
            f"Got {training} training steps and {steps} of the reconstruction; both must be positive."
        )
    start(seed, threads)
    folder = output_folder(output)
    photograph = torch.from_numpy(skimage.data.brick()).to(torch.float32)[None, None] / 255
    left, truth = photograph[..., :256], photograph[..., 256:]
    print(
        f"Learning from the left half of a {photograph.shape[2]} x {photograph.shape[3]} photograph ({training} steps)"
    )
    prior = models.patch_nr()
    learned = learn_patches(prior, [left], holdout=HOLDOUT, steps=training, progress=True)
    held = hold_out([left], HOLDOUT, prior.size)[1]
    models.save(
        folder / "prior.safetensors",
        prior,
        images=[left],
        seed=seed,
        training={
            "steps": learned.steps,
            "validation": learned.best,
            **novelty_record(prior, held),
        },
    )
    likelihood = GaussianLikelihood(downsample((512, 256), SCALE), NOISE)
    y = likelihood.simulate(truth)
    init = likelihood.operator.initial(y)
    images, timings = (
        {"bicubic, aligned": init},
        {"training": learned.seconds, "bicubic, aligned": 0.0},
    )
    begun = time.perf_counter()
    images["L2-TV"] = total_variation.reconstruct(likelihood, y, init, weight=TV_WEIGHT).x
    timings["L2-TV"] = time.perf_counter() - begun
    begun = time.perf_counter()
    solution = reconstruct(
        likelihood, prior, y, init, weight=DEFAULT_WEIGHT, steps=steps, progress=True
    )
    images["patchNR"] = solution.x
    timings["patchNR"] = time.perf_counter() - begun
    records = [
        Record(name, "brick", _figures(x, truth) | {"seconds": timings[name]})
        for name, x in images.items()
    ]
    table = build_table(
        "demo",
        f"x{SCALE} super-resolution of the right half of a photograph, patchNR learned from the left half; "
        f"noise {NOISE}, {BORDER}-pixel border removed, data range 1",
        records,
        metrics=(PSNR, SSIM, SECONDS),
    )
    print(f"\n{table}\n")
    write_image(folder / "measurement.png", y.clamp(0, 1))
    write_image(folder / "reconstruction.png", solution.x)
    panels = [
        Panel("measurement", y),
        *(Panel(name, x) for name, x in images.items()),
        Panel("truth", truth),
    ]
    write_bytes(folder / "demo.png", figure_grid(panels))
    watch = Watch.read(None, str(folder / "prior.safetensors"), prior, report=output)
    finding = watch.find(solution.x)
    page = write_report(
        folder,
        Report(
            title="Super-resolution with a prior learned from half a photograph",
            command=f"patchflow demo --output {output} --training {training} --steps {steps} --seed {seed}",
            measurement=Panel("measurement", y),
            baseline=Panel("bicubic, aligned", init),
            others=[Panel("L2-TV", images["L2-TV"])],
            reconstruction=Panel("patchNR", solution.x),
            truth=Panel("truth", truth),
            table=table,
            curves=[
                Curve(
                    "energy",
                    [float(k) for k in range(solution.steps)],
                    solution.history,
                    "energy [nats]",
                ),
                Curve(
                    "validation",
                    [float(step) for step, _ in learned.validation],
                    [value for _, value in learned.validation],
                    "validation loss [nats per patch]",
                    "training step",
                ),
            ],
            nll_map=finding.nll_map,
            novelty=finding.novelty,
            notes=finding.notes,
            seed=seed,
            timings=timings,
            settings={
                "noise": NOISE,
                "scale": SCALE,
                "weight": DEFAULT_WEIGHT,
                "tv weight": TV_WEIGHT,
                "steps": steps,
            },
        ),
    )
    print(f"Report: {page}")


def _figures(x: Tensor, truth: Tensor) -> dict[str, float]:
    x, truth = crop(x, BORDER), crop(truth, BORDER)
    return {"psnr": float(psnr(x, truth)[0]), "ssim": float(ssim(x, truth)[0])}
