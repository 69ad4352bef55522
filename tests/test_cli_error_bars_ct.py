"""Error bars of computed tomography on the command line: calibrated on slices, drawn with others, refused, told."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import patchflow as pf
from dicom_slices import save_slice
from patchflow.cli import main
from patchflow.cli.error_bars import Calibration
from patchflow.cli.scan import ScanFlags, read_scan
from patchflow.io.dicom import read_series
from patchflow.io.images import read_stack, write_image
from patchflow.problems.attenuation import from_hounsfield, to_hounsfield
from patchflow.problems.blur import Blur, gaussian_kernel
from patchflow.problems.poisson import PoissonNoise
from patchflow.problems.signature import differs, signature
from patchflow.tomography_methods import METHODS, Setting
from patchflow.uncertainty.noise_level import noise_level

pytest.importorskip("h5py")
pytest.importorskip("pydicom")
uid = pytest.importorskip("pydicom.uid")
pytestmark = pytest.mark.usefixtures("as_users_do")

SIZE, VIEW = 48, 0.24
SCAN = ["--angles=30", "--photons=4096", f"--field-of-view={VIEW}"]
CT = ["--problem=ct", "--threads=1"]
ENDS = ("-low", "-high")
KNOWN = [*CT, *SCAN, "--fine=96", "--units=hu"]


def slices(seeds):
    """Integer HU of a body with two lungs and a random texture of 60 HU, another one for each seed."""
    i, j = torch.meshgrid(
        torch.arange(SIZE) - SIZE / 2, torch.arange(SIZE) - SIZE / 2, indexing="ij"
    )
    stack = []
    for seed in seeds:
        torch.manual_seed(seed)
        field = Blur(gaussian_kernel(9, 1.5), (SIZE, SIZE), "periodic")(
            torch.randn(1, 1, SIZE, SIZE)
        )[0, 0]
        shift, size = torch.rand(2) * 6
        hu = torch.full((SIZE, SIZE), -1000.0)
        body = (i / 20).square() + (j / 22).square() < 1
        hu[body] = 40 + 60 * (field / field.std())[body]
        for side in (-1, 1):
            lung = (i / (9 + size / 2)).square() + ((j + 10 * side + shift / 2) / 6).square() < 1
            hu[lung] = -800 + 60 * (field / field.std())[lung]
        stack.append(hu)
    return torch.stack(stack)[:, None].round()


def save_series(folder, hu, pixel=1000 * VIEW / SIZE):
    Path(folder).mkdir()
    series = uid.generate_uid()
    for k, image in enumerate(hu[:, 0]):
        save_slice(f"{folder}/{k}.dcm", image, k, series, pixel)


def simulated(hu, name="y.h5", *flags):
    write_image("new.tif", hu)
    run = ["simulate", "new.tif", "--problem=ct", *SCAN, "--fine=96", "--units=hu", f"-o={name}"]
    assert main([word.replace("-o=", "--output=") for word in (*run, "--seed=7", *flags)]) == 0
    return name


def refused(capsys, arguments, *messages):
    """Exit code 2, one line, no traceback."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert all(message in error for message in messages), error
    assert "\n" not in error
    assert "Traceback" not in error


def test_error_bars_of_slices_hold_for_others_in_both_units(capsys):
    write_image("known.tif", slices(range(3)))
    assert main(["calibrate", "known.tif", *KNOWN, "--method=fbp", "--output=bars"]) == 0
    said = capsys.readouterr().out
    assert said.count("by the others") == 3
    assert "HU)" in said
    assert "Empirical, not conformal: 90 % of the pixels of 3 images" in said
    document = json.loads(Path("bars/calibration.json").read_text())
    assert document["guarantee"] in said
    assert document["measurement"]["number of photons"] == 4096
    assert len(document["measurement"]["set of angles"]) == 30
    for part in document["coverage"].values():
        assert abs(part["share"] - 0.9) < 0.04
        assert np.shape(part["regions"]) == (4, 4)
        assert len(part["intensities"]) == 10
    # The configuration repeats the run, the noise too.
    assert main(["calibrate", "--config=bars/calibration.yaml", "--output=again"]) == 0
    again, bars = (Calibration.read(name, tomography=True) for name in ("again", "bars"))
    assert again == bars
    run = ["reconstruct", simulated(slices([10, 11])), *CT, "--method=fbp", "--calibration=bars"]
    capsys.readouterr()
    given = ["--truth=new.tif", "--units=hu", "--report=page", "--output=x.tif"]
    assert main([*run, *given]) == 0
    said = capsys.readouterr().out
    assert "Warning" not in said
    hu = [read_stack(f"x{end}.tif", value_range=(-4096, 8192), slack=1) for end in ("", *ENDS)]
    x, low, high = (values * 12288 - 4096 for values in hu)
    truth = slices([10, 11])
    share = float(((low <= truth) & (truth <= high)).double().mean())
    assert abs(share - 0.9) < 0.03
    (told,) = (line for line in said.splitlines() if line.startswith("They cover"))
    assert told == f"They cover {100 * share:.1f} % of the true pixels."
    assert f"({float((high - low).mean()):.3g} HU)." in said
    # The ends are those of the fitted intervals, about each slice for itself.
    intervals = Calibration.read("bars", tomography=True).intervals
    scan = read_scan(run[1], ScanFlags())
    for k in range(2):
        level = noise_level(scan.likelihood, scan.y[k : k + 1])
        ends = intervals(from_hounsfield(x[k : k + 1], dither=False), level)
        inside = (x[k : k + 1] > -950) & (x[k : k + 1] < 3000)  # nothing was cut off at zero
        for end, values in zip(ends, (low, high), strict=True):
            near = (to_hounsfield(end) - values[k : k + 1]).abs()[inside] < 1
            assert float(near.double().mean()) > 0.9
    page = Path("page/report.html").read_text()
    assert "width of the error bars" in page
    assert "They cover" in page
    # The same in units of the largest attenuation.
    assert main([*run, "--output=n.npy"]) == 0
    for end, values in zip(ENDS, (low, high), strict=True):
        normalised = torch.from_numpy(np.load(f"n{end}.npy")).reshape(values.shape)
        assert torch.allclose(to_hounsfield(normalised), values.float(), atol=0.05)


def test_error_bars_go_by_the_dose_behind_what_absorbs(monkeypatch, capsys):
    """Slices without dense parts to calibrate on, of one dose; a slice whose rays pass a dense spine."""
    write_image("known.tif", slices(range(3)))
    assert main(["calibrate", "known.tif", *KNOWN, "--method=fbp", "--output=bars"]) == 0
    document = json.loads(Path("bars/calibration.json").read_text())
    least, largest = document["intervals"]["noise"]
    assert 0 < least < largest
    dense = slices([10])
    dense[..., 34:42, 12:36] = 2800.0
    y = simulated(dense)
    run = ["reconstruct", y, *CT, "--method=fbp", "--units=hu", "--truth=new.tif", "-o", "x.tif"]

    def shares(folder):
        assert main([*run, f"--calibration={folder}"]) == 0
        ends = [read_stack(f"x{end}.tif", value_range=(-4096, 8192), slack=1) for end in ENDS]
        low, high = (values * 12288 - 4096 for values in ends)
        inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        inside[14:30, 10:38] = True
        covered = (low <= dense) & (dense <= high)
        return float(covered[0, 0][inside].double().mean()), float(
            (high - low)[0, 0][inside].mean()
        )

    by_noise, wide = shares("bars")
    told = capsys.readouterr().out
    assert "times as noisy as the noisiest that was calibrated on" in told
    assert "without the noise of the scan" not in told
    # Files of before count the contrast alone, as if the noise were alike everywhere.
    monkeypatch.setattr(
        "patchflow.cli.calibrate_slices.noise_level",
        lambda law, y: torch.ones(len(y), 1, SIZE, SIZE),
    )
    assert main(["calibrate", "known.tif", *KNOWN, "--method=fbp", "--output=old"]) == 0
    document = json.loads(Path("old/calibration.json").read_text())
    del document["intervals"]["noise"]
    Path("old/calibration.json").write_text(json.dumps(document))
    by_contrast, narrow = shares("old")
    assert "without the noise of the scan, as those of earlier versions" in capsys.readouterr().out
    assert abs(by_noise - 0.9) < 0.08
    assert by_contrast < 0.82
    assert narrow < wide
    # Of computed tomography they are not for images, which is told before the reconstruction.
    write_image("image.tif", torch.rand(1, 1, SIZE, SIZE))
    image = ["reconstruct", "image.tif", "--problem=denoising", "--method=tv", "-o", "image-x.tif"]
    told = "is a calibration of computed tomography, not of images"
    refused(capsys, [*image, "--calibration=bars"], "bars/calibration.json", told)
    assert not Path("image-x.tif").exists()


def test_from_ten_slices_on_they_are_conformal(capsys):
    write_image("known.tif", slices(range(11)))
    assert main(["calibrate", "known.tif", *KNOWN, "--method=fbp"]) == 0
    assert "Conformal over 11 images" in capsys.readouterr().out
    intervals = Calibration.read("calibration", tomography=True).intervals
    assert intervals.guarantee == "conformal"
    new = slices(range(20, 40))
    run = ["reconstruct", simulated(new), *CT, "--method=fbp", "--calibration=calibration"]
    assert main([*run, "--units=hu", "--output=x.npy"]) == 0
    low, high = (torch.from_numpy(np.load(f"x{end}.npy")).reshape(new.shape) for end in ENDS)
    shares = ((low <= new) & (new <= high)).double().mean((1, 2, 3))
    # Promised are nine in ten slices with 90 %; chance leaves more than six in ten of twenty.
    assert float((shares >= 0.9).double().mean()) > 0.6
    assert 0.88 < float(shares.mean()) < 0.97


def test_priors_on_patches_say_what_is_unlike_the_slices(monkeypatch, capsys):
    # The default are 400 steps.
    fewer = METHODS["epll"]._replace(low_dose=Setting(0.38, 40))
    monkeypatch.setitem(METHODS, "epll", fewer)
    write_image("learn.tif", slices([50, 51]))
    write_image("known.tif", slices([0, 1]))
    train = ["train", "epll", "learn.tif", "--units=hu", "--output=p.safetensors", "--threads=1"]
    assert main([*train, "--components=4", "--size=4", "--padding=2"]) == 0
    method = ["--method=epll", "--prior=p.safetensors"]
    assert main(["calibrate", "known.tif", *KNOWN, *method, "--false-alarms=0.02"]) == 0
    document = json.loads(Path("calibration/calibration.json").read_text())
    assert document["novelty"]["rate"] == 0.02
    # No slice that was calibrated on has metal.
    new = slices([10])
    new[..., 18:30, 18:30] = 2500.0
    run = ["reconstruct", simulated(new), *CT, *method, "--calibration=calibration"]
    assert main([*run, "--output=x.tif", "--report=page"]) == 0
    said = capsys.readouterr().out
    assert "calibrated for another" not in said
    assert "surprise the prior" in said
    page = Path("page/report.html").read_text()
    assert "novelty" in page
    (share,) = (
        float(line.split("images: ")[1].split(" %")[0])
        for line in said.splitlines()
        if line.startswith("Unlike the calibration images")
    )
    assert share > 4
    # Slices are known again, whatever noise has undone their rounding, and by whatever file.
    save_series("series", slices([50]))
    learned = "is an image that p.safetensors was learned from"
    refused(capsys, ["calibrate", "learn.tif", *KNOWN, *method, "--seed=5"], "image 1", learned)
    dicom = [flag for flag in KNOWN if not flag.startswith("--field")]
    refused(capsys, ["calibrate", "series", *dicom, *method], "series, slice 1", learned)


def test_whatever_is_not_as_calibrated_is_one_warning(capsys):
    write_image("known.tif", slices([0, 1]))
    assert main(["calibrate", "known.tif", *KNOWN, "--method=fbp", "--output=fbp"]) == 0
    steps = ["--method=tv", "--steps=5", "--output=tv"]
    assert main(["calibrate", "known.tif", *KNOWN, *steps]) == 0
    y = simulated(slices([10]))
    dim = simulated(slices([10]), "dim.h5", "--photons=1000")
    write_image("image.tif", torch.rand(1, 1, 64, 64))
    image = ["--problem=denoising", "--method=tv", "--threads=1", "--output=image"]
    assert main(["calibrate", "image.tif", *image]) == 0
    of_images = ["reconstruct", y, *CT, "--method=tv", "--calibration=image"]
    refused(capsys, of_images, "image/calibration.json", "of images, not of computed tomography")
    for path, flags, *messages in [
        (y, ["--method=fbp", "--calibration=fbp"]),
        (dim, ["--method=fbp", "--calibration=fbp"], "number of photons (4096, not 1000);"),
        (
            y,
            ["--method=fbp", "--calibration=fbp", "--limited=18:162"],
            "set of angles (30, not 24);",
        ),
        (
            y,
            ["--method=tv", "--calibration=fbp", "--weight=3", "--steps=5"],
            "another method (fbp, not tv), weight (default, not 3.0), setting of the solver (steps);",
        ),
        (y, ["--method=tv", "--steps=5", "--calibration=tv"]),
        (
            y,
            ["--method=tv", "--steps=6", "--calibration=tv"],
            "another setting of the solver (steps);",
        ),
    ]:
        capsys.readouterr()
        run = ["reconstruct", path, *CT, *flags, "--output=x.tif", "--report=page"]
        assert main(run) == 0
        told = [line for line in capsys.readouterr().out.splitlines() if "Warning" in line]
        assert len(told) == (1 if messages else 0)
        assert all(message in told[0] for message in messages), told
        assert ("calibrated for another" in Path("page/report.html").read_text()) == bool(messages)


def test_series_and_the_scan_of_a_sinogram(capsys):
    save_series("known", slices([0, 1]))
    save_series("new", slices([10, 11]))
    dose = ["--angles=30", "--photons=2000", "--fine=96"]
    assert (
        main(["simulate", "new", "--problem=ct", *dose, "--output=y.h5", "--limited=18:162"]) == 0
    )
    run = ["known", *CT, "--scan=y.h5", "--fine=96", "--method=fbp", "--output=bars"]
    assert main(["calibrate", *run]) == 0
    assert "known, slice 2: reconstructed." in capsys.readouterr().out
    run = ["reconstruct", "y.h5", *CT, "--method=fbp", "--calibration=bars"]
    assert main([*run, "--template=new", "--truth=new", "--output=derived"]) == 0
    assert "Warning" not in capsys.readouterr().out
    written = {name: read_series(f"derived{name}") for name in ("", *ENDS)}
    low, high = (written[end].hu for end in ENDS)
    assert written["-low"].positions == written[""].positions
    assert written["-high"].headers[0].SeriesDescription == "filtered backprojection, 90 % high"
    share = float(((low <= slices([10, 11])) & (slices([10, 11]) <= high)).double().mean())
    assert abs(share - 0.9) < 0.05
    # A folder in the way of the ends is told before the reconstruction.
    Path("other-high").mkdir()
    Path("other-high/a").write_text("")
    refused(capsys, [*run, "--template=new", "--output=other"], "other-high", "not an empty folder")
    # Of --scan the slices must have the size.
    write_image("small.tif", slices([0])[..., 2:, 2:])
    refused(capsys, ["calibrate", "small.tif", *CT, "--units=hu", "--scan=y.h5"], "--prior")
    small = ["calibrate", "small.tif", *CT, "--units=hu", "--scan=y.h5", "--method=fbp"]
    refused(capsys, small, "46 x 46", "48 x 48", "resample")
    whole = ["calibrate", "known", *CT, "--method=fbp", "--scan=y.h5"]
    refused(capsys, [*whole, "--photons=4096"], "2000 photons", "--photons is 4096")
    refused(capsys, [*whole, "--bins=9"], "--bins 9 says nothing beside --scan")


def test_mistakes(capsys):
    write_image("known.tif", slices([0, 3]))
    write_image("small.tif", slices([0])[..., 8:40, 8:40])
    write_image("photograph.png", torch.rand(1, 3, SIZE, SIZE))
    run = ["calibrate", "known.tif", *KNOWN]
    fbp = [*run, "--method=fbp"]
    for flags, *messages in [
        ([*run], "patchnr needs --prior"),
        ([*run, "--method=bm3d"], "bm3d is not made for ct"),
        ([*fbp, "--prior=p.safetensors"], "--prior p.safetensors says nothing"),
        ([*fbp, "--weight=2"], "--weight 2.0 says nothing about the method fbp"),
        ([*fbp, "--steps=9"], "--steps 9 says nothing about the method fbp"),
        ([*fbp, "--start=u.safetensors"], "--start u.safetensors says nothing"),
        ([*fbp, "--noise=0.2"], "--noise 0.2 says nothing about the problem ct"),
        ([*fbp, "--draws=9"], "--draws 9 is for --model"),
        ([*fbp, "--size=64"], "48 x 48", "--size is 64"),
        ([*fbp, "--fine=48"], "--fine is 48"),
        ([*fbp, "--level=1.5"], "The level is 1.5"),
        ([*fbp, "--false-alarms=0.001"], "higher rate"),
        ([*fbp, "--scan=nowhere.h5"], "nowhere.h5"),
        (["calibrate", "known.tif", *CT, "--method=fbp"], "ct needs --angles"),
        (["calibrate", "known.tif", *CT, "--method=fbp", *SCAN], "say --units hu"),
        (
            ["calibrate", "known.tif", *CT, "--method=fbp", *SCAN[:2], "--units=hu"],
            "give --field-of-view",
        ),
        (["calibrate", "small.tif", *KNOWN, "--method=fbp"], "at least 2000 are needed"),
        (["calibrate", "photograph.png", *CT, *SCAN, "--method=fbp"], "3 channels"),
        (
            ["calibrate", "known.tif", "--problem=denoising", "--method=tv", "--angles=3"],
            "--angles 3 says nothing about the problem denoising",
        ),
        (["calibrate", "known.tif", "--problem=denoising", "--method=fbp"], "is for --problem ct"),
        (["calibrate", "--problem=a.py", "--model=m", "--angles=3"], "--angles 3 says nothing"),
    ]:
        refused(capsys, flags, *messages)
    y = simulated(slices([1]))
    reconstruct = ["reconstruct", y, *CT, "--method=fbp"]
    refused(capsys, [*reconstruct, "--calibration=nowhere.json"], "nowhere.json")
    twice = ["calibrate", "small.tif", "small.tif", *KNOWN, "--method=fbp"]
    refused(capsys, twice, "small.tif is the same image as small.tif")
    # Numbers that no calibration gives.
    assert main([*fbp, "--output=bars"]) == 0
    whole = json.loads(Path("bars/calibration.json").read_text())
    intervals = whole["intervals"]
    for damage in (
        {"low": intervals["low"][:1]},
        {"low": intervals["high"], "high": intervals["low"]},
        {"low": [float("nan"), *intervals["low"][1:]]},
        {
            "edges": 2 * intervals["edges"][:1],
            "low": 3 * intervals["low"][:1],
            "high": 3 * intervals["high"][:1],
        },
        {"level": 90},
        {"factor": -1},
        {"noise": "ab"},
        {"noise": [1.0]},
    ):
        Path("bad.json").write_text(json.dumps(whole | {"intervals": intervals | damage}))
        refused(capsys, [*reconstruct, "--calibration=bad.json"], "that no calibration gives")
    for text in (
        json.dumps(whole)[:-9],
        json.dumps(whole | {"intervals": intervals | {"low": 3}}),
        json.dumps(whole | {"intervals": intervals | {"noise": 3}}),
        json.dumps(whole | {"measurement": ["ParallelBeam"]}),
        "[]",
    ):
        Path("bad.json").write_text(text)
        refused(capsys, [*reconstruct, "--calibration=bad.json"], "bad.json is damaged")
    # The network of another scan.
    train = ["train", "fbp-unet", "new.tif", "known.tif", "--units=hu", *SCAN, "--limited=18:162"]
    small = ["--widths=[8,8]", "--steps=2", "--crop=32", "--fine=96", "--output=u.safetensors"]
    assert main([*train, *small, "--threads=1"]) == 0
    write_image("other.tif", slices([2, 4]))
    network = ["--method=fbp-unet", "--prior=u.safetensors"]
    refused(capsys, ["calibrate", "other.tif", *KNOWN, *network], "30 from", "trained for 24 from")
    network.append("--limited=18:162")
    refused(capsys, ["calibrate", "known.tif", *KNOWN, *network], "was learned from")
    assert main(["calibrate", "other.tif", *KNOWN, *network]) == 0


def test_the_signature_of_a_scan():
    """Angles of the same rays are the same, in any order; whatever changes the measurement is another scan."""

    def scan(angles, offset=0.0, pixel=0.01, photons=4096.0):
        angles = torch.tensor(angles, dtype=torch.float64).deg2rad()
        operator = pf.ParallelBeam((8, 8), angles, 13, pixel=pixel, offset=offset)
        return signature(pf.Likelihood(operator, PoissonNoise(photons, 81.36)))

    own = scan([0.0, 30.0, 90.0])
    assert json.loads(json.dumps(own)) == own
    assert differs(own, scan([90.0, 180.0 + 1e-6, 210.0])) == []
    assert differs(own, scan([0.0, 31.0, 90.0])) == ["set of angles"]
    assert differs(own, scan([0.0, 30.0])) == ["set of angles"]
    assert differs(own, scan([0.0, 30.0, 90.0], photons=5000.0)) == ["number of photons"]
    # A bin is as wide as a pixel if nothing is said.
    assert differs(own, scan([0.0, 30.0, 90.0], pixel=0.02)) == ["pixel size", "width of a bin"]
    moved = [scan(angles, offset=0.003) for angles in ([0.0, 30.0, 90.0], [180.0, 30.0, 90.0])]
    assert differs(*moved) == ["set of angles"]
