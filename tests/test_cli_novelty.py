"""Novelty in reports: thresholds that a training leaves in its model file, and what is said where there are none."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from patchflow import models
from patchflow.cli import main
from patchflow.io.checkpoint import read_header, save_model
from patchflow.io.images import read_image, write_image
from patchflow.numerics.patches import hold_out
from patchflow.priors.patch import PatchPrior
from patchflow.problems.blur import Blur, gaussian_kernel
from patchflow.uncertainty.novelty import fit_novelty, novel_shares, novelty_record, read_novelty

SIDE, SIZE, RATE = 160, 5, 0.02
TRAIN = ["--components=3", f"--size={SIZE}", f"--false-alarms={RATE}", "--threads=1"]
FLAGS = ["--problem=denoising", "--threads=1"]


def texture(seed, side=SIDE):
    torch.manual_seed(seed)
    field = Blur(gaussian_kernel(13, 1.2), (side, side), "periodic")(torch.randn(1, 1, side, side))
    return (0.5 + 0.1 * field / field.std()).clamp(0, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An EPLL prior with thresholds, and the images of its training."""
    folder = tmp_path_factory.mktemp("novelty")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    for name, seed in (("train", 0), ("held", 1)):
        write_image(folder / f"{name}.tif", texture(seed))
    files = [str(folder / "train.tif"), f"--validation={folder / 'held.tif'}"]
    assert main(["train", "epll", *files, *TRAIN, f"--output={folder / 'p.safetensors'}"]) == 0
    torch.set_default_dtype(before)
    return folder


@pytest.fixture
def model(trained, as_users_do):
    return str(trained / "p.safetensors")


def shares(prior, novelty, image):
    return novel_shares(novelty(prior.nll_map(image)))


def refused(capsys, arguments, told):
    capsys.readouterr()
    assert main(arguments) == 2
    line = capsys.readouterr().err.strip()
    assert told in line
    assert "\n" not in line


def noted(page):
    """The shares of surprising and of smooth pixels in a report's note, in percent."""
    found = re.search(
        r"Novelty by \S+ ([\d.]+) % of the pixels surprise the prior, ([\d.]+) %", page
    )
    assert found is not None
    return float(found[1]), float(found[2])


def test_thresholds_of_a_training_are_kept_and_hold(trained, model):
    prior, novelty = models.load(model, PatchPrior), read_novelty(model)
    assert novelty is not None
    assert novelty.rate == RATE
    # The reference has the rate on either side, but for one pixel and ties in single precision.
    held = read_image(trained / "held.tif")
    for share in shares(prior, novelty, held):
        assert abs(share - RATE / 2) < 3 / SIDE**2
    # So has a new image of its law; as many patches as do not overlap count as independent.
    error = math.sqrt(RATE * (1 - RATE) * 2 * SIZE**2 / SIDE**2)
    assert abs(sum(shares(prior, novelty, texture(2))) - RATE) < 4 * error
    foreign = texture(3)
    torch.manual_seed(4)
    foreign[..., 40:100, 40:100] = (0.5 + 0.1 * torch.randn(60, 60)).clamp(0, 1)
    found = novelty(prior.nll_map(foreign))
    assert float((found == 1)[..., 44:96, 44:96].float().mean()) > 0.95


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("student-t", ["--components=2", "--count=3000", "--steps=5"]),
        ("patch-vae", ["--steps=5", "--latent=3", "--hidden=8"]),
        ("patch-nr", ["--steps=5", "--layers=2", "--hidden=8", "--precision=float32"]),
    ],
)
def test_every_density_measures_what_was_held_out(as_users_do, name, flags):
    write_image("train.tif", texture(0))
    run = ["train", name, "train.tif", "--size=4", "--holdout=0.25", "--threads=1", *flags]
    assert main([*run, "--output=p.safetensors"]) == 0
    prior = models.load("p.safetensors", PatchPrior)
    held = hold_out([read_image("train.tif")], 0.25, 4)[1]
    assert read_novelty("p.safetensors") == pytest.approx(fit_novelty(prior, held))


def test_a_training_without_enough_held_out_says_so(as_users_do, capsys):
    write_image("train.tif", texture(0, 64))
    run = ["train", "epll", "train.tif", "--components=2", "--size=4", "--threads=1"]
    for holdout, told in (("0.1", "at least ten are needed"), ("0", "no reference image")):
        assert main([*run, f"--holdout={holdout}", "--output=p.safetensors"]) == 0
        said = capsys.readouterr().out
        assert "The model will draw no novelty map, give --validation for that" in said
        assert told in said
        assert read_novelty("p.safetensors") is None
    assert main(["train", "wpp", "train.tif", "--output=w.safetensors"]) == 0
    assert "novelty" not in capsys.readouterr().out
    refused(capsys, [*run, "--false-alarms=1"], "false alarms is 1 but must lie between")


def test_a_report_shows_what_is_foreign(trained, model, capsys):
    foreign = texture(3, 80)
    torch.manual_seed(4)
    foreign[..., 20:50, 20:50] = (0.5 + 0.1 * torch.randn(30, 30)).clamp(0, 1)
    run = ["reconstruct", "y.tif", *FLAGS, "--noise=0.005", "--output=x.tif", "--report=page"]
    own, named = ["--method=epll", f"--prior={model}"], ["--method=tikhonov", f"--novelty={model}"]
    surprised = {}
    for name, truth, method in (
        ("known", texture(2, 80), own),
        ("foreign", foreign, named),
    ):
        write_image("y.tif", truth)
        assert main([*run, *method]) == 0
        page = Path("page/report.html").read_text()
        surprised[name], _ = noted(page)
        assert noted(capsys.readouterr().out) == noted(page)
        assert "read the second share with care" in page
        written = {path.name for path in Path("page").iterdir()}
        assert {"patch-negative-log-likelihood.png", "novelty.png"} <= written
    # The square is 14 % of the image.
    assert surprised["known"] < 100 * RATE
    assert surprised["foreign"] > 10


def test_a_report_says_why_there_is_no_map(trained, model, capsys):
    write_image("y.tif", texture(2, 64))
    run = ["reconstruct", "y.tif", *FLAGS, "--output=x.tif", "--report=page"]
    tikhonov = [*run, "--method=tikhonov"]
    assert main(tikhonov) == 0
    page = Path("page/report.html").read_text()
    assert "No novelty map can be drawn, as the method has no density of patches" in page
    assert "--novelty MODEL" in page
    assert not Path("page/novelty.png").exists()
    # A file that was written before there were thresholds still serves.
    header = read_header(model)
    old = {name: value for name, value in header.training.items() if name != "novelty"}
    prior = models.load(model, PatchPrior)
    state = prior.state_dict()
    save_model("old.safetensors", state, type(header)(**{**vars(header), "training": old}))
    assert read_novelty("old.safetensors") is None
    assert main([*run, "--method=epll", "--prior=old.safetensors"]) == 0
    assert "old.safetensors has no thresholds" in Path("page/report.html").read_text()
    assert Path("page/patch-negative-log-likelihood.png").exists()
    models.save("critic.safetensors", models.alr())
    refused(capsys, [*tikhonov, "--novelty=critic.safetensors"], "holds the model alr, which has")
    refused(capsys, [*tikhonov, "--novelty=nowhere.safetensors"], "nowhere.safetensors")
    refused(capsys, [*tikhonov[:-2], tikhonov[-1], f"--novelty={model}"], "is for the report")
    write_image("y.tif", texture(2, 96).expand(1, 3, -1, -1))
    refused(capsys, [*tikhonov, f"--novelty={model}"], "3 channels")


def test_thresholds_of_a_calibration_come_first(trained, model, capsys):
    write_image("y.tif", texture(2, 80))
    method = ["--method=epll", f"--prior={model}"]
    known = str(trained / "held.tif")
    assert main(["calibrate", known, *FLAGS, *method, "--output=bars"]) == 0
    run = ["reconstruct", "y.tif", *FLAGS, "--calibration=bars", "--report=page", "-o", "x.tif"]
    assert main([*run, *method]) == 0
    page = Path("page/report.html").read_text()
    assert "Unlike the calibration images" in page
    assert "Novelty by" not in page
    assert Path("page/novelty.png").exists()
    damaged = json.loads(Path("bars/calibration.json").read_text())
    damaged["novelty"]["low"] = "low"
    Path("damaged.json").write_text(json.dumps(damaged))
    wrong = [*run[:3], *FLAGS[1:], *method, "--calibration=damaged.json", "-o", "x.tif"]
    refused(capsys, wrong, "damaged.json is damaged")
    refused(capsys, [*run, *method, f"--novelty={model}"], "beside a calibration with thresholds")


def test_damaged_thresholds_and_large_references(trained, model, monkeypatch):
    prior, header = models.load(model, PatchPrior), read_header(model)
    damaged = {**vars(header), "training": {"novelty": {"low": 1.0}}}
    save_model("bad.safetensors", prior.state_dict(), type(header)(**damaged))
    with pytest.raises(Exception, match="thresholds of novelty that cannot be read"):
        read_novelty("bad.safetensors")
    # Of references with more pixels than a training looks at, the first rows are taken.
    monkeypatch.setattr("patchflow.uncertainty.novelty._MOST", 100 * SIDE)
    image = texture(5)
    taken = novelty_record(prior, [image, image])["novelty"]
    assert taken == fit_novelty(prior, [image[:, :, :100]])._asdict()
