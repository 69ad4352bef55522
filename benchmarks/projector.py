"""Forward and adjoint of the LoDoPaB geometry: ours against ASTRA's CPU projector `linear`, thread for thread.

362 x 362 pixels, 1,000 angles, 513 bins, float32. Both alternate in one process; the figures are medians, of wall clock
and of CPU seconds, which other work on the machine disturbs less. ASTRA gets its own interface with kept objects and
outputs (OpTomo), ours its matrices built before. The peak of memory is that of another process, which only builds ours
and does one forward and one adjoint.

    python benchmarks/projector.py --radon
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchflow.io.atomic import write_text
from patchflow.papers.leuschner2021_lodopab import geometry
from patchflow.problems.astra import astra_parallel_beam
from patchflow.problems.operator import adjoint_error

WAYS = ("forward", "adjoint")


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory() -> dict[str, float]:
    """The peak before and after one forward and one adjoint."""
    result = {"libraries_mib": peak()}
    operator = geometry()
    operator.adjoint(operator(torch.rand(1, 1, *operator.domain_shape)))
    return result | {"peak_mib": peak(), "matrices_mib": operator.matrix_bytes / 2**20}


def seconds(task: Callable[[], Any]) -> tuple[float, float]:
    """Of the wall clock, and of the CPU."""
    begun, used = time.perf_counter(), time.process_time()
    task()
    return time.perf_counter() - begun, time.process_time() - used


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """In float64, because the norm of half a million values in float32 is itself off by 1e-5."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def race(repeats: int, with_radon: bool) -> dict[str, Any]:
    # Here, so that the process that measures memory does not load it.
    import astra

    ours = geometry()
    # Noise, because interpolations agree on what is smooth.
    x = torch.rand(1, 1, *ours.domain_shape)
    built, _ = seconds(lambda: ours.adjoint(ours(x)))
    y = ours(x)
    theirs = astra_parallel_beam(ours)
    kept = astra.create_projector("linear", theirs.projection_geometry, theirs.volume_geometry)
    operator = astra.OpTomo(kept)
    image, sinogram = x[0, 0].numpy(), y[0, 0].numpy()
    projected, backprojected = np.zeros_like(sinogram), np.zeros_like(image)
    tasks: dict[tuple[str, str], Callable[[], Any]] = {
        ("ours", "forward"): lambda: ours(x),
        ("astra", "forward"): lambda: operator.FP(image, out=projected),
        ("ours", "adjoint"): lambda: ours.adjoint(y),
        ("astra", "adjoint"): lambda: operator.BP(sinogram, out=backprojected),
    }
    times: dict[tuple[str, str], list[tuple[float, float]]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            times[name].append(seconds(task))
    astra.projector.delete(kept)
    if with_radon:
        # Once: another interpolation, and 512 bins of a pixel.
        from skimage.transform import iradon, radon

        degrees = np.rad2deg(ours.angles.numpy())
        theirs = radon(image, degrees, circle=False)
        times["radon", "forward"] = [seconds(lambda: radon(image, degrees, circle=False))]
        times["radon", "adjoint"] = [
            seconds(lambda: iradon(theirs, degrees, filter_name=None, circle=False))
        ]
    return {
        "engines": table(times),
        "first_forward_and_adjoint_s": built,
        "sinogram_difference": difference(sinogram, projected),
        "backprojection_difference": difference(ours.adjoint(y)[0, 0].numpy(), backprojected),
        "adjoint_error": adjoint_error(ours, torch.float32),
        "versions": {"torch": torch.__version__, "astra": astra.__version__},
        "wall_and_cpu_s": {" ".join(name): value for name, value in times.items()},
    }


def table(
    times: dict[tuple[str, str], list[tuple[float, float]]],
) -> dict[str, dict[str, float]]:
    """Medians of each engine, their sums, and the ratios of the sums to ours."""
    rows: dict[str, dict[str, float]] = {}
    for engine in dict.fromkeys(name for name, _ in times):
        row = rows[engine] = {}
        for i, clock in enumerate(("wall", "cpu")):
            for way in WAYS:
                row[f"{way}_{clock}_s"] = statistics.median(t[i] for t in times[engine, way])
            row[f"sum_{clock}_s"] = sum(row[f"{way}_{clock}_s"] for way in WAYS)
            row[f"ratio_{clock}"] = row[f"sum_{clock}_s"] / rows["ours"][f"sum_{clock}_s"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch; ASTRA's CPU code has one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--radon", action="store_true", help="also scikit-image, for reference")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/projector.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.memory:
        print(json.dumps(memory()))
        return

    # Before anything large is here: a process starts with the high-water mark of its parent.
    command = [sys.executable, __file__, "--memory", "--threads", str(arguments.threads)]
    child = subprocess.run(command, check=True, capture_output=True, text=True)
    result = {"threads": arguments.threads, "repeats": arguments.repeats}
    result |= {"memory": json.loads(child.stdout)} | race(arguments.repeats, arguments.radon)
    write_text(arguments.json, json.dumps(result, indent=2) + "\n")
    print("| Engine | forward [s] | adjoint [s] | sum [s] | times ours | CPU [s] | times ours |")
    print("|---|---|---|---|---|---|---|")
    for engine, row in result["engines"].items():
        values = [row[f"{name}_wall_s"] for name in (*WAYS, "sum")]
        values += [row["ratio_wall"], row["sum_cpu_s"], row["ratio_cpu"]]
        print(f"| {engine} | {' | '.join(f'{value:.3f}' for value in values)} |")
    print(
        f"Relative difference of ours and astra: sinograms {result['sinogram_difference']:.1e}, backprojections "
        f"{result['backprojection_difference']:.1e}. Adjoint error of ours in float32: {result['adjoint_error']:.1e}. "
        f"First forward and adjoint, with building: {result['first_forward_and_adjoint_s']:.1f} s. Peak of memory: "
        f"{result['memory']['peak_mib']:.0f} MiB, of which libraries {result['memory']['libraries_mib']:.0f} MiB."
    )


if __name__ == "__main__":
    main()
