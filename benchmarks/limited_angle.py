"""Limited-angle tomography: our procedure against the published one, in energy, PSNR and seconds, on one slice.

Run: python benchmarks/limited_angle.py --data DATA --model lung.safetensors [--full]. The slice is one of those on
which weights were chosen. Both procedures lower the same energy with the same prior; the published one (3,000 steps of
Adam, each on 40,000 random patches) takes about an hour and runs with --full.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from patchflow import metrics, models
from patchflow.papers import altekrueger2023_patchnr as paper
from patchflow.papers import leuschner2021_lodopab as lodopab
from patchflow.papers.tomography_cases import TUNING
from patchflow.priors.patch import PatchPrior
from patchflow.problems.attenuation import from_hounsfield
from patchflow.tomography_methods import METHODS, Options, Task

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", required=True, type=Path, help="folder with ct/")
parser.add_argument("--model", required=True, help="patchNR learned from the six training slices")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument(
    "--steps", type=int, default=paper.CT_LIMITED_STEPS, help="steps of the published procedure"
)
parser.add_argument("--full", action="store_true", help="run the published procedure, too")
parser.add_argument("--json", type=Path, default=Path("benchmarks/results/limited-angle.json"))
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)

row = 23 + TUNING[1]
torch.manual_seed(row)
slices = np.load(arguments.data / "ct" / "lung_val_hu.npz")["hu"]
truth = from_hounsfield(torch.from_numpy(slices[None, None, row]).float(), dither=True)
operator = lodopab.geometry().select(lodopab.LIMITED)
y = lodopab.simulate(truth, lodopab.geometry(lodopab.FINE))[:, :, lodopab.LIMITED]
likelihood = lodopab.likelihood(operator)
prior = models.load(arguments.model, PatchPrior)
weight = paper.weight_of_mean(paper.CT_LAMBDA, operator.domain_shape, prior)
fbp = operator.initial(y)


@torch.no_grad()
def report(name, x, seconds):
    # The likelihood without what depends on y alone: the smallest value that it could have is zero.
    data = float(likelihood(x, y) + likelihood.noise.log_prob(y, y))
    energy = data + weight * float(prior(x))
    psnr = float(metrics.psnr(x, truth, float(truth.max() - truth.min())))
    print(f"{name:36s} energy {energy:10.0f}  PSNR {psnr:.2f} dB  {seconds:6.0f} s", flush=True)
    rows[name] = {"energy": energy, "data": data, "psnr": psnr, "seconds": seconds}


rows = {}
report("filtered backprojection", fbp, 0.0)
begun = time.perf_counter()
options = Options(limited=True, weight=weight)
start = METHODS["tv"].setting(Options(limited=True))
task = Task(likelihood, y, fbp, prior)
init = METHODS["tv"].run(task, Options(limited=True, steps=start.steps // 2)).x
report("total variation, our start", init, time.perf_counter() - begun)
begun = time.perf_counter()
x = METHODS["patchnr"].run(task, options).x
report("ours", x, time.perf_counter() - begun)
if arguments.full:
    begun = time.perf_counter()
    x = paper.reconstruct_ct(likelihood, prior, y, fbp, steps=arguments.steps, progress=True).x
    report(f"published, {arguments.steps} steps", x, time.perf_counter() - begun)
arguments.json.write_text(
    json.dumps({"threads": arguments.threads, "weight": weight, "rows": rows}, indent=1) + "\n"
)
