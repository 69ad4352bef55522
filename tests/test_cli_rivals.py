"""The other patch priors on the command line: trained, used, refused; and the automatic weight."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

import patchflow as pf
from patchflow.cli import main
from patchflow.errors import InputError
from patchflow.io.images import read_image, write_image
from patchflow.methods import METHODS, solver
from patchflow.numerics.patches import PatchSampler
from patchflow.papers import image_problems, image_tables
from patchflow.papers.comparison import Case, compare
from patchflow.papers.library import Library
from patchflow.papers.rivals import TEACHERS
from patchflow.priors import expectation_maximization
from patchflow.priors.multiscale import MultiscalePrior
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.operator import Identity
from patchflow.reconstruct import total_variation
from patchflow.records import Record, read_csv, write_csv

pytestmark = pytest.mark.usefixtures("as_users_do")
NOISE = 0.1


def waves(rows=48, columns=48, shift=0.0):
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    wave = 0.5 + 0.25 * torch.sin(0.5 * i + shift) + 0.2 * torch.cos(0.3 * j)
    return wave[None, None].float()


@pytest.fixture
def files(as_users_do):
    write_image("train.tif", waves())
    truth = waves(40, 44, 0.7)
    write_image("truth.tif", truth)
    torch.manual_seed(1)
    write_image("y.tif", truth + NOISE * torch.randn_like(truth))


def error(path):
    return float((read_image(path, slack=1) - read_image("truth.tif")).square().mean())


@pytest.mark.parametrize(
    ("train", "method", "weight"),
    [
        (["epll", "--components=5", "--size=4"], "epll", 1.0),
        (["epll", "--components=5", "--size=4", "--remove-mean=true"], "epll", 1.0),
        (["wpp", "--count=300", "--size=4"], "wpp", 300.0),
        (["wpp", "--count=300", "--size=4", "--epsilon=0.001", "--scales=1"], "wpp", 300.0),
        (["local-ar", "--steps=300", "--lr=0.001"], "local-ar", 100.0),
    ],
)
def test_train_and_reconstruct(files, train, method, weight, capsys):
    assert main(["train", train[0], "train.tif", *train[1:], "-o", "m.safetensors"]) == 0
    assert yaml.safe_load(Path("m.yaml").read_text())["command"] == f"train {train[0]}"
    run = ["reconstruct", "y.tif", "--problem=denoising", f"--noise={NOISE}", f"--method={method}"]
    run += ["--prior=m.safetensors", f"--weight={weight}", "--truth=truth.tif"]
    assert main([*run, "--report=page", "-o", "x.tif"]) == 0
    assert error("x.tif") < 0.6 * error("y.tif")
    assert f"{method}, weight {weight:g}" in capsys.readouterr().out
    page = Path("page/report.html").read_text()
    assert ("patch negative log-likelihood" in page) == (method != "wpp")
    assert ("components" in page) == (method == "epll")
    assert main(["info", "m.safetensors"]) == 0


def test_a_smoothed_patchnr_is_trained_and_has_its_own_weight(files, capsys):
    run = ["train", "patch-nr", "train.tif", "--size=4", "--layers=3", "--hidden=32"]
    assert main([*run, "--steps=120", f"--smoothing={NOISE}", "-o", "m.safetensors"]) == 0
    assert pf.load("m.safetensors", pf.PatchPrior).smoothing == NOISE
    run = ["reconstruct", "y.tif", "--problem=denoising", f"--noise={NOISE}"]
    assert main([*run, "--prior=m.safetensors", "--steps=30", "-o", "x.tif"]) == 0
    assert "patchnr, weight 0.2, 30 steps" in capsys.readouterr().out
    assert error("x.tif") < 0.6 * error("y.tif")


@pytest.mark.parametrize("method", ["tv", "tgv", "tikhonov"])
def test_methods_without_training(files, method):
    run = ["reconstruct", "y.tif", "--problem=denoising", f"--noise={NOISE}", f"--method={method}"]
    assert main([*run, "-o", "x.tif"]) == 0
    assert error("x.tif") < 0.6 * error("y.tif")


def test_the_original_critic_is_learned_and_the_problem_counts(files):
    run = ["train", "local-ar", "train.tif", "--steps=2"]
    assert main([*run, "--form=original", "-o", "a.safetensors"]) == 0
    assert main([*run, "--problem=denoising", "--noise=0.2", "-o", "b.safetensors"]) == 0
    assert pf.load("a.safetensors", pf.PatchPrior).size == 13
    assert pf.load("b.safetensors", pf.PatchPrior).size == 6


def test_the_automatic_weight_is_told_and_good(files, capsys):
    run = ["reconstruct", "y.tif", "--problem=denoising", f"--noise={NOISE}", "--method=tv"]
    assert main([*run, "--weight=auto", "--truth=truth.tif", "-o", "auto.tif"]) == 0
    told = capsys.readouterr().out
    chosen = float(re.findall(r"Weight ([\d.]+) by Stein", told)[0])
    assert "discrepancy principle" in told
    assert told.count("estimated risk") >= 7
    errors = {}
    for factor in (0.25, 0.5, 1, 2, 4):
        assert main([*run, f"--weight={factor * chosen}", "-o", "x.tif"]) == 0
        errors[factor] = error("x.tif")
    assert errors[1] < 1.05 * min(errors.values())
    assert errors[1] < 0.8 * max(errors[0.25], errors[4])


def replace_tv(monkeypatch, solve):
    changed = METHODS["tv"]._replace(solve=solver(solve))
    monkeypatch.setitem(METHODS, "tv", changed)


def test_a_solver_that_stops_too_early_is_told(files, capsys, monkeypatch):
    run = ["reconstruct", "y.tif", "--problem=denoising", f"--noise={NOISE}", "--method=tv"]
    said = "Not converged: the solver stopped at its limit of 4 steps."
    assert main([*run, "-o", "x.tif"]) == 0
    assert "Not converged" not in capsys.readouterr().out
    replace_tv(monkeypatch, partial(total_variation.reconstruct, max_iterations=4))
    assert main([*run, "-o", "x.tif", "--report=page"]) == 0
    assert said in capsys.readouterr().out
    assert said in Path("page/report.html").read_text()
    # A number of steps that was chosen beforehand is no fault.
    model = "m.safetensors"
    assert main(["train", "epll", "train.tif", "--components=3", "--size=4", "-o", model]) == 0
    assert main([*run[:-1], "--method=epll", f"--prior={model}", "-o", "x.tif"]) == 0
    assert "Not converged" not in capsys.readouterr().out


def refused(capsys, arguments, message):
    capsys.readouterr()
    assert main(arguments) == 2
    line = capsys.readouterr().err.strip()
    assert message in line
    assert "\n" not in line


def test_mistakes_are_refused_in_one_sentence(files, capsys):
    run = ["reconstruct", "y.tif", "--problem=denoising"]
    refused(capsys, [*run, "--method=epll"], "train one with patchflow train epll")
    refused(capsys, [*run, "--method=wpp"], "train one with patchflow train wpp")
    refused(capsys, [*run, "--method=fbp"], "fbp is for --problem ct")
    refused(
        capsys, [*run, "--method=tv", "--steps=5"], "--steps 5 says nothing about the method tv"
    )
    refused(capsys, [*run, "--method=tv", "--preset=paper"], "local-ar, wpp, dip-tv, not of tv")
    refused(capsys, [*run, "--method=tv", "--weight=best"], "must be a number or auto")
    ct = [*run, "--problem=ct", "--method=tv"]
    refused(capsys, [*ct, "--weight=best"], "'best' but must be a number or auto")
    refused(capsys, [*run, "--problem=ct", "--method=bm3d"], "bm3d is not made for ct")
    assert main(["train", "wpp", "train.tif", "--count=9", "-o", "wpp.safetensors"]) == 0
    assert isinstance(pf.load("wpp.safetensors", MultiscalePrior), MultiscalePrior)
    refused(capsys, [*run, "--method=epll", "--prior=wpp.safetensors"], "not take a model of wpp")
    refused(capsys, [*run, "--prior=wpp.safetensors"], "not take a model of wpp")
    refused(capsys, ["train", "epll", "train.tif", "--components=9999"], "cannot place")
    refused(capsys, ["train", "local-ar", "train.tif", "--problem=ct"], "leave --problem out")
    refused(capsys, ["train", "wpp", "train.tif", "--scales=9"], "smaller than a patch")
    refused(capsys, ["train", "epll", "train.tif", "--count=-5"], "patches is -5 but")
    critic = ["train", "local-ar", "train.tif"]
    refused(capsys, [*critic, "--kernel=nowhere.npy"], "nowhere.npy says nothing without --problem")
    refused(capsys, [*critic, "--seconds=0"], "time limit is 0")
    refused(
        capsys, [*run, "--method=tv", "--prior=nowhere"], "nowhere says nothing about the method tv"
    )


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder as that of the data, with small pictures of waves."""
    folder = tmp_path / "data"
    (folder / "material" / "test").mkdir(parents=True)
    for name in ("learn", "val"):
        write_image(folder / "material" / f"img_{name}_material.png", waves(96, 96))
    write_image(folder / "material" / "test" / "img1.png", waves(96, 96, 1.0))
    monkeypatch.setattr(image_tables, "LPIPS", lambda *files: lambda x, y: torch.ones(len(x)))
    return folder


def test_a_table_of_two_kinds_of_problems(data, capsys):
    run = ["benchmark", "denoising", f"--data={data}", "--images=1", "--threads=1"]
    run += ["--methods=[bicubic,tv,wpp]", "--models=kept", "--json=t.json", "--csv=t.csv"]
    assert main([*run, "--figure=t.png"]) == 0
    rows = {row["method"]: row for row in json.loads(Path("t.json").read_text())["rows"]}
    assert set(rows) == {
        f"{method}, sigma {std}" for method in ("bicubic", "tv", "wpp") for std in (0.05, 0.1)
    }
    # The start is the measurement, whose error is the noise.
    assert abs(rows["bicubic, sigma 0.1"]["mean"]["psnr"] - 20) < 0.5
    assert rows["tv, sigma 0.1"]["mean"]["psnr"] > 25
    assert {path.name for path in Path().glob("t-*.png")} == {"t-sigma-0-05.png", "t-sigma-0-1.png"}
    assert Path("kept/wpp-material.safetensors").exists()
    before = Path("kept/wpp-material.safetensors").read_bytes()
    assert main([*run, "--methods=[wpp]"]) == 0
    assert Path("kept/wpp-material.safetensors").read_bytes() == before
    refused(capsys, [*run, "--methods=[nlm]"], "There is no 'nlm'")


def test_a_table_goes_on_where_it_was_interrupted(data, capsys, monkeypatch):
    run = ["benchmark", "denoising", f"--data={data}", "--images=1", "--threads=1"]
    run += ["--csv=t.csv", "--json=t.json"]
    refused(capsys, [*run[:-2], "--resume"], "--resume needs --csv")
    solve = total_variation.reconstruct

    def interrupted(likelihood, *arguments, **options):
        if likelihood.std == 0.1:
            raise InputError("Enough.")
        return solve(likelihood, *arguments, **options)

    with monkeypatch.context() as patch:
        replace_tv(patch, interrupted)
        refused(capsys, [*run[:-2], "--methods=[nlm]"], "no 'nlm'")
        assert main([*run, "--methods=[bicubic,tv]"]) == 2
    kept = read_csv("t.csv")
    assert [record.method for record in kept] == [
        "bicubic, sigma 0.05",
        "bicubic, sigma 0.1",
        "tv, sigma 0.05",
    ]
    write_csv("t.csv", [replace(kept[0], values=dict(kept[0].values) | {"psnr": 12.5}), *kept[1:]])
    assert main([*run, "--methods=[tikhonov,tv]", "--resume", "--figure=t.png"]) == 0
    assert Path("t-sigma-0-05.png").read_bytes() != Path("t-sigma-0-1.png").read_bytes()
    rows = {row["method"]: row for row in json.loads(Path("t.json").read_text())["rows"]}
    assert len(rows) == 6
    assert rows["bicubic, sigma 0.05"]["mean"]["psnr"] == 12.5
    assert rows["tv, sigma 0.05"]["mean"] == dict(kept[2].values)
    assert rows["tv, sigma 0.1"]["mean"]["psnr"] > 25
    assert rows["tv, sigma 0.1"]["peak_mib"] > 10
    assert len(read_csv("t.csv")) == 6
    Path("t.csv").write_text("method;image\n")
    refused(capsys, [*run, "--resume", "true"], "t.csv is not a table of records")


def test_what_a_method_cannot_solve_is_left_out(data):
    write_image(data / "material" / "test" / "img1.png", waves(230, 230, 1.0))  # the hole is inside
    run = [
        "benchmark",
        "inpainting",
        f"--data={data}",
        "--images=1",
        "--threads=1",
        "--json=t.json",
    ]
    assert main([*run, "--methods=[bicubic,tikhonov]"]) == 0
    table = json.loads(Path("t.json").read_text())
    assert [row["method"] for row in table["rows"]] == ["bicubic, hole", "bicubic, 80 % missing"]


def test_pictures_are_of_the_first_image_also_after_a_resume():
    likelihood = GaussianLikelihood(Identity((1, 1)), 0.1)
    cases = [Case(name, "", torch.zeros(1), likelihood, torch.zeros(1)) for name in "abc"]

    def run(before):
        solvers = {"m": lambda case: torch.full((1,), float(ord(case.image)))}
        return compare(cases, solvers, lambda case, x: {"psnr": 1.0}, before=before)

    assert run([]).pictures["m", ""] == ord("a")
    assert run([Record("m", "a", {"psnr": 2.0})]).pictures == {}


def test_half_a_training_is_not_kept(tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(PatchSampler, "__call__", interrupted)
    monkeypatch.setattr(
        expectation_maximization.Whitening, "maximise", lambda *arguments: interrupted(None)
    )
    library = Library(tmp_path, 5.0, 0, TEACHERS)
    for method in ("patchnr", "local-ar", "epll"):
        with pytest.raises(KeyboardInterrupt):
            library.prior(method, "m", lambda: ([waves(96, 96)], [waves(96, 96)]))
    assert list(tmp_path.iterdir()) == []


def test_a_library_reads_the_models_of_its_methods_only(tmp_path):
    pf.save(tmp_path / "patchnr-m.safetensors", pf.epll(size=3, components=2))
    with pytest.raises(InputError, match="patchnr does not take a model of epll"):
        Library(tmp_path, 5.0, 0, TEACHERS).prior("patchnr", "m", lambda: ([], []))
    with pytest.raises(InputError, match="no folder"):
        Library(tmp_path / "missing", 5.0, 0, TEACHERS)


def test_measurements_are_those_of_the_problem(data):
    path = data / "material" / "test" / "img1.png"
    (small,) = image_problems.PROBLEMS["patchnr-superresolution"]
    assert small.case(data, path, 0).y.shape == (1, 1, 24, 24)
    first, again = (small.case(data, path, seed).y for seed in (0, 0))
    assert torch.equal(first, again)
    assert not torch.equal(first, small.case(data, path, 1).y)
    mask = image_problems.PROBLEMS["inpainting"][1]
    case = mask.case(data, path, 0)
    noise = (case.y - case.likelihood.operator(case.truth)) / 0.01
    # The noise is standard normal where pixels are hidden: the mask was not drawn from the same numbers.
    hidden = noise[0, 0][~case.likelihood.operator.mask]
    assert abs(float(hidden.square().mean()) - 1) < 5 * (2 / hidden.numel()) ** 0.5


def test_a_table_with_intervals_of_the_validation_image(data, capsys):
    run = ["benchmark", "denoising", f"--data={data}", "--images=1", "--threads=1"]
    run += ["--csv=t.csv", "--json=t.json", "--intervals"]
    assert main([*run, "--methods=[bicubic,tv]"]) == 0
    said = capsys.readouterr().out
    assert "interval width" in said
    assert "90% intervals of that image" in said
    columns = next(line for line in said.splitlines() if line.startswith("bicubic, sigma 0.1"))
    assert not any("*" in cell for cell in columns.split()[-4:])  # nothing is best by its intervals
    records = {record.method: record.values for record in read_csv("t.csv")}
    for std in (0.05, 0.1):
        figures = records[f"bicubic, sigma {std}"]
        # The start is the measurement: its errors are the noise, whose 90 % interval is 3.29 standard deviations wide.
        assert abs(figures["interval_width"] / std - 3.2897) < 5 * 2.1 * 3.2897 / (2 * 96**2) ** 0.5
        # On either side a share of 9,216 pixels, of the validation and of the test image.
        assert abs(figures["coverage"] - 0.9) < 5 * (2 * 0.9 * 0.1 / 96**2) ** 0.5
    tv = records["tv, sigma 0.1"]
    assert tv["interval_width"] < 0.6 * records["bicubic, sigma 0.1"]["interval_width"]
    assert json.loads(Path("t.json").read_text())["rows"][0]["mean"]["coverage"] > 0.8
    # A resumed table keeps its figures, and has its columns.
    assert main([*run, "--methods=[bicubic,tikhonov]", "--resume"]) == 0
    again = {record.method: record.values for record in read_csv("t.csv")}
    assert again["tv, sigma 0.1"] == tv
    assert 0 < again["tikhonov, sigma 0.1"]["coverage"] < 1
    resumed = [word for word in run if word != "--intervals"] + ["--resume"]
    refused(capsys, [*resumed, "--methods=[tv]"], "have the columns of --intervals")
    write_csv("t.csv", [Record("tv, sigma 0.1", "img1", {"psnr": 20.0})])
    refused(capsys, [*run, "--methods=[tv]", "--resume"], "lack the columns of --intervals")
    refused(capsys, ["benchmark", "snf-mixture", "--intervals"], "not for snf-mixture")
    write_image(data / "material" / "img_val_material.png", waves(40, 40))
    refused(capsys, [*run, "--methods=[bicubic]"], "at least 2000 are needed")


def test_intervals_are_judged_where_the_figures_are_taken(data):
    """Over the whole image the hole would not be seen: 3 % of the pixels, a filling that is wrong by more."""
    for name in ("img_val_material.png", "test/img1.png"):
        shift = 0.0 if "val" in name else 1.0
        torch.manual_seed(int(shift))
        rough = waves(230, 230, shift) + 0.1 * torch.randn(1, 1, 230, 230)
        write_image(data / "material" / name, rough.clamp(0, 1))
    run = ["benchmark", "inpainting", f"--data={data}", "--images=1", "--threads=1"]
    assert main([*run, "--methods=[bicubic]", "--csv=t.csv", "--intervals"]) == 0
    records = {record.method: record.values for record in read_csv("t.csv")}
    hole, scattered = (records[f"bicubic, {kind}"] for kind in ("hole", "80 % missing"))
    assert hole["coverage"] < 0.85
    assert abs(scattered["coverage"] - 0.9) < 0.05


def test_noise_in_the_image_is_told(files, capsys):
    run = ["reconstruct", "y.tif", "--problem=denoising", f"--noise={NOISE}", "--method=tv"]
    assert main([*run, "--weight=0.01", "-o", "x.tif"]) == 0
    assert "of the noise, so that noise is in the image: raise --weight" in capsys.readouterr().out
    assert main([*run, "-o", "x.tif"]) == 0
    assert "noise is in the image" not in capsys.readouterr().out
    assert main([*run, "--weight=1e4", "-o", "x.tif"]) == 0
    assert "times the noise, so that the image does not explain" in capsys.readouterr().out
    # Where nothing was measured there is no residual, whatever the file holds there.
    y = read_image("y.tif", slack=1.0)
    mask = torch.ones_like(y)
    mask[:, :, 5:15, 5:15] = 0
    write_image("m.png", mask)
    write_image("holed.tif", torch.where(mask > 0, y, 1.0))
    run = ["reconstruct", "holed.tif", "--problem=inpainting", "--mask=m.png", *run[3:]]
    assert main([*run, "-o", "x.tif"]) == 0
    assert "times the noise" not in capsys.readouterr().out


def test_a_training_that_was_hardly_validated_is_told(files, capsys):
    run = ["train", "patch-nr", "train.tif", "--size=4", "--layers=1", "--hidden=8"]
    assert main([*run, "--seconds=0.2", "-o", "m.safetensors"]) == 0
    assert "give it more --seconds than 0.2" in capsys.readouterr().out
