"""Choose the weight of each method for each problem of the tables, on the validation image and never on a test image.

Run: python benchmarks/tune.py --data DATA --models FOLDER [--problems deblurring ...] [--methods tv ...]. Of the
validation image a corner of 300 x 300 pixels is taken (--side), which holds the hole of inpainting; it is four times
faster than the whole.
A grid of factors of two around the default, extended while its end is best, up to twelve weights; then the two
neighbours at a factor of the square root of two. Prints what belongs into src/patchflow/papers/tuned.py.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch

from patchflow.errors import NumericalError
from patchflow.methods import Task
from patchflow.metrics import psnr
from patchflow.papers import image_problems, image_tables
from patchflow.papers.library import Library
from patchflow.papers.rivals import TEACHERS
from patchflow.papers.rows import by_name

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", required=True, type=Path)
parser.add_argument(
    "--models", required=True, type=Path, help="folder in which learned models are kept"
)
parser.add_argument("--problems", nargs="*", default=list(image_problems.PROBLEMS))
parser.add_argument(
    "--methods", nargs="*", default=[m for m in image_tables.METHODS if m != "bicubic"]
)
parser.add_argument("--groups", nargs="*", help="kinds of these problems, e.g. Gaussian")
parser.add_argument("--side", type=int, default=300, help="pixels along the corner's side")
parser.add_argument("--seconds", type=float, default=300.0, help="training time of patchNR")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--json", type=Path, default=Path("benchmarks/results/tune.json"))
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
arguments.models.mkdir(parents=True, exist_ok=True)
library = Library(arguments.models, arguments.seconds, 0, TEACHERS)
results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}


def search(problem, case, method):
    prior = image_tables.learned(method, problem, library, arguments.data)
    chosen = by_name(method)
    tried = {}

    def attempt(weight):
        weight = float(f"{weight:.2g}")
        if weight not in tried:
            torch.manual_seed(0)
            begun = time.perf_counter()
            operator = case.likelihood.operator
            init, left = operator.initial(case.y), math.nan
            try:
                solution = chosen.solve(Task(case.likelihood, case.y, init, weight, prior))
                x = solution.x.clamp(0, 1)
                residual = float((operator(solution.x) - case.y).square().mean().sqrt())
                left = residual / case.likelihood.std
                found = float(psnr(problem.region(x), problem.region(case.truth)))
                if solution.converged is False:  # an image of the start as much as of the method
                    found = -math.inf
            except NumericalError:  # too large or too small for the solver
                found = -math.inf
            tried[weight] = found
            print(
                f"  {weight:10.4g} {found:7.2f} dB {time.perf_counter() - begun:6.1f} s, residual {left:.2f} of the "
                "noise",
                flush=True,
            )

    default = chosen.weight(case.likelihood, prior)
    for factor in (0.5, 1, 2):
        attempt(factor * default)
    # Where a constraint is all that counts, ever smaller weights are as good.
    while max(tried, key=tried.get) in (min(tried), max(tried)) and len(tried) < 12:
        best = max(tried, key=tried.get)
        attempt(best / 2 if best == min(tried) else best * 2)
    best = max(tried, key=tried.get)
    for factor in (1 / math.sqrt(2), math.sqrt(2)):
        attempt(factor * best)
    return tried


for name in arguments.problems:
    for problem in image_problems.PROBLEMS[name]:
        if arguments.groups and problem.group not in arguments.groups:
            continue
        path = image_problems.validation_path(arguments.data, problem.material)
        case = problem.case(arguments.data, path, 0, side=arguments.side)
        for method in arguments.methods:
            if not by_name(method).solves(case.likelihood):
                continue
            print(f"{name}, {problem.group}: {method}", flush=True)
            tried = search(problem, case, method)
            best = max(tried, key=tried.get)
            entry = results.setdefault(f"{name}|{problem.group}", {})
            entry[method] = {"weight": best, "psnr": tried[best], "tried": sorted(tried.items())}
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
            print(f"  best {best:g}: {tried[best]:.2f} dB", flush=True)
