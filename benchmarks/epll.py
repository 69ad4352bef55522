"""EPLL: our EM against scikit-learn's at the same log-likelihood, and what approximations of the search would bring.

Run: python benchmarks/epll.py --data DATA [--threads 2] [--iterations 20]. Both fit 200 full covariances to the 354,025
patches of 6 x 6 pixels of the training image of the material. scikit-learn runs so many iterations from its k-means;
ours, from its own start, until its log-likelihood is as high. Then the validation image is reconstructed
(super-resolution x4): with all patches in each step, one phase of a grid, or a search in groups.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import torch
from sklearn.mixture import GaussianMixture

from patchflow.metrics import psnr
from patchflow.numerics.patches import extract_patches
from patchflow.papers import image_problems
from patchflow.priors.expectation_maximization import fit_mixture
from patchflow.priors.mixture_search import SearchedMixture
from patchflow.priors.patch import PatchPrior
from patchflow.priors.patch_mixture import PatchMixture
from patchflow.reconstruct import epll

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", required=True, type=Path, help="folder with material/")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--components", type=int, default=200)
parser.add_argument("--iterations", type=int, default=20, help="of scikit-learn")
parser.add_argument("--json", type=Path, default=Path("benchmarks/results/epll.json"))
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
rows = {}

image = image_problems.training_image(arguments.data, "material")
points = extract_patches(image[0], 6)
print(
    f"{len(points)} patches, {arguments.components} components, {arguments.threads} threads",
    flush=True,
)

begun = time.perf_counter()
theirs = GaussianMixture(
    arguments.components, tol=0, max_iter=arguments.iterations, reg_covar=1e-6, random_state=0
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it did not converge
    theirs.fit(points.numpy())
seconds = time.perf_counter() - begun
reached = float(theirs.score(points.numpy()))
rows["scikit-learn"] = {
    "seconds": seconds,
    "log_likelihood": reached,
    "steps": arguments.iterations,
}
print(f"scikit-learn  {seconds:7.1f} s  {reached:.3f} nats", flush=True)

torch.manual_seed(0)
begun = time.perf_counter()
fit, at = None, None
while at is None:  # in turns of five steps, so that the time at their log-likelihood is known
    fit = fit_mixture(points, arguments.components, tolerance=0, max_iterations=5, start=fit)
    at = time.perf_counter() - begun if fit.log_likelihood[-1] >= reached else None
rows["ours, at the same"] = {"seconds": at, "log_likelihood": fit.log_likelihood[-1]}
print(
    f"ours, same    {at:7.1f} s  {fit.log_likelihood[-1]:.3f} nats: {seconds / at:.1f} times as fast",
    flush=True,
)

torch.manual_seed(0)
begun = time.perf_counter()
fit = fit_mixture(points, arguments.components)
seconds = time.perf_counter() - begun
steps = len(fit.log_likelihood) - 1
rows["ours, converged"] = {
    "seconds": seconds,
    "log_likelihood": fit.log_likelihood[-1],
    "steps": steps,
}
print(
    f"ours, default {seconds:7.1f} s  {fit.log_likelihood[-1]:.3f} nats, {steps} steps", flush=True
)

(problem,) = image_problems.PROBLEMS["patchnr-superresolution"]
path = image_problems.validation_path(arguments.data, "material")
case = problem.case(arguments.data, path, 0)
init = case.likelihood.operator.initial(case.y)
mixture = PatchMixture(fit.weights, fit.means, fit.covariances)


def reconstruct(name, mixture, steps, stride):
    prior = PatchPrior(mixture, 6)
    levels = epll.geometric_levels(*epll.LEVELS, steps)
    begun = time.perf_counter()
    x = epll.reconstruct(case.likelihood, prior, case.y, init, levels=levels, stride=stride).x
    spent = time.perf_counter() - begun
    found = float(psnr(problem.region(x.clamp(0, 1)), problem.region(case.truth)))
    rows[name] = {"seconds": spent, "psnr": found}
    print(f"{name:40s} {found:.2f} dB {spent:6.1f} s", flush=True)


reconstruct("all patches, 16 steps", mixture, 16, 1)
reconstruct("stride 3, 64 steps", mixture, 64, 3)
reconstruct("stride 6, 128 steps (default)", mixture, 128, None)
reconstruct("stride 6, 32 steps", mixture, 32, None)
for groups in (10, 20):
    reconstruct(f"search in {groups} groups, stride 6", SearchedMixture(mixture, groups), 128, None)
    reconstruct(f"search in {groups} groups, all patches", SearchedMixture(mixture, groups), 16, 1)
arguments.json.write_text(json.dumps({"threads": arguments.threads, "rows": rows}, indent=1) + "\n")
