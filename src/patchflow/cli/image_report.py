"""The report of a reconstruction of images; of a stack, the first is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from patchflow.cli.config import command_line
from patchflow.cli.error_bars import Bars
from patchflow.cli.image_methods import SPLITTING, Prior
from patchflow.cli.novelty import Finding
from patchflow.metrics import psnr, ssim
from patchflow.priors.patch import PatchPrior
from patchflow.reconstruct.epll import component_map
from patchflow.records import Record
from patchflow.report import Curve, Panel, Report
from patchflow.solution import Solution
from patchflow.table import build_table

# What the start image of a problem is called in the report.
_START_NAMES = {"super-resolution": "bicubic, aligned", "inpainting": "harmonic filling"}


def image_report(
    settings: Mapping[str, object],
    y: Tensor,
    init: Tensor,
    solution: Solution,
    truth: Tensor | None,
    prior: Prior | None,
    notes: Sequence[str],
    seconds: float,
    bars: Bars | None,
    finding: Finding,
) -> Report:
    """Put together what is shown.

    Args:
        settings: All flags of the command.
        y: The measurements.
        init: What the solver started from.
        solution: The reconstructions.
        truth: The true images.
        prior: The prior.
        notes: What there is to say about the reconstruction.
        seconds: How long it took.
        bars: The error bars.
        finding: Novelty.
    """
    method = str(settings["method"])
    start = _START_NAMES.get(str(settings["problem"]), "start")
    table = None
    if truth is not None:
        records = [
            Record(
                name,
                f"{k}",
                {
                    "psnr": float(psnr(x[k : k + 1], truth[k : k + 1])[0]),
                    "ssim": float(ssim(x[k : k + 1], truth[k : k + 1])[0]),
                },
            )
            for name, x in ((start, init), (method, solution.x))
            for k in torch.arange(len(truth)).tolist()
        ]
        table = build_table("reconstruction", "PSNR and SSIM, data range 1, whole image", records)
    if len(y) > 1:
        notes = [*notes, f"A stack of {len(y)} images; the first is shown."]
    return Report(
        title=f"{settings['problem']} of {settings['measurement']}",
        command=command_line("reconstruct", settings, "measurement"),
        measurement=Panel("measurement", y[:1]),
        baseline=Panel(start, init[:1], "what the solver started from"),
        reconstruction=Panel(method, solution.x[:1]),
        truth=None if truth is None else Panel("truth", truth[:1]),
        table=table,
        curves=_curves(method, solution.history),
        nll_map=finding.nll_map,
        std_map=None if solution.std is None else solution.std[0].mean(0),
        components=(
            component_map(solution.x[:1], prior)[0, 0]
            if method == "epll" and isinstance(prior, PatchPrior)
            else None
        ),
        width=None if bars is None else (bars.high - bars.low)[0].mean(0),
        novelty=finding.novelty,
        seed=int(str(settings["seed"])),
        timings={"reconstruction": seconds},
        settings={key: value for key, value in settings.items() if value is not None},
        notes=[*notes, *finding.notes],
    )


def _curves(method: str, history: list[float]) -> list[Curve]:
    label, axis = SPLITTING.get(method, ("energy", "energy [nats]"))
    return [Curve(label, list(range(len(history))), history, axis)] if history else []
