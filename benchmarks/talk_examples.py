"""The talk's two examples in the plane: a posterior of four modes, and bridges between modes.

    python benchmarks/talk_examples.py --threads 1

prints the tables and writes benchmarks/results/talk-examples.json, docs/images/talk-posterior.png and
docs/images/talk-multimodal.png; four minutes on one core. Nothing is read.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from patchflow.io.atomic import write_bytes
from patchflow.papers import talk_examples, talk_multimodal
from patchflow.table import build_table

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1200, help="training steps of each flow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "talk-examples.json"
    )
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    begun = time.perf_counter()
    flow = talk_examples.learn_example(seed=arguments.seed, steps=arguments.steps // 2)
    trained = time.perf_counter() - begun
    w1, floor = talk_examples.measure_posterior(flow)
    print(f"posterior: W1 {w1:.3f}, exact samples {floor:.3f}, training {trained:.0f} s\n")
    write_bytes(
        arguments.images / "talk-posterior.png",
        talk_examples.draw_posterior(flow, w1, floor, seed=arguments.seed),
    )

    examples = talk_multimodal.learn(seed=arguments.seed, steps=arguments.steps)
    table, records = talk_multimodal.compare(examples, seed=arguments.seed)
    picture = talk_multimodal.draw(examples, records, seed=arguments.seed)
    write_bytes(arguments.images / "talk-multimodal.png", picture)
    for example in examples:
        own = [record for record in records if record.image == example.name]
        print(build_table(example.name, "one target", own, metrics=table.metrics), "\n")
    print(table)
    document = {
        "steps": arguments.steps,
        "seed": arguments.seed,
        "threads": arguments.threads,
        "seconds": time.perf_counter() - begun,
        "posterior": {"w1": w1, "w1 of exact samples": floor, "seconds": trained},
        "multimodal": table.document(),
        "targets": [
            {"method": r.method, "target": r.image, **{k: float(v) for k, v in r.values.items()}}
            for r in records
        ],
    }
    arguments.json.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    print(f"\n{document['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
