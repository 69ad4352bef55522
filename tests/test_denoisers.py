"""Denoisers: their networks, how they are learned, their files, and the command line."""

import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

import patchflow as pf
from patchflow.cli import main
from patchflow.io.images import read_image, write_image
from patchflow.learn_denoiser import Constrained, DenoisingLoss
from patchflow.networks.denoiser import Denoiser
from patchflow.networks.drunet import DRUNet
from patchflow.networks.proximal_denoiser import ProximalDenoiser
from patchflow.numerics.averaged import check_lipschitz, measured_lipschitz
from patchflow.numerics.stiefel import polar

SMALL = {"width": 2, "features": 4, "size": 3, "layers": 2}


def waves(rows=48, columns=48, shift=0.0):
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    wave = 0.5 + 0.25 * torch.sin(0.5 * i + shift) + 0.2 * torch.cos(0.3 * j)
    return wave[None, None].to(torch.get_default_dtype())


def test_the_unet_is_homogeneous_and_keeps_odd_sizes():
    network = DRUNet(channels=2, widths=(4, 6, 8), blocks=1)
    x = torch.rand(2, 2, 13, 10)
    found = network(x, 0.1)
    assert found.shape == x.shape
    assert torch.allclose(network(3 * x, 0.3), 3 * found)
    assert not torch.allclose(network(x, 0.2), found)
    each = network(x, torch.tensor([0.1, 0.2]))
    assert torch.allclose(each[:1], found[:1])
    assert torch.allclose(each[1:], network(x[1:], 0.2))
    assert not [name for name, _ in network.named_parameters() if "bias" in name]


def test_networks_of_one_level_scale():
    for network in (pf.dncnn(layers=3, width=4), pf.pnn(**SMALL), pf.pnn(gamma=1.5, **SMALL)):
        x, level = torch.rand(1, 1, 12, 12), network.levels[0]
        assert torch.allclose(network(x, 2 * level), 2 * network(x / 2, level))


def test_constants_of_proximal_denoisers():
    direct, residual = pf.pnn(**SMALL), pf.pnn(gamma=5.0, **SMALL)
    single = pf.pnn(gamma=1.99, **(SMALL | {"layers": 1}))
    assert (direct.lipschitz, direct.averagedness) == (1.0, pytest.approx(2 / 3))
    assert (residual.lipschitz, residual.averagedness) == (pytest.approx(4), float("inf"))
    assert (single.lipschitz, single.averagedness) == (pytest.approx(1), pytest.approx(0.995))
    x = torch.rand(1, 1, 10, 10)
    for denoiser in (direct, residual, single):
        denoiser.network.finish_()
        denoiser.requires_grad_(False)
        found = float(measured_lipschitz(lambda z, d=denoiser: d(z, 0.05), x))
        assert found <= denoiser.lipschitz + 1e-6
    # Twice the network is outside: the check is not blind.
    with pytest.raises(pf.NumericalError):
        check_lipschitz(lambda z: 2 * direct(z, 0.05), x)


def test_one_clipping_layer_leaves_shrunk_features():
    """What a residual of clipped features leaves of an image: the same features, shrunk."""
    denoiser = pf.pnn(gamma=1.0, **(SMALL | {"layers": 1})).requires_grad_(False)
    layer, lift = denoiser.network.layers[0], denoiser.network.lift
    for convolution in (
        layer.convolution,
        lift,
    ):  # exactly Parseval: orthonormal mixtures of pixels
        features, channels = convolution.weight.shape[:2]
        convolution.weight.zero_()[:, :, 1, 1] = polar(torch.randn(features, channels))
    layer.activation.bias.normal_()
    bias = layer.activation.unit * layer.activation.bias.view(-1, 1, 1)
    x = torch.rand(1, 1, 12, 12)
    u = layer.convolution(lift(x - 0.5)) + bias
    shrunk = torch.nn.functional.softshrink(u, 0.03) - bias
    expected = 0.5 + lift.adjoint(layer.convolution.adjoint(shrunk))
    assert torch.allclose(denoiser(x, denoiser.levels[0]), expected)
    assert not torch.allclose(x, expected, atol=0.01)


def test_published_weights_denoise(data_dir, single_precision):
    network = pf.load_dncnn(data_dir / "weights" / "dncnn_25.safetensors")
    truth = read_image(data_dir / "noncommercial" / "bsd68" / "test052.png", grey=True)
    truth = truth[:, :, :64, :64]
    y = truth + 25 / 255 * torch.randn(truth.shape)
    with torch.no_grad():
        found = float(pf.psnr(network(y, 25 / 255), truth))
    assert found > float(pf.psnr(y, truth)) + 6


def test_other_files_are_no_dncnn(tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"model.0.weight": torch.zeros(2, 1, 3, 3)}, path)
    with pytest.raises(pf.InputError, match="does not hold a DnCNN"):
        pf.load_dncnn(path)
    state = pf.dncnn(layers=2, width=2).state_dict()
    safetensors.torch.save_file({k: v * float("nan") for k, v in state.items()}, path)
    with pytest.raises(pf.InputError, match="not finite; download"):
        pf.load_dncnn(path)
    safetensors.torch.save_file(state, path)
    x = torch.rand(1, 1, 8, 8)
    assert torch.equal(pf.load_dncnn(path).model(x), pf.load_dncnn(path).model(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: pf.drunet(widths=[4, 6], blocks=1, low=0.05, high=0.1),
        lambda: pf.pnn(gamma=1.99, **SMALL),
        lambda: pf.dncnn(layers=3, width=4, level=0.1),
    ],
)
def test_models_are_read_as_they_were_written(make, tmp_path):
    model = make()
    pf.save(tmp_path / "m.safetensors", model)
    found = pf.load(tmp_path / "m.safetensors", Denoiser)
    x = torch.rand(1, 1, 12, 12)
    assert torch.equal(found(x, 0.1), model(x, 0.1))
    assert found.levels == model.levels
    assert not any(p.requires_grad for p in found.parameters())


def test_the_loss_is_the_expected_error_of_a_known_denoiser():
    """The denoiser that does nothing: the error is the noise, sigma^2 over sigma."""
    network = DRUNet(widths=(2,), blocks=1)
    network.network.tail.weight.data.zero_()
    energy = DenoisingLoss(network)(torch.zeros(4, 1, 64, 64), torch.full((4,), 0.2))
    error = 5 * 0.2 * (2 / 64**2) ** 0.5
    assert (energy - 0.2).abs().max() < error
    # It would see the variance of another level.
    assert (energy - 0.25).abs().min() > error


def test_training_helps_and_keeps_the_constraint(single_precision):
    x = waves(64, 64)
    for denoiser in (
        pf.drunet(widths=[4, 8], blocks=1, low=0.1, high=0.1),
        pf.pnn(level=0.1, **SMALL),
    ):
        result = pf.learn_denoiser(denoiser, [x], steps=120, crop=16, batch=4, lr=1e-2, average=0.9)
        # Noise of 0.1 has 20 dB.
        assert -result.best > 21
        assert not any(p.requires_grad for p in denoiser.parameters())
        if isinstance(denoiser, ProximalDenoiser):
            assert denoiser.network.error <= 1e-5
            assert check_lipschitz(denoiser.network, x[:, :, :16, :16]) <= 1 + 1e-3


def test_the_penalty_takes_the_place_of_the_projection(single_precision):
    denoiser = pf.pnn(level=0.1, **SMALL)
    energy = DenoisingLoss(denoiser, penalty=10.0)
    with torch.no_grad():
        for convolution in denoiser.network._convolutions():
            convolution.weight.mul_(1.5)
        before = float(denoiser.network.penalty())
    pf.fit(energy, lambda: (torch.rand(2, 1, 12, 12), torch.full((2,), 0.1)), steps=150, lr=1e-2)
    assert float(denoiser.network.penalty()) < 0.1 * before
    with pytest.raises(pf.InputError, match="Parseval penalty is 1.0 for a DRUNet"):
        DenoisingLoss(pf.drunet(), penalty=1.0)


def test_gradients_are_shortened_but_of_proximal_networks(monkeypatch):
    shorten, norms = torch.nn.utils.clip_grad_norm_, []

    def watched(parameters, largest):
        given = list(parameters)
        before = shorten(given, largest)
        after = torch.stack([p.grad.norm() for p in given if p.grad is not None]).norm()
        norms.append((float(before), float(after)))
        return before

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    options = {"steps": 4, "crop": 12, "batch": 2, "warmup": 1}
    # Far outside of [0, 1], where gradients are long.
    pf.learn_denoiser(pf.drunet(widths=(4, 8), low=0.1), [100 * waves()], **options)
    assert len(norms) == 4
    assert max(before for before, _ in norms) > 1
    assert max(after for _, after in norms) == pytest.approx(0.5, rel=1e-3)
    pf.learn_denoiser(pf.pnn(level=0.1, **SMALL), [waves()], **options)
    assert len(norms) == 4


def test_an_interrupted_training_is_resumed_bit_by_bit(tmp_path, single_precision, monkeypatch):
    def run(steps_before_interrupt):
        torch.manual_seed(3)
        denoiser = pf.pnn(level=0.1, **SMALL)
        state = tmp_path / f"{steps_before_interrupt}.safetensors"
        options = {"steps": 20, "crop": 12, "batch": 2, "checkpoint": state}
        if steps_before_interrupt:
            calls, draw = [], Constrained.__call__

            def interrupted(self):
                calls.append(0)
                if len(calls) > steps_before_interrupt:
                    raise KeyboardInterrupt
                return draw(self)

            with monkeypatch.context() as patch:
                patch.setattr(Constrained, "__call__", interrupted)
                assert pf.learn_denoiser(denoiser, [waves()], **options).stopped == "interrupted"
            denoiser.requires_grad_(True)
            options["resume"] = True
        pf.learn_denoiser(denoiser, [waves()], **options)
        return denoiser.state_dict()

    whole, resumed = run(0), run(7)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pf.learn_denoiser(pf.drunet(), [torch.zeros(1, 3, 99, 99)]), "3 channels"),
        (lambda: pf.learn_denoiser(pf.drunet(), []), "no training images"),
        (lambda: pf.learn_denoiser(pf.drunet(), [waves()], crop=4), "crops of 4 x 4"),
        (lambda: pf.learn_denoiser(pf.drunet(), [waves(60, 60)]), "too small to hold out"),
        (lambda: pf.drunet(widths=[]), r"Got widths \[\]"),
        (lambda: pf.drunet(low=0.3, high=0.2), "noise levels are 0.3 to 0.2"),
        (lambda: pf.drunet(preset="big"), "preset is 'big'"),
        (lambda: pf.dncnn(layers=1), "Got 1 layers"),
        (lambda: pf.pnn(gamma=0.0), "Got gamma 0.0"),
        (lambda: pf.drunet(channels=0), "have 0 channels"),
        (lambda: DenoisingLoss(pf.drunet())(torch.zeros(1, 1, 8, 8)), "learns at noise levels"),
    ],
)
def test_messages(call, message):
    with pytest.raises(pf.InputError, match=message):
        call()


@pytest.fixture
def files(as_users_do):
    write_image("train.tif", waves())
    truth = waves(40, 44, 0.7)
    write_image("truth.tif", truth)
    torch.manual_seed(1)
    write_image("y.tif", truth + 0.1 * torch.randn_like(truth))


def error(path):
    return float((read_image(path, slack=1) - read_image("truth.tif")).square().mean())


@pytest.mark.parametrize(
    ("train", "method"),
    [
        (["denoiser", "--widths=[4,8]", "--cell=1", "--high=0.2"], "dpir"),
        (["pnn", "--width=2", "--features=4", "--size=3", "--layers=2", "--level=0.1"], "pnp-pnn"),
    ],
)
def test_the_command_line_from_end_to_end(files, train, method, capsys):
    run = ["train", train[0], "train.tif", *train[1:], "--steps=150", "--crop=16", "--batch=4"]
    assert main([*run, "--lr=0.01", "-o", "m.safetensors"]) == 0
    told = capsys.readouterr().out
    assert "dB on the validation crops" in told
    assert yaml.safe_load(Path("m.yaml").read_text())["command"] == f"train {train[0]}"
    assert not Path("m.state.safetensors").exists()
    if train[0] == "pnn":
        assert float(re.findall(r"network: ([\d.]+) measured", told)[0]) <= 1 + 1e-3
        assert "averaged with 0.667" in told
    run = ["reconstruct", "y.tif", "--problem=denoising", "--noise=0.1", f"--method={method}"]
    run += ["--prior=m.safetensors", "--truth=truth.tif", "--report=page", "-o", "x.tif"]
    assert main(run) == 0
    assert error("x.tif") < 0.8 * error("y.tif")
    assert f"{method}, weight" in capsys.readouterr().out
    assert main(["info", "m.safetensors"]) == 0


def test_mistakes_on_the_command_line(files, capsys):
    def refused(arguments, message):
        capsys.readouterr()
        assert main(arguments) == 2
        line = capsys.readouterr().err.strip()
        assert message in line
        assert "\n" not in line

    run = ["reconstruct", "y.tif", "--problem=denoising", "--noise=0.1"]
    refused([*run, "--method=dpir"], "train one with patchflow train denoiser")
    refused([*run, "--method=pnp-pnn"], "train one with patchflow train pnn")
    refused([*run, "--method=dpir", "--prior=nowhere.safetensors"], "nowhere.safetensors")
    pf.save("pnn.safetensors", pf.pnn(**SMALL))
    refused([*run, "--method=dpir", "--prior=pnn.safetensors"], "does not take a model of pnn")
    pf.save("steep.safetensors", pf.pnn(gamma=5.0, **SMALL))
    refused([*run, "--method=pnp-pnn", "--prior=steep.safetensors"], "need not converge")
    pf.save("colour.safetensors", pf.drunet(channels=3, widths=[2], blocks=1))
    refused([*run, "--method=dpir", "--prior=colour.safetensors"], "the denoiser was made for 3")
    refused(["train", "pnn", "train.tif", "--resume"], "to resume from")
    refused(["train", "denoiser", "train.tif", "--crop=40"], "too small to hold out")


def test_published_weights_are_a_prior_of_dpir(files):
    safetensors.torch.save_file(pf.dncnn(layers=3, width=4).state_dict(), "published.safetensors")
    run = ["reconstruct", "y.tif", "--problem=denoising", "--noise=0.1", "--method=dpir"]
    assert main([*run, "--prior=published.safetensors", "-o", "x.tif"]) == 0
