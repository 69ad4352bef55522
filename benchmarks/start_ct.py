"""Networks for the scan by their relaxation, and patchNR from their result or total variation by its number of steps.

Run: python benchmarks/start_ct.py --data DATA --models FOLDER [--problem ct-limited-angle] [--slices 1]. The folder
holds single-image-PROBLEM.safetensors and patchnr-lung.safetensors of the tables; the slices are those that weights
were chosen on. Prints the PSNR (range of the slice), and the seconds of patchNR; --steps with no number leaves it out.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import patchflow as pf
from patchflow.papers import leuschner2021_lodopab as lodopab
from patchflow.papers import tomography_cases as slices
from patchflow.scan_network import ScanNetwork
from patchflow.tomography_methods import METHODS, Options, Task

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", required=True, type=Path, help="folder with ct/")
parser.add_argument("--models", required=True, type=Path, help="folder of learned models")
parser.add_argument(
    "--problem", default="ct-limited-angle", choices=["ct-limited-angle", "ct-low-dose"]
)
parser.add_argument("--slices", type=int, default=1)
parser.add_argument("--steps", nargs="*", type=int, default=[100, 300, 1000])
parser.add_argument("--relaxations", nargs="*", type=float, default=[0.35, 0.5, 0.7, 1.0])
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--json", type=Path)
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)

limited = arguments.problem == "ct-limited-angle"
kept = lodopab.LIMITED if limited else slice(None)
likelihood = lodopab.likelihood(lodopab.geometry().select(kept))
fine = lodopab.geometry(lodopab.FINE)
cases = slices.simulated_cases(
    arguments.data, ["B40f"], arguments.slices, fine, likelihood, kept, 0, slices.TUNING
)
del fine
network = pf.load(arguments.models / f"single-image-{arguments.problem}.safetensors", ScanNetwork)
prior = None
if arguments.steps:
    prior = pf.load(arguments.models / "patchnr-lung.safetensors", pf.PatchPrior)
rows = []
for case in cases:
    init = likelihood.operator.initial(case.y)
    own = float(case.truth.max() - case.truth.min())
    estimate, usual = network.estimate(case.y), network.relaxation
    for relaxation in arguments.relaxations:
        network.relaxation = relaxation
        x = network(case.y, ensemble=True, estimate=estimate)
        row = {"slice": case.image, "method": "single-image", "relaxation": relaxation}
        row["psnr"] = float(pf.psnr(x, case.truth, own))
        rows.append(row)
        print(row, flush=True)
    network.relaxation = usual
    tried = [
        ("patchnr", Options(limited=limited, steps=steps, start=start), prior, name)
        for name, start in (("networks", network), ("total variation", None))
        for steps in arguments.steps
    ]
    for method, options, model, name in tried:
        begun = time.perf_counter()
        x = METHODS[method].run(Task(likelihood, case.y, init, model), options).x
        row = {"slice": case.image, "method": method, "start": name, "steps": options.steps}
        row["psnr"] = float(pf.psnr(x, case.truth, own))
        row["seconds"] = time.perf_counter() - begun
        rows.append(row)
        print(row, flush=True)
if arguments.json is not None:
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
