"""Result tables: the figures, the marks, and strict JSON."""

from __future__ import annotations

import csv
import json
import math
import statistics

import pytest

from patchflow.errors import InputError
from patchflow.records import Record, read_csv, write_csv
from patchflow.table import IMAGE_METRICS, Metric, Row, Table, build_table

PSNRS = {"bicubic": [25.0, 26.0, 27.5], "patchNR": [28.0, 28.5, 30.0]}


def records() -> list[Record]:
    return [
        Record(
            method,
            f"img{i}",
            {"psnr": value, "ssim": value / 40, "lpips": 5 / value, "seconds": 1.0 + i},
        )
        for method, values in PSNRS.items()
        for i, value in enumerate(values)
    ]


def table() -> Table:
    return build_table(
        "patchnr-superresolution",
        "x4, 40-pixel border removed",
        records(),
        published={"patchNR": {"psnr": 28.53, "ssim": 0.78}, "ACNN": {"psnr": 28.89}},
        peak_mib={"patchNR": 812.6},
        floor={"psnr": 0.01, "ssim": 0.0002},
    )


def test_means_and_deviations():
    rows = {row.method: row for row in table().rows}
    assert list(rows) == ["bicubic", "patchNR", "ACNN"]
    for method, values in PSNRS.items():
        assert rows[method].mean["psnr"] == pytest.approx(statistics.fmean(values))
        assert rows[method].std["psnr"] == pytest.approx(statistics.stdev(values))
        assert rows[method].images == 3
    assert rows["ACNN"] == Row("ACNN", {"psnr": 28.89})


def test_text_is_aligned_and_marks_the_best():
    lines = table().text().splitlines()
    assert lines[0] == "patchnr-superresolution: x4, 40-pixel border removed"
    ours = next(line for line in lines if line.startswith("patchNR"))
    assert "28.83 ± 1.04*" in ours
    assert "0.721 ± 0.026*" in ours
    assert "0.174 ± 0.006*" in ours
    assert "813" in ours
    bicubic = next(line for line in lines if line.startswith("bicubic"))
    assert "*" not in bicubic
    assert lines[-1].endswith("; noise floor: PSNR 0.01, SSIM 0.0002.")
    header = lines[2]
    # Digits stand below each other: the mark has a column of its own.
    assert (
        bicubic.index("26.17") == ours.index("28.83") < header.index("PSNR [dB]") + len("PSNR [dB]")
    )
    assert str(table()) == table().text()


def test_lower_is_better_where_it_is_and_time_is_not_ranked():
    header, rows = table().grid()
    best = {
        row[0][0]: [title for title, (_, mark) in zip(header, row, strict=True) if mark]
        for row in rows
    }
    assert best == {"bicubic": [], "patchNR": ["PSNR [dB]", "SSIM", "LPIPS"], "ACNN": []}
    metric = Metric("kl", "KL", 2, higher_is_better=False)
    two = [Record("a", "1", {"kl": 0.5}), Record("b", "1", {"kl": 0.75})]
    _, rows = build_table("t", "p", two, metrics=[metric]).grid()
    assert [row[1] for row in rows] == [("0.50", True), ("0.75", False)]


def test_one_method_is_not_the_best_of_anything():
    single = build_table("t", "p", [Record("a", "1", {"psnr": 30.0})])
    assert "30.00*" not in single.text()


def test_markdown():
    lines = table().markdown().splitlines()
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert len(widths) == 1
    assert lines[1].startswith("| --- | ---: |")
    assert "**28.83 ± 1.04**" in lines[3]
    pipe = build_table("t", "p", [Record("a|b", "1", {"psnr": 1.0})]).markdown()
    assert "a\\|b" in pipe


def test_json_has_the_documented_form(tmp_path):
    table().write_json(tmp_path / "t.json")
    document = json.loads((tmp_path / "t.json").read_text())
    assert list(document) == ["name", "protocol", "rows", "floor"]
    row = document["rows"][1]
    assert list(row) == ["method", "published", "mean", "std", "images", "peak_mib"]
    assert list(row["mean"]) == ["psnr", "ssim", "lpips", "seconds"]
    assert row["published"] == {"psnr": 28.53, "ssim": 0.78}
    assert row["peak_mib"] == 812.6
    assert document["rows"][0]["peak_mib"] is None
    assert document["floor"] == {"psnr": 0.01, "ssim": 0.0002}


def test_json_is_strict_and_nothing_is_dropped_silently():
    broken = [
        Record("a", "1", {"psnr": math.inf, "ssim": 0.5}),
        Record("a", "2", {"psnr": 20.0, "ssim": math.nan}),
        Record("b", "1", {"psnr": 21.0}),
    ]
    result = build_table("t", "p", broken, peak_mib={"a": math.nan})

    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads(result.json(), parse_constant=refuse)
    a, b = document["rows"]
    assert a["mean"] == {"psnr": None, "ssim": None}
    assert a["std"] == {"psnr": None, "ssim": None}
    assert b["mean"] == {"psnr": 21.0}
    assert b["std"] == {"psnr": None}
    assert a["peak_mib"] is None
    assert "nan" in result.text()
    missing = [Record("a", "1", {"psnr": 1.0, "ssim": 1.0}), Record("a", "2", {"psnr": 1.0})]
    assert math.isnan(build_table("t", "p", missing).rows[0].mean["ssim"])


def test_nothing_is_dropped(tmp_path):
    metrics = [*IMAGE_METRICS, Metric("kl", "KL", 2)]
    values = {metric.name: index + 1.5 for index, metric in enumerate(metrics)}
    ours = [Record(m, f"image {i}", values) for m in ("a", "b") for i in range(3)]
    result = build_table(
        "t",
        "p",
        ours,
        published={"b": {"psnr": 7, "kl": 77.25}, "printed": {"ssim": 0.625}},
        peak_mib={"a": 111, "measured": 222.0},
        floor={metric.name: 0.25 for metric in metrics},
        metrics=metrics,
    )
    assert [row.method for row in result.rows] == ["a", "b", "printed", "measured"]
    assert [row.images for row in result.rows] == [3, 3, 0, 0]
    for row in result.rows[:2]:
        assert row.mean == values
        assert row.std == dict.fromkeys(values, 0.0)
    figures = ["7.00", "77.25", "0.625", "111", "222"]
    figures += [
        f"{value:.{m.digits}f} ± " for m, value in zip(metrics, values.values(), strict=True)
    ]
    words = [row.method for row in result.rows] + [metric.title for metric in metrics] + figures
    words += [f"published {title}" for title in ("PSNR [dB]", "SSIM", "KL")]
    words += [f"{metric.label} 0.25" for metric in metrics]
    for shown in (result.text(), result.markdown()):
        assert [word for word in words if word not in shown] == []
    document = json.loads(result.json())
    assert [row["method"] for row in document["rows"]] == ["a", "b", "printed", "measured"]
    assert [row["peak_mib"] for row in document["rows"]] == [111, None, None, 222]
    assert document["rows"][0]["mean"] == values
    assert document["rows"][1]["published"] == {"psnr": 7, "kl": 77.25}
    assert document["rows"][2]["published"] == {"ssim": 0.625}
    assert list(document["floor"]) == list(values)
    # A figure that only one image has is a column all the same.
    ours += [Record("a", "image 3", {**values, "extra": 4})]
    write_csv(tmp_path / "t.csv", ours)
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row.pop("method"), row.pop("image")) for row in rows] == [
        (record.method, record.image) for record in ours
    ]
    assert [{k: float(v) for k, v in row.items() if v} for row in rows] == [
        record.values for record in ours
    ]


def test_csv(tmp_path):
    written = [*records(), Record('a, "b"', "x", {"psnr": math.nan})]
    write_csv(tmp_path / "t.csv", written)
    again = read_csv(tmp_path / "t.csv")
    assert again[:-1] == written[:-1]
    assert all(math.isnan(value) for value in again[-1].values.values())
    known = [Record("a", "1", {"psnr": 1.0}, 99.5), Record("b", "1", {"psnr": 2.0}, 100.5)]
    write_csv(tmp_path / "peak.csv", known)
    assert read_csv(tmp_path / "peak.csv") == known
    for text in ("", "method,image,psnr\na,b,c\n", "method,image,psnr\na\n"):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(InputError, match="bad.csv is not a table of records"):
            read_csv(tmp_path / "bad.csv")
    with pytest.raises(InputError, match="There is no file"):
        read_csv(tmp_path / "none.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    assert rows[0] == {
        "method": "bicubic",
        "image": "img0",
        "psnr": "25.0",
        "ssim": "0.625",
        "lpips": "0.2",
        "seconds": "1.0",
    }
    assert rows[-1] == {
        "method": 'a, "b"',
        "image": "x",
        "psnr": "",
        "ssim": "",
        "lpips": "",
        "seconds": "",
    }


def test_errors(tmp_path):
    twice = [Record("a", "1", {"psnr": 1.0}), Record("a", "1", {"psnr": 2.0})]
    with pytest.raises(InputError, match="image 1 has two records of a"):
        build_table("t", "p", twice)
    with pytest.raises(
        InputError, match="figure kl, which is not one of lpips, psnr, seconds, ssim"
    ):
        build_table("t", "p", [Record("a", "1", {"kl": 1.0})])
    with pytest.raises(InputError, match="published row of a has the figure kl"):
        build_table("t", "p", [], published={"a": {"kl": 1.0}})
    with pytest.raises(InputError, match="noise floor has the figure kl"):
        build_table("t", "p", [], floor={"kl": 1.0})
    with pytest.raises(InputError, match="no folder"):
        table().write_json(tmp_path / "no" / "t.json")
    assert [metric.name for metric in IMAGE_METRICS] == ["psnr", "ssim", "lpips", "seconds"]
