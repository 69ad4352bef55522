"""Posterior sampling on the command line: train, sample and calibrate on an oscillation, and every refusal."""

import json
import math
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from patchflow.cli import calibration, main
from patchflow.cli.posterior_problem import read_values
from patchflow.errors import InputError
from patchflow.io.checkpoint import ModelHeader, read_header, save_model
from patchflow.io.posterior import read_posterior
from patchflow.priors.uniform import Uniform
from patchflow.uncertainty.evidence import sample_posterior

EXAMPLE = Path(__file__).parents[1] / "examples" / "oscillation.py"
TINY = ["--layers=2", "--hidden=16", "--batch=256", "--threads=1"]
TRAIN = ["train", "conditional-snf", "--problem=oscillation.py"]
SAMPLE = ["sample", "y.csv", "--problem=oscillation.py", "--model=snf.safetensors", "--threads=1"]
CALIBRATE = ["calibrate", "--problem=oscillation.py", "--model=snf.safetensors", "--threads=1"]
HEAD = """
import numpy as np
import torch
import patchflow as pf
from patchflow.priors.uniform import Uniform
from patchflow.problems.external import NumpyModel
prior = Uniform(torch.tensor([0.2, 0.0]), torch.tensor([1.0, 1.0]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The problem, a measurement, and a small model, trained once."""
    path = tmp_path_factory.mktemp("posterior")
    (path / "oscillation.py").write_text(EXAMPLE.read_text())
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert main([*TRAIN, "--output=snf.safetensors", "--steps=150", *TINY]) == 0
    torch.set_default_dtype(before)
    t = np.linspace(0.25, 3, 12)
    y = np.exp(-0.4 * t) * np.cos(2 * np.pi * 0.6 * t) + 0.1 * np.sin(40 * t)
    (path / "y.csv").write_text("\n".join(map(str, y)) + "\n")
    (path / "x.csv").write_text("damping,frequency\n0.4,0.6\n")
    return path


@pytest.fixture(autouse=True)
def as_users_do(as_users_do, folder, tmp_path):
    """Single precision and a fresh copy of the folder, as outside of the tests."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())


def refused(capsys, arguments, message, code=2):
    """One line, no traceback, no new file."""
    files = {path: path.stat().st_mtime_ns for path in Path().iterdir()}
    capsys.readouterr()
    assert main(arguments) == code
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert "Traceback" not in error
    found = {path: path.stat().st_mtime_ns for path in Path().iterdir()}
    # Problem files leave their byte code.
    found.pop(Path("__pycache__"), None)
    files.pop(Path("__pycache__"), None)
    assert found == files


def exact_mean():
    """The posterior mean by quadrature."""
    y, _ = read_values("y.csv", "measurement")
    t = torch.linspace(0.25, 3, 12, dtype=torch.float64)
    f, d = torch.meshgrid(
        torch.linspace(0.2, 1, 801, dtype=torch.float64),
        torch.linspace(0, 1, 501, dtype=torch.float64),
        indexing="ij",
    )
    a = torch.exp(-d[..., None] * t) * torch.cos(2 * math.pi * f[..., None] * t)
    weight = (-50 * (a - y.double()).square().sum(-1)).flatten().softmax(0)
    return torch.stack([(weight * f.flatten()).sum(), (weight * d.flatten()).sum()])


def test_round_trip_in_every_format(capsys):
    header = read_header("snf.safetensors")
    assert header.training["names"] == ["frequency", "damping"]
    assert 0.2 < header.training["acceptance"][0] <= 1
    assert main(["info", "snf.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "conditional_snf" in said
    assert "sha256): \n" not in said

    assert main([*SAMPLE, "-n", "4000", "-o", "p.nc", "--truth=x.csv"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "frequency" in said.out
    assert "independence" in said.out
    posterior = read_posterior("p.nc")
    assert posterior.names == ("frequency", "damping")
    assert posterior.samples.shape == (4000, 2)
    assert posterior.samples.dtype == torch.float32
    assert torch.equal(posterior.observation, read_values("y.csv", "measurement")[0])
    assert posterior.settings["count"] == 4000
    assert "patchflow sample y.csv" in posterior.settings["command"]
    mean = posterior.samples.double().mean(0)
    error = posterior.samples.double().std(0) / min(4000, posterior.ess) ** 0.5
    assert ((mean - exact_mean()).abs() < 5 * error).all()
    assert "Posterior of y.csv" in Path("p.html").read_text()
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load(Path("p.yaml").read_text())["command"] == "sample"

    np.save("y.npy", np.loadtxt("y.csv")[:, None])
    run = ["sample", "y.npy", *SAMPLE[2:], "--count=500"]
    report = ["--report=page/report.html"]
    Path("page").mkdir()
    assert main([*run, "--correct=none", "-o", "p.csv", *report]) == 0
    weighted = read_posterior("p.csv")
    assert weighted.samples.shape == (500, 2)
    assert weighted.log_weights.std() > 0
    assert {path.name for path in Path("page").iterdir()} == {"report.html", "report.png"}
    run += ["--correct=metropolis", "--effort=3", "--report=new"]
    assert main([*run, "--output=p.npy"]) == 0
    assert np.load("p.npy").shape == (500, 2)
    assert np.load("p.weights.npy").sum() == pytest.approx(1)
    assert {path.name for path in Path("new").iterdir()} == {"p.html", "p.png"}


def test_without_a_model(capsys):
    run = ["sample", "y.csv", "--problem=oscillation.py", "--count=2000", "--truth=x.csv"]
    assert main([*run, "-o", "a.nc"]) == 0
    assert "difference walk" in capsys.readouterr().out
    posterior = read_posterior("a.nc")
    mean = posterior.samples.double().mean(0)
    error = posterior.samples.double().std(0) / min(2000, posterior.ess) ** 0.5
    assert ((mean - exact_mean()).abs() < 5 * error).all()
    assert "Annealed from the prior" in Path("a.html").read_text()
    for path in ("a.nc", "a.html", "a.png", "a.yaml"):
        Path(path).unlink()


def test_seed_and_configuration_repeat_a_run():
    def samples(path):
        return read_posterior(path).samples

    run = [*SAMPLE, "--count=100"]
    assert main([*run, "-o", "a.csv"]) == 0
    assert main([*run, "-o", "b.csv"]) == 0
    assert main([*run, "-o", "c.csv", "--seed=1"]) == 0
    assert main(["sample", "--config=a.yaml", "-o", "d.csv"]) == 0
    assert Path("a.csv").read_text() == Path("b.csv").read_text() == Path("d.csv").read_text()
    assert not torch.equal(samples("a.csv"), samples("c.csv"))
    assert main([*TRAIN, "--steps=20", *TINY, "-o", "s.safetensors"]) == 0
    again = ["train", "conditional-snf", "--config=s.yaml", "-o", "t.safetensors"]
    assert main(again) == 0
    s, t = load_file("s.safetensors"), load_file("t.safetensors")
    assert all(torch.equal(s[key], t[key]) for key in s)


def test_calibrate(capsys, monkeypatch):
    flags = ["--datasets=40", "--draws=50"]
    assert main([*CALIBRATE, *flags, "-o", "c"]) == 0
    said = capsys.readouterr().out
    assert "none of 7 tests on 40 measurements rejects" in said
    names = {"calibration.png", "calibration.json", "calibration.yaml", "ranks.csv"}
    assert {path.name for path in Path("c").iterdir()} == names
    document = json.loads(Path("c/calibration.json").read_text())
    frequency, damping = document["parameters"]
    assert frequency["name"] == "frequency"
    assert 0 < frequency["narrowing"] < damping["narrowing"] < 0.8
    ranks = np.loadtxt("c/ranks.csv", delimiter=",", skiprows=1)
    assert ranks.shape == (40, 2)
    assert ranks.max() <= 50
    assert main(["calibrate", "--config=c/calibration.yaml", "-o", "d"]) == 0
    assert Path("c/ranks.csv").read_bytes() == Path("d/ranks.csv").read_bytes()
    monkeypatch.setattr(calibration, "sample_posterior", partial(sample_posterior, effort=2))
    few = ["--datasets=20", "--draws=30", "--correct=metropolis"]
    assert main([*CALIBRATE, *few, "-o", "e"]) == 0
    assert np.loadtxt("e/ranks.csv", delimiter=",", skiprows=1).max() <= 30


def test_calibrate_finds_what_is_wrong(capsys):
    """The same model and another simulator: with the noise too low, the samples are too wide, and so on."""
    text = EXAMPLE.read_text()
    assert main([*TRAIN, "--steps=150", *TINY, "--mcmc=none", "-o", "snf.safetensors"]) == 0
    for old, new, verdict in [
        ("GaussianNoise(0.1)", "GaussianNoise(0.01)", "frequency is underconfident"),
        ("GaussianNoise(0.1)", "GaussianNoise(0.4)", "overconfident"),
        (
            "-damping * times",
            "-(damping + 0.4) * times",
            "damping is biased (its draws are too high)",
        ),
    ]:
        assert old in text
        Path("oscillation.py").write_text(text.replace(old, new))
        capsys.readouterr()
        assert main([*CALIBRATE, "--datasets=200", "--draws=49"]) == 0
        said = capsys.readouterr()
        assert "Not calibrated: " in said.out
        assert verdict in said.out
        assert "train longer" in said.out
        assert "is not the file that snf.safetensors was learned with" in said.err


def test_numpy_model(capsys):
    Path("own_simulator.py").write_text(
        "import numpy as np\n"
        "def run(x):\n"
        "    t = np.linspace(0.25, 3, 12)\n"
        "    return np.exp(-x[:, 1:] * t) * np.cos(2 * np.pi * x[:, :1] * t)\n"
    )
    # A problem file may import from its folder; without names there are x1, x2.
    Path("oscillation.py").write_text(
        f"{HEAD}from own_simulator import run\n"
        "likelihood = pf.Likelihood(NumpyModel(run), pf.GaussianNoise(0.1))\n"
    )
    flags = [*TINY, "--steps=40", "--simulations=1000", "--mcmc=mh", "--mcmc_steps=1", "--layers=1"]
    assert main([*TRAIN, *flags, "-o", "snf.safetensors"]) == 0
    assert main([*SAMPLE, "--count=300", "-o", "p.csv"]) == 0
    assert Path("p.csv").read_text().startswith("x1,x2,log_weight\n")
    refused(capsys, [*TRAIN, "--mcmc=mala", "-o", "m.safetensors"], "needs the gradient")
    Path("oscillation.py").write_text(
        f"{HEAD}likelihood = pf.Likelihood(lambda x: x.numpy(), pf.GaussianNoise(0.1))\n"
    )
    refused(capsys, [*TRAIN, "-o", "m.safetensors"], "wrap a NumPy function in patchflow")


@pytest.mark.parametrize(
    "flags",
    [
        ["--mcmc=mala", "--mcmc_steps=1", "--layers=1"],
        ["--mcmc=none", "--couplings=affine"],
        ["--components=3", "--seconds=0.5", "--lr=1e-3"],
    ],
)
def test_other_flows(flags):
    assert main([*TRAIN, *TINY, "--steps=20", *flags, "-o", "m.safetensors"]) == 0
    run = [*SAMPLE, "--model=m.safetensors", "--count=100", "-o", "p.csv"]
    assert main(run) == 0


def test_interrupted_training_keeps_the_best_and_resumes(monkeypatch, capsys):
    run = [*TRAIN, "--steps=60", *TINY]
    assert main([*run, "-o", "whole.safetensors"]) == 0
    draw, calls = Uniform.sample, []

    def interrupt(self, count, condition=None):
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return draw(self, count, condition)

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(Uniform, "sample", interrupt)
        assert main([*run, "-o", "part.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "Interrupted; part.state.safetensors holds the state" in said
    assert read_header("part.safetensors").training["stopped"] == "interrupted"
    assert main(shlex.split(said.split("Continue with: ")[1].strip())[1:]) == 0
    whole, part = load_file("whole.safetensors"), load_file("part.safetensors")
    assert all(torch.equal(whole[key], part[key]) for key in whole)
    assert not Path("part.state.safetensors").exists()


def test_warnings_leave_the_exit_code(capsys):
    """A measurement that the prior cannot explain."""
    Path("y.csv").write_text(",".join(["9"] * 12))
    assert main([*SAMPLE, "--count=200", "-o", "p.csv"]) == 0
    said = capsys.readouterr().err
    assert "patchflow: warning: Value 1 of y.csv (9) is far from all simulated" in said
    assert "far from all simulated" in Path("p.html").read_text()


def test_double_precision_of_the_problem_file():
    text = EXAMPLE.read_text().replace(
        "import torch", "import torch\ntorch.set_default_dtype(torch.float64)", 1
    )
    Path("oscillation.py").write_text(text)
    assert main([*TRAIN, "--steps=20", *TINY, "-o", "snf.safetensors"]) == 0
    torch.set_default_dtype(torch.float32)
    assert main([*SAMPLE, "--count=100", "-o", "p.nc"]) == 0
    assert read_posterior("p.nc").samples.dtype == torch.float64


def test_one_parameter():
    Path("oscillation.py").write_text(
        f"{HEAD}prior = Uniform(-1, 1, dim=1)\n"
        "likelihood = pf.Likelihood(lambda x: x.repeat(1, 12), pf.GaussianNoise(0.3))\n"
    )
    assert main([*TRAIN, "--steps=20", *TINY, "-o", "snf.safetensors"]) == 0
    assert main([*SAMPLE, "--count=100", "-o", "p.csv"]) == 0
    assert main([*CALIBRATE, "--datasets=20", "--draws=20"]) == 0


def test_bad_problem_files(capsys):
    run = [*TRAIN, "-o", "m.safetensors"]
    refused(capsys, [*run, "--problem=none.py"], "no problem file none.py")
    refused(capsys, [*run, "--problem=y.csv"], "not a Python file")
    refused(capsys, run[:2], "--problem is required; see --help.")
    cube = "likelihood = pf.Likelihood(lambda x: {}, pf.GaussianNoise(0.1))\n"
    sound = cube.format("x.repeat(1, 6)")
    for text, message in [
        ("1 / 0", "failed in line 1 (ZeroDivisionError"),
        ("import patchflow as pf\n" + sound, "defines no prior"),
        (HEAD + sound + "prior = 3\n", "defines no prior"),
        (HEAD, "defines no likelihood"),
        (HEAD + cube.format("x[:, 0] / 0"), "returns the shape (64,) for 64 points"),
        (HEAD + cube.format("x[:1]"), "returns the shape (1, 2) for 64 points"),
        (HEAD + cube.format("x.double()"), "end it with .to(x)"),
        (HEAD + cube.format("(x - 0.5).log()"), "is not finite at "),
        (HEAD + cube.format("x @ x"), "failed in line 8 (RuntimeError"),
        (HEAD + sound + "names = 'ab'\n", "a list of strings is needed"),
        (HEAD + sound + "names = ['a']\n", "1 names do not fit 2 parameters"),
        (HEAD + sound + "names = ['a', 'draw']\n", "'draw' cannot name a parameter"),
    ]:
        Path("oscillation.py").write_text(text)
        refused(capsys, run, message)
    Path("oscillation.py").write_text(HEAD + cube.format("x.repeat(1, 5)"))
    refused(capsys, [*SAMPLE, "-o", "p.csv"], "has 10 measured values, but snf.safetensors was")
    refused(capsys, CALIBRATE, "has 10 measured values, but snf.safetensors was learned for 12")
    three = HEAD.replace("[1.0, 1.0]", "[1.0, 1.0, 1.0]").replace("[0.2, 0.0]", "[0.2, 0.0, 0]")
    Path("oscillation.py").write_text(three + cube.format("x.repeat(1, 4)"))
    refused(capsys, [*SAMPLE, "-o", "p.csv"], "has 3 parameters, but snf.safetensors was learned")


def test_bad_measurements(capsys):
    run = ["sample", "m.csv", *SAMPLE[2:], "-o", "p.csv"]
    refused(capsys, run, "no measurement file m.csv")
    refused(capsys, ["sample", *SAMPLE[2:]], "MEASUREMENT")
    row = ",".join(["0.5"] * 12)
    for text, message in [
        (row[4:], "has 11 values but snf.safetensors was learned for 12"),
        (row.replace("0.5", "nan", 1), "nan or infinite at value 1"),
        (row.replace("0.5", "1e300", 1), "nan or infinite at value 1"),
        (f"{row}\n{row}", "one row or one column; give one vector per file"),
        (f"{row}\n0.5,0.5", "has 2 entries in line 2"),
        (f"{row},NA", "has the entry 'NA' in line 1"),
        ("a,b,c\n", "is empty"),
        ("", "is empty"),
    ]:
        Path("m.csv").write_text(text)
        refused(capsys, run, message)
    Path("m.csv").write_bytes(b"\xff\xfe\x00")
    refused(capsys, run, "not a text file")
    Path("m.npy").write_text("text")
    refused(capsys, ["sample", "m.npy", *run[2:]], "not a NumPy file of real numbers")
    refused(capsys, ["sample", "snf.safetensors", *run[2:]], "give a .csv or .npy file")


def test_measurements_as_people_write_them():
    for text in (
        "a,b,c\n1,2,3\n",
        "value\n1\n2\n3\n\n",
        "# t\n1 2 3",
        "1;2;3",
        "\ufeff1\t2\t3\r\n",
    ):
        Path("v.csv").write_text(text, encoding="utf-8")
        values, titles = read_values("v.csv", "measurement")
        assert values.tolist() == [1, 2, 3]
        assert titles == (["a", "b", "c"] if "a" in text and "b" in text else [])
    np.save("v.npy", np.array([[1, 2, 3]]))
    assert read_values("v.npy", "measurement")[0].tolist() == [1, 2, 3]
    np.save("v.npy", np.array([1j]))
    with pytest.raises(InputError, match="real numbers"):
        read_values("v.npy", "measurement")


def test_bad_models(capsys):
    whole = Path("snf.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
    save_model("other.safetensors", {"a": torch.ones(1)}, ModelHeader("patch_nr"))
    save_model("thin.safetensors", {"a": torch.ones(1)}, read_header("snf.safetensors"))
    for name, message in [
        ("cut", "truncated"),
        ("other", "holds the model 'patch_nr'"),
        ("thin", "lacks the tensor"),
        ("none", "none.safetensors"),
    ]:
        flag = f"--model={name}.safetensors"
        refused(capsys, [*SAMPLE, flag, "-o", "p.csv"], message)
        refused(capsys, [*CALIBRATE, flag], message)


def test_bad_arguments(capsys):
    refused(capsys, [*SAMPLE, "-o", "p.txt"], ".txt")
    refused(capsys, [*SAMPLE, "-o", "no/p.csv"], "folder no")
    refused(capsys, [*SAMPLE, "-o", "y.csv"], "would overwrite y.csv")
    refused(capsys, [*SAMPLE, "-o", "p.csv", "-n", "0"], "--count is 0")
    refused(capsys, [*SAMPLE, "-o", "p.csv", "--effort=0"], "--effort is 0")
    refused(capsys, [*SAMPLE, "--correct=none", "--effort=5", "-o", "p.csv"], "needs a correction")
    refused(capsys, [*SAMPLE, "--correct=all", "-o", "p.csv"], "correct")
    refused(capsys, [*SAMPLE, "--threads=0", "-o", "p.csv"], "at least 1")
    refused(capsys, [*SAMPLE, "--report=no/r.html", "-o", "p.csv"], "folder no")
    refused(capsys, [*SAMPLE, "--report=y.csv", "-o", "p.csv"], "y.csv cannot be made")
    refused(capsys, [*SAMPLE, "--truth=y.csv", "-o", "p.csv"], "12 values but there are 2")
    Path("t.csv").write_text("amplitude,rate\n1,2\n")
    refused(capsys, [*SAMPLE, "--truth=t.csv", "-o", "p.csv"], "columns amplitude, rate but")
    without = ["sample", "y.csv", "--problem=oscillation.py", "-o", "p.csv"]
    refused(capsys, [*without, "--correct=none"], "give --model or leave them out")
    refused(capsys, [*without, "--count=3"], "at least 20")
    Path("y3.csv").write_text("1,2,3\n")
    refused(capsys, ["sample", "y3.csv", *without[2:]], "3 values but the forward model gives 12")
    refused(capsys, [*CALIBRATE, "--datasets=19"], "--datasets is 19 but must be at least 20")
    refused(capsys, [*CALIBRATE, "--draws=1"], "--draws is 1")
    refused(capsys, [*CALIBRATE, "-o", "y.csv"], "y.csv cannot be made")
    run = [*TRAIN, "-o", "m.safetensors"]
    refused(capsys, [*TRAIN, "-o", "m.pth"], ".pth")
    for flag in ("layers", "hidden", "batch", "steps", "mcmc_steps"):
        refused(capsys, [*run, f"--{flag}=0"], f"--{flag} is 0 but must be at least 1")
    refused(capsys, [*run, "--components=-1"], "--components is -1")
    refused(capsys, [*run, "--simulations=10"], "--simulations is 10 but must be at least 1000")
    refused(capsys, [*run, "--lr=0"], "--lr is 0")
    refused(capsys, [*run, "--seconds=-1"], "--seconds is -1")
    refused(capsys, [*run, "--resume=true"], "m.state.safetensors")


def test_a_failed_computation_exits_with_one(monkeypatch, capsys):
    """The forward model breaks down after its trial."""
    Path("oscillation.py").write_text(
        f"{EXAMPLE.read_text().partition('if __name__')[0]}\n"
        "sound = likelihood.operator\n"
        "likelihood.operator = lambda x: sound(x) if len(x) == 64 else sound(x) * float('nan')\n"
    )
    before = Path("snf.safetensors").read_bytes()
    run = [*TRAIN, "--steps=20", *TINY, "-o", "snf.safetensors"]
    refused(capsys, run, "simulated measurements are not finite")
    assert Path("snf.safetensors").read_bytes() == before
    capsys.readouterr()
    assert main([*SAMPLE, "--count=100", "-o", "p.csv"]) == 1
    assert "nan at " in capsys.readouterr().err
    assert not Path("p.csv").exists()
    assert main([*CALIBRATE, "--datasets=20"]) == 1
    assert "are not finite" in capsys.readouterr().err


def test_help(capsys):
    for words in (["train", "conditional-snf"], ["sample"], ["calibrate"]):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--help"])
        assert stop.value.code == 0
        assert "usage: patchflow" in capsys.readouterr().out
