"""patchNR and a proximal network trained by Adam and by inertial stochastic PALM: loss against time and gradients.

Run: python benchmarks/palm_training.py --data DATA [--problems patchnr pnn] [--runs 3] [--seconds 12]
[--work palm-runs] [--json benchmarks/results/palm-training.json] [--figure benchmarks/results/palm-training.png].
Both learn from the same 8,192 patches of 6 x 6 pixels of the material's training image, in batches of 512: patchNR, of
5 couplings of width 32, by its mean negative log-likelihood; the proximal network (3 layers of 72 soft thresholds,
matrices with orthonormal columns) by the mean squared error of denoising patches less 0.5 with fixed noise of standard
deviation 0.1. All parameters are one block. Held out: 4,096 patches of the validation image.

Adam takes constant steps, and the network's matrices are projected after each; "iPALM on batches" is
``Palm.step`` with inertia on each batch; iSPALM-SARAH has a full gradient every 16 steps and the recursive estimate in
between. Batches are the same for all methods, step by step. patchNR's step sizes come from backtracking, whose
evaluations of the loss are counted as gradients; the network's from products with the Hessian, counted too. The rate of
Adam, and factor and inertia of PALM, are the best of a grid after a third of the time in a seed of its own.

Time is CPU time of training alone, since the machine may be shared. Runs lie in --work and are not repeated.
"""

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import torch
from torch import nn

from patchflow import read_image
from patchflow.errors import NumericalError
from patchflow.io.atomic import atomic_path
from patchflow.networks.proximal import ParsevalLayer
from patchflow.numerics.gradient_estimators import Exact, Sarah
from patchflow.numerics.patches import extract_patches
from patchflow.numerics.proximal_maps import free, stiefel
from patchflow.palm_optimizer import Block, Palm
from patchflow.patch_models import coupling_flow

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", required=True, type=Path, help="folder with material/")
parser.add_argument("--problems", nargs="*", default=["patchnr", "pnn"])
parser.add_argument("--runs", type=int, default=3)
parser.add_argument("--seconds", type=float, default=12.0, help="CPU time of a run")
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--work", type=Path, default=Path("palm-runs"))
parser.add_argument("--json", type=Path)
parser.add_argument("--figure", type=Path)
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
COUNT, BATCH, EVERY, RECORDS, TUNING_SEED = 8192, 512, 16, 20, 1000
METHODS = {
    "Adam": list(itertools.product([1e-3, 3e-3, 1e-2, 3e-2], [0.0])),
    "iPALM on batches": list(itertools.product([0.3, 0.7], [0.5, 0.8])),
    "iSPALM-SARAH": list(itertools.product([0.3, 0.7], [0.5, 0.8])),
}


def patches(name, count):
    image = read_image(arguments.data / "material" / name, grey=True)[0]
    found = extract_patches(image, 6)
    generator = torch.Generator().manual_seed(0)
    return found[torch.randperm(len(found), generator=generator)[:count]]


class Likelihood(nn.Module):
    """The mean negative log-likelihood of a flow."""

    curvature = "backtracking"

    def __init__(self, training, held):
        super().__init__()
        self.training_points, self.held = training, held
        self.flow = coupling_flow(36, layers=5, hidden=32)

    def forward(self, index=None):
        return self.loss(self.training_points if index is None else self.training_points[index])

    def held_out(self):
        return self.loss(self.held)

    def loss(self, x):
        return self.flow(x).mean()

    def blocks(self):
        return [Block("all", list(self.parameters()))]


class Denoising(nn.Module):
    """The mean squared error of a proximal network over patches with fixed noise."""

    curvature = "hessian"

    def __init__(self, training, held):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.clean, self.held = training - 0.5, held - 0.5
        self.noise = [
            0.1 * torch.randn(x.shape, generator=generator) for x in (self.clean, self.held)
        ]
        self.network = nn.Sequential(*[ParsevalLayer(36, 72) for _ in range(3)])

    def forward(self, index=None):
        index = slice(None) if index is None else index
        return self.loss(self.clean[index], self.noise[0][index])

    def held_out(self):
        return self.loss(self.held, self.noise[1])

    def loss(self, clean, noise):
        return (self.network(clean + noise) - clean).square().mean()

    def blocks(self):
        named = dict(self.network.named_parameters())
        penalties = [stiefel() if name.endswith("weight") else free() for name in named]
        return [Block("all", list(named.values()), penalties)]


def draw(seed, step):
    """The batch of a step. A number is drawn first, as the estimator of SARAH does."""
    torch.manual_seed(10**6 * (seed + 1) + step)
    torch.rand(())
    return torch.randperm(COUNT)[:BATCH]


def run(make, method, setting, seed, seconds):
    """Time, gradients of all data, loss and held-out loss, at equal distances of time; None if it failed."""
    torch.manual_seed(seed)
    objective = make()
    blocks = objective.blocks()
    rate, inertia = setting
    if method == "Adam":
        optimizer = torch.optim.Adam(objective.parameters(), lr=rate)
    else:
        optimizer = Palm(blocks, lr=rate, inertia=inertia, curvature=objective.curvature)
    sarah = Sarah(objective, COUNT, BATCH, probability=1e-3, every=EVERY)
    passes = 0.0

    def step(number):
        nonlocal passes
        index = draw(seed, number)
        if method == "Adam":
            optimizer.zero_grad()
            objective(index).backward()
            optimizer.step()
            for tensor, penalty in zip(blocks[0].tensors, blocks[0].penalties, strict=True):
                tensor.data.copy_(penalty.prox(tensor.data, 1.0))
            passes += BATCH / COUNT
        elif method == "iSPALM-SARAH":
            torch.manual_seed(10**6 * (seed + 1) + number)
            optimizer.advance(sarah)
            passes = sarah.passes
        else:
            batch = Exact(lambda: objective(index))
            optimizer.advance(batch)
            passes += batch.passes * BATCH / COUNT

    def measure(spent):
        with torch.no_grad():
            return spent, passes, float(objective()), float(objective.held_out())

    record, spent, number = [measure(0.0)], 0.0, 0
    while len(record) <= RECORDS:
        begun = time.process_time()
        try:
            while spent + time.process_time() - begun < seconds * len(record) / RECORDS:
                step(number)
                number += 1
        except NumericalError as error:
            print(f"failed after {number} steps: {error}", flush=True)
            return None
        spent += time.process_time() - begun
        record.append(measure(spent))
        if not math.isfinite(record[-1][2]):
            return None
    return {"record": record, "steps": number}


def cached(name, compute):
    path = arguments.work / f"{name}.json"
    if not path.exists():
        with atomic_path(path, parents=True) as temporary:
            temporary.write_text(json.dumps(compute()))
    return json.loads(path.read_text())


def experiment(name):
    data = (patches("img_learn_material.png", COUNT), patches("img_val_material.png", 4096))
    kind = {"patchnr": Likelihood, "pnn": Denoising}[name]

    def make():
        return kind(*data)

    seconds, result = arguments.seconds, {}
    for method, grid in METHODS.items():
        ends = []
        for setting in grid:
            found = cached(
                f"training-{name}-{method}-{setting}-{seconds / 3:g}-{TUNING_SEED}",
                lambda method=method, setting=setting: run(
                    make, method, setting, TUNING_SEED, seconds / 3
                ),
            )
            ends.append(math.inf if found is None else found["record"][-1][2])
            print(f"{name} {method} {setting}: {ends[-1]:.5g} (tuning)", flush=True)
        best = grid[ends.index(min(ends))]
        runs = [
            cached(
                f"training-{name}-{method}-{best}-{seconds:g}-{seed}",
                lambda method=method, best=best, seed=seed: run(make, method, best, seed, seconds),
            )
            for seed in range(arguments.runs)
        ]
        kept = [found for found in runs if found is not None]
        result[method] = {
            "setting": best,
            "tuning": dict(zip(map(str, grid), ends, strict=True)),
            "failed": len(runs) - len(kept),
            "runs": kept,
        }
        tell(name, method, result[method])
    return result


def tell(name, method, found):
    ends = torch.tensor([run["record"][-1] for run in found["runs"]])
    steps = [run["steps"] for run in found["runs"]]
    if len(ends):
        mean, spread = (
            ends.mean(0).tolist(),
            (ends.std(0) if len(ends) > 1 else 0 * ends[0]).tolist(),
        )
        print(
            f"{name:8s} {method:17s} {found['setting']}: loss {mean[2]:.5g} ± {spread[2]:.2g}, held out {mean[3]:.5g} "
            f"± {spread[3]:.2g}, {mean[1]:.1f} passes, {sum(steps) / len(steps):.0f} steps, {mean[0]:.1f} CPU s, "
            f"{len(ends)} seeds, {found['failed']} failed",
            flush=True,
        )


def plot(results):
    import matplotlib.pyplot as plt  # noqa: PLC0415 - only where a figure is wanted

    figure, axes = plt.subplots(2, len(results), squeeze=False, figsize=(6 * len(results), 8))
    labels = ("CPU seconds of training", "gradients of all data")
    for column, (name, result) in zip(axes.T, results.items(), strict=True):
        for number, (axis, label) in enumerate(zip(column, labels, strict=True)):
            for method, found in result.items():
                if not found["runs"]:
                    continue
                curves = torch.tensor([run["record"] for run in found["runs"]])
                mean = curves.mean(0)
                spread = curves[:, :, 2].std(0) if len(curves) > 1 else 0 * mean[:, 2]
                axis.plot(mean[:, number], mean[:, 2], label=f"{method} {found['setting']}")
                axis.fill_between(
                    mean[:, number], mean[:, 2] - spread, mean[:, 2] + spread, alpha=0.2
                )
            axis.set(xlabel=label, ylabel=f"{name}: training loss")
            if name == "pnn":
                axis.set(yscale="log")
            if number == 1:
                axis.set(xscale="symlog")
            axis.legend()
    figure.tight_layout()
    figure.savefig(arguments.figure, dpi=120)


results = {name: experiment(name) for name in arguments.problems}
if arguments.json is not None:
    arguments.json.write_text(json.dumps(results) + "\n")
if arguments.figure is not None:
    plot(results)
