"""Samples of the posterior of images, and the way from accuracy to texture, on the test images of super-resolution x4.

Run: python benchmarks/image_samples.py --data DATA --models FOLDER [--images 10] [--draws 32] [--threads 2]
     python benchmarks/image_samples.py --data DATA --models FOLDER --parts mala --images 2 --side 64.

FOLDER holds what the table learned: single-image-material, single-image-denoiser-material and patchnr-material
(patchflow benchmark patchnr-superresolution --methods [single-image,single-image-denoiser,patchnr] --models FOLDER),
as far as the parts want it. Parts that are not run keep what the file --json says of them.

Samples: split Gibbs with the denoiser, on the 160 x 160 pixels in the middle of each image; or MALA with patchNR, four
chains of --steps steps, half of them without samples. Printed are the squared error of a single sample over that of the
mean of all (right: 2 / (1 + 1 / draws), accepted: 1.8 to 2.2), the largest deviation of coverage (TARP over squares of
8 x 8), PSNR of one sample and of the mean, and for MALA the diagnostics of the chains. Nothing was tuned on them.

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
from patchflow.cli.image_samples import Sampling
from patchflow.io.images import read_image
from patchflow.metrics import LPIPS, psnr
from patchflow.papers import image_problems
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.reconstruct import perception, single_image
from patchflow.uncertainty.image_samples import check_samples, diagnose

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--data", required=True, type=Path)
parser.add_argument("--models", required=True, type=Path)
parser.add_argument("--images", type=int, default=10)
parser.add_argument("--draws", type=int, default=32)
parser.add_argument(
    "--parts", nargs="+", choices=["gibbs", "mala", "texture"], default=["gibbs", "texture"]
)
parser.add_argument("--steps", type=int, default=600, help="of the chains of MALA")
parser.add_argument("--side", type=int, default=160, help="of the part of which samples are drawn")
parser.add_argument("--shares", type=float, nargs="*", default=[0.0, 0.25, 0.5, 0.75, 1.0])
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--json", type=Path, default=Path("benchmarks/results/image-samples.json"))
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
problem = image_problems.PROBLEMS["patchnr-superresolution"][0]
paths = image_problems.reported_paths(arguments.data, problem.material, arguments.images)


def learned(name):
    return models.load(arguments.models / f"{name}-material.safetensors", nn.Module)


def draw(sampling, name):
    """Samples of the part in the middle of each image, checked and printed."""
    sampling.check()
    prior, rows = learned(name), {}
    print(f"{sampling.name}: image, ratio, deviation, PSNR of a sample, PSNR of the mean")
    for number, path in enumerate(paths):
        torch.manual_seed(number)
        truth = read_image(path, grey=True)
        top, left = ((extent - arguments.side) // 2 for extent in truth.shape[-2:])
        truth = truth[..., top : top + arguments.side, left : left + arguments.side]
        operator = problem.operator(arguments.data, truth.shape[-2:])
        likelihood = GaussianLikelihood(operator, problem.std)
        y = likelihood.simulate(truth)
        init = likelihood.operator.initial(y)
        samples = sampling.draw(likelihood, y, prior, 1.0).samples
        check = check_samples(samples, truth, init)
        single = statistics.mean(psnr(samples.images, truth.expand_as(samples.images)).tolist())
        mean = float(psnr(samples.images.mean(0, keepdim=True), truth))
        told = diagnose(samples)
        rows[path.stem] = check._asdict() | {
            "psnr of a sample": single,
            "of the mean": mean,
            "start": float(psnr(init, truth)),
            "diagnostics": told,
        }
        print(
            f"{path.stem:8} {check.ratio:.3f} {check.deviation:.3f} {single:.2f} {mean:.2f} "
            f"{'passed' if check.passed else 'failed'}",
            *told,
            flush=True,
        )
    return rows


def texture():
    """The way from single-image towards patchNR, on whole images."""
    network, patch_nr = learned("single-image"), learned("patchnr")
    weights = arguments.data / "weights"
    lpips = LPIPS(
        weights / "lpips_squeezenet11_features.safetensors",
        weights / "lpips_v0.1_squeeze_lin.safetensors",
    )
    found = {share: [] for share in arguments.shares}
    for number, path in enumerate(paths):
        case = problem.case(arguments.data, path, number)
        x = single_image.reconstruct(case.likelihood, network, case.y).x
        end = perception.retexture(case.likelihood, patch_nr, case.y, x, 1)
        for share in arguments.shares:
            moved = problem.region((x + share * (end - x)).clamp(0, 1))
            truth = problem.region(case.truth)
            found[share].append((float(psnr(moved, truth)), float(lpips(moved, truth))))
    print("texture: share, PSNR, LPIPS (means over images)")
    rows = {}
    for share, values in found.items():
        means = [statistics.mean(column) for column in zip(*values, strict=True)]
        rows[f"{share:g}"] = {"psnr": means[0], "lpips": means[1]}
        print(f"{share:.2f} {means[0]:.2f} {means[1]:.3f}")
    return rows


rows = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
if "gibbs" in arguments.parts:
    sampling = Sampling(arguments.draws, "dpir", "mala", None)
    rows["samples"] = draw(sampling, "single-image-denoiser")
if "mala" in arguments.parts:
    rows["mala"] = draw(Sampling(arguments.draws, "patchnr", "mala", arguments.steps), "patchnr")
if "texture" in arguments.parts:
    rows["texture"] = texture()
arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
