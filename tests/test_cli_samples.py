"""Samples of images, the way to a better texture and the automatic choice, by the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml

from patchflow import models
from patchflow.cli.main import main
from patchflow.image_models import SingleImage
from patchflow.io.images import write_image
from patchflow.learn import learn_patches
from patchflow.learn_denoiser import learn_denoiser
from patchflow.priors.patch import PatchPrior
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.operator import Identity
from patchflow.problems.signature import signature
from patchflow.reconstruct import single_image
from patchflow.uncertainty.novelty import novelty_record

SIDE, NOISE = 64, 0.1
DENOISING = ["--problem=denoising", f"--noise={NOISE}"]


def texture(seed, side=SIDE):
    """Waves of two directions with random phases."""
    torch.manual_seed(seed)
    k = torch.arange(side) / side
    waves = [
        (2 * torch.pi * (a * k[:, None] + b * k[None] + torch.rand(()))).sin()
        for a, b in ((6, 2), (1, 8))
    ]
    return 0.5 + 0.2 * sum(waves).view(1, 1, side, side)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of one texture, and a measurement of another one of its kind, in the precision of users."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("samples")
    (root / "models").mkdir()
    image = texture(0)
    denoiser = models.drunet(widths=(8, 16), cell=1, low=0.003, high=0.5)
    learn_denoiser(
        denoiser, [image], spread="log-uniform", crop=24, batch=8, steps=80, warmup=20, lr=5e-3
    )
    flow = models.patch_nr(size=4, hidden=16, layers=2)
    learn_patches(flow, [image], steps=60, batch=64, lr=3e-3, warmup=20)
    law = GaussianLikelihood(Identity((SIDE, SIDE)), NOISE)
    network = models.single_image(measurement=signature(law), width=8, blocks=1, cell=2)
    for parameter in network.parameters():  # a new one changes nothing
        parameter.data += 0.02 * torch.randn_like(parameter)
    for name, model in (("denoiser", denoiser), ("flow", flow), ("network", network)):
        models.save(
            root / "models" / f"{name}.safetensors", model, images=[image], seed=0, training={}
        )
    truth = texture(1)
    write_image(root / "truth.tif", truth)
    write_image(root / "y.tif", truth + NOISE * torch.randn_like(truth))
    torch.set_default_dtype(before)
    return root


@pytest.fixture
def here(folder, single_precision, monkeypatch):
    monkeypatch.chdir(folder)


def run(*flags, expected=0):
    assert main(["reconstruct", "y.tif", *DENOISING, *flags]) == expected


def values(path):
    """Of a file, also outside [0, 1]."""
    found = np.load(path) if path.endswith(".npy") else tifffile.imread(path)
    return torch.from_numpy(found).squeeze()


def error(path):
    return float((values(path) - values("truth.tif")).square().mean())


def test_samples_by_a_denoiser_and_their_check(here, capsys):
    prior = "--prior=models/denoiser.safetensors"
    run("--method=dpir", prior, "--samples=16", "--steps=20", "--truth=truth.tif", "-o", "s.tif")
    told = capsys.readouterr().out
    assert "times the squared error of the mean of 16" in told
    assert "weight" not in told.splitlines()[0]
    low, high, std = (values(f"s-{end}.tif") for end in ("low", "high", "std"))
    assert bool((low <= high).all())
    assert float(std.mean()) > 0.005
    samples = values("s-samples.npy")
    assert samples.shape == (16, SIDE, SIDE)
    assert torch.allclose(samples.mean(0), values("s.tif"), atol=1e-4)
    assert error("s.tif") < error("y.tif") / 2

    run("--method=dpir", prior, "--samples=8", "--steps=20", "-o", "s.tif")
    assert "Nobody has checked these samples" in capsys.readouterr().out

    calibrate = ["calibrate", "truth.tif", *DENOISING, "--method=dpir", prior, "--samples=8"]
    assert main([*calibrate, "--level=0.8", "-o", "c"]) == 0
    checked = json.loads(Path("c/calibration.json").read_text())["checked"]
    assert checked["draws"] == 8
    told = capsys.readouterr().out
    assert "with known truth" in told
    run("--method=dpir", prior, "--samples=8", "--calibration=c", "--report=page", "-o", "s.tif")
    told = capsys.readouterr().out
    assert f"{checked['ratio']:.2f} times the squared error" in told
    assert "Warning" not in told
    assert f"{checked['ratio']:.2f} times" in Path("page/report.html").read_text()
    run("--method=dpir", prior, "--calibration=c", "-o", "x.tif")
    assert "another sampler (8 samples by split Gibbs, not None)" in capsys.readouterr().out


def test_samples_by_markov_chains(here, tmp_path, monkeypatch, capsys):
    prior = f"--prior={Path('models/flow.safetensors').absolute()}"
    small = values("y.tif")[:24, :24][None, None]
    monkeypatch.chdir(tmp_path)
    flags = ["--method=patchnr", prior, "--samples=16", "--steps=24"]
    write_image("y.tif", small)
    run(*flags, "-o", "m.tif")
    told = capsys.readouterr().out
    assert "of the steps were accepted" in told
    assert "R-hat" in told
    assert values("m-samples.npy").shape == (16, 24, 24)
    run(*flags, "--chain=langevin", "-o", "m.tif")
    assert "accepted" not in capsys.readouterr().out.replace("accepted: ", "")


def test_perception_goes_along_the_line(here, capsys):
    flags = ["--method=dpir", "--prior=models/denoiser.safetensors"]
    ends = {}
    capsys.readouterr()
    for share in ("0", "0.5", "1"):
        given = [] if share == "0" else ["--texture=models/flow.safetensors"]
        run(*flags, f"--perception={share}", *given, "-o", "p.tif")
        ends[share] = values("p.tif")
    assert not torch.allclose(ends["0"], ends["1"], atol=1e-3)
    assert torch.allclose((ends["0"] + ends["1"]) / 2, ends["0.5"], atol=1e-5)
    assert "Moved by 0.5 of the way" in capsys.readouterr().out


def test_single_image_makes_one_pass_if_asked(here, capsys):
    flags = ["--method=single-image", "--prior=models/network.safetensors"]
    run(*flags, "-o", "mean.tif")
    run(*flags, "--ensemble=false", "-o", "pass.tif")
    y = torch.from_numpy(tifffile.imread("y.tif")).view(1, 1, SIDE, SIDE)
    model = models.load("models/network.safetensors", SingleImage)
    law = GaussianLikelihood(Identity((SIDE, SIDE)), NOISE)
    for name, ensemble in (("mean.tif", True), ("pass.tif", False)):
        expected = single_image.reconstruct(law, model, y, ensemble=ensemble).x
        assert torch.allclose(values(name), expected[0, 0], atol=1e-5)
    assert not torch.allclose(values("mean.tif"), values("pass.tif"), atol=1e-5)
    # Nothing ties a network to the data: an image that does not explain them is told.
    capsys.readouterr()
    run(*flags, "-o", "pass.tif")
    assert "does not explain" not in capsys.readouterr().out
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    Path("wild").mkdir()
    models.save("wild/network.safetensors", model)
    run(*flags[:1], "--prior=wild/network.safetensors", "-o", "wild.tif")
    assert "the measurement: compare with --method tv" in capsys.readouterr().out
    calibrate = ["calibrate", "truth.tif", *DENOISING, *flags, "--level=0.8"]
    assert main([*calibrate, "--ensemble=false", "-o", "one"]) == 0
    capsys.readouterr()
    run(*flags, "--ensemble=false", "--calibration=one", "-o", "pass.tif")
    assert "setting of the solver" not in capsys.readouterr().out
    run(*flags, "--calibration=one", "-o", "mean.tif")
    assert "setting of the solver (ensemble)" in capsys.readouterr().out
    run("--method=tv", "--ensemble=false", "-o", "pass.tif", expected=2)
    assert "--ensemble false says nothing about the method tv" in capsys.readouterr().err
    run("--method=auto", "--ensemble=false", "-o", "pass.tif")
    assert main(["reconstruct", "--config=pass.yaml"]) == 0
    run("--method=auto", "--prior=models", "--ensemble=false", "-o", "pass.tif")
    assert torch.allclose(values("pass.tif"), expected[0, 0], atol=1e-5)


def chosen(capsys):
    told = capsys.readouterr().out
    return next(line for line in told.splitlines() if "chosen automatically" in line)


def test_automatic_choice_says_why(here, capsys):
    run("--method=auto", "--prior=models", "--report=page", "-o", "a.tif")
    line = chosen(capsys)
    assert line.startswith("Method single-image with models/network.safetensors")
    assert "trained for this operator and noise" in line
    assert line in Path("page/report.html").read_text()
    assert yaml.safe_load(Path("a.yaml").read_text())["method"] == "single-image"

    other = ["reconstruct", "y.tif", "--problem=denoising", "--noise=0.12", "--method=auto"]
    assert main([*other, "--prior=models", "--steps=5", "-o", "a.tif"]) == 0
    line = chosen(capsys)
    assert line.startswith("Method patchnr")
    assert "network.safetensors is for another measurement" in line

    assert main([*other, "--prior=models", "--budget=1e-6", "-o", "a.tif"]) == 0
    line = chosen(capsys)
    assert line.startswith("Method tv, chosen")
    assert "dpir would take about" in line

    run("--method=auto", "--prior=models", "--budget=1e-6", "-o", "a.tif")
    assert "single-image would take about" in chosen(capsys)

    run("--method=auto", "--prior=models", "--samples=8", "--steps=3", "-o", "a.tif")
    assert chosen(capsys).startswith("Method dpir with models/denoiser.safetensors")

    run("--method=auto", "-o", "a.tif")
    assert "needs no model" in chosen(capsys)


def test_automatic_choice_shows_the_novelty_map_of_a_density_in_the_folder(here, capsys):
    shutil.copytree("models", "known")
    flow = models.load("known/flow.safetensors", PatchPrior)
    record = novelty_record(flow, [texture(5)], rate=0.02)
    models.save("known/flow.safetensors", flow, images=[texture(0)], training=record)
    run("--method=auto", "--prior=known", "--report=shown", "-o", "a.tif")
    told = capsys.readouterr().out
    assert "Method single-image" in told
    assert "Novelty by known/flow.safetensors" in told
    assert Path("shown/novelty.png").exists()
    # The configuration repeats it, and without a report there is none to show.
    assert main(["reconstruct", "--config=a.yaml", "--report=again"]) == 0
    assert Path("again/novelty.png").read_bytes() == Path("shown/novelty.png").read_bytes()
    run("--method=auto", "--prior=known", "-o", "a.tif")
    assert yaml.safe_load(Path("a.yaml").read_text()).get("novelty") is None
    # A density for other images is passed over, and one without thresholds for one that has some.
    known = ["calibrate", "truth.tif", *DENOISING, "--level=0.8"]
    models.save("known/mixture.safetensors", models.epll(size=4, components=2))
    for message in (
        "Novelty by known/flow.safetensors",
        "as known/mixture.safetensors has no thresholds; train it again with images",
    ):
        capsys.readouterr()
        run("--method=auto", "--prior=known", "--report=colour", "-o", "a.tif")
        assert message in capsys.readouterr().out
        wide = models.patch_nr(size=4, hidden=8, layers=1, channels=3)
        models.save("known/flow.safetensors", wide)
    run("--method=auto", "--prior=known", "--report=colour", "-o", "a.tif")
    assert "known/flow.safetensors is for other images" in chosen(capsys)
    # A calibration of the method has no thresholds; one of another method has some that say nothing of it.
    models.save("known/flow.safetensors", flow, images=[texture(0)], training=record)
    for method, file in (("single-image", "network"), ("patchnr", "flow")):
        prior = [f"--method={method}", f"--prior=models/{file}.safetensors"]
        steps = ["--steps=2"] if method == "patchnr" else []
        assert main([*known, *prior, *steps, "-o", f"bars-{method}"]) == 0
        capsys.readouterr()
        given = [f"--calibration=bars-{method}", "--report=barred", "-o", "a.tif"]
        run("--method=auto", "--prior=known", *given)
        assert "Novelty by known/flow.safetensors" in capsys.readouterr().out
        assert main(["reconstruct", "--config=a.yaml"]) == 0


def test_automatic_choice_passes_models_that_it_does_not_know_or_cannot_read(here, capsys):
    Path("other").mkdir()
    models.save("other/local-ar.safetensors", models.local_ar())
    run("--method=auto", "--prior=other/local-ar.safetensors", "-o", "a.tif")
    assert "other/local-ar.safetensors holds the model local_ar, which is never chosen" in chosen(
        capsys
    )
    shutil.copytree("models", "some")
    whole = Path("some/network.safetensors").read_bytes()
    Path("some/network.safetensors").write_bytes(whole[: len(whole) // 2])
    Path("some/other.safetensors").write_bytes(b"no model")
    run("--method=auto", "--prior=some", "--steps=3", "-o", "a.tif")
    line = chosen(capsys)
    assert line.startswith("Method patchnr")
    for name in ("network", "other"):
        assert f"some/{name}.safetensors cannot be read" in line
    spoilt = Path("models/denoiser.safetensors").read_bytes()[:-9]
    Path("some/denoiser.safetensors").write_bytes(spoilt)
    Path("some/flow.safetensors").unlink()
    run("--method=auto", "--prior=some", "--samples=8", "-o", "b.tif", expected=2)
    assert "some/denoiser.safetensors cannot be read" in capsys.readouterr().err
    # The one model that was named is not passed over.
    for name in ("network", "other"):
        run("--method=auto", f"--prior=some/{name}.safetensors", "-o", "b.tif", expected=2)
        assert f"some/{name}.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method=tv", "--samples=8"], "not by tv"),
        (["--method=dpir", "--prior=models/denoiser.safetensors", "--samples=4"], "at least 8"),
        (["--method=patchnr", "--prior=models/flow.safetensors", "--samples=9"], "multiple of 4"),
        (
            ["--method=dpir", "--prior=models/denoiser.safetensors", "--samples=8", "--weight=2"],
            "--weight 2",
        ),
        (
            ["--method=patchnr", "--prior=models/flow.safetensors", "--samples=8", "--lr=0.1"],
            "--lr 0.1",
        ),
        (["--method=tv", "--perception=0.5"], "go together"),
        (["--method=tv", "--perception=2"], "between 0"),
        (["--method=tv", "--budget=3"], "--method auto"),
        (["--method=auto", "--samples=8"], "a model that draws them"),
        (["--method=auto", "--prior=."], "no model files"),
        (["--method=auto", "--budget=-1"], "must be positive"),
    ],
)
def test_refusals(here, capsys, flags, message):
    run(*flags, "-o", "r.tif", expected=2)
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not Path("r.tif").exists()
