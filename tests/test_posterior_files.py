"""Posterior files: round trips, what ArviZ reads, atomicity, and sentences for bad input."""

from __future__ import annotations

import dataclasses
import math
import os
import sys

import numpy as np
import pytest
import torch

from patchflow.errors import InputError
from patchflow.io import posterior as module
from patchflow.io.posterior import (
    Posterior,
    check_posterior_path,
    read_posterior,
    write_posterior,
)

pytest.importorskip("h5netcdf")


def full(**changes) -> Posterior:
    samples = torch.randn(200, 3, dtype=torch.float64) * torch.tensor([1e-9, 1.0, 1e6])
    log_weights = torch.randn(200, dtype=torch.float64)
    log_weights[7] = -math.inf
    entries = {
        "samples": samples,
        "log_weights": log_weights,
        "names": ("rate, per hour", "x", "a-height µ"),
        "observation": torch.randn(5, dtype=torch.float64),
        "log_evidence": (-12.25, 0.125),
        "ess": 130.5,
        "k_hat": 0.25,
        "acceptance": {"layer 3": 0.75, "layer 5": 0.5},
        "settings": {"command": "patchflow sample 'µ'", "seed": 3, "versions": {"torch": "2"}},
    }
    return Posterior(**{**entries, **changes})


def test_netcdf_keeps_everything(tmp_path):
    path, posterior = tmp_path / "p.nc", full()
    write_posterior(path, posterior)
    back = read_posterior(path)
    for field in dataclasses.fields(Posterior):
        old, new = getattr(posterior, field.name), getattr(back, field.name)
        if isinstance(old, torch.Tensor):
            assert old.dtype == new.dtype
            assert torch.equal(old, new)
        else:
            assert old == new
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.nc"]


def test_netcdf_of_little(tmp_path):
    path = tmp_path / "p.NC"
    samples = torch.randn(4, 1, dtype=torch.float32, requires_grad=True)
    write_posterior(path, Posterior(samples, torch.zeros(4), ("x",)))
    back = read_posterior(path)
    assert back.samples.dtype == torch.float32
    assert torch.equal(back.samples, samples.detach())
    assert back.observation.shape == (0,)
    assert back.log_evidence is None
    assert math.isnan(back.ess)
    assert math.isnan(back.k_hat)
    assert back.acceptance == back.settings == {}


def test_long_settings_fit(tmp_path):
    # HDF5 limits what lies in the header of an object to 64 KiB.
    settings = {"notes": "µ" * 200_000}
    write_posterior(tmp_path / "p.nc", full(settings=settings))
    assert read_posterior(tmp_path / "p.nc").settings == settings


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_arviz_reads_netcdf(tmp_path):
    arviz = pytest.importorskip("arviz")
    posterior = full()
    write_posterior(tmp_path / "p.nc", posterior)
    data = arviz.from_netcdf(str(tmp_path / "p.nc"))
    assert set(data.groups()) == {"posterior", "sample_stats", "observed_data"}
    assert dict(data.posterior.sizes) == {"chain": 1, "draw": 200}
    assert list(data.posterior.data_vars) == list(posterior.names)
    assert data.posterior.attrs["inference_library"] == "patchflow"
    assert np.array_equal(data.posterior["x"].values[0], posterior.samples[:, 1].numpy())
    weights = data.sample_stats["log_weight"].values[0]
    assert np.array_equal(weights, posterior.log_weights.numpy())
    assert np.array_equal(data.observed_data["y"].values, posterior.observation.numpy())
    summary = arviz.summary(data, round_to="none")
    assert list(summary.index) == list(posterior.names)
    assert np.allclose(summary["mean"], posterior.samples.mean(0).numpy(), rtol=1e-6, atol=1e-15)


def test_csv(tmp_path):
    path, posterior = tmp_path / "p.csv", full()
    write_posterior(path, posterior)
    assert path.read_text().splitlines()[0] == '"rate, per hour",x,a-height µ,log_weight'
    back = read_posterior(path)
    assert back.names == posterior.names
    assert torch.equal(back.samples, posterior.samples)
    assert torch.equal(back.log_weights, posterior.log_weights)
    assert back.observation.shape == (0,)
    assert math.isnan(back.ess)


def test_csv_in_single_precision_is_short_and_exact(tmp_path):
    samples = torch.tensor([[0.1], [1e-30], [-3.0]], dtype=torch.float32)
    write_posterior(tmp_path / "p.csv", Posterior(samples, torch.zeros(3), ("x",)))
    assert (tmp_path / "p.csv").read_text() == "x,log_weight\n0.1,0.0\n1e-30,0.0\n-3.0,0.0\n"
    assert torch.equal(read_posterior(tmp_path / "p.csv").samples.float(), samples)


def test_csv_of_other_programs(tmp_path):
    (tmp_path / "p.csv").write_bytes("\ufeffa,b\r\n1,2\r\n3,4\r\n\r\n".encode())
    back = read_posterior(tmp_path / "p.csv")
    assert back.names == ("a", "b")
    assert back.samples.tolist() == [[1, 2], [3, 4]]
    assert back.log_weights.tolist() == [0, 0]


def test_npy(tmp_path):
    posterior = full()
    write_posterior(tmp_path / "p.npy", posterior)
    assert {entry.name for entry in tmp_path.iterdir()} == {"p.npy", "p.weights.npy"}
    samples = np.load(tmp_path / "p.npy", allow_pickle=False)
    weights = np.load(tmp_path / "p.weights.npy", allow_pickle=False)
    assert np.array_equal(samples, posterior.samples.numpy())
    assert math.isclose(weights.sum(), 1)
    expected = np.exp(posterior.log_weights.numpy())
    assert np.allclose(weights, expected / expected.sum())
    with pytest.raises(InputError, match=r"holds numbers without names"):
        read_posterior(tmp_path / "p.npy")


def test_weights_of_huge_log_weights():
    log_weights = torch.tensor([-1e5, -1e5 + math.log(3)], dtype=torch.float64)
    posterior = Posterior(torch.zeros(2, 1), log_weights, ("x",))
    assert torch.allclose(posterior.weights, torch.tensor([0.25, 0.75], dtype=torch.float64))


@pytest.mark.parametrize("name", ["p.nc", "p.csv", "p.npy"])
def test_a_failing_write_leaves_the_old_files(name, tmp_path, monkeypatch):
    write_posterior(tmp_path / name, full())
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match="no space left on the disk; nothing was overwritten"):
        write_posterior(tmp_path / name, full())
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_samples_that_fail_halfway_leave_both_arrays(tmp_path, monkeypatch):
    write_posterior(tmp_path / "p.npy", full())
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    save, calls = np.save, []

    def fail_at_the_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(module.np, "save", fail_at_the_second)
    with pytest.raises(InputError, match="no space left"):
        write_posterior(tmp_path / "p.npy", full())
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_bad_paths(tmp_path):
    for function in (check_posterior_path, read_posterior, lambda p: write_posterior(p, full())):
        with pytest.raises(InputError, match=r"extension '.h5', .* one of .nc, .csv, .npy: choose"):
            function(tmp_path / "p.h5")
    for name in ("p.nc", "p.csv", "p.npy"):
        with pytest.raises(InputError, match="there is no folder"):
            write_posterior(tmp_path / "missing" / name, full())
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="there is no folder"):
        write_posterior(tmp_path / "file" / "p.csv", full())
    (tmp_path / "posterior.csv").touch()
    with pytest.raises(InputError, match=r"There is no posterior file .*did you mean"):
        read_posterior(tmp_path / "posteriors.csv")


@pytest.mark.parametrize("name", ["p.nc", "p.csv", "p.npy"])
def test_a_folder_of_somebody_else(name, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    # Not by chmod, because root may write anywhere.
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match="permission denied; nothing was overwritten"):
        write_posterior(tmp_path / name, full())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("p.nc", b"", "does not hold samples"),
        ("p.nc", b"x,log_weight\n1,0\n", "does not hold samples"),
        ("p.csv", b"", "names do not fit|is needed"),
        ("p.csv", b"x,log_weight\n", r"Samples have the shape \(0, 1\)"),
        ("p.csv", b"x,log_weight\n1,0\n2,zero\n", "zero"),
        ("p.csv", b"x,log_weight\n1,0,0\n2,0,0\n", "2 titles above 3 columns"),
        ("p.csv", b"x,log_weight\n1,0\nnan,0\n", "1 of 2 samples are not finite"),
        ("p.csv", b"\x89PNG\r\n\xff", "utf-8"),
    ],
)
def test_damaged_files(name, content, reason, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        read_posterior(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_damaged_and_foreign_netcdf(tmp_path):
    path = tmp_path / "p.nc"
    write_posterior(path, full())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="does not hold samples as patchflow writes them"):
        read_posterior(path)
    import h5netcdf

    with h5netcdf.File(path, "w") as file:
        file.create_group("posterior")
    with pytest.raises(InputError, match="'parameters'"):
        read_posterior(path)


def test_netcdf_without_h5netcdf(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5netcdf", None)
    for function in (check_posterior_path, read_posterior, lambda p: write_posterior(p, full())):
        with pytest.raises(InputError, match=r"pip install 'patchflow\[bayes\]'"):
            function(tmp_path / "p.nc")
    write_posterior(tmp_path / "p.csv", full())
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.csv"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"names": ("a", "b")}, "2 names do not fit 3 parameters"),
        ({"names": ("a", "b", "a")}, "'a' cannot name a parameter"),
        ({"names": ("a", "b", "")}, "'' cannot name a parameter"),
        ({"names": ("a", "b", "c/d")}, "'c/d' cannot name a parameter"),
        ({"names": ("a", "b", "draw")}, "'draw' cannot name a parameter"),
        ({"samples": torch.zeros(200)}, r"shape \(200,\), but \(count, dim\)"),
        ({"samples": torch.zeros(0, 3)}, r"shape \(0, 3\)"),
        ({"log_weights": torch.zeros(3)}, r"shape \(3,\) do not fit samples of shape \(200, 3\)"),
        ({"log_weights": torch.full((200,), -math.inf)}, "one has to be finite"),
        ({"log_weights": torch.full((200,), math.nan)}, "none may be NaN"),
        ({"observation": torch.zeros(2, 2)}, r"shape \(2, 2\), but \(data_dim,\)"),
    ],
)
def test_posteriors_that_cannot_be(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        full(**changes)


def test_samples_that_are_not_finite():
    samples = torch.zeros(200, 3)
    samples[3, 1], samples[5, 2] = math.nan, math.inf
    with pytest.raises(InputError, match="2 of 200 samples are not finite"):
        full(samples=samples)


def test_settings_that_are_not_json(tmp_path):
    with pytest.raises(InputError, match=r"settings cannot be written .*only JSON values"):
        write_posterior(tmp_path / "p.nc", full(settings={"model": torch.zeros(1)}))
    assert not list(tmp_path.iterdir())
