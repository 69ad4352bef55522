"""The posterior report: weighted statistics, the table, the corner plot and the page."""

from __future__ import annotations

import math
import re

import imagecodecs
import numpy as np
import pytest
import torch

from patchflow.errors import InputError
from patchflow.io import atomic
from patchflow.io.posterior import Posterior
from patchflow.posterior_report import (
    corner_plot,
    summarize,
    summary_text,
    write_posterior_report,
)
from test_report import read


def posterior_of(dim=3, count=400, **changes) -> Posterior:
    entries = {
        "samples": torch.randn(count, dim, dtype=torch.float64),
        "log_weights": torch.randn(count, dtype=torch.float64),
        "names": tuple(f"p{i}" for i in range(dim)),
    }
    return Posterior(**{**entries, **changes})


def full(**changes) -> Posterior:
    entries = {
        "names": ("rate <1>", "$broken_", "τ"),
        "observation": torch.randn(23),
        "log_evidence": (-12.3456, 0.0312),
        "ess": 200.0,
        "k_hat": 0.31,
        "acceptance": {"layer 2": 0.714, "layer 4": 0.5},
        "settings": {
            "command": "hidden",
            "seed": 12345,
            "model": "<script>alert(1)</script>",
            "versions": {"torch": "1.2.3-old"},
        },
    }
    return posterior_of(**{**entries, **changes})


def test_statistics_are_those_of_repeated_samples():
    times = torch.randint(0, 6, (301,))
    times[0] = 5
    samples = torch.randn(301, 2, dtype=torch.float64)
    repeated = samples.repeat_interleave(times, 0).numpy()
    posterior = Posterior(samples, times.double().log(), ("a", "b"))
    for level in (0.5, 0.9, 0.99):
        places = [(1 - level) / 2, 0.5, (1 + level) / 2]
        expected = np.quantile(repeated, places, axis=0, method="inverted_cdf")
        for i, row in enumerate(summarize(posterior, level)):
            assert [row["low"], row["median"], row["high"]] == expected[:, i].tolist()
            assert math.isclose(row["mean"], repeated[:, i].mean(), abs_tol=1e-12)


def test_equal_weights_give_the_ordinary_statistics():
    samples = torch.randn(50, 1, dtype=torch.float64)
    (row,) = summarize(Posterior(samples, torch.full((50,), -700.0), ("x",)))
    assert row["name"] == "x"
    assert math.isclose(row["mean"], samples.mean())
    assert math.isclose(row["sd"], samples.std())
    assert math.isclose(row["mcse"], samples.std() / math.sqrt(50))
    assert list(row) == ["name", "mean", "sd", "low", "median", "high", "mcse"]


def test_weights_turn_one_gaussian_into_another():
    # Samples of N(0, 2^2), weighted to be samples of N(1, 1).
    x = 2 * torch.randn(40_000, 1, dtype=torch.float64)
    log_weights = (-0.5 * (x - 1).square() + x.square() / 8).squeeze(1)
    (row,) = summarize(Posterior(x, log_weights, ("x",)), 0.9)
    # E[w^2] / E[w]^2 in closed form: the integral of N(x; 1, 1)^2 / N(x; 0, 4).
    factor = 4 / math.sqrt(7) * math.exp(1 / 7)
    error = row["mcse"]
    assert math.isclose(error, math.sqrt(factor / 40_000), rel_tol=0.05)
    assert abs(row["mean"] - 1) < 4 * error
    assert math.isclose(row["sd"], 1, rel_tol=0.03)
    assert math.isclose(row["median"], 1, abs_tol=0.05)
    assert math.isclose(row["high"], 1 + 1.6449, abs_tol=0.08)
    assert math.isclose(row["low"], 1 - 1.6449, abs_tol=0.08)


def test_the_error_is_by_the_smaller_sample_size():
    x = torch.randn(100, 1, dtype=torch.float64)
    sd = float(x.std())
    # Reported 25: resampled copies of few. Reported 5000: few drawn from many.
    for ess, size in [(25.0, 25), (5000.0, 100), (math.nan, 100)]:
        (row,) = summarize(Posterior(x, torch.zeros(100), ("x",), ess=ess))
        assert math.isclose(row["mcse"], sd / math.sqrt(size))


def test_a_single_sample_has_no_spread(tmp_path):
    posterior = Posterior(torch.zeros(1, 2), torch.zeros(1), ("a", "b"))
    row = summarize(posterior)[0]
    assert row["mean"] == row["low"] == row["high"] == 0
    assert math.isnan(row["sd"])
    assert "nan" in summary_text(posterior)
    write_posterior_report(tmp_path / "r.html", posterior, title="t", command="c")


def test_summary_text():
    lines = summary_text(full()).splitlines()
    assert lines[0].split() == ["parameter", "mean", "sd", "5", "%", "50", "%", "95", "%", "mcse"]
    assert [line.split("  ")[0] for line in lines[2:5]] == ["rate <1>", "$broken_", "τ"]
    assert len({len(line) for line in lines[:5]}) == 1
    assert re.fullmatch(
        r"400 samples, ESS \d+ \(\d+\.\d %\), k-hat 0\.31 \(good\), log Z -12\.346 ± 0\.031",
        lines[6],
    )
    assert lines[7] == "acceptance: layer 2 71 %, layer 4 50 %"
    for k_hat, words in [
        (0.5, "k-hat 0.50 (usable)"),
        (0.7, "k-hat 0.70 (usable)"),
        (0.71, "k-hat 0.71 (unreliable)"),
        (math.nan, "k-hat unknown"),
    ]:
        last = summary_text(posterior_of(k_hat=k_hat)).splitlines()[-1]
        assert words in last
        assert "log Z" not in last


def test_numbers_keep_the_digits_that_matter():
    z = torch.linspace(-1.5, 1.5, 301, dtype=torch.float64)
    columns = [1000.001 + 1e-4 * z, 1e-8 * z, 3e8 * z, 0 * z + 4]
    names = ("offset", "tiny", "large", "constant")
    samples = torch.stack(columns, 1)
    text = summary_text(Posterior(samples, torch.zeros(301), names)).splitlines()
    assert text[2].split()[1:3] == ["1000.0010000", "0.0000870"]
    assert text[3].split()[2] == "8.704e-09"
    assert text[4].split()[2] == "2.61e+08"
    assert text[5].split()[1:6] == ["4.000", "0.000", "4.000", "4.000", "4.000"]


def picture(*args, **options):
    return imagecodecs.png_decode(corner_plot(*args, **options))[..., :3].astype(int)


def orange(pixels) -> int:
    """How many pixels have the colour of the truth."""
    return int((np.abs(pixels - [232, 89, 12]).sum(-1) < 30).sum())


@pytest.mark.parametrize("dim", [1, 2, 5, 10])
def test_corner_plot(dim):
    posterior = posterior_of(dim)
    plain, marked = picture(posterior), picture(posterior, [0.0] * dim)
    assert plain.shape[0] == plain.shape[1]
    assert plain.std() > 5
    assert orange(plain) == 0
    assert orange(marked) > 100


def test_corner_plot_shows_ten_parameters():
    samples, names = torch.randn(200, 12), tuple(f"a_rather_long_name_{i}" for i in range(12))
    posterior = Posterior(samples, torch.zeros(200), names)
    shown = picture(posterior)
    first = picture(Posterior(samples[:, :10], torch.zeros(200), names[:10]))
    assert shown.shape == first.shape
    # Only the sentence at the top right is more.
    differs = (shown != first).any(-1)
    assert differs.any()
    rows, columns = differs.nonzero()
    assert rows.max() < 0.06 * len(shown)
    assert columns.min() > 0.5 * len(shown)


def test_corner_plot_obeys_the_weights():
    x = torch.cat([torch.randn(500, 2) - 10, torch.randn(500, 2) + 10])
    one = torch.cat([torch.full((500,), -math.inf), torch.zeros(500)])
    # Half of the samples has no weight: as if it were not there.
    weighted = picture(Posterior(x, one, ("a", "b")))
    alone = picture(Posterior(x[500:], torch.zeros(500), ("a", "b")))
    assert np.array_equal(weighted, alone)


def test_corner_plot_of_extremes():
    z = torch.randn(50, dtype=torch.float64)
    columns = [0 * z, 0 * z + 1e17, 1e-300 * z, 1e300 * z, 5 + 1e-14 * z]
    posterior = Posterior(torch.stack(columns, 1), torch.zeros(50), tuple("abcde"))
    assert picture(posterior).std() > 5
    assert picture(posterior, bins=1).std() > 5
    heavy = torch.where(torch.arange(50) == 3, 0.0, -1000.0)
    assert picture(Posterior(torch.randn(50, 2), heavy, ("a", "b"))).std() > 1


def test_report(tmp_path):
    path = tmp_path / "posterior.html"
    write_posterior_report(
        path,
        full(k_hat=0.93),
        title="grating & <posterior>",
        command="patchflow sample 'y <1>.csv'",
        truth=torch.zeros(3),
        notes=["The noise level was estimated."],
    )
    reader = read(path)
    expected = ["Parameters", "Samples", "Weights and data", "Command", "Details"]
    assert reader.headings == expected
    for word in [
        "grating & <posterior>",
        "400 samples, ESS",
        "k-hat is 0.93, above 0.7",
        "The noise level was estimated.",
        "rate <1>",
        "acceptance: layer 2 71 %",
        "the truth",
        "observation",
        "patchflow sample 'y <1>.csv'",
        "12345",
        "<script>alert(1)</script>",
        "1.2.3-old",
    ]:
        assert word in reader.text
    assert "hidden" not in reader.text
    assert (
        reader.text.index("k-hat is") < reader.text.index("The noise") < reader.text.index("mcse")
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["posterior.html"]


def test_it_loads_nothing_and_runs_nothing(tmp_path):
    path = tmp_path / "r.html"
    write_posterior_report(path, full(), title="t", command="c")
    reader = read(path)
    assert len(reader.loads) >= 3
    assert all(re.match("data:image/png;base64,", load) for load in reader.loads)
    assert not reader.tags & {"script", "link", "iframe", "object"}
    assert "default-src 'none'; img-src data:" in path.read_text()
    assert "http://" not in path.read_text()
    assert "https://" not in path.read_text()


def test_report_of_little(tmp_path):
    path = tmp_path / "r.html"
    posterior = Posterior(torch.randn(300, 1), torch.zeros(300), ("x",))
    write_posterior_report(path, posterior, title="t", command="c")
    reader = read(path)
    # Equal weights and no observation: nothing to draw but the samples.
    assert reader.headings == ["Parameters", "Samples", "Command", "Details"]
    assert "Contours" not in reader.text
    assert "k-hat is" not in reader.text
    assert torch.__version__ in reader.text
    few = Posterior(torch.randn(30, 1), torch.zeros(30), ("x",))
    write_posterior_report(path, few, title="t", command="c")
    assert "worth only 30 independent ones" in read(path).text


def test_a_failing_write_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", fail)
    with pytest.raises(InputError, match="nothing was overwritten"):
        write_posterior_report(path, full(), title="t", command="c")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.html"]


def test_errors(tmp_path):
    with pytest.raises(InputError, match=r"The level 1.5 is not between 0 and 1"):
        summarize(full(), 1.5)
    with pytest.raises(InputError, match="truth has 2 values for 3 parameters"):
        corner_plot(full(), [0.0, 1.0])
    with pytest.raises(InputError, match="0 bins cannot be drawn"):
        corner_plot(full(), bins=0)
    with pytest.raises(InputError, match="there is no folder"):
        write_posterior_report(tmp_path / "missing" / "r.html", full(), title="t", command="c")
