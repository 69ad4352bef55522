"""Coverage of error bars of computed tomography: on other slices of the patient, and across reconstruction kernels.

Run: python benchmarks/error_bars_ct.py --data DATA --models FOLDER [--methods fbp tv patchnr] [--images 9]. For each
method: 90 % intervals of 20 bins of local contrast times noise level are fitted to simulated scans (LoDoPaB's geometry)
of the slices of the soft kernel (B40f) that weights are chosen on, or of --rows; none of them is reported. The share of
the pixels that they cover is measured on the reported slices (or --on others) of this kernel, and apart from these on
the same slices of the sharp kernel (B70f) and, for methods that learn nothing, on five slices of another patient and
kernel (B31f), beside their mean width and that of the best constant interval of the same coverage. The noise floor: the
standard deviation of the coverage over three noises of the first reported slice; and the calibration slices with
another noise. With --contrast-alone bins do not count the noise level, for comparison. Models are
FOLDER/METHOD-lung.safetensors, of networks FOLDER/METHOD-PROBLEM.safetensors, as `patchflow benchmark` leaves them.
Intervals and slices are kept in --json one by one, and taken from there by the next run: delete it to start again.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from patchflow import models
from patchflow.papers import leuschner2021_lodopab as lodopab
from patchflow.papers import patchnr_tomography as table
from patchflow.papers import tomography_cases as slices
from patchflow.problems.attenuation import HU_RANGE
from patchflow.uncertainty.intervals import Intervals, coverage, fit_intervals
from patchflow.uncertainty.noise_level import noise_level

# Slices of the patient that other methods learn from, with a kernel of its own: less and less absorbing.
OTHER_KERNEL, OTHER_ROWS = "B31f", (0, 8, 16, 24, 32)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", required=True, type=Path)
parser.add_argument("--models", required=True, type=Path, help="folder of learned models")
parser.add_argument("--problem", default="ct-low-dose", choices=["ct-low-dose", "ct-limited-angle"])
parser.add_argument(
    "--methods",
    nargs="*",
    default=None,
    help="by default fbp, tv, and patchnr if there is its model",
)
parser.add_argument(
    "--on",
    type=int,
    nargs="+",
    default=list(slices.REPORTED),
    help="rows to measure; to choose something take others than the reported ones",
)
parser.add_argument("--images", type=int, default=None, help="only the first of them")
parser.add_argument(
    "--rows",
    type=int,
    nargs="*",
    default=list(slices.TUNING),
    help="to calibrate on; ten are conformal",
)
parser.add_argument("--level", type=float, default=0.9)
parser.add_argument(
    "--contrast-alone", action="store_true", help="bins do not count the noise level of the scan"
)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--json", type=Path, default=Path("benchmarks/results/error-bars-ct.json"))
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
measured = set(arguments.rows) & set(arguments.on)
if measured:
    parser.error(
        f"--rows {sorted(measured)} are measured; calibrate on others, such as {slices.TUNING}."
    )
if arguments.methods is None:
    learned = (arguments.models / "patchnr-lung.safetensors").exists()
    arguments.methods = ["fbp", "tv", *(["patchnr"] if learned else [])]
priors = {}
for name in arguments.methods:
    learned_for = arguments.problem if name in table.SCANNED else "lung"
    path = arguments.models / f"{name}-{learned_for}.safetensors"
    if table.by_name(name).learned and not path.exists():
        parser.error(
            f"There is no {path}; learn it with patchflow benchmark {arguments.problem} --methods [{name}]."
        )
    priors[name] = models.load(path, torch.nn.Module) if table.by_name(name).learned else None

kept = lodopab.LIMITED if arguments.problem == "ct-limited-angle" else slice(None)
fine = lodopab.geometry(lodopab.FINE)
likelihood = lodopab.likelihood(lodopab.geometry().select(kept))
results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
soft, sharp = slices.KERNELS


def cases(kernel, rows, seed):
    """The slices of a kernel; their noise is that of the tables with the seed 0."""
    patient = "val" if kernel in slices.KERNELS else "train"
    return slices.simulated_cases(
        arguments.data, [kernel], None, fine, likelihood, kept, seed, rows, patient
    )


def level_of(case):
    """The noise level at each pixel, unless bins are of contrast alone."""
    return None if arguments.contrast_alone else noise_level(likelihood, case.y)


def summary(told):
    shares = [part["share"] for part in told]
    width, constant = (statistics.mean(part[key] for part in told) for key in ("width", "constant"))
    inside = sum(abs(share - arguments.level) <= 0.02 for share in shares)
    enough = sum(share >= arguments.level for share in shares)
    bright = statistics.mean(part["intensities"][-1] for part in told)
    return (
        f"{100 * statistics.mean(shares):.2f} % ({100 * min(shares):.2f} to {100 * max(shares):.2f}), of "
        f"{len(shares)} slices {inside} within 2 points of the level, {enough} at least the level; of the "
        f"brightest tenth of the pixels {100 * bright:.0f} %; width "
        f"{HU_RANGE * width:.1f} HU, best constant {HU_RANGE * constant:.1f} HU"
    )


for name in arguments.methods:
    solve = table.solver(arguments.problem, name, priors[name])
    rows = "-".join(map(str, arguments.rows))
    title = f"{name}, {arguments.problem}, {100 * arguments.level:g} %, rows {rows}"
    title += ", contrast alone" if arguments.contrast_alone else ""
    if arguments.on != list(slices.REPORTED):
        title += f", on {'-'.join(map(str, arguments.on))}"
    result = results.setdefault(title, {})
    if result and (result["intervals"].get("noise") is None) != arguments.contrast_alone:
        parser.error(
            f"{arguments.json} holds intervals of another kind under {title!r}; delete it."
        )
    if "intervals" not in result:
        known = cases(soft, arguments.rows, 0)
        xs, truths = [solve(case) for case in known], [case.truth for case in known]
        noise = None if arguments.contrast_alone else [level_of(case) for case in known]
        intervals = fit_intervals(xs, truths, noise, level=arguments.level)
        result |= {"intervals": intervals._asdict(), "guarantee": intervals.explain()}
        arguments.json.write_text(json.dumps(results, indent=1))
    intervals = Intervals(**result["intervals"])
    first, *_ = shown = arguments.on[: arguments.images]
    groups = [
        (soft, soft, shown, [0]),
        (sharp, sharp, shown, [0]),
        (f"slice {first}, other noises", soft, [first], [1000, 2000, 3000]),
        ("calibration slices, other noise", soft, arguments.rows, [500]),
    ]
    if not table.by_name(name).learned:
        groups.append(("other patient", OTHER_KERNEL, OTHER_ROWS, [0]))
    print(f"{title} of {soft}. {intervals.explain()}", flush=True)
    for label, kernel, numbers, seeds in groups:
        told = result.setdefault(label, {})
        for seed in seeds:
            for number in numbers:
                key = f"{number}, seed {seed}"
                if key not in told:
                    (case,) = cases(kernel, [number], seed)
                    fares = coverage(intervals, solve(case), case.truth, level_of(case))
                    told[key] = fares._asdict()
                    arguments.json.write_text(json.dumps(results, indent=1))
        told = [told[f"{number}, seed {seed}"] for seed in seeds for number in numbers]
        print(f"  {label:32} {summary(told)}", flush=True)
        if len(seeds) > 1:
            floor = statistics.stdev(part["share"] for part in told)
            print(f"  noise floor of the coverage: {100 * floor:.3f} points")
