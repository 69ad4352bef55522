"""Negative log-likelihoods of coupling, residual, proximal residual and continuous flows in the plane.

    python benchmarks/flows_2d.py --threads 1

The same protocol for all: Adam on fresh batches of 256, one schedule, averaged weights, the last state is kept; scales
and shifts start from 5,000 samples. The numbers of steps give each flow about 50 seconds of one core. The figures are
nats on 20,000 fresh test samples, beside those of the exact density on the same samples: their difference is an
estimate of the Kullback-Leibler divergence, with its standard error. Continuous flows are trained with a fixed step,
and tested with an adaptive solver of tolerance 1e-5. Rows are written to benchmarks/results/flows-2d.json one by one;
--flows and --targets choose some. It needs the extra ode. Nothing is read.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from patchflow.chains.continuous import ContinuousFlow, TransportKL
from patchflow.chains.flow import Flow
from patchflow.chains.kernel import Chain, Kernel
from patchflow.energy import Density, Energy
from patchflow.fit import fit
from patchflow.flow_models import continuous_flow, proximal_residual_flow, residual_flow, whiten
from patchflow.io.atomic import write_text
from patchflow.papers.talk_examples import eight_gaussians, two_moons
from patchflow.patch_models import coupling_flow

JSON = Path(__file__).parent / "results" / "flows-2d.json"
TARGETS: dict[str, Callable[[], Density]] = {
    "two moons": two_moons,
    "8 Gaussians": eight_gaussians,
}


class Trial(NamedTuple):
    make: Callable[[], Flow]
    steps: int
    lr: float = 5e-3
    loss: Callable[[Flow], Energy] = lambda flow: flow


TRIALS = {
    "coupling": Trial(lambda: coupling_flow(2, layers=8, hidden=64), 2000),
    "residual": Trial(lambda: residual_flow(2, blocks=8, hidden=64), 900),
    "proximal-residual": Trial(lambda: proximal_residual_flow(2, blocks=8, hidden=32), 900),
    "continuous": Trial(lambda: continuous_flow(2, method="rk4", steps=4), 600),
    # Its published rate is 0.1.
    "ot-flow": Trial(
        lambda: continuous_flow(2, velocity="potential", hidden=32, method="rk4", steps=4),
        900,
        0.05,
        lambda flow: TransportKL(flow, transport=0.01, hjb=0.05),
    ),
}
BATCH, TEST = 256, 20_000


def accurate(kernel: Kernel) -> Kernel:
    if isinstance(kernel, ContinuousFlow):
        return ContinuousFlow(kernel.velocity, tolerance=1e-5)
    return kernel


@torch.no_grad()
def energies(energy: Energy, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([energy(block) for block in x.split(5000)])


def measure(trial: Trial, target: Density, seed: int) -> dict[str, float | int]:
    torch.manual_seed(seed)
    flow = trial.make()
    parameters = sum(p.numel() for p in flow.parameters())
    whiten(flow, target.sample(5000))
    begun = time.process_time()
    fit(
        trial.loss(flow),
        lambda: target.sample(BATCH),
        steps=trial.steps,
        lr=trial.lr,
        warmup=50,
        average=0.99,
    )
    seconds = time.process_time() - begun
    torch.manual_seed(1000)  # the same test samples for all
    x = target.sample(TEST)
    assert isinstance(flow.chain, Chain)
    flow = Flow(flow.latent, Chain(*(accurate(kernel) for kernel in flow.chain)))
    ours, exact = energies(flow, x).double(), energies(target, x).double()
    with torch.no_grad():
        back = flow.chain(flow.chain.reverse(x[:2000]).x).x
    return {
        "nll": ours.mean().item(),
        "exact": exact.mean().item(),
        "excess": (ours - exact).mean().item(),
        "standard_error": ((ours - exact).std() / math.sqrt(len(x))).item(),
        "inverse_error": (back - x[:2000]).abs().max().item(),
        "parameters": parameters,
        "steps": trial.steps,
        "cpu_s": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--flows", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path, default=JSON)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    for target in arguments.targets:
        for name in arguments.flows:
            row = measure(TRIALS[name], TARGETS[target](), arguments.seed)
            rows.setdefault(target, {})[name] = row
            write_text(arguments.json, json.dumps(rows, indent=1, allow_nan=False) + "\n")
            print(
                f"{target:12s} {name:18s} nll {row['nll']:.4f}, exact {row['exact']:.4f}, excess "
                f"{row['excess']:.4f} +- {row['standard_error']:.4f}, {row['parameters']} parameters, "
                f"inverse {row['inverse_error']:.1e}, CPU {row['cpu_s']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
