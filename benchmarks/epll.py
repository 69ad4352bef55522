"""EPLL: our EM against scikit-learn's at the same log-likelihood, and what approximations of the search would bring.

Run: python benchmarks/epll.py --data DATA [--threads 2] [--parts em reconstruct] [--model epll.safetensors].
em: both fit 200 full covariances to the 354,025 patches of 6 x 6 pixels of the training image of the material.
scikit-learn runs 20 iterations (--iterations) from its k-means; ours, from its own start, until its log-likelihood is
as high. reconstruct: the validation image (super-resolution x4), with all patches in each step, one phase of a grid, or
a search in groups; with the mixture of --model (patchflow train epll), or that of em.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import torch
from sklearn.mixture import GaussianMixture

from patchflow import models
from patchflow.metrics import psnr
from patchflow.numerics.patches import extract_patches
from patchflow.papers import image_problems
from patchflow.priors.expectation_maximization import fit_mixture
from patchflow.priors.mixture_search import SearchedMixture
from patchflow.priors.patch import PatchPrior
from patchflow.priors.patch_mixture import PatchMixture
from patchflow.reconstruct import epll

COMPONENTS, SIZE = 200, 6
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", required=True, type=Path, help="folder with material/")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--parts", nargs="*", default=["em", "reconstruct"])
parser.add_argument("--iterations", type=int, default=20, help="of scikit-learn")
parser.add_argument("--model", type=Path, help="mixture of the reconstructions")
parser.add_argument("--json", type=Path, default=Path("benchmarks/results/epll.json"))
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
document = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}


def keep(part, name, row):
    document.setdefault(part, {})[name] = row | {"threads": arguments.threads}
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{name:40s} {row}", flush=True)


def race(points):
    begun = time.perf_counter()
    theirs = GaussianMixture(
        COMPONENTS, tol=0, max_iter=arguments.iterations, reg_covar=1e-6, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it did not converge
        theirs.fit(points.numpy())
    seconds = time.perf_counter() - begun
    reached = float(theirs.score(points.numpy()))
    keep("em", "scikit-learn", {"seconds": seconds, "log_likelihood": reached})
    torch.manual_seed(0)
    begun = time.perf_counter()
    fit, at = None, None
    while at is None:  # in turns of five steps, so that the time at their log-likelihood is known
        fit = fit_mixture(points, COMPONENTS, tolerance=0, max_iterations=5, start=fit)
        at = time.perf_counter() - begun if fit.log_likelihood[-1] >= reached else None
    row = {"seconds": at, "log_likelihood": fit.log_likelihood[-1], "times as fast": seconds / at}
    keep("em", "ours", row)
    return PatchPrior(PatchMixture(fit.weights, fit.means, fit.covariances), SIZE)


def reconstruct(case, prior, name, steps, stride):
    init = case.likelihood.operator.initial(case.y)
    levels = epll.geometric_levels(*epll.LEVELS, steps)
    begun = time.perf_counter()
    x = epll.reconstruct(case.likelihood, prior, case.y, init, levels=levels, stride=stride).x
    seconds = time.perf_counter() - begun
    found = float(psnr(problem.region(x.clamp(0, 1)), problem.region(case.truth)))
    keep("reconstruct", name, {"seconds": seconds, "psnr": found})


prior = None if arguments.model is None else models.load(arguments.model, PatchPrior)
if "em" in arguments.parts:
    image = image_problems.training_image(arguments.data, "material")
    learned = race(extract_patches(image[0], SIZE))
    prior = learned if prior is None else prior
if "reconstruct" in arguments.parts:
    if prior is None:
        parser.error("reconstruct needs --model, or em among --parts")
    (problem,) = image_problems.PROBLEMS["patchnr-superresolution"]
    path = image_problems.validation_path(arguments.data, "material")
    case = problem.case(arguments.data, path, 0)
    mixture = prior.patch_energy
    assert isinstance(mixture, PatchMixture)
    reconstruct(case, prior, "stride 6, 128 steps (default)", 128, None)
    reconstruct(case, prior, "stride 6, 32 steps", 32, None)
    reconstruct(case, prior, "stride 3, 64 steps", 64, 3)
    reconstruct(case, prior, "all patches, 16 steps", 16, 1)
    for groups in (10, 20):
        searched = PatchPrior(SearchedMixture(mixture, groups), prior.size)
        reconstruct(case, searched, f"search in {groups} groups, stride 6, 128 steps", 128, None)
        reconstruct(case, searched, f"search in {groups} groups, all patches, 16 steps", 16, 1)
