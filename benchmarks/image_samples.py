"""Samples of the posterior of images, and the way from accuracy to texture, on the test images of super-resolution x4.

Run: python benchmarks/image_samples.py --data DATA --models FOLDER [--images 10] [--draws 32] [--threads 2].

FOLDER holds what the table learned: single-image-material, single-image-denoiser-material and patchnr-material
(patchflow benchmark patchnr-superresolution --methods [single-image,single-image-denoiser,patchnr] --models FOLDER).

Samples: split Gibbs with the denoiser, on the 160 x 160 pixels in the middle of each image. Printed are the squared
error of a single sample over that of the mean of all (right: 2 / (1 + 1 / draws), accepted: 1.8 to 2.2), the largest
deviation of coverage (TARP over squares of 8 x 8), and PSNR of one sample and of the mean. Nothing was tuned on them.

Texture: single-image moved by shares towards patchNR (patchflow.reconstruct.perception), on whole images, with PSNR in
the table's region and LPIPS; beside it patchNR from the table. Weight and steps were chosen on the validation image.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import nn

from patchflow import models
from patchflow.io.images import read_image
from patchflow.metrics import LPIPS, psnr
from patchflow.papers import image_problems
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.reconstruct import perception, single_image, split_gibbs
from patchflow.uncertainty.image_samples import check_samples

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--data", required=True, type=Path)
parser.add_argument("--models", required=True, type=Path)
parser.add_argument("--images", type=int, default=10)
parser.add_argument("--draws", type=int, default=32)
parser.add_argument("--side", type=int, default=160, help="of the part of which samples are drawn")
parser.add_argument("--shares", type=float, nargs="*", default=[0.0, 0.25, 0.5, 0.75, 1.0])
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--json", type=Path, default=Path("benchmarks/results/image-samples.json"))
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
problem = image_problems.PROBLEMS["patchnr-superresolution"][0]
paths = image_problems.reported_paths(arguments.data, problem.material, arguments.images)
weights = arguments.data / "weights"
lpips = LPIPS(
    weights / "lpips_squeezenet11_features.safetensors",
    weights / "lpips_v0.1_squeeze_lin.safetensors",
)


def learned(name):
    return models.load(arguments.models / f"{name}-material.safetensors", nn.Module)


network, denoiser, patch_nr = (
    learned(name) for name in ("single-image", "single-image-denoiser", "patchnr")
)
rows = {"samples": {}, "texture": {}}
print("samples: image, ratio, deviation, PSNR of a sample, PSNR of the mean")
for number, path in enumerate(paths):
    torch.manual_seed(number)
    truth = read_image(path, grey=True)
    top, left = ((extent - arguments.side) // 2 for extent in truth.shape[-2:])
    truth = truth[..., top : top + arguments.side, left : left + arguments.side]
    likelihood = GaussianLikelihood(problem.operator(arguments.data, truth.shape[-2:]), problem.std)
    y = likelihood.simulate(truth)
    init = likelihood.operator.initial(y)
    levels = split_gibbs.noise_levels(likelihood, denoiser.levels)
    samples = split_gibbs.sample(
        likelihood, denoiser, y, init, levels=levels, draws=arguments.draws, batch=4
    )
    check = check_samples(samples, truth, init)
    single = statistics.mean(psnr(samples.images, truth.expand_as(samples.images)).tolist())
    mean = float(psnr(samples.images.mean(0, keepdim=True), truth))
    rows["samples"][path.stem] = check._asdict() | {"psnr of a sample": single, "of the mean": mean}
    print(
        f"{path.stem:8} {check.ratio:.3f} {check.deviation:.3f} {single:.2f} {mean:.2f} "
        f"{'passed' if check.passed else 'failed'}",
        flush=True,
    )
print("texture: share, PSNR, LPIPS (means over images)")
found = {share: [] for share in arguments.shares}
for number, path in enumerate(paths):
    case = problem.case(arguments.data, path, number)
    x = single_image.reconstruct(case.likelihood, network, case.y).x
    end = perception.retexture(case.likelihood, patch_nr, case.y, x, 1)
    for share in arguments.shares:
        moved = problem.region((x + share * (end - x)).clamp(0, 1))
        truth = problem.region(case.truth)
        found[share].append((float(psnr(moved, truth)), float(lpips(moved, truth))))
for share, values in found.items():
    means = [statistics.mean(column) for column in zip(*values, strict=True)]
    rows["texture"][f"{share:g}"] = {"psnr": means[0], "lpips": means[1]}
    print(f"{share:.2f} {means[0]:.2f} {means[1]:.3f}")
arguments.json.write_text(json.dumps(rows, indent=1))
