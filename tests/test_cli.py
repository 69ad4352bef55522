"""The command line, end to end on tiny data, and every refusal: one sentence, exit code 2, nothing written."""

import errno
import importlib
import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from patchflow.cli import main
from patchflow.io.checkpoint import ModelHeader, read_header, save_model
from patchflow.io.images import read_image, read_stack, write_image
from patchflow.numerics.patches import PatchSampler
from patchflow.papers import image_tables as table

pytestmark = pytest.mark.usefixtures("as_users_do")


def texture(rows=64, columns=64):
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    wave = 0.5 + 0.3 * torch.sin(0.5 * i) * torch.cos(0.3 * j)
    return wave[None, None].float()


@pytest.fixture
def image():
    write_image("train.png", texture())
    return "train.png"


TINY = ["--size=4", "--layers=2", "--hidden=16", "--batch=64", "--threads=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model, trained once."""
    folder = tmp_path_factory.mktemp("model")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    write_image(folder / "train.png", texture())
    output = folder / "prior.safetensors"
    run = ["train", "patch-nr", str(folder / "train.png"), f"--output={output}", "--steps=300"]
    assert main([*run, *TINY]) == 0
    torch.set_default_dtype(before)
    return output.read_bytes()


@pytest.fixture
def model(trained):
    Path("prior.safetensors").write_bytes(trained)
    return "prior.safetensors"


def refused(capsys, arguments, message):
    """Exit code 2, one line, no traceback, no new file."""
    files = {path: path.stat().st_mtime_ns for path in Path().iterdir()}
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert "Traceback" not in error
    assert {path: path.stat().st_mtime_ns for path in Path().iterdir()} == files


def test_train_reconstruct_and_report(model, capsys):
    header = read_header(model)
    assert header.arguments["size"] == 4
    assert header.training["steps"] == 300
    assert len(header.fingerprint) == 64
    assert main(["info", model]) == 0
    assert "patch_nr" in capsys.readouterr().out

    write_image("truth.tif", texture(64, 48))
    problem = ["--problem=super-resolution", "--scale=2", "--noise=0.01"]
    assert main(["simulate", "truth.tif", *problem, "--output=y.tif"]) == 0
    assert read_image("y.tif", slack=1).shape == (1, 1, 32, 24)
    arguments = ["y.tif", *problem, f"--prior={model}", "--steps=60", "--threads=1"]
    extra = ["--truth=truth.tif", "--report=page", "--output=x.tif"]
    capsys.readouterr()
    assert main(["reconstruct", *arguments, *extra]) == 0
    assert "PSNR" in capsys.readouterr().out
    x, truth = read_image("x.tif", slack=1), read_image("truth.tif")
    start = torch.nn.functional.interpolate(
        read_image("y.tif", slack=1), scale_factor=2, mode="bicubic"
    )
    assert (x - truth).square().mean() < 0.2 * (start - truth).square().mean()
    page = Path("page/report.html").read_text()
    assert "patchflow reconstruct y.tif" in page


def test_configuration_repeats_a_run(model):
    write_image("y.tif", texture(32, 32))
    arguments = ["y.tif", "--problem=denoising", "--noise=0.05", f"--prior={model}", "--steps=5"]
    assert main(["reconstruct", *arguments, "--output=a.tif", "--threads=1"]) == 0
    written = yaml.safe_load(Path("a.yaml").read_text())
    assert written["command"] == "reconstruct"
    assert written["steps"] == 5
    assert main(["reconstruct", "--config=a.yaml", "--output=b.tif"]) == 0
    assert torch.equal(read_image("a.tif", slack=1), read_image("b.tif", slack=1))
    assert main(["reconstruct", "--config", "a.yaml", "--steps", "9", "--output", "c.tif"]) == 0
    assert yaml.safe_load(Path("c.yaml").read_text())["steps"] == 9
    assert not torch.equal(read_image("a.tif", slack=1), read_image("c.tif", slack=1))


def test_repeated_training_gives_the_same_model(image):
    run = ["train", "patch-nr", image, "--steps=40", *TINY]
    assert main([*run, "--output=a.safetensors"]) == 0
    assert main(["train", "patch-nr", "--config=a.yaml", "--output=b.safetensors"]) == 0
    a, b = load_file("a.safetensors"), load_file("b.safetensors")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_interrupted_training_keeps_the_best_and_resumes(image, monkeypatch, capsys):
    run = ["train", "patch-nr", image, "--steps=120", *TINY]
    assert main([*run, "--output=whole.safetensors"]) == 0
    draw, calls = PatchSampler.__call__, []

    def interrupt(self):
        calls.append(1)
        if len(calls) == 110:
            raise KeyboardInterrupt
        return draw(self)

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(PatchSampler, "__call__", interrupt)
        assert main([*run, "--output=part.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "Interrupted; part.state.safetensors holds the state" in said
    assert read_header("part.safetensors").training["stopped"] == "interrupted"
    command = said.split("Continue with: ")[1].strip()
    assert main(shlex.split(command)[1:]) == 0
    whole, part = load_file("whole.safetensors"), load_file("part.safetensors")
    assert all(torch.equal(whole[key], part[key]) for key in whole)
    assert not Path("part.state.safetensors").exists()


@pytest.mark.parametrize(
    ("problem", "extra"),
    [
        ("deblurring", ["--kernel=kernel.npy"]),
        ("deblurring", ["--kernel=kernel.npy", "--boundary=valid"]),
        ("inpainting", ["--mask=mask.png"]),
        ("denoising", []),
        ("super-resolution", ["--scale=4", "--boundary=valid"]),
        ("custom.py", []),
    ],
)
def test_every_problem_with_both_methods(problem, extra, model):
    truth = texture(64, 48)
    write_image("truth.tif", truth)
    np.save("kernel.npy", np.ones((3, 5)) / 15)
    mask = torch.rand(1, 1, 64, 48) > 0.3
    write_image("mask.png", mask.float())
    Path("custom.py").write_text(
        "import patchflow as pf\nlikelihood = pf.GaussianLikelihood(pf.Identity((64, 48)), 0.02)\n"
    )
    flags = [f"--problem={problem}", "--noise=0.02", *extra]
    assert main(["simulate", "truth.tif", *flags, "--output=y.tif"]) == 0
    for method in ([f"--prior={model}", "--steps=80"], ["--method=tv"]):
        assert main(["reconstruct", "y.tif", *flags, *method, "--output=x.tif", "--threads=1"]) == 0
        x = read_image("x.tif", slack=1)
        assert x.shape == truth.shape
        inner = (x - truth)[..., 8:-8, 8:-8].square().mean().sqrt()
        # The trivial answer, grey everywhere, is 0.15 away.
        assert float(inner) < (0.05 if "--steps=80" in method else 0.11)


def test_published_procedure(model, image, capsys):
    flags = ["--problem=denoising", "--noise=0.1", f"--prior={model}", "--threads=1"]
    assert main(["reconstruct", image, *flags, "--preset=paper", "-o", "x.tif"]) == 0
    said = capsys.readouterr().out
    # lambda / (2 sigma^2) p^2 / N with lambda = 0.15 and 61^2 patches of 4 x 4
    assert f"weight {0.15 / 0.02 * 16 / 61**2:g}, 300 steps" in said


def test_colour_and_stacks(capsys):
    colour = torch.cat([texture() * k for k in (1.0, 0.8, 0.6)], 1)
    write_image("colour.png", colour)
    assert main(["train", "patch-nr", "colour.png", "--steps=30", *TINY]) == 0
    write_image("stack.tif", torch.cat([colour, colour.flip(2)]))
    flags = ["--problem=denoising", "--noise=0.05", "--prior=prior.safetensors", "--steps=3"]
    assert main(["reconstruct", "stack.tif", *flags, "--output=x.tif"]) == 0
    assert read_stack("x.tif", slack=1).shape == (2, 3, 64, 64)
    refused(capsys, ["reconstruct", "train.png", *flags], "train.png")
    write_image("grey.tif", texture())
    refused(
        capsys, ["reconstruct", "grey.tif", *flags], "1 channels but the patch prior was made for 3"
    )


def test_bad_arguments(image, capsys):
    refused(
        capsys,
        ["reconstruct", image, "--problem=super-resolutoin", "--method=tv"],
        "did you mean super-resolution?",
    )
    refused(capsys, ["train", "patch-nr"], "IMAGES")
    refused(capsys, ["train", "patch-nr", "no.png"], "no.png")
    refused(capsys, ["train", "patch-nr", image, "--size=six"], "size")
    refused(capsys, ["train", "patch-nr", image, "--sise=6"], "--sise")
    refused(capsys, ["train", "patch-nr", image, "--output=no/x.safetensors"], "folder no")
    refused(capsys, ["train", "patch-nr", image, "--output=x.pth"], ".pth")
    refused(capsys, ["train", "patch-nr", image, "--threads=0"], "at least 1")
    refused(capsys, ["train", "patch-nr", image, "--range=5"], "LO:HI")
    refused(capsys, ["train", "patch-nr", image, "--resume"], "prior.state.safetensors")
    refused(capsys, ["reconstruct", image, "--problem=denoising"], "needs --prior")
    refused(
        capsys,
        ["reconstruct", image, "--problem=denoising", "--method=tv", "--noise=0"],
        "noise is 0",
    )
    refused(capsys, ["reconstruct", image, "--problem=deblurring", "--method=tv"], "needs --kernel")
    refused(capsys, ["reconstruct", image, "--problem=inpainting", "--method=tv"], "needs --mask")
    refused(capsys, ["reconstruct", image, "--problem=none.py", "--method=tv"], "none.py")
    refused(
        capsys,
        ["reconstruct", image, "--problem=denoising", "--method=tv", "--weight=-1"],
        "weight",
    )
    refused(
        capsys,
        ["benchmark", "patchnr-superres", "--data=."],
        "did you mean patchnr-superresolution?",
    )
    refused(capsys, ["benchmark", "patchnr-superresolution", "--data=."], "testset_superres")
    refused(capsys, ["reconstruct", "--config=none.yaml"], "none.yaml")
    refused(capsys, ["info", image], image)
    refused(capsys, ["info"], "MODEL")
    refused(capsys, ["reconstruct", image], "--problem is required; see --help.")
    refused(capsys, ["reconstruct", image, "--problem=denoising", "--noise=-1"], "needs --prior")
    tv = ["reconstruct", image, "--method=tv"]
    refused(capsys, [*tv, "--problem=denoising", "--noise=-1"], "noise is -1")
    refused(capsys, [*tv, "--problem=denoising", f"--report={image}"], "cannot be made")
    refused(capsys, ["demo", f"--output={image}"], "cannot be made")
    write_image("stack.tif", torch.cat([texture(), texture()]))
    refused(
        capsys,
        ["reconstruct", "stack.tif", "--problem=denoising", "--method=tv", "--output=x.png"],
        "can hold one image, but there are 2",
    )
    Path("broken.py").write_text("import patchflow\n1 / 0\n")
    refused(capsys, [*tv, "--problem=broken.py"], "failed in line 2 (ZeroDivisionError")
    Path("broken.py").write_text("likelihood = (\n")
    refused(capsys, [*tv, "--problem=broken.py"], "failed in line 1 (SyntaxError")
    Path("empty.py").write_text("x = 1\n")
    refused(capsys, [*tv, "--problem=empty.py"], "defines no likelihood")
    refused(capsys, ["nonsense"], "nonsense")


def test_problem_file_brings_its_noise(capsys):
    """The file's noise, not the flag's default, says how far a measurement may leave the range."""
    Path("noisy.py").write_text(
        "import patchflow as pf\n"
        "likelihood = pf.Likelihood(pf.Identity((64, 64)), pf.GaussianNoise(0.3))\n"
    )
    write_image("x.png", texture())
    assert main(["simulate", "x.png", "--problem=noisy.py", "-o", "y.tif"]) == 0
    assert main(["reconstruct", "y.tif", "--problem=noisy.py", "--method=tv", "-o", "z.tif"]) == 0
    assert capsys.readouterr().out.count("noise 0.3") == 2


def test_interrupted_reconstruction_keeps_the_image(model, image, monkeypatch):
    for method, solver in (
        ("tv", "priors.differences.minus_divergence"),
        ("patchnr", "priors.patch.add_patches"),
    ):
        module, name = solver.rsplit(".", 1)
        module = importlib.import_module(f"patchflow.{module}")
        work, calls = getattr(module, name), []

        def interrupt(*arguments, work=work, calls=calls):
            calls.append(1)
            if len(calls) == 8:
                raise KeyboardInterrupt
            return work(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(module, name, interrupt)
            run = ["reconstruct", "train.png", "--problem=denoising", f"--method={method}"]
            prior = [f"--prior={model}"] if method == "patchnr" else []
            assert main([*run, *prior, f"--output={method}.tif"]) == 0
        assert read_image(f"{method}.tif", slack=1.0).shape == (1, 1, 64, 64)


def test_bad_images(capsys):
    write_image("flat.png", torch.full((1, 1, 32, 32), 0.5))
    write_image("small.png", texture(4, 9))
    np.save("hole.npy", np.where(np.eye(32) > 0, np.nan, 0.5))
    np.save("large.npy", 300 * np.random.rand(32, 32))
    Path("text.png").write_text("not an image")
    for name, message in [
        ("flat.png", "constant"),
        ("small.png", "too small"),
        ("hole.npy", "NaN or infinite"),
        ("large.npy", "for example --range"),
        ("text.png", "not a PNG image"),
    ]:
        refused(capsys, ["train", "patch-nr", name, *TINY[1:]], message)
    write_image("black.png", torch.zeros(1, 1, 64, 64))
    write_image("train.png", texture())
    write_image("other.png", texture(32, 32))
    flags = ["reconstruct", "train.png", "--method=tv", "--problem=inpainting"]
    refused(capsys, [*flags, "--mask=black.png"], "hides everything")
    refused(capsys, [*flags, "--mask=other.png"], "32 x 32")
    flags = ["reconstruct", "train.png", "--method=tv", "--problem=denoising"]
    refused(capsys, [*flags, "--truth=other.png"], "32 x 32")


def test_bad_models(model, image, capsys):
    flags = ["reconstruct", image, "--problem=denoising", "--steps=1"]
    whole = Path(model).read_bytes()
    Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
    Path("text.safetensors").write_text("weights")
    save_model("other.safetensors", {"a": torch.ones(1)}, ModelHeader("conditional_snf"))
    header = read_header(model)
    newer = ModelHeader(header.model, header.arguments, format_version=99)
    save_model("newer.safetensors", {"a": torch.ones(1)}, newer)
    save_model("thin.safetensors", {"a": torch.ones(1)}, header)
    for name, message in [
        ("cut", "truncated"),
        ("text", "text.safetensors"),
        ("other", "conditional_snf"),
        ("newer", "upgrade"),
        ("thin", "thin.safetensors"),
        ("none", "none.safetensors"),
    ]:
        refused(capsys, [*flags, f"--prior={name}.safetensors"], message)
    write_image("tiny.png", texture(3, 3))
    refused(
        capsys, ["reconstruct", "tiny.png", *flags[2:], f"--prior={model}"], "smaller than a patch"
    )


def test_full_disk_leaves_the_old_output(image, monkeypatch, capsys):
    write_image("x.tif", texture(8, 8))
    before = Path("x.tif").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    run = ["reconstruct", image, "--problem=denoising", "--method=tv", "--output=x.tif"]
    assert main(run) == 2
    # Above it is the progress line.
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("patchflow: x.tif")
    assert Path("x.tif").read_bytes() == before


def test_nan_in_training_is_a_failure_with_advice(image, monkeypatch, capsys):
    monkeypatch.setattr(PatchSampler, "__call__", lambda self: torch.full((8, 16), torch.nan))
    assert main(["train", "patch-nr", image, "--steps=5", *TINY]) == 1
    assert "smaller lr" in capsys.readouterr().err


def test_benchmark_on_small_data(model, monkeypatch, data_dir):
    monkeypatch.setattr(table, "NOISE_SEEDS", 2)
    arguments = [f"--data={data_dir}", "--images=1", "--methods=[bicubic]", "--json=t.json"]
    assert main(["benchmark", "patchnr-superresolution", *arguments, "--csv=t.csv"]) == 0
    document = json.loads(Path("t.json").read_text())
    bicubic = document["rows"][0]
    assert bicubic["method"] == "bicubic"
    # One of the hundred images whose mean is 25.63 +- 0.56.
    assert abs(bicubic["mean"]["psnr"] - 25.63) < 1.7
    assert bicubic["published"]["psnr"] == 25.63
    assert 0 < document["floor"]["psnr"] < 0.1
    assert Path("t.csv").read_text().count("\n") == 2


def test_demo(monkeypatch, capsys):
    assert main(["demo", "--training=10", "--steps=3", "--output=d", "--threads=1"]) == 0
    assert {"report.html", "demo.png", "prior.safetensors"} <= {p.name for p in Path("d").iterdir()}
    assert "L2-TV" in capsys.readouterr().out


def test_help_is_for_newcomers(capsys):
    for words in (["--help"], ["train", "patch-nr", "--help"], ["reconstruct", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        assert "usage: patchflow" in capsys.readouterr().out
    assert main([]) == 2
