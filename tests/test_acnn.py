"""The supervised network of super-resolution: its layers, its pairs, where its pixels lie, and the command line."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional

import patchflow as pf
from patchflow.cli import main
from patchflow.io.images import read_image, write_image
from patchflow.learn_pairs import PairLoss
from patchflow.networks.acnn import ACNN, AsymmetricConvolution, AsymmetricLayers
from patchflow.numerics.interpolation import interpolate
from patchflow.papers import image_problems, image_tables
from patchflow.problems.blur import Blur, downsample, gaussian_kernel
from patchflow.problems.operator import Identity
from patchflow.problems.resolution import LowResolution, from_cells
from patchflow.reconstruct import acnn
from patchflow.resolution_models import SuperResolver

KERNEL = gaussian_kernel(6, 1.0)
TINY = {"scale": 2, "kernel_shape": (6, 6), "noise": 0.02, "width": 8, "layers": 3}


def waves(rows=64, columns=64, shift=0.0):
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    wave = 0.5 + 0.2 * torch.sin(1.1 * i + shift) + 0.2 * torch.cos(0.9 * j)
    return wave[None, None].to(torch.get_default_dtype())


def tiny(**arguments):
    return pf.acnn(**(TINY | arguments)).trained_for(KERNEL.to(torch.get_default_dtype()))


def test_three_convolutions_are_one():
    layer, x = AsymmetricConvolution(3, 5), torch.randn(2, 3, 7, 9)
    expected = (
        functional.conv2d(x, layer.row.weight, padding=(0, 1))
        + functional.conv2d(x, layer.column.weight, padding=(1, 0))
        + functional.conv2d(x, layer.square.weight, padding=1)
    )
    torch.testing.assert_close(layer(x), expected)


def test_the_layers_are_summed_before_the_last_rectifier():
    layers, x = AsymmetricLayers(2, 4, 3), torch.randn(1, 2, 6, 6)
    one, two, three = layers.layers
    a = one(x)
    b = two(a.relu())
    c = three(b.relu())
    first, total = layers(x)
    torch.testing.assert_close(first, a.relu())
    torch.testing.assert_close(total, (a + b + c).relu())


@pytest.mark.parametrize("scale", [2, 3, 4, 6])
def test_the_network_starts_as_interpolation_of_any_scale(scale):
    network, y = ACNN(channels=2, scale=scale, width=4, layers=2), torch.rand(1, 2, 5, 7)
    torch.testing.assert_close(network(y), interpolate(y, scale))
    assert network(y).shape == (1, 2, 5 * scale, 7 * scale)


@pytest.mark.parametrize(
    "operator",
    [
        downsample((48, 40)),
        downsample((48, 40), boundary="valid"),
        downsample((48, 40), 2, kernel_size=6),
        Blur(gaussian_kernel(7, 1.2), (48, 42), "reflect", stride=3),
        Blur(gaussian_kernel(7, 1.2), (48, 42), "reflect", stride=3, anchor=(0, 4)),
    ],
)
def test_cells_lie_where_the_operator_measured(operator):
    """A plane is the same after a symmetric blur and interpolation, on the mean over whole cells."""
    rows, columns = operator.domain_shape
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    plane = (0.01 * i + 0.02 * j)[None, None].to(torch.get_default_dtype())
    inside = (slice(None), slice(None), slice(16, 28), slice(14, 26))
    found = from_cells(operator, interpolate(operator(plane), operator.stride), plane)
    assert abs(float((found - plane)[inside].mean())) < 1e-9
    for axis in (2, 3):  # a shift of one pixel would be seen
        assert abs(float((found.roll(1, axis) - plane)[inside].mean())) > 5e-3


def test_pairs_are_aligned_and_noisy():
    degrade = LowResolution(gaussian_kernel(16, 2.0), 4, 0.05)
    x = torch.zeros(64, 1, degrade.side(16), degrade.side(16))
    wanted, given = degrade(x)
    assert wanted.shape[2:] == (16, 16)
    assert given.shape[2:] == (4, 4)
    error = 5 * 0.05 * (2 / given.numel()) ** 0.5
    assert abs(float(given.square().mean().sqrt()) - 0.05) < error < 0.02
    side = degrade.side(40)
    ramp = (torch.arange(side).to(x) / 100).expand(1, 1, side, side)
    wanted, given = LowResolution(gaussian_kernel(16, 2.0), 4, 0.0)(ramp)
    assert abs(float((interpolate(given, 4) - wanted)[..., 12:-12].mean())) < 1e-9


def test_the_loss_is_the_mean_squared_error():
    loss = PairLoss(torch.nn.Identity())
    wanted, given = torch.rand(3, 1, 4, 4), torch.rand(3, 1, 4, 4)
    expected = ((given - wanted) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(loss(wanted, given), expected)


def test_learning_beats_interpolation_and_its_files_are_read(single_precision, tmp_path):
    model, degrade = tiny(), LowResolution(gaussian_kernel(6, 1.0), 2, 0.02)
    y = degrade(waves())[1]
    before = model(y)
    options = {"crop": degrade.side(16), "steps": 100, "lr": 1e-2, "batch": 4}
    record = pf.learn_pairs(model, [waves(80)], [waves(48)], pairs=degrade, **options)
    assert record.losses[-1] < 0.5 * record.losses[0]
    likelihood = pf.GaussianLikelihood(downsample((64, 64), 2, kernel_size=6), 0.02)
    truth = waves(shift=0.7)
    y = likelihood.simulate(truth)
    x = acnn.reconstruct(likelihood, model, y).x
    inside = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    start = likelihood.operator.initial(y)
    assert pf.psnr(x[inside], truth[inside]) > pf.psnr(start[inside], truth[inside]) + 3
    pf.save(tmp_path / "m.safetensors", model)
    found = pf.load(tmp_path / "m.safetensors", SuperResolver)
    assert torch.equal(found(y), model(y))
    assert torch.equal(found.kernel, model.kernel)
    assert not torch.equal(before, model(degrade(waves())[1]))


def test_a_resumed_training_is_the_whole_one(tmp_path):
    degrade = LowResolution(KERNEL.double(), 2, 0.02)

    def run(stop):
        torch.manual_seed(3)
        model, calls = tiny(), []

        def pairs(x):
            calls.append(len(x))
            if len(calls) == stop:
                raise KeyboardInterrupt
            return degrade(x)

        options = {"crop": degrade.side(8), "steps": 12, "batch": 2}
        options |= {"checkpoint": tmp_path / f"{stop}.safetensors"}
        record = pf.learn_pairs(model, [waves()], pairs=pairs, **options)
        if stop:
            assert record.stopped == "interrupted"
            model.requires_grad_(True)
            pf.learn_pairs(model, [waves()], pairs=degrade, resume=True, **options)
        return model.state_dict()

    whole, resumed = run(0), run(7)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_ensemble_turns_with_a_symmetric_measurement():
    model = tiny()
    torch.nn.init.normal_(model.network.last.weight)
    operator = Blur(KERNEL.double(), (24, 24), "periodic", stride=2, anchor=(2, 2))
    likelihood, y = pf.GaussianLikelihood(operator, 0.02), torch.rand(1, 1, 12, 12)
    turned = acnn.reconstruct(likelihood, model, y.rot90(1, (2, 3))).x
    torch.testing.assert_close(turned, acnn.reconstruct(likelihood, model, y).x.rot90(1, (2, 3)))
    single = acnn.reconstruct(likelihood, model, y, ensemble=False).x
    torch.testing.assert_close(single, model(y))


def test_cells_beside_the_middle_of_the_kernel_are_not_turned():
    """A kernel of 7 x 7 at scale 2: a turn would move the cells by a pixel."""
    kernel = gaussian_kernel(7, 1.0)
    model = pf.acnn(**(TINY | {"kernel_shape": (7, 7)})).trained_for(kernel)
    torch.nn.init.normal_(model.network.last.weight)
    likelihood = pf.GaussianLikelihood(Blur(kernel, (24, 24), "periodic", stride=2), 0.02)
    y = torch.rand(1, 1, 12, 12)
    once, often = (acnn.reconstruct(likelihood, model, y, ensemble=e).x for e in (False, True))
    torch.testing.assert_close(often, once)


def served(operator, noise=0.02):
    return lambda: tiny().operator_of(pf.GaussianLikelihood(operator, noise))


DEGRADE = LowResolution(KERNEL, 2, 0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (served(downsample((24, 24))), "scale 2 but the operator has scale 4"),
        (served(Identity((24, 24))), r"the operator has no scale \(a Identity\)"),
        (served(downsample((24, 24), 2, kernel_size=8)), "another blur, of 6 x 6"),
        (served(downsample((24, 24), 2, kernel_size=6, std=1.2)), "another blur"),
        (served(downsample((24, 24), 2, kernel_size=6), 0.03), "the noise 0.02 but .* has 0.03"),
        (lambda: pf.acnn(scale=1), "scale 1; the scale must be at least 2"),
        (lambda: pf.acnn(noise=0.0), "the noise positive"),
        (lambda: pf.acnn(scale=4, kernel_shape=(3, 3)), "a kernel of 3 x 3 pixels at scale 4"),
        (lambda: tiny().trained_for(torch.ones(3, 3)), r"made for \(6, 6\)"),
        (lambda: pf.learn_pairs(pf.acnn(**TINY), [waves()], pairs=DEGRADE), "knows no blur yet"),
        (
            lambda: pf.learn_pairs(
                tiny(), [waves()], pairs=LowResolution(torch.ones(6, 6) / 36, 2, 0.02)
            ),
            "trained for another blur",
        ),
        (lambda: DEGRADE.side(15), "15 x 15 pixels are not divisible by the scale 2"),
        (lambda: LowResolution(torch.ones(2, 2), 3, 0.0), "a kernel of 2 x 2"),
        (lambda: pf.learn_pairs(tiny(), [], pairs=DEGRADE), "no training images"),
        (
            lambda: pf.learn_pairs(tiny(), [torch.ones(1, 3, 199, 99)], pairs=DEGRADE),
            "3 channels but the network was made for 1",
        ),
        (lambda: pf.learn_pairs(tiny(), [waves(40)], pairs=DEGRADE), "too small to hold out"),
        (
            lambda: pf.learn_pairs(tiny(), [waves()], [waves()], pairs=DEGRADE, crop=99),
            "smaller than a patch of 99",
        ),
        (
            lambda: pf.learn_pairs(tiny(scale=3), [waves()], pairs=DEGRADE, crop=24),
            "let the pairs and the network fit together",
        ),
        (lambda: pf.learn_pairs(tiny(), [waves()], pairs=DEGRADE, steps=0), "each of 0 steps"),
    ],
)
def test_messages(call, message):
    with pytest.raises(pf.InputError, match=message):
        call()


def test_tables_leave_it_out_where_nothing_is_super_resolved(tmp_path):
    for name, solves in (("patchnr-superresolution", True), ("denoising", False)):
        problem = image_problems.PROBLEMS[name][0]
        write_image(tmp_path / "x.png", waves(48, 48))
        case = problem.case(tmp_path, tmp_path / "x.png", 0)
        assert image_tables._solves("acnn", case) == solves


@pytest.fixture
def files(as_users_do):
    write_image("train.tif", waves(90, 80))
    np.save("kernel.npy", KERNEL.numpy())
    write_image("truth.tif", waves(48, 40, 0.7))


def test_the_command_line_from_end_to_end(files, capsys):
    problem = ["--scale=2", "--noise=0.02", "--kernel=kernel.npy"]
    run = ["train", "acnn", "train.tif", *problem, "--width=8", "--layers=3", "--crop=16"]
    assert main([*run, "--batch=4", "--steps=80", "--lr=0.01", "-o", "m.safetensors"]) == 0
    assert "dB on the validation after 80 steps" in capsys.readouterr().out
    assert yaml.safe_load(Path("m.yaml").read_text())["command"] == "train acnn"
    assert not Path("m.state.safetensors").exists()
    problem = ["--problem=super-resolution", *problem]
    assert main(["simulate", "truth.tif", *problem, "-o", "y.tif"]) == 0
    use = ["reconstruct", "y.tif", *problem, "--truth=truth.tif"]
    learned = [*use, "--method=acnn", "--prior=m.safetensors", "-o", "x.tif"]
    assert main([*learned, "--report=page"]) == 0
    assert "x.tif: acnn, 1 steps" in capsys.readouterr().out
    assert Path("page/report.html").exists()
    assert main([*use, "--method=tv", "-o", "tv.tif"]) == 0

    def error(path):
        difference = read_image(path, slack=1) - read_image("truth.tif")
        return float(difference[..., 8:-8, 8:-8].square().mean())

    assert error("x.tif") < error("tv.tif")
    assert main(["info", "m.safetensors"]) == 0

    def refused(arguments, message):
        capsys.readouterr()
        assert main(arguments) == 2
        line = capsys.readouterr().err.strip()
        assert message in line
        assert "\n" not in line

    refused([*learned, "--noise=0.1"], "was trained for the noise 0.02")
    refused([*learned, "--weight=2"], "--weight 2.0 says nothing about the method acnn")
    refused([*use, "--method=acnn"], "train one with patchflow train acnn")
    other = [*learned[:2], "--problem=denoising", *learned[5:]]
    refused(
        [*other, "--truth=y.tif"], "super-resolution with scale 2 but the operator has no scale"
    )
    refused([*run, "--problem=denoising"], "does not lower the resolution")
    refused([*run[:-1], "--crop=15"], "not divisible by the scale 2")
    refused([*run, "--resume"], "to resume from")
