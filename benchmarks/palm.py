"""PALM, iPALM, SPRING (SARAH, SAGA), inertial stochastic PALM and Adam on the two published experiments.

Run: python benchmarks/palm.py [--quick] [--experiments student network] [--methods PALM iSPALM-SARAH] [--runs 10]
[--epochs 50] [--stochastic-epochs 10] [--work /tmp/palm] [--json benchmarks/results/palm.json]
[--figure benchmarks/results/palm.png]

student: a Student-t mixture of 30 components in 10 dimensions from 200,000 points, as published: the truth, the four
blocks, batches of 20,000, a full gradient in the first step of each epoch, and the start, one fit for each of 30 random
labels. network: a proximal network with ELU (64, 32 and 16 features) that tells scikit-learn's 8 x 8 digits, in place
of MNIST: orthonormal columns, a last matrix with entries in [-100, 100], sigmoid, squared error; all parameters are one
block. The penalty of each tensor is exact. Deterministic methods run once, the others --runs times: means with standard
deviations over seeds. Adam's learning rate is the best of three in the first seed; its iterates are projected.

Each run leaves its record in --work, whole or not at all, and is not repeated while it lies there; the tables and the
figure are of all records there, so that methods and seeds can be run in pieces. A run whose step is not finite ends
there and counts as failed. The student's points are float32 and so are the gradients, summed in float64.

"Epochs" count steps as the paper does: one step of a deterministic method, or as many batches as there are in the data.
"Passes" count gradients and products with the Hessian, in units of one gradient of all blocks and all data; Adam needs
one per epoch. The aim: inertial stochastic PALM reaches the final objective of PALM in at most half of its epochs.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from patchflow.errors import NumericalError
from patchflow.io.atomic import atomic_path
from patchflow.learn_student import StudentObjective
from patchflow.numerics.gradient_estimators import Exact, Saga, Sarah, assign
from patchflow.numerics.proximal_maps import box, free, stiefel
from patchflow.numerics.stiefel import polar
from patchflow.palm_optimizer import Block, Palm
from patchflow.priors.student import StudentMixture
from patchflow.priors.student_maximization import StudentFit, fit_student_mixture

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="small sizes, a minute or two")
parser.add_argument("--experiments", nargs="*", default=["student", "network"])
parser.add_argument("--runs", type=int, default=10)
parser.add_argument("--methods", nargs="*", help="all by default")
parser.add_argument("--epochs", type=int, help="50 for student, 200 for network; 15 if quick")
parser.add_argument("--stochastic-epochs", type=int, help="of those on batches; as --epochs")
parser.add_argument("--first-seed", type=int, default=0, help="another for tuning")
parser.add_argument("--lr", type=float, help="step factor of the methods, for tuning")
parser.add_argument("--inertia", type=float, help="the same, where there is inertia")
parser.add_argument("--em", type=int, default=0, help="steps of EM from the start, to compare")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--work", type=Path, default=Path("palm-runs"))
parser.add_argument("--json", type=Path)
parser.add_argument("--figure", type=Path)
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
torch.set_default_dtype(torch.float64)


class Problem(NamedTuple):
    """An experiment.

    Attributes:
        start: Makes the objective, a function of the numbers of summands, and its blocks, anew from the same start.
        count: The number of summands.
        batch: The batch size.
        every: Steps between full gradients.
        settings: Step factor and inertia of each method.
        extra: What else is told of an objective.
    """

    start: object
    count: int
    batch: int
    every: int
    settings: dict
    extra: object


def student(quick):
    """SPEC: d = 10, K = 30, n = 200,000; quick: d = 4, K = 5, n = 5,000."""
    dim, components, count = (4, 5, 5000) if quick else (10, 30, 200_000)
    torch.manual_seed(0)
    factors = torch.randn(components, dim, dim)
    weights = torch.randn(components).square() + 1
    truth = StudentMixture(
        weights,
        2 * torch.randn(components, dim),
        factors @ factors.mT + torch.eye(dim),
        (10 * torch.randn(components)).square().add(1).clamp_max(100),
    )
    x = truth.sample(count)
    labels = torch.randint(components, (count,))
    path = arguments.work / f"student-{'quick' if quick else 'full'}-start.json"
    if not path.exists():
        fits = [
            fit_student_mixture(x[labels == k], 1, floor=0.2, tolerance=1e-6, max_iterations=100)
            for k in range(components)
        ]
        weights = [labels.bincount(minlength=components) / count]
        found = weights + [torch.cat([f[i] for f in fits]) for i in range(1, 4)]
        with atomic_path(path, parents=True) as temporary:
            temporary.write_text(json.dumps([t.tolist() for t in found]))
    found = [torch.tensor(values) for values in json.loads(path.read_text())]
    start = StudentFit(*found, [], False)
    print(f"student: truth {float(truth(x).mean()):.4f}", flush=True)
    if arguments.em:
        em = fit_student_mixture(
            x, components, start=start, floor=0.1, max_iterations=arguments.em, tolerance=0
        )
        print(
            f"student: start {-em.log_likelihood[0]:.4f}, EM after {len(em.log_likelihood) - 1} steps "
            f"{-em.log_likelihood[-1]:.4f}",
            flush=True,
        )
    x = x.float()

    def begin():
        objective = StudentObjective(x, start)
        return objective, objective.blocks

    settings = {
        "PALM": (1.0, 0.0),
        "iPALM": (1.0, 1.0),
        "SPRING-SARAH": (0.7, 0.0),
        "SPRING-SAGA": (0.7, 0.0),
        "iSPALM-SARAH": (0.7, 0.8),
        "iSPALM-SAGA": (0.7, 0.8),
    }
    return Problem(begin, count, count // 10, 10, settings, lambda objective: {})


class Network(nn.Module):
    """The proximal network, its summed squared error over data and its share of right answers on the test set."""

    def __init__(self, data, features):
        super().__init__()
        self.x, self.y, self.x_test, self.y_test = data
        self.matrices = nn.ParameterList(polar(torch.randn(64, m)) for m in features)
        self.biases = nn.ParameterList(torch.zeros(m) for m in features)
        self.last = nn.Parameter(0.1 * torch.randn(10, 64))
        self.offset = nn.Parameter(torch.zeros(10))

    def answer(self, x):
        for t, b in zip(self.matrices, self.biases, strict=True):
            x = functional.elu(x @ t + b) @ t.mT
        return (x @ self.last.mT + self.offset).sigmoid()

    def forward(self, index=None):
        index = slice(None) if index is None else index
        return (self.answer(self.x[index]) - self.y[index]).square().mean()

    @property
    def blocks(self):
        tensors = [*self.matrices, *self.biases, self.last, self.offset]
        free_ones = [free()] * len(self.biases)
        penalties = [*[stiefel()] * len(self.matrices), *free_ones, box(-100, 100), free()]
        return [Block("network", tensors, penalties)]


def network(quick):
    """SPEC: MNIST, batches of 1/40 of the data, 200 epochs; here the digits of scikit-learn."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(digits.data)[order], torch.from_numpy(digits.target)[order]
    train = slice(0, 300 if quick else 1440)
    x = (x - x[train].mean(0)) / (x[train] - x[train].mean(0)).abs().max()
    data = (x[train], functional.one_hot(y[train], 10).double(), x[1440:], y[1440:])
    count = len(data[0])

    def begin():
        with torch.random.fork_rng():
            torch.manual_seed(1)
            objective = Network(data, (16, 8) if quick else (64, 32, 16))
        return objective, objective.blocks

    def extra(objective):
        with torch.no_grad():
            right = objective.answer(data[2]).argmax(1) == data[3]
        return {"accuracy": float(right.double().mean())}

    settings = {
        "PALM": (1.0, 0.0),
        "iPALM": (0.9, 1.0),
        "SPRING-SARAH": (0.7, 0.0),
        "SPRING-SAGA": (0.7, 0.0),
        "iSPALM-SARAH": (0.7, 0.99),
        "iSPALM-SAGA": (0.7, 0.99),
    }
    return Problem(begin, count, count // 40, 100, settings, extra)


def run(problem, name, seed, epochs):
    """The objective, the residual, the passes and the seconds after each epoch; the start is the first."""
    objective, blocks = problem.start()
    torch.manual_seed(100 + seed)
    lr, inertia = problem.settings[name]
    lr, inertia = arguments.lr or lr, inertia and (arguments.inertia or inertia)
    optimizer = Palm(blocks, lr=lr, inertia=inertia)
    if name.endswith("SARAH"):
        estimator = Sarah(
            objective, problem.count, problem.batch, probability=1e-3, every=problem.every
        )
    elif name.endswith("SAGA"):
        estimator = Saga(objective, problem.count, problem.batch)
    else:
        estimator = Exact(objective)
    steps = 1 if isinstance(estimator, Exact) else estimator.steps_per_epoch

    def epoch():
        for _ in range(steps):
            optimizer.advance(estimator)

    def measure():
        return *optimizer.measure([(1.0, objective)]), estimator.passes / len(blocks)

    return record_epochs(epochs, epoch, measure), problem.extra(objective)


def adam(problem, seed, epochs, rate):
    """Adam on batches; after each step every tensor is projected by its proximal map."""
    objective, blocks = problem.start()
    torch.manual_seed(100 + seed)
    tensors = [t for b in blocks for t in b.tensors]
    penalties = [f for b in blocks for f in b.penalties]
    optimizer = torch.optim.Adam(tensors, lr=rate)
    measured, passes = Palm(blocks), 0

    def epoch():
        nonlocal passes
        for index in torch.randperm(problem.count).split(problem.batch):
            optimizer.zero_grad()
            objective(index).backward()
            optimizer.step()
            with torch.no_grad():
                assign(tensors, [f.prox(t, 1.0) for f, t in zip(penalties, tensors, strict=True)])
        passes += 1

    def measure():
        return *measured.measure([(1.0, objective)]), float(passes)

    return record_epochs(epochs, epoch, measure), problem.extra(objective)


def record_epochs(epochs, epoch, measure):
    """What is measured and the seconds so far, at the start and after each epoch, until a step is not finite."""
    record, spent = [(*measure(), 0.0)], 0.0
    for _ in range(epochs):
        begun = time.process_time()
        try:
            epoch()
        except NumericalError as error:
            print(f"failed in epoch {len(record)}: {error}", flush=True)
            break
        spent += time.process_time() - begun
        record.append((*measure(), spent))
    return record


def best_rate(problem, epochs):
    """The learning rate with the lowest objective after a third of the epochs, in a seed of its own."""
    rates = (1e-3, 1e-2, 1e-1)
    ends = [adam(problem, 1000, max(1, epochs // 3), rate)[0][-1][0] for rate in rates]
    return rates[ends.index(min(ends))]


def experiment(name):
    problem = {"student": student, "network": network}[name](arguments.quick)
    full = arguments.epochs or (15 if arguments.quick else {"student": 50, "network": 200}[name])
    runs = min(arguments.runs, 3) if arguments.quick else arguments.runs
    short = arguments.stochastic_epochs or full
    methods = [*problem.settings, "Adam"]
    wanted = arguments.methods or methods
    size = "quick" if arguments.quick else "full"
    rate = None
    for seed in range(arguments.first_seed, arguments.first_seed + runs):
        for method in wanted:
            alone = method in ("PALM", "iPALM")
            epochs = full if alone else short
            path = arguments.work / f"{name}-{size}-{method}-{epochs}-{seed}.json"
            if path.exists() or (alone and seed != arguments.first_seed):
                continue
            if method == "Adam":
                rate = rate or best_rate(problem, epochs)
                record, extra = adam(problem, seed, epochs, rate)
            else:
                record, extra = run(problem, method, seed, epochs)
            found = {
                "record": record,
                "extra": extra,
                "failed": len(record) <= epochs,
                "rate": rate if method == "Adam" else None,
            }
            with atomic_path(path, parents=True) as temporary:
                temporary.write_text(json.dumps(found))
            print(f"{path.name}: {record[-1]}", flush=True)
    curves, extras, failed, rates = {}, {}, {}, []
    for method in methods:
        epochs = full if method in ("PALM", "iPALM") else short
        paths = sorted(arguments.work.glob(f"{name}-{size}-{method}-{epochs}-*.json"))
        found = [json.loads(path.read_text()) for path in paths]
        kept = [f for f in found if not f["failed"]]
        failed[method] = len(found) - len(kept)
        rates += [f["rate"] for f in found if f["rate"]]
        if not kept:
            continue
        curves[method] = torch.tensor([f["record"] for f in kept])
        extras[method] = [f["extra"] for f in kept]
        tell(name, method, curves[method], extras[method], failed[method])
    target = float(curves["PALM"][0, -1, 0])
    reached = {}
    for method, curve in curves.items():
        below = (curve[:, :, 0].mean(0) <= target).nonzero()
        reached[method] = int(below[0]) if len(below) else None
        passes = float(curve[:, reached[method], 2].mean()) if len(below) else None
        print(
            f"  {method:14s} reaches PALM's final objective after {reached[method]} of {curve.shape[1] - 1} epochs"
            + (f", {passes:.1f} passes" if passes is not None else "")
        )
    first = reached.get("iSPALM-SARAH")
    verdict = "reached" if first is not None and first <= full / 2 else "missed"
    seeds = len(curves.get("iSPALM-SARAH", ()))
    print(f"  aim: iSPALM-SARAH in at most {full / 2:g} epochs, mean of {seeds} seeds: {verdict}")
    return {
        "epochs": full,
        "adam": rates[0] if rates else None,
        "reached": reached,
        "failed": failed,
        "curves": {method: curve.tolist() for method, curve in curves.items()},
        "extras": extras,
    }


def tell(name, method, curve, extras, failed):
    value, residual, passes, seconds = curve[:, -1].mean(0).tolist()
    spread = float(curve[:, -1, 0].std()) if len(curve) > 1 else 0.0
    shown = "".join(f", {k} {sum(e[k] for e in extras) / len(extras):.3f}" for k in extras[0])
    print(
        f"{name} {method:14s} objective {value:.5f} ± {spread:.5f}, gradient {residual:.2e}, {passes:.0f} passes, "
        f"{seconds:.1f} CPU s{shown}, {len(curve)} seeds, {failed} failed",
        flush=True,
    )


def draw(results):
    import matplotlib.pyplot as plt  # noqa: PLC0415 - only where a figure is wanted

    figure, axes = plt.subplots(2, len(results), squeeze=False, figsize=(6 * len(results), 8))
    for column, (name, result) in zip(axes.T, results.items(), strict=True):
        for axis, which in zip(column, ("epochs", "passes"), strict=True):
            for method, curve in result["curves"].items():
                curve = torch.tensor(curve)
                across = torch.arange(curve.shape[1]) if which == "epochs" else curve[0, :, 2]
                values = curve[:, :, 0]
                mean, spread = values.mean(0), values.std(0) if len(values) > 1 else 0 * values[0]
                axis.plot(across, mean, label=f"{method}, seeds: {len(values)}")
                axis.fill_between(across, mean - spread, mean + spread, alpha=0.2)
            scale = "log" if name == "network" else "linear"
            axis.set(yscale=scale, xlabel=which, ylabel=f"{name}: objective")
            axis.legend()
    figure.savefig(arguments.figure, dpi=120)


results = {name: experiment(name) for name in arguments.experiments}
if arguments.json is not None:
    arguments.json.write_text(json.dumps(results) + "\n")
if arguments.figure is not None:
    draw(results)
