"""The published procedures: their weights in the library's units, and that each lowers its own energy."""

import pytest
import torch

import patchflow as pf
from patchflow.cli import main
from patchflow.io.images import write_image
from patchflow.methods import METHODS, Task
from patchflow.papers import presets
from patchflow.problems.blur import downsample
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.operator import Identity


def critic():
    return pf.alr(size=6)


@pytest.mark.parametrize(
    ("method", "prior", "weight"),
    [
        # lambda / (2 sigma^2) p^2 / N, with N = 595^2 patches and sigma = 0.01.
        ("patchnr", lambda: pf.patch_nr(hidden=4), 0.0763),
        ("epll", lambda: pf.epll(components=2), 0.1780),
        ("local-ar", critic, 35.59),
        ("wpp", lambda: pf.wpp(size=6, count=3, scales=2), 338.9),
    ],
)
def test_weights_of_super_resolution(method, prior, weight):
    likelihood = GaussianLikelihood(downsample((600, 600)), 0.01)
    found = presets.PRESETS[method].weight(likelihood, prior())
    assert found == pytest.approx(weight, rel=1e-3)


@pytest.mark.parametrize("method", list(presets.PRESETS))
def test_procedures_run_and_lower_the_energy(method, monkeypatch):
    """In a few steps, where the published ones take hours."""
    few = presets.PatchProcedure(1.0, 30, 0.01, 200)
    monkeypatch.setattr(presets, "WPP_STEPS", 30)
    monkeypatch.setattr(presets.deep_image_prior, "PUBLISHED_STEPS", 120)
    monkeypatch.setattr(presets, "PATIENCE", 2)
    network = presets.SkipNet
    monkeypatch.setattr(
        presets, "SkipNet", lambda **options: network(channels=4, skip=(0, 4), **options)
    )
    i, j = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    truth = (0.5 + 0.25 * torch.sin(0.7 * i) + 0.2 * torch.cos(0.4 * j))[None, None]
    truth = truth.to(torch.get_default_dtype())
    likelihood = GaussianLikelihood(Identity((32, 32)), 0.1)
    y = likelihood.simulate(truth)
    priors = {
        "patchnr": lambda: pf.patch_nr(size=4, hidden=8, layers=2).requires_grad_(False),
        "epll": lambda: pf.learn_epll([truth], size=4, components=3)[0],
        "local-ar": lambda: pf.alr(size=4).requires_grad_(False),
        "wpp": lambda: pf.learn_wpp([truth], size=4, count=300, scales=2),
    }
    prior = priors[method]() if method in priors else None
    preset = presets.PRESETS[method]
    if method in ("patchnr", "epll", "local-ar"):
        preset = presets._patches(few)
    task = Task(likelihood, y, y, preset.weight(likelihood, prior), prior)
    solution = preset.solve(task)
    assert solution.x.isfinite().all()
    start, end = solution.history[0], min(solution.history[-5:])
    assert end < start


def test_the_command_line_names_the_methods_that_have_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image("y.png", torch.rand(1, 1, 16, 16))
    run = ["reconstruct", "y.png", "--problem=denoising", "--preset=paper"]
    assert main([*run, "--method=tv"]) == 2
    message = capsys.readouterr().err
    assert "preset paper of patchnr, epll, local-ar, wpp, dip-tv, not of tv" in message
    assert set(presets.PRESETS) < set(METHODS)
