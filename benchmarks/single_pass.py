"""A single pass of the network of one image on the test images of super-resolution x4: CPU time and PSNR.

Run: python benchmarks/single_pass.py --data DATA --models FOLDER [--images 10] [--repeats 10]
     python benchmarks/single_pass.py --data DATA --models FOLDER --student 300 [--width 48] [--threads 2].

FOLDER holds single-image-material.safetensors (patchflow benchmark patchnr-superresolution --methods [single-image]
--models FOLDER). With --student a smaller network (four blocks, --width) first learns its mean over the turns, for so
many seconds, from the same one image (its state is chosen on the validation image), and is measured in its place.

One thread; the time is the best of the repeats on the first image, after one pass to warm up, and contains the start
image. Beside it the mean over the eight turns. PSNR is that of the table's region, the mean over the images; the
networks run in float32 and in bfloat16, which is the default where the processor multiplies it faster.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from patchflow import models
from patchflow.image_models import SingleImage, single_image
from patchflow.io.images import read_image
from patchflow.learn_single_image import learn_single_image
from patchflow.metrics import psnr
from patchflow.numerics.precision import fastest_dtype
from patchflow.papers import image_problems
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.reconstruct.single_image import reconstruct

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--data", required=True, type=Path)
parser.add_argument("--models", required=True, type=Path)
parser.add_argument("--images", type=int, default=10)
parser.add_argument("--repeats", type=int, default=10)
parser.add_argument("--student", type=float, default=0.0, help="seconds of its training")
parser.add_argument("--width", type=int, default=48, help="of the student")
parser.add_argument("--threads", type=int, default=1, help="of the student's training")
parser.add_argument("--json", type=Path)
arguments = parser.parse_args()
problem = image_problems.PROBLEMS["patchnr-superresolution"][0]
paths = image_problems.reported_paths(arguments.data, problem.material, arguments.images)
path = arguments.models / f"single-image-{problem.material}.safetensors"
network = models.load(path, SingleImage)
if arguments.student:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    learned = image_problems.training_image(arguments.data, problem.material)
    validation = read_image(
        image_problems.validation_path(arguments.data, problem.material), grey=True
    )
    teacher, network = (
        network,
        single_image(measurement=network.measurement, width=arguments.width),
    )
    learn_single_image(
        network,
        [learned],
        [validation],
        problem=lambda shape: GaussianLikelihood(
            problem.operator(arguments.data, shape), problem.std
        ),
        teacher=teacher,
        average=0.998,
        steps=10**6,
        seconds=arguments.student,
        progress=True,
    )
    models.save(
        arguments.models / f"single-image-student-{problem.material}.safetensors",
        network,
        images=[learned],
        seed=0,
    )
torch.set_num_threads(1)
cases = [problem.case(arguments.data, path, number) for number, path in enumerate(paths)]


def solve(case, **settings):
    return reconstruct(case.likelihood, network, case.y, **settings).x


def seconds(case, **settings):
    begun = time.process_time()
    solve(case, **settings)
    return time.process_time() - begun


def quality(case, **settings):
    x = solve(case, **settings).clamp(0, 1)
    return float(psnr(problem.region(x), problem.region(case.truth)))


found = {"student": arguments.student, "auto": str(fastest_dtype(cases[0].y.device)), "rows": []}
for precision in ("float32", "bfloat16"):
    for ensemble in (False, True):
        repeats = arguments.repeats if not ensemble else 2
        settings = {"precision": precision, "ensemble": ensemble}
        spent = min(seconds(cases[0], **settings) for _ in range(1 + repeats))
        mean = statistics.mean(quality(case, **settings) for case in cases)
        found["rows"].append(
            {"precision": precision, "turns": ensemble, "cpu seconds": spent, "psnr": mean}
        )
        print(found["rows"][-1], flush=True)
name = "single-pass-student" if arguments.student else "single-pass"
path = arguments.json or Path(f"benchmarks/results/{name}.json")
path.write_text(json.dumps(found, indent=1) + "\n")
