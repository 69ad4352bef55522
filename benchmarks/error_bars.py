"""Coverage of error bars that were calibrated on the validation image alone, on the test images of a table.

Run: python benchmarks/error_bars.py --data DATA --models FOLDER [--methods single-image epll]. For each method: 90 %
intervals of 20 bins of local contrast are fitted to one simulated measurement of the validation image, and the share of
the pixels that they cover is measured on each test image, beside their mean width and the width of the best constant
interval of the same coverage. Nothing is chosen on test images. The noise floor: the coverage of the validation image
with another noise.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from patchflow.methods import METHODS, Task
from patchflow.papers import image_problems, image_tables
from patchflow.papers.library import Library
from patchflow.papers.rivals import TEACHERS
from patchflow.papers.tuned import WEIGHTS
from patchflow.uncertainty.intervals import coverage, fit_intervals

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", required=True, type=Path)
parser.add_argument(
    "--models", required=True, type=Path, help="folder in which learned models are kept"
)
parser.add_argument("--problem", default="patchnr-superresolution", help="a table of images")
parser.add_argument("--methods", nargs="*", default=["single-image", "epll"])
parser.add_argument("--level", type=float, default=0.9)
parser.add_argument("--seconds", type=float, default=600.0, help="training time of networks")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--json", type=Path, default=Path("benchmarks/results/error-bars.json"))
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
arguments.models.mkdir(parents=True, exist_ok=True)
library = Library(arguments.models, arguments.seconds, 0, TEACHERS)
problem = image_problems.PROBLEMS[arguments.problem][0]
rows = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}


def reconstruct(name, path, seed):
    case = problem.case(arguments.data, path, seed)
    prior = image_tables.learned(name, problem, library, arguments.data)
    method, init = METHODS[name], case.likelihood.operator.initial(case.y)
    weight = WEIGHTS.get((arguments.problem, problem.group), {}).get(name)
    if weight is None:
        weight = method.weight(case.likelihood, prior)
    x = method.solve(Task(case.likelihood, case.y, init, weight, prior)).x
    return x, case.truth


for name in arguments.methods:
    validation = image_problems.validation_path(arguments.data, problem.material)
    x, truth = reconstruct(name, validation, 999)
    intervals = fit_intervals([x], [truth], level=arguments.level)
    again = coverage(intervals, *reconstruct(name, validation, 998))
    images = {"validation, other noise": again._asdict()}
    paths = image_problems.reported_paths(arguments.data, problem.material)
    for number, path in enumerate(paths):
        images[path.stem] = coverage(intervals, *reconstruct(name, path, number))._asdict()
    rows[f"{name}, {arguments.problem}"] = {"intervals": intervals._asdict(), "images": images}
    arguments.json.write_text(json.dumps(rows, indent=1))
    print(f"{name}: {100 * arguments.level:.0f} % intervals, calibrated on {validation.name}")
    for image, told in images.items():
        print(
            f"  {image:24} {100 * told['share']:6.2f} %   width {told['width']:.4f}, best constant "
            f"{told['constant']:.4f}"
        )
    shares = [images[path.stem]["share"] for path in paths]
    inside = sum(abs(share - arguments.level) <= 0.02 for share in shares)
    print(
        f"  mean {100 * statistics.mean(shares):.2f} %, within 2 points of the level: {inside} of {len(shares)} images"
    )
