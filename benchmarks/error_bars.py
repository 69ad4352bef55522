"""Coverage of error bars that were calibrated on the validation image alone, on the test images of a table.

Run: python benchmarks/error_bars.py --data DATA --models FOLDER [--methods single-image epll]. For each method: 90 %
intervals of 20 bins of local contrast are fitted to one simulated measurement of the validation image, and the share of
the pixels that they cover is measured on each test image, beside their mean width and the width of the best constant
interval of the same coverage; over whole images, where `patchflow benchmark --intervals` keeps to the region of its
other figures. Nothing is chosen on test images. The noise floor: the coverage of the validation image with another
noise.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from patchflow.papers import image_problems, image_tables
from patchflow.papers.library import Library
from patchflow.papers.rivals import TEACHERS
from patchflow.papers.table_intervals import CALIBRATION_SEED, TableIntervals, calibration_case
from patchflow.uncertainty.intervals import coverage

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
groups = {problem.group: problem}
solvers = {
    name: image_tables.solver(name, arguments.problem, groups, library, arguments.data)
    for name in arguments.methods
}
known = {problem.group: calibration_case(arguments.data, problem)}
bars = TableIntervals(known, solvers, {problem.group: problem.region}, arguments.level)
rows = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}

for name, solve in solvers.items():
    intervals = bars.fitted(name, problem.group)

    def judged(path, seed, intervals=intervals, solve=solve):
        case = problem.case(arguments.data, path, seed)
        return coverage(intervals, solve(case), case.truth)._asdict()

    validation = image_problems.validation_path(arguments.data, problem.material)
    images = {"validation, other noise": judged(validation, CALIBRATION_SEED - 1)}
    paths = image_problems.reported_paths(arguments.data, problem.material)
    images |= {path.stem: judged(path, number) for number, path in enumerate(paths)}
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
