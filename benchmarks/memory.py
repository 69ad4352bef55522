"""Peak resident memory of one gradient of the prior, and of a reconstruction, for large images.

Each size runs in its own process, since the high-water mark never falls.

    python benchmarks/memory.py --sizes 600,1000,2000
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

import patchflow as pf
from patchflow.reconstruct.variational import reconstruct


def measure(size: int, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    result: dict[str, float] = {"size": size, "libraries": peak()}
    prior = pf.patch_nr(hidden=512).requires_grad_(False)
    x = torch.rand(1, 1, size, size)
    prior.value_and_grad(x)
    result["gradient of all patches"] = peak()
    likelihood = pf.GaussianLikelihood(pf.downsample((size, size)), 0.01)
    y = likelihood.simulate(x)
    reconstruct(likelihood, prior, y, likelihood.operator.initial(y), steps=36)
    result["reconstruction"] = peak()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", default="600,1000,2000")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/memory.json"))
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.threads)))
        return
    rows = []
    for size in arguments.sizes.split(","):
        command = [sys.executable, __file__, "--one", size, "--threads", str(arguments.threads)]
        rows.append(
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        )
        print(rows[-1], "MiB", flush=True)
    arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
