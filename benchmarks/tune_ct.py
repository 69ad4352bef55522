"""Choose the weight of each method for both tables of tomography, on slices that the tables do not report.

Run: python benchmarks/tune_ct.py --data DATA --models FOLDER [--problems ct-low-dose ...] [--methods tgv ...].
The slices are those of `TUNING` (soft kernel), all of them or the first few. A grid of factors of two around the
default, extended while its end is best. Prints what belongs into src/patchflow/tomography_methods.py.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from patchflow.metrics import psnr
from patchflow.papers import leuschner2021_lodopab as lodopab
from patchflow.papers import patchnr_tomography as tables
from patchflow.papers import tomography_cases as slices
from patchflow.papers.library import Library
from patchflow.tomography_methods import Options, Task

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", required=True, type=Path, help="folder with ct/")
parser.add_argument("--models", required=True, type=Path, help="folder of learned models")
parser.add_argument("--problems", nargs="*", default=list(tables.PUBLISHED))
weighted = [m for m in tables.METHODS if tables.by_name(m).takes and m != tables.AFTER]
parser.add_argument("--methods", nargs="*", default=weighted)
parser.add_argument("--slices", type=int, default=len(slices.TUNING))
parser.add_argument("--steps", type=int, help="steps of each run; by default those of the method")
parser.add_argument("--seconds", type=float, default=300.0, help="training time of patchNR")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--json", type=Path, default=Path("benchmarks/results/tune-ct.json"))
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
library = Library(arguments.models, arguments.seconds, 0, tables.TEACHERS)
results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}


def pupils():
    found = slices.training_images(arguments.data)
    return found[: slices.TRAINING_SLICES], found[slices.TRAINING_SLICES :]


def search(problem, cases, name):
    method, prior = tables.by_name(name), library.prior(name, "lung", pupils)
    options = Options(limited=problem == "ct-limited-angle", steps=arguments.steps)
    tried = {}

    def attempt(weight):
        weight = float(f"{weight:.2g}")
        if weight in tried:
            return
        begun, found = time.perf_counter(), []
        for case in cases:
            torch.manual_seed(0)
            task = Task(case.likelihood, case.y, case.likelihood.operator.initial(case.y), prior)
            x = method.run(task, options._replace(weight=weight)).x
            own = float(case.truth.max() - case.truth.min())
            found.append(float(psnr(x, case.truth, own)))
        tried[weight] = sum(found) / len(found)
        seconds = (time.perf_counter() - begun) / len(cases)
        print(f"  {weight:10.4g} {tried[weight]:7.2f} dB {seconds:6.1f} s", flush=True)

    default = method.setting(options).weight
    for factor in (0.5, 1, 2):
        attempt(factor * default)
    while max(tried, key=tried.get) in (min(tried), max(tried)) and len(tried) < 8:
        best = max(tried, key=tried.get)
        attempt(best / 2 if best == min(tried) else best * 2)
    return tried


fine = lodopab.geometry(lodopab.FINE)
for problem in arguments.problems:
    kept = lodopab.LIMITED if problem == "ct-limited-angle" else slice(None)
    likelihood = lodopab.likelihood(lodopab.geometry().select(kept))
    cases = slices.simulated_cases(
        arguments.data,
        slices.KERNELS[:1],
        arguments.slices,
        fine,
        likelihood,
        kept,
        0,
        slices.TUNING,
    )
    for name in arguments.methods:
        print(f"{problem}: {name}", flush=True)
        tried = search(problem, cases, name)
        best = max(tried, key=tried.get)
        entry = {"weight": best, "psnr": tried[best], "tried": sorted(tried.items())}
        results.setdefault(problem, {})[name] = entry
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"  best {best:g}: {tried[best]:.2f} dB", flush=True)
