"""The weight that `--weight auto` chooses without the truth, against the best one of a grid.

Run: python benchmarks/auto_weight.py --data DATA --models FOLDER [--methods tv epll]. On corners of the validation
images (--side) of all problems of the image tables. The grid is what the choice itself tried: factors of four around
the default, refined around the smallest estimated risk, and then around the highest PSNR, which only this benchmark
sees, until both neighbours of the best are worse. Weights with which the solver does not converge do not count as best.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch

from patchflow.errors import NumericalError
from patchflow.methods import METHODS, Task
from patchflow.metrics import psnr
from patchflow.papers import image_problems, image_tables
from patchflow.papers.library import Library
from patchflow.papers.rivals import TEACHERS
from patchflow.reconstruct.automatic_weight import choose_weight

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", required=True, type=Path)
parser.add_argument(
    "--models", required=True, type=Path, help="folder in which learned models are kept"
)
parser.add_argument("--problems", nargs="*", default=list(image_problems.PROBLEMS))
parser.add_argument("--methods", nargs="*", default=["tv", "epll"])
parser.add_argument("--side", type=int, default=300, help="pixels along the corner's side")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--json", type=Path, default=Path("benchmarks/results/auto-weight.json"))
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
arguments.models.mkdir(parents=True, exist_ok=True)
library = Library(arguments.models, 300.0, 0, TEACHERS)
rows = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}


def compare(problem, name):
    path = image_problems.validation_path(arguments.data, problem.material)
    case = problem.case(arguments.data, path, 0, side=arguments.side)
    prior = image_tables.learned(name, problem, library, arguments.data)
    method, operator = METHODS[name], case.likelihood.operator
    found = {}

    def solve(y, weight):
        solution = method.solve(Task(case.likelihood, y, operator.initial(y), weight, prior))
        if y is case.y and solution.converged is not False:
            x = problem.region(solution.x.clamp(0, 1))
            found[weight] = float(psnr(x, problem.region(case.truth)))
        return solution

    begun = time.perf_counter()
    default = method.weight(case.likelihood, prior)
    torch.manual_seed(0)
    try:
        choice = choose_weight(solve, case.likelihood, case.y, start=default)
    except NumericalError as error:
        return {"error": str(error)}
    seconds, trials = time.perf_counter() - begun, len(choice.trials)
    x = problem.region(choice.solution.x.clamp(0, 1))
    chosen = float(psnr(x, problem.region(case.truth)))
    best, before = max(found, key=found.get), None
    while best != before:
        for factor in (1 / math.sqrt(2), math.sqrt(2)):
            if not any(math.isclose(weight, best * factor, rel_tol=0.01) for weight in found):
                solve(case.y, best * factor)
        best, before = max(found, key=found.get), best
    return {
        "weight": choice.weight,
        "psnr": chosen,
        "best_weight": best,
        "best_psnr": found[best],
        "by_discrepancy": choice.by_discrepancy,
        "agree": choice.agree,
        "default_psnr": found.get(default),
        "trials": trials,
        "seconds": seconds,
    }


for table in arguments.problems:
    for problem in image_problems.PROBLEMS[table]:
        for name in arguments.methods:
            key = f"{table}|{problem.group}|{name}"
            rows[key] = row = rows.get(key) or compare(problem, name)
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
            print(key, row, flush=True)
loss = [row["best_psnr"] - row["psnr"] for row in rows.values() if "psnr" in row]
print(
    f"{sum(value <= 0.15 for value in loss)} of {len(rows)} choices lose at most 0.15 dB; "
    f"the largest loss is {max(loss):.2f} dB."
)
