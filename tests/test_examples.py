"""Every example runs as a user would run it, shortened where it trains, and improves on its start."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = {
    "inpainting.py": ["--training=50", "--steps=24"],
    "oscillation.py": [],
    "own_operator.py": [],
    "posterior.py": ["--training=100"],
    "super_resolution.py": ["--training=50", "--steps=24"],
    "tomography.py": ["--size=64", "--angles=60"],
}


def test_all_examples_are_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SHORT)


@pytest.mark.parametrize("name", sorted(SHORT))
def test_example(name, tmp_path):
    command = [sys.executable, str(EXAMPLES / name), *SHORT[name]]
    # As many threads as the tests have: beside other workers more would wait for each other.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | threads
    )
    assert run.returncode == 0, run.stderr
    if name == "oscillation.py":
        assert (tmp_path / "y.csv").read_text().count(",") == 11
        return
    assert (tmp_path / name.replace(".py", ".png")).exists()
    if name == "posterior.py":
        means = dict(re.findall(r"^(frequency|damping) +([\d.]+)", run.stdout, re.M))
        assert abs(float(means["frequency"]) - 0.6) < 0.05
        assert abs(float(means["damping"]) - 0.4) < 0.25
        return
    quality = [float(value) for value in re.findall(r"([\d.]+) dB", run.stdout)]
    assert len(quality) >= 2
    assert quality[-1] > quality[0] + 0.5
