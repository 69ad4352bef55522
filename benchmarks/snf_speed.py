"""A training step of the mixture flow against bare torch, and energy evaluations against the published procedure.

Run: python benchmarks/snf_speed.py. Both steps alternate in one process; the figure is the ratio of medians.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from patchflow.chains.proposals import LangevinProposal
from patchflow.chains.stochastic import Metropolis
from patchflow.energy import Energy
from patchflow.io.atomic import write_text
from patchflow.papers import hagemann2023_mixture as mixture
from patchflow.posterior_models import joint_batches
from patchflow.priors.gaussian import StandardNormal


class BareBlock(nn.Module):
    """The same coupling block in plain torch: what one writes without a library."""

    def __init__(self, dim: int, condition: int, hidden: int, clamp: float) -> None:
        super().__init__()
        self.half, self.clamp = dim // 2, 0.636 * clamp

        def net() -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(self.half + condition, hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Linear(hidden, 2 * self.half),
            )

        self.net1, self.net2 = net(), net()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x1, x2 = x.chunk(2, 1)
        s2, t2 = self.net2(torch.cat((x2, y), 1)).chunk(2, 1)
        s2 = self.clamp * torch.atan(s2)
        z1 = x1 * s2.exp() + t2
        s1, t1 = self.net1(torch.cat((z1, y), 1)).chunk(2, 1)
        s1 = self.clamp * torch.atan(s1)
        return torch.cat((z1, x2 * s1.exp() + t1), 1), s1.sum(1) + s2.sum(1)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BareBlock(100, 100, 128, 1.4) for _ in range(8))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(len(x))
        for block in self.blocks:
            x, log_det = block(x, y)
            total = total + log_det
        return 0.5 * x.square().sum(1) - total


class Counted(Energy):
    def __init__(self, energy: Energy) -> None:
        super().__init__()
        self.energy, self.rows = energy, 0

    def forward(self, x: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        self.rows += len(x)
        return self.energy(x, condition)


def published_mala(energy: Energy, x: torch.Tensor, tau: float, steps: int) -> torch.Tensor:
    """MALA as the public code walks it: both energies and both gradients anew at every step."""
    start = energy(x)
    for _ in range(steps):
        _, slope = energy.value_and_grad(x)
        noise = torch.randn_like(x)
        new = x - tau * slope + (2 * tau) ** 0.5 * noise
        _, back = energy.value_and_grad(new)
        eta = (x - new + tau * back) / (2 * tau) ** 0.5
        log_alpha = energy(x) - energy(new) + 0.5 * (noise.square() - eta.square()).sum(1)
        x = torch.where((torch.rand(len(x)).log() < log_alpha)[:, None], new, x)
    return energy(x) - start


def steps_per(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.zero_grad(set_to_none=True)
    begun = time.perf_counter()
    model(x, y).mean().backward()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--json", default="benchmarks/results/snf-speed.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    likelihood, prior, _ = mixture.problem(0)
    x, y = joint_batches(prior, likelihood, 1024)()
    ours, _ = mixture.published_flow("INN", likelihood + prior)
    bare = Bare()
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    for k in range(arguments.repeats + 3):
        for name, model in (("ours", ours), ("bare", bare)):
            seconds = steps_per(model, x, y)
            if k >= 3:
                times[name].append(seconds)
    ours_s, bare_s = (statistics.median(times[name]) for name in ("ours", "bare"))
    counts = {}
    with torch.no_grad():
        energy, points = Counted(StandardNormal(100)), torch.randn(1000, 100)
        Metropolis(energy, LangevinProposal(1e-3), 3)(points)
        counts["ours"], energy.rows = energy.rows, 0
        published_mala(energy, points, 1e-3, 3)
        counts["published"] = energy.rows
    result = {
        "threads": arguments.threads,
        "step_ours_s": ours_s,
        "step_bare_s": bare_s,
        "ratio": ours_s / bare_s,
        "evaluations_ours": counts["ours"] / 1000,
        "evaluations_published": counts["published"] / 1000,
    }
    write_text(Path(arguments.json), json.dumps(result, indent=2) + "\n")
    print(
        f"Training step of 8 couplings on 1,024 x 100: ours {1e3 * ours_s:.1f} ms, bare torch {1e3 * bare_s:.1f} ms, "
        f"ratio {ours_s / bare_s:.2f}\nEvaluations of the energy per point, 3 MALA steps: ours "
        f"{result['evaluations_ours']:.0f}, published {result['evaluations_published']:.0f}"
    )


if __name__ == "__main__":
    main()
