"""The command line of computed tomography, from DICOM slices to DICOM slices, and every refusal."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dicom_slices import save_slice
from patchflow import models
from patchflow.cli import main, notes
from patchflow.io.checkpoint import read_header
from patchflow.io.dicom import read_series
from patchflow.io.images import read_stack, write_image
from patchflow.io.sinogram import Sinogram, read_sinogram, write_sinogram
from patchflow.metrics import psnr
from patchflow.papers import altekrueger2023_patchnr as paper
from patchflow.priors import differences
from patchflow.priors.patch import PatchPrior
from patchflow.problems.attenuation import MU_MAX, from_hounsfield, to_hounsfield
from patchflow.reconstruct.automatic_weight import Trial, WeightChoice
from patchflow.tomography_methods import TomographyMethod
from patchflow.uncertainty.novelty import novelty_record

pytest.importorskip("h5py")
pytest.importorskip("pydicom")
uid = pytest.importorskip("pydicom.uid")
pytestmark = pytest.mark.usefixtures("as_users_do")

SIZE, PIXEL = 32, 8.0  # mm
VIEW = SIZE * PIXEL / 1000
SERIES = uid.generate_uid()


def slices(count=2):
    """Discs of tissue with lungs and a bone, in integer HU, (count, 1, SIZE, SIZE)."""
    i, j = torch.meshgrid(torch.arange(SIZE) - 15.5, torch.arange(SIZE) - 15.5, indexing="ij")
    stack = []
    for k in range(count):
        hu = torch.full((SIZE, SIZE), -1000.0)
        hu[(i / 14).square() + (j / 15).square() < 1] = 40.0
        hu[(i / 8).square() + ((j - 6 - k) / 4).square() < 1] = -800.0
        hu[(i / 8).square() + ((j + 6) / 4).square() < 1] = -820.0
        hu[(i - 10).square() + j.square() < 6] = 600.0 + 20 * k
        stack.append(hu)
    return torch.stack(stack)[:, None]


@pytest.fixture
def series():
    """The folder of a series of two slices."""
    Path("slices").mkdir()
    for k, hu in enumerate(slices()):
        save_slice(Path(f"slices/{k}.dcm"), hu[0], k, SERIES, PIXEL)
    return "slices"


TINY = ["--size=4", "--layers=2", "--hidden=16", "--batch=64", "--threads=1", "--precision=float32"]
DOSE = ["--angles=30", "--photons=4096"]
MEASURED = ["y.h5", "--problem=ct", "--threads=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model, trained once, on a stack in Hounsfield units."""
    folder = tmp_path_factory.mktemp("model")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    write_image(folder / "slices.tif", slices())
    output = folder / "lung.safetensors"
    run = ["train", "patch-nr", str(folder / "slices.tif"), "--units=hu", f"--output={output}"]
    assert main([*run, "--steps=100", "--padding=2", *TINY]) == 0
    torch.set_default_dtype(before)
    return output.read_bytes()


@pytest.fixture
def model(trained):
    Path("lung.safetensors").write_bytes(trained)
    return "lung.safetensors"


@pytest.fixture
def sinogram(series, capsys):
    run = ["simulate", series, "--problem=ct", *DOSE, "--fine=96", "-o", "y.h5", "--seed=1"]
    assert main(run) == 0
    capsys.readouterr()
    return "y.h5"


def test_the_report_of_a_slice_shows_what_is_new(sinogram, model, capsys):
    prior = models.load(model, PatchPrior)
    record = novelty_record(prior, list(from_hounsfield(slices()).split(1)), rate=0.05)
    models.save("told.safetensors", prior, training=record)
    run = ["reconstruct", *MEASURED, *DOSE, "--method=fbp", "-o", "x.npy", "--report=page"]
    assert main([*run, "--novelty=told.safetensors"]) == 0
    page = Path("page/report.html").read_text()
    x = torch.from_numpy(np.load("x.npy")).float().view(-1, 1, SIZE, SIZE)[:1]
    energies = prior.nll_map(x)
    low, high = (record["novelty"][name] for name in ("low", "high"))
    above, below = (100 * float(part.float().mean()) for part in (energies > high, energies < low))
    assert f"{above:.2f} % of the pixels surprise the prior, {below:.2f} % are smoother" in page
    assert below > 5  # the filter smooths the edges
    assert Path("page/novelty.png").exists()
    capsys.readouterr()
    assert main(run) == 0
    assert "the method has no density of patches; --novelty MODEL" in capsys.readouterr().out


def refused(capsys, arguments, *messages):
    """Exit code 2, one line, no traceback, no new file."""
    files = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert all(message in error for message in messages), error
    assert "\n" not in error
    assert "Traceback" not in error
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == files


def quality(path, *, units="normalised"):
    truth = from_hounsfield(slices())
    values = torch.from_numpy(np.load(path)) if path.endswith(".npy") else None
    x = read_stack(path, value_range=(-4096, 8192), slack=1) * 12288 - 4096
    x = x if values is None else values
    if units == "hu":
        x = from_hounsfield(x)
    return float(psnr(x, truth[: len(x)], 0.5).mean())


def test_train_on_every_kind_of_slices(series, capsys):
    hu = slices()
    normalised = from_hounsfield(hu)
    write_image("hu.tif", hu)
    np.save("hu.npy", hu.to(torch.int16).repeat(3, 1, 1, 1).numpy()[:, 0])
    write_image("normalised.tif", normalised)
    h5py = pytest.importorskip("h5py")
    with h5py.File("stack.h5", "w") as file:
        file["data"] = normalised[:, 0].numpy()
    for images, flags, said in [
        (["slices/0.dcm", "slices/1.dcm"], [], "2 slice(s) from -1000 to 620 HU"),
        (["slices"], [], "Pixels of 8 x 8 mm"),
        (["hu.tif"], ["--units=hu"], "2 slice(s) from -1000 to 620 HU"),
        (["hu.npy"], ["--units=hu"], "6 slice(s)"),
        (["normalised.tif", "stack.h5"], ["--validation=normalised.tif"], ""),
        (["stack.h5"], ["--range=0:1"], ""),
    ]:
        assert main(["train", "patch-nr", *images, *flags, "--steps=2", *TINY]) == 0
        out = capsys.readouterr().out
        assert said in out
        assert ("HU" in out) == bool(said)
    assert read_header("prior.safetensors").arguments["padding"] == 0


def test_simulate(sinogram):
    y = read_sinogram(sinogram)
    assert y.data.shape == (2, 1, 30, 47)  # 2 * 23 + 1 bins for a diagonal of 45.3 pixels
    assert y.image_shape == (SIZE, SIZE)
    assert y.pixel_spacing == pytest.approx(PIXEL / 1000)
    assert y.detector_spacing == pytest.approx(math.sqrt(2) * VIEW / 47)
    assert (y.photons, y.attenuation_scale, y.offset) == (4096, MU_MAX, 0)
    assert torch.allclose(y.angles, (torch.arange(30, dtype=torch.float64) + 0.5) * math.pi / 30)
    # The middle bin at the angle 0 measures along row 15 and a half.
    rows = from_hounsfield(slices()[0, 0, 15:17]).mean(0)
    expected = float(rows.sum()) * PIXEL / 1000
    assert float(y.data[0, 0, 0, 23]) == pytest.approx(expected, rel=0.1)
    assert yaml.safe_load(Path("y.yaml").read_text())["images"] == ["slices"]
    assert main(["simulate", "--config=y.yaml", "--output=again.h5"]) == 0
    assert torch.equal(read_sinogram("again.h5").data, y.data)
    limited = ["--limited=18:162", "--fine=96", "--field-of-view=0.256", "-o", "part.h5"]
    assert main(["simulate", "slices/0.dcm", "--problem=ct", *DOSE, *limited]) == 0
    assert read_sinogram("part.h5").data.shape == (1, 1, 24, 47)


def test_reconstruct_by_every_method(sinogram, model, monkeypatch, capsys):
    write_image("truth.tif", from_hounsfield(slices()))
    flags = [*MEASURED, "--truth=truth.tif", *DOSE, f"--size={SIZE}", f"--field-of-view={VIEW}"]
    found = {}
    for method, extra in (
        ("fbp", []),
        ("tv", ["--steps=60"]),
        ("patchnr", [f"--prior={model}", "--steps=40"]),
    ):
        run = ["reconstruct", *flags, f"--method={method}", *extra, "-o", f"{method}.tif"]
        assert main(run) == 0
        out = capsys.readouterr().out
        assert "30 angles x 47 bins of 32 x 32 pixels" in out
        assert "180 of 180 degrees, 4096 photons" in out
        assert "range of the slice" in out
        found[method] = quality(f"{method}.tif")
    assert found["fbp"] > 15
    assert found["tv"] > found["fbp"] + 2
    assert found["patchnr"] > found["fbp"] + 2
    # The weight is that of the mean over all patches.
    assert f"patchNR, weight {0.38 * (362 / 32) ** 2:.4g}" in out
    assert "40 steps, from total variation" in out
    assert yaml.safe_load(Path("patchnr.yaml").read_text())["method"] == "patchnr"


def test_the_automatic_weight_is_told_and_good(sinogram, capsys):
    run = ["reconstruct", *MEASURED, "--method=tv", "--steps=60", "-o", "x.npy"]
    assert main([*run, "--weight=auto", "--report=page"]) == 0
    out = capsys.readouterr().out
    assert "weight to be chosen around 30, at most" in out
    assert out.count("estimated risk") >= 7
    (told,) = re.findall(r"Weight ([\d.]+) by Stein's risk estimate .of the sinogram.*", out)
    assert "a residual as large as the noise (discrepancy principle)" in out
    assert "chosen on the first slice" in out
    page = Path("page/report.html").read_text()
    assert f"Total variation, weight {told}, at most" in page
    assert f"Weight {told} by Stein" in page
    assert yaml.safe_load(Path("x.yaml").read_text())["weight"] == "auto"
    found = {1: quality("x.npy")}
    for factor in (0.25, 4):
        assert main([*run, f"--weight={factor * float(told)}"]) == 0
        found[factor] = quality("x.npy")
    # Within what is aimed at of either side, of which one is much worse.
    assert max(found.values()) - 0.15 < found[1] > min(found.values()) + 1


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("tv", []),
        ("tgv", []),
        ("dip-tv", []),
        ("patchnr", []),
        ("patchnr", ["--preset=paper"]),
        ("epll", []),
        ("local-ar", []),
        ("wpp", []),
    ],
)
def test_every_method_has_an_automatic_weight(sinogram, method, flags, monkeypatch, capsys):
    made = {
        "patchnr": models.patch_nr(size=4, layers=2, hidden=8, padding=2),
        "epll": models.epll(size=3, components=2),
        "local-ar": models.alr(),
        "wpp": models.wpp(size=4, count=20),
    }
    if method in made:
        models.save("m.safetensors", made[method])
        flags = [*flags, "--prior=m.safetensors"]
    run = ["reconstruct", *MEASURED, f"--method={method}", *flags, "--steps=2"]
    starts, given = [], []

    def choose(solve, likelihood, y, *, start, report):
        starts.append(start)
        given.append(y)
        trial = Trial(2 * start, 0.9, 0.5)
        report(trial)
        solve(y, start)
        return WeightChoice(2 * start, solve(y, 2 * start), 20 * start, [trial])

    begun, first = [], TomographyMethod.first

    def begin(self, task, options):
        begun.append(task.y)
        return first(self, task, options)

    monkeypatch.setattr(notes, "choose_weight", choose)
    with monkeypatch.context() as counting:
        counting.setattr(TomographyMethod, "first", begin)
        assert main([*run, "--weight=auto", "-o", "auto.npy"]) == 0
    # Once for each of the two slices, however many weights were tried.
    assert len(begun) == (2 if method in made and not flags[1:] else 0)
    out = capsys.readouterr().out
    assert "disagree by more than a factor of four: check --photons" in out
    assert len(starts) == 1
    assert given[0].shape == (1, 1, 30, 47)
    # The default, and the choice for both slices.
    assert main([*run, f"--weight={2 * starts[0]!r}", "-o", "given.npy"]) == 0
    assert f", weight {2 * starts[0]:.4g}," in capsys.readouterr().out
    if method != "dip-tv":  # whose networks were drawn
        assert np.array_equal(np.load("auto.npy"), np.load("given.npy"))
    assert main([*run, "-o", "x.npy"]) == 0
    assert f", weight {starts[0]:.4g}," in capsys.readouterr().out


def test_only_a_gap_that_stayed_open_is_told(sinogram, model, capsys):
    run = ["reconstruct", *MEASURED, "-o", "x.npy"]
    said = "Not converged in 2 of 2 slices: the solver stopped at its limit of 3 steps; --steps allows more."
    for method in ("tv", "tgv"):
        assert main([*run, f"--method={method}", "--steps=3", "--report=page"]) == 0
        assert said in capsys.readouterr().out
        assert said in Path("page/report.html").read_text()
    for flags in (["--method=tv"], ["--method=fbp"], ["--method=dip-tv", "--steps=3"]):
        assert main([*run, *flags]) == 0
        assert "Not converged" not in capsys.readouterr().out
    for flags in ([], ["--solver=lbfgs"], ["--preset=paper"]):
        assert main([*run, f"--prior={model}", "--steps=3", *flags]) == 0
        assert "Not converged" not in capsys.readouterr().out


def test_limited_angle(sinogram, model, capsys):
    common = [*MEASURED, "--limited=18:162", "--method=tv", "--steps=20"]
    assert main(["reconstruct", *common, "-o", "a.npy", "--units=hu"]) == 0
    out = capsys.readouterr().out
    assert "24 angles" in out
    assert "144 of 180 degrees" in out
    assert quality("a.npy", units="hu") > 15
    # A file that has only these angles.
    y = read_sinogram(sinogram)
    part = Sinogram(
        y.data[:, :, 3:27],
        y.angles[3:27],
        y.detector_spacing,
        y.pixel_spacing,
        y.image_shape,
        y.photons,
        y.attenuation_scale,
    )
    write_sinogram("y.h5", part)
    assert main(["reconstruct", *common, "-o", "b.npy"]) == 0
    a, b = torch.from_numpy(np.load("a.npy")), torch.from_numpy(np.load("b.npy"))
    assert torch.allclose(a, to_hounsfield(b), atol=0.01)
    # The flags that made it say the same, also where the file does not say its angles.
    assert main(["reconstruct", *common, "--angles=30", "-o", "b.npy"]) == 0
    write_sinogram("y.h5", dataclasses.replace(part, angles=None))
    assert main(["reconstruct", *common, "--angles=30", "-o", "d.npy"]) == 0
    assert np.array_equal(np.load("d.npy"), np.load("b.npy"))
    write_sinogram("y.h5", part)
    prior = f"--prior={model}"
    published = ["--preset=paper", "--steps=3", "-o", "c.npy", prior]
    assert main(["reconstruct", *MEASURED, *published]) == 0
    assert "patchNR as published" in capsys.readouterr().out
    assert (paper.CT_STEPS, paper.CT_LIMITED_STEPS) == (300, 3000)


def test_numpy_sinogram_as_in_lodopab(sinogram, capsys):
    y = read_sinogram(sinogram)
    np.save("y.npy", y.data[:, 0].numpy())
    geometry = [*DOSE, f"--size={SIZE}", f"--field-of-view={VIEW}"]
    run = ["--problem=ct", "--method=fbp", "--threads=1"]
    assert main(["reconstruct", "y.npy", *run, *geometry, "-o", "a.npy"]) == 0
    out = capsys.readouterr().out
    assert "midpoints of 30 equal parts" in out
    assert "detector is 0.362 m wide" in out
    assert "divided by 81.36/m" in out
    assert main(["reconstruct", "y.npy", *run, *geometry, "--limited=18:162", "-o", "a.npy"]) == 0
    assert "6 of the 30 measured angles are left out" in capsys.readouterr().out
    assert main(["reconstruct", "y.npy", *run, *geometry, "-o", "a.npy"]) == 0
    assert "left out" not in capsys.readouterr().out
    assert main(["reconstruct", "y.h5", *run, "-o", "b.npy"]) == 0
    assert np.allclose(np.load("a.npy"), np.load("b.npy"), atol=1e-5)
    # Line integrals without a unit, as other programs write them.
    write_sinogram("plain.h5", Sinogram(y.data * MU_MAX, y.angles, attenuation_scale=1.0))
    assert main(["reconstruct", "plain.h5", *run, *geometry, "-o", "c.npy"]) == 0
    assert np.allclose(np.load("c.npy"), np.load("b.npy"), atol=1e-5)
    for missing in ("--angles", "--photons", "--size", "--field-of-view"):
        left = [flag for flag in geometry if not flag.startswith(missing)]
        refused(capsys, ["reconstruct", "y.npy", *run, *left, "-o", "d.npy"], f"give {missing}")


def test_report_and_dicom_output(sinogram, model, series, monkeypatch, capsys):
    flags = [f"--prior={model}", "--steps=10", "--truth=slices", "--template=slices"]
    run = ["reconstruct", *MEASURED, *flags, "--report=page", "-o", "derived"]
    assert main(run) == 0
    assert "derived: patchnr, 2 of 2 slice(s)" in capsys.readouterr().out
    written, source = read_series("derived"), read_series(series)
    assert (written.spacing, written.positions) == (source.spacing, source.positions)
    assert written.headers[0].SeriesDescription == "patchNR"
    assert written.headers[0].SeriesInstanceUID != SERIES
    assert float((written.hu - source.hu).abs().median()) < 200
    assert Path("derived.yaml").is_file()
    page = Path("page/report.html").read_text()
    for words in (
        "lung window, -1350 to 150 HU",
        "soft-tissue window, -150 to 250 HU",
        "absolute error of the reconstruction in HU",
        "Profile",
        "PSNR, range 1",
        "A stack of 2 slices",
        "Convergence",
    ):
        assert words in page
    names = {path.name for path in Path("page").iterdir()}
    for label in ("truth", "patchnr", "filtered-backprojection"):
        assert f"{label}-lung-window-1350-to-150-hu.png" in names
        assert f"{label}-soft-tissue-window-150-to-250-hu.png" in names
    assert {"sinogram.png", "profile-hu.png", "error-map.png"} <= names
    # Water is half way up the lung window's upper part: (0 + 1350) / 1500.
    shown = read_stack("page/truth-lung-window-1350-to-150-hu.png")
    hu = to_hounsfield(from_hounsfield(slices()[:1]))
    assert torch.allclose(shown, ((hu + 1350) / 1500).clamp(0, 1), atol=0.003)


def test_interrupted_reconstruction_keeps_what_is_finished(sinogram, series, monkeypatch, capsys):
    work, calls = differences.minus_divergence, []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return work(*arguments)

    monkeypatch.setattr(differences, "minus_divergence", interrupt)
    run = ["reconstruct", *MEASURED, "--method=tv", "--steps=15"]
    stop = 60  # in the second slice
    assert main([*run, "-o", "derived", "--template=slices"]) == 0
    assert "1 of 2 slice(s)" in capsys.readouterr().out
    assert read_series("derived").positions == read_series(series).positions[:1]
    stop, calls = 30, []  # in the first
    assert main([*run, "-o", "x.tif"]) == 0
    assert "Interrupted" in capsys.readouterr().out
    assert read_stack("x.tif", slack=1).shape == (1, 1, SIZE, SIZE)


def test_flags_and_files_that_disagree(sinogram, capsys):
    run = ["reconstruct", *MEASURED, "--method=fbp"]
    for flags, *messages in [
        (["--angles=47"], "30 angles x 47 bins", "--angles is 47", "transpose"),
        (["--angles=1000"], "30 angles x 47 bins", "--angles is 1000", "leave --angles out"),
        (["--photons=100"], "4096 photons", "--photons is 100"),
        (["--size=64"], "32 x 32", "--size is 64"),
        (["--field-of-view=0.5"], "0.256 m", "--field-of-view is 0.5"),
        (["--field-of-view=256"], "--field-of-view is 256", "metres"),
        (["--photons=-1"], "--photons is -1"),
        (["--size=0"], "--size is 0"),
        (["--limited=162:18"], "'162:18'", "A:B"),
        (["--limited=wide"], "'wide'"),
        (["--limited=1:2"], "none of the 30 angles", "3 and 177 degrees"),
        (["--method=patchnr"], "needs --prior"),
        (["--method=tv", "--steps=0"], "--steps is 0"),
        (["--steps=5"], "--steps 5 says nothing about the method fbp"),
        (["--method=tgv", "--stride=2"], "--stride 2 says nothing about the method tgv"),
        (["--method=epll"], "epll needs --prior", "train epll"),
        (["--method=bm3d"], "bm3d is not made for ct", "tgv"),
        (["--method=tv", "--preset=paper"], "paper is that of patchnr"),
        (["--method=tv", "--weight=-1"], "--weight is -1"),
        (["--scale=2"], "--scale 2", "ct"),
        (["--range=0:2"], "--range 0:2", "ct"),
        (["-o", "x.png"], "'.png'", ".tif"),
        (["-o", "folder"], "folder", "--template"),
        (["-o", "x.tif", "--template=slices"], "'.tif'", "--template slices"),
        (["-o", "slices", "--template=slices"], "slices", "not an empty folder"),
    ]:
        refused(capsys, [*run, *flags], *messages)
    refused(capsys, ["reconstruct", "y.h5", "--problem=denoising", "--method=fbp"], "--method")
    write_image("x.png", torch.rand(1, 1, 16, 16))
    other = ["x.png", "--problem=denoising"]
    refused(capsys, ["reconstruct", *other, "--method=tv", "--angles=3"], "--angles 3", "denoising")
    refused(capsys, ["simulate", *other, "--photons=3"], "--photons 3", "denoising")
    refused(capsys, ["simulate", "x.png", *other], "2 images", "takes one")


def test_values_that_are_no_line_integrals(sinogram, capsys):
    y = read_sinogram(sinogram)
    run = ["--problem=ct", "--method=fbp", "--threads=1"]
    geometry = [*DOSE, f"--size={SIZE}", f"--field-of-view={VIEW}"]
    counts = 4096 * torch.exp(-MU_MAX * y.data[:, 0])
    np.save("counts.npy", counts.numpy())
    np.save("integers.npy", counts.to(torch.int32).numpy())
    np.save("shares.npy", (counts / 4096).numpy())
    np.save("negative.npy", -y.data[:, 0].numpy())
    np.save("plain.npy", MU_MAX * y.data[:, 0].numpy())
    for name, message in [
        ("counts", "none of 4096 photons pass"),
        ("integers", "raw counts"),
        ("shares", "not counts"),
        ("negative", "times the 4096 photons of air"),
        ("plain", "attenuation_scale"),
    ]:
        refused(capsys, ["reconstruct", f"{name}.npy", *run, *geometry], f"{name}.npy", message)
    h5py = pytest.importorskip("h5py")
    with h5py.File("y.h5", "r+") as file:
        file["angles"][...] = np.linspace(0, 180, 30)
    refused(capsys, ["reconstruct", "y.h5", *run], "probably degrees")


def test_slices_that_cannot_be_used(sinogram, series, model, capsys):
    hu = slices()
    write_image("hu.tif", hu)
    write_image("normalised.tif", from_hounsfield(hu))
    write_image("oblong.tif", from_hounsfield(hu)[..., 1:])
    write_image("photograph.png", torch.rand(1, 3, SIZE, SIZE))
    mixed = ["train", "patch-nr", "slices/0.dcm", "hu.tif"]
    refused(capsys, mixed, "slices/0.dcm is a DICOM file", "hu.tif is not")
    refused(capsys, ["train", "patch-nr", "hu.tif"], "say --units hu")
    refused(
        capsys, ["train", "patch-nr", "normalised.tif", "--units=hu"], "normalised attenuations"
    )
    refused(capsys, ["train", "patch-nr", "photograph.png", "--units=hu"], "3 channel(s)")
    refused(capsys, ["train", "patch-nr", "slices", "--range=0:9"], "leave out --range")
    save_slice(Path("slices/other.dcm"), hu[0, 0], 7, uid.generate_uid(), PIXEL)
    refused(capsys, ["train", "patch-nr", "slices"], "SeriesInstanceUID", "one series")
    Path("slices/other.dcm").unlink()

    run = ["reconstruct", *MEASURED, "--method=fbp"]
    refused(capsys, [*run, "--truth=hu.tif"], "say --units hu")
    refused(capsys, [*run, "--truth=normalised.tif", "--units=hu"], "normalised attenuations")
    refused(capsys, [*run, "--truth=oblong.tif"], "32 x 31", "32 x 32")
    refused(capsys, [*run, "--truth=photograph.png"], "3 channels")
    save_slice(Path("slices/other.dcm"), hu[0, 0], 7, SERIES, PIXEL)
    refused(capsys, [*run, "--template=slices", "-o", "x"], "3 slice(s)", "2 of 32 x 32")
    for k in (0, 1):
        save_slice(Path(f"slices/{k}.dcm"), hu[k, 0], k, SERIES, 4.0)
    Path("slices/other.dcm").unlink()
    refused(capsys, [*run, "--template=slices", "-o", "x"], "4 x 4 mm", "8 mm")
    models.save("colour.safetensors", models.patch_nr(size=4, channels=3, hidden=8))
    refused(capsys, ["reconstruct", *MEASURED, "--prior=colour.safetensors"], "made for 3")

    simulate = ["simulate", "--problem=ct", *DOSE]
    for images, flags, message in [
        (["hu.tif"], ["--field-of-view=0.2"], "say --units hu"),
        (["hu.tif"], ["--units=hu"], "give --field-of-view"),
        (["oblong.tif"], ["--field-of-view=0.2"], "square"),
        (["slices"], ["--field-of-view=0.2"], "0.128 m"),
        (["slices"], ["--fine=32"], "--fine is 32"),
        (["slices"], ["--output=y.tif"], ".h5"),
        (["slices"], ["--limited=1:2"], "none of the 30 angles"),
        (["photograph.png"], ["--field-of-view=0.2"], "3 channels"),
    ]:
        refused(capsys, [simulate[0], *images, *simulate[1:], *flags], message)
    refused(capsys, ["simulate", "slices", "--problem=ct"], "needs --angles")


def test_help_names_every_flag_with_its_unit(capsys):
    for command in ("reconstruct", "simulate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        out = " ".join(capsys.readouterr().out.split())
        for words in ("--field_of_view", "in metres", "--limited", "in degrees", "--photons"):
            assert words in out


def test_dataset_of_a_file_with_several(sinogram, capsys):
    found = read_sinogram(sinogram)
    h5py = pytest.importorskip("h5py")
    with h5py.File("two.h5", "w") as file:
        file["flat"] = np.ones((30, 7), np.float32)
        file["scan"] = found.data[:, 0].numpy()
    run = ["reconstruct", "two.h5", "--problem=ct", "--threads=1", "--method=fbp", *DOSE]
    run += [f"--size={SIZE}", f"--field-of-view={VIEW}", "--output=x.npy"]
    refused(capsys, run, "--dataset", "flat")
    assert main([*run, "--dataset=scan"]) == 0
    assert np.load("x.npy").shape[-2:] == (SIZE, SIZE)
    with h5py.File("stack.h5", "w") as file:
        file["a"], file["b"] = slices()[:, 0].numpy(), np.zeros((2, 8, 8), np.float32)
    run = ["train", "patch-nr", "stack.h5", "--units=hu", "--steps=2", *TINY]
    refused(capsys, run, "--dataset")
    assert main([*run, "--dataset=a"]) == 0
