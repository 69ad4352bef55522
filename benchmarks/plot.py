"""Draw what the other scripts measured: learning curves, and what likelihood is worth in PSNR.

python benchmarks/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    rows = []
    for name in ("training.json", "training-paper.json"):
        if (RESULTS / name).exists():
            rows += json.loads((RESULTS / name).read_text())
    figure, (curves, worth) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for row in rows:
        label = f"{row['recipe']}, {row['seconds']:.0f} s"
        published = row["recipe"] == "paper"
        (line,) = curves.plot(
            *zip(*row["curve"], strict=True), label=label, color="black" if published else None
        )
        if "psnr" not in row:
            continue
        worth.plot(row["nats"], row["psnr"], "o", color=line.get_color())
        worth.annotate(
            label, (row["nats"], row["psnr"]), fontsize=7, xytext=(3, 3), textcoords="offset points"
        )
    curves.set(
        xscale="log",
        xlabel="training time [s]",
        ylabel="validation loss [nats per patch]",
        ylim=(min(row["nats"] for row in rows) - 0.5, -122),
        title="Learning curves",
    )
    curves.legend(fontsize=7)
    worth.set(
        xlabel="validation loss [nats per patch]",
        ylabel="PSNR of the validation image [dB]",
        title="What likelihood is worth",
    )
    worth.margins(0.15)
    for axes in (curves, worth):
        axes.grid(alpha=0.3)
    figure.savefig(RESULTS / "training.png", dpi=150)


if __name__ == "__main__":
    main()
