"""Double precision, one seed, two threads; and where the real data are."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the tests")
    parser.addoption("--dtype", default="float64", help="default floating-point type")


def pytest_configure(config):
    torch.set_default_dtype(getattr(torch, config.getoption("--dtype")))
    torch.set_default_device(config.getoption("--device"))
    # Beside other workers more threads than free cores would wait for each other.
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    torch.set_num_threads(min(2, os.cpu_count() or 1) if alone else 1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def data_dir() -> Path:
    """The folder of real data: PATCHFLOW_DATA, or ../shared/data beside the repository."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PATCHFLOW_DATA", beside))
    if not (folder / "material").is_dir():
        pytest.skip(f"no data in {folder}; set PATCHFLOW_DATA")
    return folder


@pytest.fixture
def single_precision():
    """The default type of users, for tables and the command line."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def as_users_do(single_precision, tmp_path, monkeypatch):
    """Single precision and an empty folder, as outside of the tests."""
    monkeypatch.chdir(tmp_path)
