"""Error bars on the command line: calibrated on one image, drawn with another, refused where they would be wrong."""

import json
from pathlib import Path

import pytest
import torch

from patchflow.cli import main
from patchflow.io.images import read_image, write_image
from patchflow.problems.blur import Blur, gaussian_kernel


def texture(seed, side=72):
    torch.manual_seed(seed)
    field = Blur(gaussian_kernel(9, 1.5), (side, side), "periodic")(torch.randn(1, 1, side, side))
    return (0.5 + 0.12 * field / field.std()).clamp(0, 1)


@pytest.fixture
def files(as_users_do):
    for name, seed in (("train", 0), ("known", 1), ("other", 2), ("third", 3)):
        write_image(f"{name}.tif", texture(seed))
    flags = ["--problem=denoising", "--noise=0.1", "--threads=1"]
    assert (
        main(
            [
                "train",
                "epll",
                "train.tif",
                "--output=p.safetensors",
                "--components=3",
                "--holdout=0",
                "--threads=1",
            ]
        )
        == 0
    )
    assert main(["simulate", "other.tif", *flags[:2], "--output=y.tif"]) == 0
    return flags


def test_error_bars_of_one_image_hold_for_another(files, capsys) -> None:
    method = ["--method=epll", "--prior=p.safetensors"]
    assert (
        main(["calibrate", "known.tif", *files, *method, "--output=bars", "--false-alarms=0.02"])
        == 0
    )
    said = capsys.readouterr().out
    assert "upper half by the lower" in said
    assert "Empirical, not conformal: 90 % of the pixels of one image" in said
    document = json.loads(Path("bars/calibration.json").read_text())
    assert document["intervals"]["guarantee"] == "empirical"
    assert all(0.85 < part["share"] < 0.95 for part in document["coverage"].values())
    run = ["reconstruct", "y.tif", *files, *method, "--output=x.tif", "--calibration=bars"]
    assert main([*run, "--truth=other.tif", "--report=page"]) == 0
    said = capsys.readouterr().out
    assert "Warning" not in said
    truth, low, high = (read_image(name) for name in ("other.tif", "x-low.tif", "x-high.tif"))
    share = float(((low <= truth) & (truth <= high)).double().mean())
    assert abs(share - 0.9) < 0.03
    assert f"They cover {100 * share:.1f} % of the true pixels." in said
    assert "surprise the prior" in said
    page = Path("page/report.html").read_text()
    assert "width of the error bars" in page
    assert "novelty" in page
    # Another noise level, or another weight, is told.
    assert main([*run, "--weight=0.5"]) == 0
    assert "calibrated for another weight (default, not 0.5)" in capsys.readouterr().out
    assert (
        main(["reconstruct", "y.tif", files[0], "--noise=0.2", *method, "--calibration=bars"]) == 0
    )
    assert "calibrated for another noise" in capsys.readouterr().out


def test_several_images_are_judged_by_the_others(files, capsys) -> None:
    assert main(["calibrate", "known.tif", "other.tif", "third.tif", *files, "--method=tv"]) == 0
    said = capsys.readouterr().out
    assert said.count("by the others") == 3
    assert said.count("Of its tenths by brightness") == 3
    assert "of 3 images" in said


def test_a_problem_file_with_the_projector_of_scans_is_one_of_images(files) -> None:
    Path("beam.py").write_text(
        "import torch\nimport patchflow as pf\n\nangles = torch.linspace(0, 3, 40)\n"
        "likelihood = pf.GaussianLikelihood(pf.ParallelBeam((72, 72), angles, 103), 0.3)\n"
    )
    flags = ["--problem=beam.py", "--method=tv", "--threads=1"]
    assert main(["calibrate", "known.tif", *flags, "--output=beam"]) == 0
    write_image("z.npy", torch.zeros(1, 1, 40, 103))
    run = ["reconstruct", "z.npy", *flags, "--calibration=beam", "--output=z.tif"]
    assert main(run) == 0
    assert Path("z-low.tif").exists()


def test_mistakes(files, capsys) -> None:
    def refused(arguments, told):
        capsys.readouterr()
        assert main(arguments) == 2
        line = capsys.readouterr().err.strip()
        assert told in line
        assert "\n" not in line

    method = ["--method=epll", "--prior=p.safetensors"]
    refused(
        ["calibrate", "train.tif", *files, *method],
        "is an image that p.safetensors was learned from",
    )
    refused(["calibrate", *files], "either images with known truth")
    refused(
        ["calibrate", "known.tif", *files, "--method=tv", "--draws=9"], "--draws 9 is for --model"
    )
    refused(
        ["calibrate", "known.tif", *files, "--correct=metropolis"], "--correct metropolis is for"
    )
    refused(
        ["calibrate", "--problem=a.py", "--model=m.safetensors", "--noise=0.2"],
        "--noise 0.2 is for images",
    )
    refused(["calibrate", "known.tif", *files, "--method=tv", "--level=1.5"], "The level is 1.5")
    refused(["calibrate", "known.tif", *files, *method, "--false-alarms=2"], "false alarms is 2")
    write_image("small.tif", texture(5, 40))
    refused(["calibrate", "small.tif", *files, "--method=tv"], "at least 2000 are needed")
    run = ["reconstruct", "y.tif", *files, "--method=tv"]
    refused([*run, "--calibration=nowhere.json"], "nowhere.json")
    Path("no.json").write_text("{}")
    refused([*run, "--calibration=no.json"], "no calibration of images")
    twice = ["calibrate", "known.tif", "other.tif", "known.tif", *files, "--method=tv"]
    refused(twice, "known.tif is the same image as known.tif; give each")
