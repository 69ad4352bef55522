"""Validation likelihood against training time, and what it is worth in PSNR.

Trains on the one material image with several recipes, each for the same time, and reports the negative
log-likelihood of 8,192 fixed patches of the validation image (nats per patch, without the constant
18 log 2 pi) and the PSNR of the reconstruction of the validation image (x4, noise 0.01, 40-pixel crop).
Test images are not touched.

    python benchmarks/training.py --data ../shared/data --recipes default:90,default:300,paper:3600
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch

import patchflow as pf
from patchflow.papers import altekrueger2023_patchnr as paper
from patchflow.reconstruct.variational import reconstruct

# What differs from the defaults of ``patch_nr`` and of ``learn_patches``.
RECIPES: dict[str, tuple[dict, dict]] = {
    "default": ({}, {}),
    "paper": ({"preset": "paper"}, {"preset": "paper"}),
    "wide": ({"hidden": 512}, {}),
    "dihedral": ({}, {"dihedral": True}),
    "batch-2048": ({}, {"batch": 2048, "lr": 4e-3}),
    "batch-256": ({}, {"batch": 256, "lr": 1e-3}),
    "last-weights": ({}, {"average": 0.0}),
    "float32": ({}, {"precision": "float32"}),
}
CONSTANT = 18 * math.log(2 * math.pi)


def measure(data: Path, recipe: str, seconds: float, seed: int) -> dict:
    folder = data / "material"
    learn = pf.read_image(folder / "img_learn_material.png", grey=True)
    validation = pf.read_image(folder / "img_val_material.png", grey=True)
    model, training = RECIPES[recipe]
    torch.manual_seed(seed)
    prior = pf.patch_nr(**model)
    record = pf.learn_patches(
        prior, [learn], [validation], **{"steps": 10**6} | training, seconds=seconds, progress=True
    )
    likelihood = pf.GaussianLikelihood(pf.downsample(tuple(validation.shape[-2:])), paper.NOISE)
    torch.manual_seed(seed)
    y = likelihood.simulate(validation)
    begun = time.perf_counter()
    x = reconstruct(likelihood, prior, y, likelihood.operator.initial(y)).x
    elapsed = time.perf_counter() - begun
    cropped = pf.crop(x.clamp(0, 1), paper.CROP), pf.crop(validation, paper.CROP)
    return {
        "recipe": recipe,
        "seconds": record.seconds,
        "steps": record.steps,
        "nats": record.best - CONSTANT,
        "psnr": pf.psnr(*cropped).item(),
        "ssim": pf.ssim(*cropped).item(),
        "reconstruction_seconds": elapsed,
        "threads": torch.get_num_threads(),
        # Validations are equally spaced in steps, and steps in time.
        "curve": [
            (step * record.seconds / record.steps, v - CONSTANT) for step, v in record.validation
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipes", default="default:90,default:300", help="NAME:SECONDS,...")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/training.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for item in arguments.recipes.split(","):
        recipe, _, seconds = item.partition(":")
        row = measure(arguments.data, recipe, float(seconds), arguments.seed)
        # Read again each time: two processes may fill one table.
        rows = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        rows = [
            r
            for r in rows
            if (r["recipe"], round(r["seconds"], -1)) != (recipe, round(row["seconds"], -1))
        ]
        arguments.json.write_text(json.dumps([*rows, row], indent=1))
        print(
            f"{recipe:14s} {row['seconds']:6.0f} s {row['steps']:7d} steps {row['nats']:9.3f} nats "
            f"{row['psnr']:.3f} dB SSIM {row['ssim']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
