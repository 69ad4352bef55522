"""Zero-shot patchNR: what it learns, the published procedure, a photograph, the command line, and what is refused."""

import json
from pathlib import Path

import pytest
import skimage.data
import torch

import patchflow as pf
from patchflow import zero_shot
from patchflow.cli import main
from patchflow.papers import zero_shot_table as table
from patchflow.papers.altekrueger2023_patchnr import weight_of_lambda
from patchflow.problems.resolution import low_resolution


def photograph(rows=58, columns=66):
    """A part of a photograph with edges, and its likelihood for x2."""
    truth = torch.from_numpy(skimage.data.camera() / 255.0)[90 : 90 + rows, 190 : 190 + columns]
    likelihood = low_resolution((rows // 2 - 2, columns // 2 - 2), 2, kernel_size=6)
    assert likelihood.operator.domain_shape == (rows, columns)
    return truth[None, None].to(torch.get_default_dtype()), likelihood


@pytest.fixture
def tiny(monkeypatch):
    """A network and patches that learn in a second."""
    monkeypatch.setattr(zero_shot, "HIDDEN", 16)
    monkeypatch.setattr(zero_shot, "SIZE", 4)
    monkeypatch.setattr(zero_shot, "BATCH", 64)


def test_augmentation_gives_eight_different_patches():
    """The published one turned the axes of batch and channels, and gave one."""
    sampler = pf.PatchSampler([torch.rand(1, 1, 4, 4)], 4, 256, dihedral=True)
    assert len({tuple(patch) for patch in sampler().tolist()}) == 8


def test_noise_of_the_image_counts_as_smoothing():
    torch.manual_seed(1)
    clean = torch.full((1, 1, 40, 40), 0.5)
    y = clean + 0.03 * torch.randn_like(clean)
    prior = pf.patch_nr(size=2, hidden=8, layers=1, smoothing=0.05)
    seen = []
    energy = prior.patch_energy
    energy.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()))
    pf.learn_patches(prior, [y], [y], noise=0.03, batch=2000, steps=3)
    # The noise in y and the noise that is added make up the smoothing.
    assert abs(float(torch.cat(seen[:3]).std()) - 0.05) < 0.002
    with pytest.raises(pf.InputError, match=r"noise of 0.1 but the smoothing of the prior is 0.05"):
        pf.learn_patches(pf.patch_nr(smoothing=0.05), [y], noise=0.1)


def test_start_is_aligned_with_the_valid_grid():
    """A ramp survives a symmetric blur, and interpolation gives it back; displaced, it would differ by .0035."""
    i, j = torch.meshgrid(torch.arange(60), torch.arange(52), indexing="ij")
    x = (0.2 + 0.004 * i + 0.003 * j)[None, None].to(torch.get_default_dtype())
    operator = low_resolution((23, 19), 2).operator
    assert operator.domain_shape == (60, 52)
    assert operator.covered == ((7, 53), (7, 45))
    start = operator.initial(operator(x))
    inside = (slice(None), slice(None), slice(10, -10), slice(10, -10))
    torch.testing.assert_close(start[inside], x[inside], rtol=0, atol=8e-4)


def test_better_than_bicubic_on_a_photograph(tiny):
    truth, likelihood = photograph()
    y = likelihood.simulate(truth)
    found = zero_shot.reconstruct(likelihood, y, training_steps=250, steps=60)
    (top, bottom), (left, right) = likelihood.operator.covered

    def quality(x):
        region = (slice(None), slice(None), slice(top, bottom), slice(left, right))
        return float(pf.psnr(x[region], truth[region]))

    assert quality(found.solution.x) > quality(likelihood.operator.initial(y)) + 0.25
    assert found.training.steps == 250
    assert found.prior.smoothing == max(zero_shot.SMOOTHING, 0.01)
    assert found.solution.history[-1] < found.solution.history[0]


def test_one_call_for_colour(tiny, monkeypatch):
    monkeypatch.setattr(zero_shot, "STEPS", 2)
    y = torch.rand(1, 3, 12, 10)
    x = pf.super_resolve(y, 3, noise=0.05, kernel_size=5, seconds=0.2)
    assert x.shape == (1, 3, 12 * 3 + 2, 10 * 3 + 2)
    assert x.isfinite().all()


def test_published_procedure_frees_only_what_was_measured(monkeypatch):
    monkeypatch.setattr(zero_shot, "PUBLISHED_STEPS", 2)
    likelihood = low_resolution((15, 14), 2)
    y = torch.rand(1, 1, 15, 14)
    shapes = []
    found = zero_shot.reconstruct(
        likelihood,
        y,
        training_steps=2,
        preset="paper",
        callback=lambda step, x, value: shapes.append(tuple(x.shape)),
    )
    x = found.solution.x
    assert shapes == [(1, 1, *likelihood.operator.domain_shape)] * 2
    inside = x[:, :, 7:-7, 7:-7]
    assert torch.equal(x, torch.nn.functional.pad(inside, [7] * 4, mode="reflect"))
    assert not torch.allclose(inside, likelihood.operator.initial(y)[:, :, 7:-7, 7:-7])
    assert found.prior.smoothing == 0
    assert found.weight == pytest.approx(
        weight_of_lambda(likelihood.operator.domain_shape, noise=0.01, lam=0.25)
    )


def test_bad_input_is_refused():
    likelihood = low_resolution((20, 20), 2, kernel_size=4)
    y = torch.rand(1, 1, 20, 20)

    def refused(message, law=likelihood, measured=y, weight=None):
        with pytest.raises(pf.InputError, match=message):
            zero_shot.reconstruct(law, measured, weight=weight, training_steps=1)

    refused("Identity that does not lower", pf.GaussianLikelihood(pf.Identity((20, 20)), 0.1))
    refused("gives one image of 20 x 20 pixels", measured=y[:, :, 1:])
    refused("400 of 400 values of the measurement are not finite", measured=y * torch.nan)
    refused("Got weight -1 and 300 steps", weight=-1)
    refused("smaller than a patch", low_resolution((5, 20), 2), y[:, :, :5])
    with pytest.raises(
        pf.InputError, match="The scale is 1 but must be a whole number of at least 2"
    ):
        low_resolution((20, 20), 1)
    with pytest.raises(pf.InputError, match="at least as large as the scale 5"):
        low_resolution((20, 20), 5, kernel_size=4)
    with pytest.raises(pf.InputError, match="15 x 20 pixels is not divisible by the scale 2"):
        pf.downsample((15, 20), 2)


@pytest.mark.usefixtures("as_users_do")
class TestCommandLine:
    def simulate(self):
        pf.write_image("truth.png", photograph(82, 74)[0])
        flags = ["--scale=2", "--boundary=valid", "--noise=0.01", "--output=y.tif"]
        assert main(["simulate", "truth.png", "--problem=super-resolution", *flags]) == 0

    @pytest.mark.parametrize("method", ["patchnr", "zssr", "dual-sr"])
    def test_from_file_to_report(self, method, tiny, capsys):
        self.simulate()
        command = f"zero-shot y.tif --scale 2 --noise 0.01 --method {method} --seconds 0.3 -o x.tif"
        more = ["--truth=truth.png", "--report=page", "--threads=1"]
        more += ["--steps=3"] if method == "patchnr" else []
        assert main([*command.split(), *more]) == 0
        told = capsys.readouterr().out
        assert "residual" in told
        assert "PSNR" in told
        assert pf.read_image("x.tif").shape == (1, 1, 82, 74)
        assert "zero-shot" in Path("page/report.html").read_text()
        assert main(["zero-shot", "--config=x.yaml", "--output=again.tif"]) == 0
        assert Path("again.tif").exists()

    def test_refusals_come_before_learning(self, capsys):
        self.simulate()
        pf.write_image("flat.png", torch.full((1, 1, 20, 20), 0.5))
        for words, message in (
            ("y.tif --scale=1", "The scale is 1"),
            ("y.tif --noise=-1", "The noise is -1.0 but must be positive"),
            ("y.tif --method=zssr --weight=1", "says nothing about the method zssr"),
            ("y.tif --method=dual-sr --steps=1", "says nothing about the method dual-sr"),
            ("y.tif --method=dual-sr --preset=paper", "not of dual-sr"),
            ("y.tif --truth=y.tif", "give the image that was measured"),
            ("y.tif --kernel_size=1", "at least as large as the scale 2"),
            ("flat.png", "flat.png"),
            ("none.png", "none.png"),
            ("", "MEASUREMENT"),
        ):
            capsys.readouterr()
            assert main(["zero-shot", *words.split()]) == 2
            error = capsys.readouterr().err.strip()
            assert message in error
            assert "\n" not in error
        assert not Path("reconstruction.png").exists()

    def test_benchmark(self, data_dir, monkeypatch):
        """Bicubic interpolation on the first photograph; the mean over 68 is 27.05 with a spread of 3.4."""
        monkeypatch.setattr(table, "NOISE_SEEDS", 2)
        command = ["benchmark", table.NAME, f"--data={data_dir}", "--images=1"]
        assert main([*command, "--methods=[bicubic]", "--json=t.json", "--csv=t.csv"]) == 0
        rows = {row["method"]: row for row in json.loads(Path("t.json").read_text())["rows"]}
        assert abs(rows["bicubic"]["mean"]["psnr"] - 27.05) < 8
        assert rows["patchnr"]["published"]["psnr"] == 29.08


@pytest.mark.usefixtures("single_precision")
def test_methods_of_the_table_see_one_measurement(tiny, monkeypatch):
    monkeypatch.setattr(zero_shot, "STEPS", 2)
    truth, likelihood = photograph(70, 66)
    case = table.Case("part", "", truth, likelihood, likelihood.simulate(truth))
    for method in ("bicubic", "tv", "zssr", "dual-sr", "patchnr"):
        x = table.solver(method, 0.2, 0)(case)
        assert x.shape == truth.shape
        assert x.isfinite().all()
    with pytest.raises(pf.InputError, match="There is no image in"):
        table.run(Path())
