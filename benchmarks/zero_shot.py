"""Choose weights of zero-shot super-resolution on photographs that no table reports.

Run: python benchmarks/zero_shot.py --data DATA [--images coffee test_321 ...] [--methods tv ...] [--factors .5 1 2].
An image is one of scikit-image's photographs (a part of 320 x 480 pixels) or a name in noncommercial/bsd_train400,
whose 180 x 180 photographs are disjoint from BSD68. Prints for each method and each factor of its weight in the table
the gain over aligned bicubic interpolation in dB, and SSIM, and writes them to --json.
"""

import argparse
import json
import time
from pathlib import Path

import skimage.color
import skimage.data
import torch

from patchflow import zero_shot
from patchflow.io.images import read_image
from patchflow.methods import by_name
from patchflow.metrics import psnr, ssim
from patchflow.papers import zero_shot_table as table
from patchflow.papers.tuned import WEIGHTS
from patchflow.problems.blur import downsample
from patchflow.problems.likelihood import GaussianLikelihood

# Upper left corners of what is taken of scikit-image's photographs.
PHOTOGRAPHS = {
    "camera": (60, 16),
    "coffee": (40, 60),
    "chelsea": (0, 0),
    "stereo_motorcycle": (100, 130),
    "astronaut": (0, 16),
}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", required=True, type=Path)
parser.add_argument(
    "--images", nargs="*", default=[*PHOTOGRAPHS, "test_005", "test_123", "test_321"]
)
parser.add_argument("--methods", nargs="*", default=["tv", "zssr", "dual-sr", "patchnr", "dip-tv"])
parser.add_argument("--factors", nargs="*", type=float, default=[0.5, 0.71, 1.0, 1.41, 2.0])
parser.add_argument("--seconds", type=float, help="time in which patchnr, zssr and dual-sr learn")
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--json", type=Path, default=Path("benchmarks/results/zero-shot-tuning.json"))
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)


def photograph(name):
    if name not in PHOTOGRAPHS:
        folder = arguments.data / "noncommercial" / "bsd_train400"
        return read_image(folder / f"{name}.png", grey=True)
    array = getattr(skimage.data, name)()
    array = array[0] if isinstance(array, tuple) else array  # of a stereo pair the left one
    grey = array / 255 if array.ndim == 2 else skimage.color.rgb2gray(array)
    top, left = PHOTOGRAPHS[name]
    image = torch.from_numpy(grey[top : top + 320, left : left + 480]).float()[None, None]
    return image[:, :, : image.shape[2] // 2 * 2, : image.shape[3] // 2 * 2]


def measured(name):
    truth = photograph(name)
    operator = downsample((truth.shape[2], truth.shape[3]), table.SCALE, boundary="valid")
    likelihood = GaussianLikelihood(operator, table.NOISE)
    torch.manual_seed(0)
    return table.Case(name, "", truth, likelihood, likelihood.simulate(truth))


def figures(case, x):
    x, truth = table.REGION(x.clamp(0, 1)), table.REGION(case.truth)
    return float(psnr(x, truth)), float(ssim(x, truth))


def weights(method, likelihood):
    """The weights to try; of a method without any, one attempt."""
    if method in ("bicubic", "zssr", "dual-sr"):
        return [None]
    default = zero_shot.WEIGHT if method == "patchnr" else WEIGHTS[table.NAME, ""].get(method)
    if default is None:
        default = by_name(method).weight(likelihood, None)
    return [float(f"{factor * default:.2g}") for factor in arguments.factors]


found = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
for name in arguments.images:
    case = measured(name)
    bicubic, _ = figures(case, case.likelihood.operator.initial(case.y))
    for method in arguments.methods:
        for weight in weights(method, case.likelihood):
            begun = time.perf_counter()
            x = table.solver(method, arguments.seconds, 0, weight)(case)
            quality, likeness = figures(case, x)
            row = {
                "gain": round(quality - bicubic, 3),
                "ssim": round(likeness, 4),
                "seconds": round(time.perf_counter() - begun, 1),
            }
            print(f"{name} {method} {weight}: {row}", flush=True)
            found.setdefault(method, {}).setdefault(str(weight), {})[name] = row
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
