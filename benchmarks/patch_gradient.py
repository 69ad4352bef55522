"""The patch gradient: how close log-density and gradient come to the speed of bare matrix products.

For 32,768 patches of the flow with 5 blocks: seconds of the energy and its gradient in x with frozen weights,
operations per second (counted: the products of forward and backward only), and the fraction of what a bare
product of 4096 x 512 by 512 x 512 achieves in the same type, measured in alternation in the same process.

    python benchmarks/patch_gradient.py --threads 2
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch

import patchflow as pf

PATCHES = 32768
PRODUCTS = 64


def operations(hidden: int, dim: int = 36, layers: int = 5) -> float:
    """Products of the networks of a coupling flow, forward and backward in x, for one patch."""
    half = dim // 2
    network = half * hidden + hidden * hidden + hidden * 2 * half
    return 2 * 2 * 2 * layers * network


def alternate(first, second, repeats: int) -> tuple[float, float]:
    """The best seconds of two calls, in alternation, so that both see the same neighbours on the machine."""
    best = [math.inf, math.inf]
    for _ in range(repeats + 1):
        for k, call in enumerate((first, second)):
            begun = time.perf_counter()
            call()
            best[k] = min(best[k], time.perf_counter() - begun)
    return best[0], best[1]


def measure(hidden: int, dtype: torch.dtype, repeats: int) -> dict[str, float | int | str]:
    torch.manual_seed(0)
    patches = torch.rand(PATCHES, 36)
    learned = pf.coupling_flow(36, hidden=hidden)
    frozen = copy.deepcopy(learned).requires_grad_(False)
    a, b, bias = (torch.rand(*shape).to(dtype) for shape in ((4096, 512), (512, 512), (512,)))
    low = torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16)

    def gradient() -> None:
        with low:
            frozen.value_and_grad(patches)

    def product() -> None:
        for _ in range(PRODUCTS):
            torch.addmm(bias, a, b)

    def plain() -> None:
        x = patches.clone().requires_grad_(True)
        with low:
            learned._by_autograd(x, None).sum().backward()

    ours, bare = alternate(gradient, product, repeats)
    _, autograd = alternate(gradient, plain, 1)
    speed, peak = PATCHES * operations(hidden) / ours, PRODUCTS * 2 * 4096 * 512 * 512 / bare
    return {
        "hidden": hidden,
        "type": str(dtype).removeprefix("torch."),
        "seconds": ours,
        "gflops": speed / 1e9,
        "product_gflops": peak / 1e9,
        "fraction": speed / peak,
        "seconds of autograd, weights not frozen": autograd,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/patch-gradient.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for hidden in (512, 256):
        for dtype in (torch.float32, torch.bfloat16):
            row = measure(hidden, dtype, arguments.repeats)
            rows.append(row)
            print(
                f"width {hidden} {row['type']:9s} {row['seconds']:.3f} s {row['gflops']:7.0f} GFLOP/s, "
                f"bare product {row['product_gflops']:7.0f} GFLOP/s, fraction {row['fraction']:.2f}; "
                f"autograd {row['seconds of autograd, weights not frozen']:.3f} s",
                flush=True,
            )
    arguments.json.write_text(
        json.dumps({"threads": arguments.threads, "patches": PATCHES, "rows": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
