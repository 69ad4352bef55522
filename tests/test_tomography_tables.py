"""The tables of tomography on a small geometry: what is measured, what is refused, what LoDoPaB adds."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import patchflow as pf
from patchflow import tomography_methods as methods
from patchflow.cli import main
from patchflow.io.images import read_image
from patchflow.learn_mixture import learn_epll
from patchflow.papers import leuschner2021_lodopab as lodopab
from patchflow.papers import patchnr_tomography as tables
from patchflow.papers import tomography_cases
from patchflow.papers.altekrueger2023_patchnr import weight_of_mean
from patchflow.problems.tomography import ParallelBeam
from patchflow.scan_network import ScanNetwork
from patchflow.solution import Solution
from patchflow.tomography_methods import Setting

SIZE = 24


pytestmark = pytest.mark.usefixtures("single_precision")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Discs of two tissues in place of slices, and a geometry of 24 x 24 pixels and 50 angles."""

    def geometry(size: int = SIZE) -> ParallelBeam:
        angles = (torch.arange(50, dtype=torch.float64) + 0.5) * math.pi / 50
        return ParallelBeam((size, size), angles, 35, pixel=0.26 / size, spacing=0.0106)

    monkeypatch.setattr(lodopab, "geometry", geometry)
    monkeypatch.setattr(lodopab, "FINE", 40)
    monkeypatch.setattr(lodopab, "LIMITED", slice(5, 45))
    monkeypatch.setattr(tomography_cases, "REPORTED", (0, 1))
    for method in methods.METHODS.values():
        # Enough to tell that a method runs.
        few = method._replace(low_dose=Setting(method.low_dose.weight, 20))
        few = few._replace(limited=Setting(method.limited.weight, 20))
        monkeypatch.setitem(methods.METHODS, method.name, few)
    monkeypatch.setattr(tables, "NOISE_SEEDS", 2)
    folder = tmp_path / "ct"
    folder.mkdir()
    grid = np.hypot(*np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j])
    slices = [
        np.where(grid < 0.4 + 0.03 * k, 60, np.where(grid < 0.8, -800, -1000)) for k in range(12)
    ]
    for part in ("train", "val"):
        np.savez(folder / f"lung_{part}_hu.npz", hu=np.array(slices, np.int16))
    kernels = ["B70f"] * 6 + ["B40f"] * 6
    lines = [f"{k},p,{kernel},1,1,1,x" for k, kernel in enumerate(kernels)]
    (folder / "lung_val.csv").write_text("\n".join(["row,patient,kernel,px,thick,z,src", *lines]))
    return tmp_path


def small_prior() -> pf.PatchPrior:
    torch.manual_seed(0)
    return pf.patch_nr(size=4, layers=2, hidden=16, padding=4).requires_grad_(False)


@pytest.mark.parametrize("problem", list(tables.PUBLISHED))
def test_rows_are_methods_by_kernel(data: Path, problem: tables.Problem) -> None:
    chosen = ("fbp", "tv", "patchnr")
    table, records, pictures = tables.run(data, problem, methods=chosen, prior=small_prior())
    names = [f"{method}, {kernel}" for method in chosen for kernel in tables.KERNELS]
    assert [row.method for row in table.rows] == names
    assert all(row.images == 2 and not row.published for row in table.rows)
    assert [record.image for record in records if record.method == "tv, B40f"] == ["6", "7"]
    means = {row.method: row.mean for row in table.rows}
    assert means["tv, B40f"]["psnr"] > means["fbp, B40f"]["psnr"] + 1
    # The range of a slice is below one, and PSNR counts it in decibels.
    assert means["tv, B40f"]["psnr_range_1"] > means["tv, B40f"]["psnr"] + 5
    assert 0 < table.floor["psnr"] < 2
    assert ("36 of 180" in table.protocol) == (problem == "ct-limited-angle")
    assert "learned methods start at total variation (counted in their seconds)" in table.protocol
    assert [picture.group for picture in pictures] == list(tables.KERNELS)
    for picture in pictures:
        assert list(picture.methods) == list(chosen)
        assert picture.title == f"{picture.group}, -1000 to 400 HU"
        # Air is black; soft tissue, of 60 HU, is light grey.
        assert 0 <= float(picture.truth.min()) < 1e-3
        assert float(picture.truth.max()) == pytest.approx(1060 / 1400, abs=2e-3)
        image, caption = picture.methods["tv"]
        assert 0 <= float(image.min()) <= float(image.max()) <= 1
        mean = next(r for r in records if r.method == f"tv, {picture.group}").values["psnr"]
        assert caption.startswith(f"{mean:.2f} dB, SSIM")


def test_every_method_joins(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lodopab, "LIMITED", slice(0, 50))
    few = partial(learn_epll, components=4, padding=4)
    monkeypatch.setitem(tables.TEACHERS, "epll", lambda lesson: few(lesson.images)[0])
    monkeypatch.setattr(tables.prost, "SMALL", tables.prost.SMALL._replace(seconds=1.0))
    models = tmp_path / "models"
    models.mkdir()
    chosen = [method for method in tables.METHODS if method != "dip-tv"]  # see below
    table, *_ = tables.run(
        data,
        "ct-low-dose",
        methods=chosen,
        kernels=("B40f",),
        images=1,
        models=models,
        seconds=1.0,
    )
    means = {row.method.removesuffix(", B40f"): row.mean["psnr"] for row in table.rows}
    assert list(means) == chosen
    fbp = means.pop("fbp")
    assert min(means.values()) > fbp, means
    kept = {f"{method}-lung" for method in tables.TEACHERS} | {
        f"{method}-ct-low-dose" for method in tables.SCANNED
    }
    assert {path.stem for path in models.iterdir()} == kept


def test_the_command_draws_a_figure_of_each_kernel(data: Path) -> None:
    run = ["benchmark", "ct-low-dose", f"--data={data}", "--images=1", "--methods=[fbp,tv]"]
    assert main([*run, "--threads=1", f"--figure={data / 't.png'}"]) == 0
    sizes = [read_image(data / f"t-{kernel}.png").shape for kernel in ("b40f", "b70f")]
    # Three panels, each with its zoom below.
    assert sizes[0] == sizes[1]
    assert sizes[0][2] > 1000


def test_the_start_is_what_it_was_and_the_gap_decides_about_a_solution() -> None:
    for limited, steps in ((False, 75), (True, 150)):
        options = methods.Options(limited=limited)
        for name in ("tv", "tgv"):
            assert methods.METHODS[name].setting(options).steps == 1000
        seen = []

        def solve(task, seen=seen):
            seen.append(task.settings["max_iterations"])
            return Solution(task.init, [], seen[-1], True, interrupted=True)

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(methods.METHODS, "tv", methods.METHODS["tv"]._replace(solve=solve))
            empty = torch.zeros(1, 1, 1, 1)
            task = methods.Task(lodopab.likelihood(lodopab.geometry(4, angles=2)), empty, empty)
            methods.METHODS["epll"].run(task, options)
        assert seen == [steps]


def test_methods_of_patches_go_on_from_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def solve(task):
        seen.append((float(task.init), task.settings["steps"]))
        return Solution(task.init, [], 1, True)

    class Network(ScanNetwork):
        def __init__(self):
            torch.nn.Module.__init__(self)

        def forward(self, y, *, ensemble=False, estimate=None):
            return torch.full((1, 1, 1, 1), 0.25 if ensemble else 0.5)

    monkeypatch.setitem(
        methods.METHODS, "patchnr", methods.METHODS["patchnr"]._replace(solve=solve)
    )
    empty = torch.zeros(1, 1, 1, 1)
    task = methods.Task(lodopab.likelihood(lodopab.geometry(4, angles=2)), empty, empty)
    options = methods.Options(limited=True, start=Network())
    for given in (None, 7, 1000):
        methods.METHODS["patchnr"].run(task, options._replace(steps=given))
    assert seen == [(0.25, methods.FROM_NETWORK), (0.25, 7), (0.25, 1000)]
    assert "from the networks" in methods.METHODS["patchnr"].describe(options)
    # Of methods that do not go on from anything it changes nothing.
    assert methods.METHODS["tv"].setting(options).steps == 1000


def test_a_deep_image_prior_fits_a_sinogram() -> None:
    torch.manual_seed(0)
    angles = (torch.arange(40) + 0.5) * math.pi / 40
    operator = ParallelBeam((72, 72), angles, 103, pixel=0.26 / 72, spacing=0.0036)
    likelihood = lodopab.likelihood(operator)
    x = torch.zeros(1, 1, 72, 72)
    x[:, :, 16:56, 20:50] = 0.2
    y = operator(x)
    task = methods.Task(likelihood, y, operator.initial(y))
    found = methods.METHODS["dip-tv"].run(task, methods.Options((72, 72), steps=100, lr=0.01))
    assert found.steps == 100
    assert float((found.x - x).square().mean()) < 0.1 * float(x.square().mean())


def test_the_same_seed_gives_the_same_figures(data: Path) -> None:
    first, second, other = (
        tables.run(data, "ct-low-dose", methods=("fbp",), kernels=("B40f",), images=1, seed=seed)
        for seed in (0, 0, 1)
    )
    assert first[1][0].values["psnr"] == second[1][0].values["psnr"]
    assert first[1][0].values["psnr"] != other[1][0].values["psnr"]


def test_the_prior_is_learned_from_six_slices(data: Path) -> None:
    images = tomography_cases.training_images(data)
    assert len(images) == 8
    rows = [float(image.mean()) for image in images]
    assert len(set(rows)) == 8
    assert all(0 <= float(image.min()) <= float(image.max()) <= 1 for image in images)
    table, *_ = tables.run(
        data, "ct-low-dose", methods=("patchnr",), kernels=("B40f",), images=1, seconds=1.0
    )
    assert "patchnr-lung learned in" in table.protocol


def test_lodopab_brings_the_published_columns(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    torch.manual_seed(0)
    for kind, shape in (("ground_truth", (362, 362)), ("observation", (1000, 513))):
        with h5py.File(tmp_path / f"{kind}_test_000.hdf5", "w") as file:
            # Only what is written takes room.
            stored = file.create_dataset("data", (128, *shape), "f4", chunks=(1, *shape))
            stored[:2] = torch.rand(2, *shape).numpy() * 0.01
    table, records, _ = tables.run(tmp_path, "ct-low-dose", methods=("fbp",), images=2)
    assert [record.method for record in records] == ["fbp"] * 2
    published = {row.method: row.published for row in table.rows}
    assert published["patchnr"] == {"psnr": 35.19, "ssim": 0.829}
    assert published["fbp"]["psnr"] == 30.37


def test_weight_is_that_of_the_paper() -> None:
    # 700 times the mean over 365 x 365 patches of the padded image, each counted by 36 pixels.
    prior = pf.patch_nr(layers=1, hidden=4, padding=4)
    assert weight_of_mean(700.0, (362, 362), prior) == pytest.approx(700 * 36 / 365**2)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"methods": ("fbb",)}, "fbp, tv, tgv"),
        ({"kernels": ("soft",)}, "B40f, B70f"),
        ({"images": 0}, "at least 1"),
    ],
)
def test_refused(data: Path, settings: dict[str, object], fault: str) -> None:
    with pytest.raises(pf.InputError, match=fault):
        tables.run(data, "ct-low-dose", **settings)


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(pf.InputError, match="zenodo"):
        tables.run(tmp_path, "ct-low-dose", methods=("fbp",))
