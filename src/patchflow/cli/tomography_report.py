"""The report of a CT reconstruction: in windows, with a profile, in Hounsfield units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from patchflow.cli.config import command_line
from patchflow.cli.error_bars import Bars
from patchflow.cli.novelty import Finding
from patchflow.metrics import psnr, ssim
from patchflow.papers.patchnr_tomography import METRICS
from patchflow.problems.attenuation import HU_RANGE, to_hounsfield
from patchflow.records import Record
from patchflow.report import Curve, Panel, Report, Window, write_report
from patchflow.table import build_table

# Centre and width: -600 and 1500 HU, 50 and 400 HU.
_WINDOWS = (
    Window("lung window, -1350 to 150 HU", -1350.0, 150.0),
    Window("soft-tissue window, -150 to 250 HU", -150.0, 250.0),
)


def metrics_of(x: Tensor, truth: Tensor) -> list[dict[str, float]]:
    """PSNR and SSIM of each slice, with its own range and with range 1.

    Args:
        x: Reconstructions (slices, 1, height, width), in units of the largest attenuation.
        truth: The true slices.
    """
    rows = []
    for a, b in zip(x.split(1), truth.split(1), strict=True):
        own = float(b.max() - b.min())
        figures = {
            "psnr": psnr(a, b, own),
            "ssim": ssim(a, b, own),
            "psnr_range_1": psnr(a, b),
            "ssim_range_1": ssim(a, b),
        }
        rows.append({name: float(value[0]) for name, value in figures.items()})
    return rows


def write_tomography_report(
    folder: str,
    *,
    settings: Mapping[str, object],
    title: str,
    summary: str,
    method: str,
    y: Tensor,
    fbp: Tensor,
    x: Tensor,
    truth: Tensor | None,
    history: Sequence[float],
    finding: Finding,
    bars: Bars | None,
    seconds: float,
    notes: Sequence[str],
) -> Path:
    """Write the report; of a stack, the first slice is shown.

    Args:
        folder: The folder.
        settings: All flags of the command.
        title: The heading.
        summary: How it was measured and reconstructed.
        method: What the reconstruction is called.
        y: The sinograms.
        fbp: Filtered backprojections, in units of the largest attenuation.
        x: The reconstructions.
        truth: The true slices.
        history: The energies along the way, of the first slice.
        finding: Novelty of the first slice.
        bars: The error bars.
        seconds: How long all slices took.
        notes: What was assumed.

    Returns:
        The path of the page.
    """
    # Of filtered backprojection itself there is no other to compare with.
    compared = [] if bool((fbp == x).all()) else [("filtered backprojection", fbp)]
    table = None
    if truth is not None:
        records = [
            Record(name, f"{k}", figures)
            for name, images in (*compared, (method, x))
            for k, figures in enumerate(metrics_of(images, truth))
        ]
        protocol = "range of each slice (max - min of the truth), or range 1; whole slice"
        table = build_table("reconstruction", protocol, records, metrics=METRICS)
    known = [] if truth is None else [("truth", truth)]
    middle = x.shape[2] // 2
    columns = list(range(x.shape[3]))
    if len(y) > 1:
        notes = [*notes, f"A stack of {len(y)} slices; the first is shown."]
    return write_report(
        folder,
        Report(
            title=title,
            summary=summary,
            command=command_line("reconstruct", settings, "measurement"),
            measurement=Panel(
                "sinogram", y[:1], f"{y.shape[2]} angles (down) x {y.shape[3]} bins (right)"
            ),
            measurement_is_image=False,
            baseline=Panel("filtered backprojection", to_hounsfield(fbp[:1])) if compared else None,
            reconstruction=Panel(method, to_hounsfield(x[:1])),
            truth=None if truth is None else Panel("truth", to_hounsfield(truth[:1])),
            table=table,
            curves=[Curve("energy", list(range(len(history))), list(history), "energy [nats]")]
            if history
            else [],
            profiles=[
                Curve(
                    name,
                    columns,
                    to_hounsfield(image[0, 0, middle]).tolist(),
                    "profile [HU]",
                    f"column of row {middle}",
                )
                for name, image in ((method, x), *known, *compared)
            ],
            nll_map=finding.nll_map,
            novelty=finding.novelty,
            width=None if bars is None else HU_RANGE * (bars.high - bars.low)[0, 0],
            seed=int(str(settings["seed"])),
            timings={"reconstruction": seconds},
            settings={key: value for key, value in settings.items() if value is not None},
            notes=[*notes, *finding.notes],
            windows=_WINDOWS,
            unit="HU",
        ),
    )
