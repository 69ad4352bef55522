"""The report: self-contained, well-formed, complete, escaped."""

from __future__ import annotations

import base64
import html.parser
import re
import sys

import imagecodecs
import numpy as np
import pytest
import skimage.data
import torch
from torch.nn import functional as F

from patchflow import figures
from patchflow.errors import InputError
from patchflow.records import Record
from patchflow.report import (
    Curve,
    Panel,
    Region,
    Report,
    busiest_region,
    figure_grid,
    versions,
    write_report,
)
from patchflow.table import build_table

VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


class Reader(html.parser.HTMLParser):
    """Checks that tags are balanced and collects what a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loads += [
            value for key, value in attrs if key in ("src", "srcset", "href", "data", "action")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def read(path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text())
    reader.close()
    assert not reader.open
    return reader


def brick() -> torch.Tensor:
    array = skimage.data.brick()[100:196, 200:280].astype(np.float32) / 255
    return torch.from_numpy(array)[None, None]


def full_report(**changes) -> Report:
    truth = brick()
    measurement = F.avg_pool2d(truth, 4)
    bicubic = F.interpolate(measurement, scale_factor=4, mode="bicubic")
    records = [Record(m, "brick", {"psnr": p}) for m, p in [("bicubic", 26.4), ("patchNR", 30.6)]]
    entries = {
        "title": "brick & <mortar>",
        "command": "patchflow reconstruct 'y <1>.png' --scale 4 -o x.png",
        "measurement": Panel("measurement", measurement, "24 x 20 pixels"),
        "baseline": Panel("aligned bicubic", bicubic, "26.4 dB"),
        "others": [Panel("L2-TV", 0.5 * (bicubic + truth))],
        "reconstruction": Panel("patchNR", 0.2 * bicubic + 0.8 * truth),
        "truth": Panel("truth", truth),
        "summary": "x4 in 3 s",
        "table": build_table("brick", "whole image", records),
        "curves": [
            Curve("patchNR", [1, 2, 3], [9.0, 4.0, 3.0]),
            Curve("L2-TV", [1, 2, 3], [8.0, 5.0, 4.0]),
            Curve("patchNR", [1, 2, 3], [26.0, 29.0, 30.0], "PSNR [dB]"),
        ],
        "nll_map": 100 * (bicubic - truth).abs()[0, 0],
        "seed": 12345,
        "timings": {"reconstruct": 21.337},
        "settings": {"weight": 0.15, "file": "<script>alert(1)</script>"},
        "notes": ["The noise level was estimated."],
    }
    return Report(**{**entries, **changes})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "report"
    return folder, read(write_report(folder, full_report()))


def test_every_section_is_there(written):
    _, reader = written
    assert reader.headings == [
        "Results",
        "Images",
        "Zoom",
        "Maps",
        "Convergence",
        "Command",
        "Details",
    ]
    for word in [
        "brick & <mortar>",
        "x4 in 3 s",
        "aligned bicubic",
        "26.4 dB",
        "L2-TV",
        "patchNR",
        "truth",
        "error map",
        "patch negative log-likelihood",
        "objective",
        "PSNR [dB]",
        "30.60",
        "12345",
        "21.34 s",
        "weight",
        "0.15",
        "patchflow reconstruct 'y <1>.png' --scale 4 -o x.png",
        "The noise level was estimated.",
        "platform",
        "threads",
    ]:
        assert word in reader.text
    assert torch.__version__ in reader.text


def test_it_loads_nothing_and_runs_nothing(written):
    folder, reader = written
    assert reader.loads
    assert all(re.match("data:image/png;base64,", load) for load in reader.loads)
    assert not reader.tags & {"script", "link", "iframe", "object"}
    page = (folder / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\(|javascript:", page)
    assert "default-src 'none'" in page
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert 'name="viewport"' in page


def test_every_inlined_image_is_a_png(written):
    _, reader = written
    for load in reader.loads:
        data = base64.b64decode(load.split(",")[1], validate=True)
        assert imagecodecs.png_decode(data).size


def test_png_files_have_full_resolution(written):
    folder, _ = written
    assert {p.name for p in folder.iterdir()} == {
        "report.html",
        "measurement.png",
        "aligned-bicubic.png",
        "l2-tv.png",
        "patchnr.png",
        "truth.png",
        "error-map.png",
        "patch-negative-log-likelihood.png",
        "objective.png",
        "psnr-db.png",
    }
    array = imagecodecs.png_decode((folder / "truth.png").read_bytes())
    assert np.array_equal(array, np.rint(brick()[0, 0].numpy() * 255))


def test_the_least_report(tmp_path):
    x = brick()
    path = write_report(tmp_path, Report("t", "c", Panel("y", x), Panel("x", x)))
    reader = read(path)
    assert reader.headings == ["Images", "Zoom", "Command", "Details"]
    assert path == tmp_path / "report.html"


def test_colour_sinograms_and_labels_that_meet(tmp_path):
    colour = torch.rand(1, 3, 40, 40, dtype=torch.float64)
    sinogram = 50 * torch.rand(1, 1, 90, 57, dtype=torch.float32)
    report = Report(
        "t",
        "c",
        Panel("a/b", sinogram),
        Panel("a b", colour),
        others=[Panel("é", 2 * colour - 0.5)],
        measurement_is_image=False,
        zoom=Region(0, 0, 8, 8),
    )
    reader = read(write_report(tmp_path, report))
    assert {p.name for p in tmp_path.iterdir()} == {
        "a-b.png",
        "a-b-2.png",
        "image.png",
        "report.html",
    }
    scaled = imagecodecs.png_decode((tmp_path / "a-b.png").read_bytes())
    assert scaled.min() == 0
    assert scaled.max() == 255
    assert len(reader.loads) == 5


def test_not_finite_values_do_not_break_it(tmp_path):
    x = brick().clone()
    x[..., 3, 3] = torch.nan
    nll = torch.full((96, 80), torch.nan, dtype=torch.float32)
    report = Report(
        "t",
        "c",
        Panel("y", x),
        Panel("x", x),
        truth=Panel("t", brick()),
        nll_map=nll,
        curves=[Curve("e", [1.0, 2.0], [float("nan"), float("inf")])],
    )
    read(write_report(tmp_path, report))


def test_large_images_are_inlined_smaller(tmp_path):
    x = torch.rand(1, 1, 1300, 30, dtype=torch.float32)
    reader = read(write_report(tmp_path, Report("t", "c", Panel("y", x), Panel("x", x))))
    shapes = [
        imagecodecs.png_decode(base64.b64decode(load.split(",")[1])).shape for load in reader.loads
    ]
    assert shapes[1] == (650, 15)
    assert imagecodecs.png_decode((tmp_path / "x.png").read_bytes()).shape == (1300, 30)


def test_busiest_region():
    x = torch.full((1, 1, 64, 80), 0.5, dtype=torch.float32)
    x[..., 40:56, 16:32] = torch.rand(16, 16, dtype=torch.float32)
    assert busiest_region(x, 16) == Region(40, 16, 16, 16)
    assert busiest_region(x, 100) == Region(0, 0, 64, 80)


def test_the_zoom_shows_the_same_place_in_every_sampling(tmp_path):
    truth = torch.zeros(1, 1, 32, 32, dtype=torch.float32)
    truth[..., 10:22, 6:18] = 1
    coarse = F.avg_pool2d(truth, 2)
    report = Report("t", "c", Panel("y", coarse), Panel("x", truth), zoom=Region(8, 4, 16, 16))
    reader = read(write_report(tmp_path, report))
    measured, fine = (
        imagecodecs.png_decode(base64.b64decode(load.split(",")[1])) for load in reader.loads[2:]
    )
    assert measured.shape == fine.shape == (16, 16)
    assert np.array_equal(measured, fine)
    assert np.array_equal(fine, 255 * truth[0, 0, 8:24, 4:20].numpy())


def test_figure_grid():
    report = full_report()
    data = figure_grid(report.panels(), title="brick", width=8.0, dpi=100)
    array = imagecodecs.png_decode(data)
    assert array.shape[1] == 800
    assert array[..., :3].std() > 20
    taller = imagecodecs.png_decode(figure_grid(report.panels(), columns=3, width=8.0, dpi=100))
    assert taller.shape[0] > array.shape[0]
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )


def test_errors(tmp_path):
    x = brick()
    with pytest.raises(InputError, match=r"panel patchNR has the shape \(2, 1, 96, 80\)"):
        write_report(tmp_path, full_report(reconstruction=Panel("patchNR", x.repeat(2, 1, 1, 1))))
    with pytest.raises(
        InputError, match=r"zoom \(90, 0, 16, 16\) .* does not lie in the 96 x 80 pixels"
    ):
        write_report(tmp_path, full_report(zoom=Region(90, 0, 16, 16)))
    with pytest.raises(InputError, match="cannot be subtracted"):
        write_report(tmp_path, full_report(truth=Panel("truth", x[..., 1:])))
    with pytest.raises(InputError, match="curve c has 1 places but 2 values"):
        write_report(tmp_path, full_report(curves=[Curve("c", [1], [1.0, 2.0])]))
    with pytest.raises(InputError, match="figure of 0 panels"):
        figure_grid([])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="nothing was overwritten"):
        write_report(tmp_path / "file" / "report", full_report())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_versions():
    assert set(versions()) == {"patchflow", "python", "torch", "platform", "threads"}


@pytest.mark.parametrize(("marked", "ends"), [(0, 1e-9), (3, 7.0), (9900, 7.0)])
def test_the_colours_of_a_map_reach_its_few_high_values(monkeypatch, marked, ends):
    drawn, drawing = [], figures._drawing
    monkeypatch.setattr(
        figures, "_drawing", lambda draw: drawn.append(draw("black")) or drawing(draw)
    )
    values = np.zeros((100, 100), np.float32)
    values.flat[:marked] = 7.0
    figures.draw_map(values, "viridis", from_zero=True)
    assert drawn[0].axes[0].images[0].get_clim() == pytest.approx((0.0, ends))


def test_maps_of_signs_have_three_colours_and_a_legend(monkeypatch):
    drawn, drawing = [], figures._drawing
    monkeypatch.setattr(
        figures, "_drawing", lambda draw: drawn.append(draw("black")) or drawing(draw)
    )
    # The colours are those of the signs, also where one of them is missing.
    for values in (np.eye(9, dtype=np.int32) - np.eye(9, dtype=np.int32)[::-1], np.zeros((9, 9))):
        figures.draw_signs(values, ("less", "same", "more"))
        figure = drawn.pop()
        drawn.clear()
        (axes,) = figure.axes
        (legend,) = figure.legends
        named = {
            text.get_text(): patch.get_facecolor()
            for text, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)
        }
        assert list(named) == ["less", "same", "more"]
        assert len(set(named.values())) == 3
        for sign, name in ((-1, "less"), (0, "same"), (1, "more")):
            image = axes.images[0]
            assert image.cmap(image.norm(sign)) == named[name]
