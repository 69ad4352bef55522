"""Reconstruction by the plain published procedure against ours: seconds per image and PSNR.

The published procedure, written here with the library that the authors used (FrEIA) and nothing of ours but
the operator: 130,000 random patches drawn anew in each of 300 iterations of Adam (step 0.03), plain torch
bicubic as the start (it is not aligned with the operator's grid), float32, the network's weights not frozen.

Seconds: a few iterations are timed and extrapolated to 300, with the published network (width 512) and with
ours (width 256); our reconstruction is timed whole, in the same process. PSNR: with --full all 300 iterations
are run with the weights of our model, so that the two procedures minimise the same energy. To spare an hour the
full run takes its gradients from the library's float32 path, which equals FrEIA's autograd up to rounding (the
difference is printed).
The image is the validation image of the material unless --image says otherwise; noise 0.01, 40-pixel crop.

    python benchmarks/published_procedure.py --data ../shared/data --model prior.safetensors --full
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import torch
from torch import Tensor, nn

import patchflow as pf
from patchflow.methods import Task
from patchflow.numerics.patches import extract_patches
from patchflow.papers import altekrueger2023_patchnr as paper
from patchflow.papers.presets import PRESETS
from patchflow.reconstruct.variational import reconstruct


def network(hidden: int) -> nn.Module:
    def subnet(inputs: int, outputs: int) -> nn.Module:
        first = [nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
        return nn.Sequential(*first, nn.Linear(hidden, outputs))

    net = Ff.SequenceINN(paper.SIZE**2)
    for k in range(5):
        net.append(Fm.GLOWCouplingBlock, subnet_constructor=subnet, clamp=1.6)
        net.append(Fm.PermuteRandom, seed=k + 1)
    return net


def published(
    net: nn.Module, operator: pf.LinearOperator, y: Tensor, steps: int
) -> tuple[Tensor, list[float]]:
    """The image after some iterations, and the seconds of each."""
    x = nn.functional.interpolate(y, scale_factor=4, mode="bicubic", align_corners=False)
    x.requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=paper.STEP_SIZE)
    seconds = []
    for _ in range(steps):
        begun = time.perf_counter()
        optimizer.zero_grad()
        patches = nn.functional.unfold(x, paper.SIZE)[0].T
        chosen = patches[torch.randperm(len(patches))[: paper.RANDOM_PATCHES]]
        z, log_det = net(chosen, rev=True)
        prior = (0.5 * z.square().sum(1) - log_det).mean()
        loss = (operator(x) - y).square().sum() + paper.LAMBDA * prior
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begun)
    return x.detach(), seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="from patchflow train patch-nr")
    parser.add_argument("--image", type=Path, help="truth; the validation image by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=3, help="iterations to time")
    parser.add_argument(
        "--full", action="store_true", help="run all 300 iterations with our weights"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/published-procedure.json")
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = arguments.image or arguments.data / "material" / "img_val_material.png"
    truth = pf.read_image(path, grey=True)
    prior = pf.load(arguments.model, pf.PatchPrior)
    likelihood = pf.GaussianLikelihood(pf.downsample(tuple(truth.shape[-2:])), paper.NOISE)
    torch.manual_seed(0)
    y = likelihood.simulate(truth)

    def figures(x: Tensor) -> dict[str, float]:
        a, b = pf.crop(x.clamp(0, 1), paper.CROP), pf.crop(truth, paper.CROP)
        return {"psnr": pf.psnr(a, b).item(), "ssim": pf.ssim(a, b).item()}

    begun = time.perf_counter()
    ours = reconstruct(likelihood, prior, y, likelihood.operator.initial(y)).x
    seconds = time.perf_counter() - begun
    rows = {"ours": figures(ours) | {"seconds": seconds}}
    print(f"ours: {rows['ours']}", flush=True)

    width = prior.patch_energy.state_dict()["chain.kernels.0.net1.0.weight"].shape[0]
    same = network(width)
    same.load_state_dict(
        {
            name.replace("chain.kernels", "module_list")
            .replace("net", "subnet")
            .replace("order", "perm")
            .replace("inverse", "perm_inv"): value
            for name, value in prior.patch_energy.state_dict().items()
        }
    )
    for name, net in (("published, width 512", network(512)), ("published, our network", same)):
        x, times = published(net, likelihood.operator, y, arguments.iterations)
        # The first iteration also allocates memory.
        total = statistics.median(times[1:]) * paper.STEPS
        rows[name] = {
            "seconds": total,
            "extrapolated from": arguments.iterations,
            "ratio": total / seconds,
        }
        print(f"{name}: {rows[name]}", flush=True)
    if arguments.full:
        prior.precision = "float32"
        torch.manual_seed(1)
        start = nn.functional.interpolate(y, scale_factor=4, mode="bicubic", align_corners=False)
        weight = PRESETS["patchnr"].weight(likelihood, prior)
        task = Task(likelihood, y, start, weight, prior, progress=True)
        x = PRESETS["patchnr"].solve(task).x
        rows["published, our network"] |= figures(x)
        patches = extract_patches(truth[0], paper.SIZE)[:512].clone().requires_grad_(True)
        z, log_det = same(patches, rev=True)
        (theirs,) = torch.autograd.grad((0.5 * z.square().sum(1) - log_det).sum(), patches)
        mine = prior.patch_energy.value_and_grad(patches)[1]
        rows["published, our network"]["gradient difference"] = float(
            (theirs - mine).norm() / theirs.norm()
        )
        print(rows["published, our network"], flush=True)
    document = {"image": path.name, "threads": arguments.threads, "rows": rows}
    arguments.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
