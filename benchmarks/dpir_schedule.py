"""Steps and largest noise level of DPIR with the denoiser of one image, on a corner of the validation image.

Run: python benchmarks/dpir_schedule.py --data DATA --models FOLDER [--problems inpainting ...]. The folder holds the
denoiser of the tables, single-image-denoiser-material.safetensors (or that of --row); weights are those of the tables.
Prints the PSNR and the seconds of each number of steps and each largest level, with turned images.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

import patchflow as pf
from patchflow.networks.denoiser import Denoiser
from patchflow.papers.image_problems import PROBLEMS, validation_path
from patchflow.papers.tuned import WEIGHTS
from patchflow.reconstruct import plug_and_play

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", required=True, type=Path)
parser.add_argument("--models", required=True, type=Path)
parser.add_argument("--problems", nargs="*", default=["patchnr-superresolution", "inpainting"])
parser.add_argument("--row", default="single-image-denoiser", help="whose denoiser")
parser.add_argument("--steps", nargs="*", type=int, default=[8, 12, 24, 48, 96])
parser.add_argument("--levels", nargs="*", type=float, default=[0.06, 0.1, 49 / 255])
parser.add_argument("--side", type=int, default=300, help="pixels along the corner's side")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--json", type=Path)
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
denoiser = pf.load(arguments.models / f"{arguments.row}-material.safetensors", Denoiser)

rows = []
for problem in (p for name in arguments.problems for p in PROBLEMS[name]):
    name = next(name for name, kinds in PROBLEMS.items() if problem in kinds)
    path = validation_path(arguments.data, "material")
    case = problem.case(arguments.data, path, 1000, side=arguments.side)
    weight = WEIGHTS[name, problem.group].get("single-image-denoiser", plug_and_play.DEFAULT_WEIGHT)
    init = case.likelihood.operator.initial(case.y)
    smallest = plug_and_play.noise_levels(case.likelihood)[-1]
    for steps in arguments.steps:
        for largest in arguments.levels:
            levels = [float(v) for v in np.geomspace(largest, smallest, steps)]
            begun = time.perf_counter()
            x = plug_and_play.dpir(
                case.likelihood, denoiser, case.y, init, levels=levels, weight=weight, turn=True
            ).x.clamp(0, 1)
            figure = float(pf.psnr(problem.region(x), problem.region(case.truth)))
            row = {
                "problem": f"{name}, {problem.group}",
                "steps": steps,
                "largest": largest,
                "psnr": figure,
                "seconds": time.perf_counter() - begun,
            }
            rows.append(row)
            print(row, flush=True)
if arguments.json is not None:
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
