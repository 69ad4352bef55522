"""Held-out log-likelihood of patches: a Student-t mixture against a Gaussian one with as many components.

Run: python benchmarks/student_likelihood.py --data DATA [--components 50] [--seeds 1] [--count 50000] [--threads 1].
Patches of 6 x 6 pixels of the material's training image, at random without replacement; held out: those of the
validation image. Per seed both mixtures have the same patches, the same start (k-means++, scatter matrices of the
clusters; the Student-t one starts with 3 degrees of freedom) and the same floor; each takes steps of EM until one
gains less than --tolerance nats per patch. The means of patches stay in for both. Components that own no patch are left
out by either. The standard error is that of the mean difference over validation patches at a stride of 6, which do not
overlap. Rows lie in the JSON as soon as they are known, and are not measured again.

The aim: the Student-t mixture has the higher held-out log-likelihood.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from patchflow import read_image
from patchflow.io.atomic import atomic_path
from patchflow.numerics.patches import extract_patches
from patchflow.priors.expectation_maximization import fit_mixture
from patchflow.priors.patch_mixture import PatchMixture
from patchflow.priors.student import StudentMixture
from patchflow.priors.student_maximization import fit_student_mixture

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", required=True, type=Path, help="folder with material/")
parser.add_argument("--components", type=int, nargs="*", default=[50])
parser.add_argument("--seeds", type=int, default=1)
parser.add_argument("--count", type=int, default=50_000)
parser.add_argument("--held-out", type=int, default=50_000, help="validation patches at most")
parser.add_argument("--size", type=int, default=6)
parser.add_argument("--floor", type=float, default=1e-6)
parser.add_argument("--tolerance", type=float, default=5e-3)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--json", type=Path, default=Path("benchmarks/results/student-likelihood.json"))
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
document = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}


def patches(name, stride=1):
    image = read_image(arguments.data / "material" / name, grey=True)[0]
    return extract_patches(image, arguments.size, stride).double()


def log_likelihoods(density, x):
    with torch.no_grad():
        return torch.cat([-density(part) for part in x.split(1000)])


def fitted(kind, points, components, seed):
    """The density of a fit, and what is told of it."""
    torch.manual_seed(seed)
    begun = time.process_time()
    options = {"floor": arguments.floor, "tolerance": arguments.tolerance}
    if kind == "student":
        fit = fit_student_mixture(points, components, **options)
        density = StudentMixture(*fit[:4])
        levels = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
        extra = {"degrees": fit.degrees.double().quantile(levels).tolist()}
    else:
        fit = fit_mixture(points, components, **options)
        density, extra = PatchMixture(*fit[:3]), {}
    spent = time.process_time() - begun
    sample = points[:5000]
    told = {
        "steps": len(fit.log_likelihood) - 1,
        "start": fit.log_likelihood[0],
        "components": len(fit.weights),
        "training": fit.log_likelihood[-1],
        "training_sample": float(log_likelihoods(density, sample).mean()),
        "cpu_seconds": spent,
    }
    return density, told | extra


def compare(components, seed):
    torch.manual_seed(1000 + seed)
    training = patches("img_learn_material.png")
    points = training[torch.randperm(len(training))[: arguments.count]]
    held = patches("img_val_material.png")
    held = held[torch.randperm(len(held))[: arguments.held_out]]
    apart = patches("img_val_material.png", arguments.size)
    row, on_apart = {}, {}
    for kind in ("gaussian", "student"):
        density, row[kind] = fitted(kind, points, components, seed)
        row[kind]["held_out"] = float(log_likelihoods(density, held).mean())
        on_apart[kind] = log_likelihoods(density, apart)
    gain = on_apart["student"] - on_apart["gaussian"]
    row["gain"] = row["student"]["held_out"] - row["gaussian"]["held_out"]
    row["gain_apart"] = float(gain.mean())
    row["standard_error"] = float(gain.std() / len(gain) ** 0.5)
    return row | {"count": len(points), "held_out": len(held), "tolerance": arguments.tolerance}


for components in arguments.components:
    for seed in range(arguments.seeds):
        name = f"{components} components, {arguments.count} patches, seed {seed}"
        if name not in document:
            document[name] = compare(components, seed)
            with atomic_path(arguments.json) as temporary:
                temporary.write_text(json.dumps(document, indent=1) + "\n")
        row = document[name]
        for kind in ("gaussian", "student"):
            print(f"{name}, {kind}: {row[kind]}")
        print(
            f"{name}: Student-t above Gaussian by {row['gain']:.4f} nats on all held out, "
            f"{row['gain_apart']:.4f} ± {row['standard_error']:.4f} on patches apart",
            flush=True,
        )
wins = [row["gain"] > 0 for row in document.values()]
print(f"aim: the Student-t mixture is higher held out: {sum(wins)} of {len(wins)} rows")
