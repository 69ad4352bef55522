"""Negative log-likelihoods of coupling, residual, proximal residual and continuous flows in the plane.

    python benchmarks/flows_2d.py --threads 1

The same protocol for all: as many Adam steps of fresh batches, one schedule, averaged weights, the last state is kept;
scales and shifts start from 5,000 samples. The figures are nats on fresh test samples, beside those of the exact
density on the same samples: their difference is an estimate of the Kullback-Leibler divergence, with its standard
error. Continuous flows are trained with a fixed step, and tested with an adaptive solver of tolerance 1e-6. Rows are
added to benchmarks/results/flows-2d.json one by one; --flows and --targets choose some. It needs the extra ode.
Nothing is read.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

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
# What trains, and the flow that is tested afterwards: the same parameters.
FLOWS: dict[str, Callable[[], tuple[Energy, Flow]]] = {
    "coupling": lambda: both(coupling_flow(2, layers=8, hidden=64)),
    "residual": lambda: both(residual_flow(2, blocks=8, hidden=64)),
    "proximal-residual": lambda: both(proximal_residual_flow(2, blocks=8, hidden=32)),
    "continuous": lambda: both(continuous_flow(2, method="rk4", steps=6)),
    "ot-flow": lambda: ot_flow(),
}


def both(flow: Flow) -> tuple[Energy, Flow]:
    return flow, flow


def ot_flow() -> tuple[Energy, Flow]:
    flow = continuous_flow(2, velocity="potential", hidden=32, method="rk4", steps=6)
    return TransportKL(flow, transport=0.01, hjb=0.05), flow


def accurate(kernel: Kernel) -> Kernel:
    if isinstance(kernel, ContinuousFlow):
        return ContinuousFlow(kernel.velocity, tolerance=1e-6)
    return kernel


@torch.no_grad()
def energies(energy: Energy, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([energy(block) for block in x.split(5000)])


def measure(name: str, target: Density, arguments: argparse.Namespace) -> dict[str, float | int]:
    torch.manual_seed(arguments.seed)
    energy, flow = FLOWS[name]()
    parameters = sum(p.numel() for p in flow.parameters())
    whiten(flow, target.sample(5000))
    begun = time.process_time()
    fit(
        energy,
        lambda: target.sample(arguments.batch),
        steps=arguments.steps,
        lr=arguments.lr,
        warmup=100,
        average=0.99,
    )
    seconds = time.process_time() - begun
    torch.manual_seed(1000)  # the same test samples for all
    x = target.sample(arguments.test)
    flow = Flow(flow.latent, Chain(*(accurate(kernel) for kernel in flow.chain)))
    ours, exact = energies(flow, x).double(), energies(target, x).double()
    back = flow.chain(flow.chain.reverse(x[:2000]).x).x
    return {
        "nll": ours.mean().item(),
        "exact": exact.mean().item(),
        "excess": (ours - exact).mean().item(),
        "standard_error": ((ours - exact).std() / math.sqrt(len(x))).item(),
        "inverse_error": (back - x[:2000]).abs().max().item(),
        "parameters": parameters,
        "steps": arguments.steps,
        "batch": arguments.batch,
        "cpu_s": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--test", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=list(FLOWS))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path, default=JSON)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    for target in arguments.targets:
        for name in arguments.flows:
            row = measure(name, TARGETS[target](), arguments)
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
