"""FBP and U-Net: the network, the symmetries of scans, fresh noise, learning, files, the command line, refusals."""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml

import patchflow as pf
from patchflow import scan_network
from patchflow.cli import main
from patchflow.cli.automatic import choose_for_scan
from patchflow.cli.scan import ScanFlags, read_scan
from patchflow.io.images import write_image
from patchflow.io.sinogram import read_sinogram
from patchflow.learn_scan import (
    DRAWS,
    LEAST_RELAXATION,
    REUSE,
    CorrectionLoss,
    SimulatedPairs,
)
from patchflow.networks.unet import UNet
from patchflow.numerics.dihedral import DIHEDRAL
from patchflow.problems.likelihood import Likelihood
from patchflow.problems.scan_geometry import geometry, projector
from patchflow.problems.simulated_scan import line_integrals, refined, scan_symmetries
from patchflow.reconstruct import total_variation
from patchflow.scan_network import ScanNetwork
from patchflow.solution import Solution
from patchflow.tomography_models import fbp_unet, single_scan

SIZE = 32


def scan(kept=slice(None), offset=0.0, angles=40):
    directions = (torch.arange(angles, dtype=torch.float64) + 0.5) * math.pi / angles
    return pf.ParallelBeam(
        (SIZE, SIZE), directions[kept], 47, pixel=0.26 / SIZE, spacing=0.0079, offset=offset
    )


def slices(count=4):
    """Ellipses of two tissues, each in another place."""
    i, j = torch.meshgrid(torch.arange(SIZE) - 15.5, torch.arange(SIZE) - 15.5, indexing="ij")
    images = []
    for k in range(count):
        x = torch.where((i / 14).square() + (j / 13).square() < 1, 0.25, 0.0)
        x[((i - k) / 8).square() + ((j + 4 - 2 * k) / 5).square() < 1] = 0.05
        images.append(x[None, None].to(torch.get_default_dtype()))
    return images


def small(operator=None, photons=500.0):
    torch.manual_seed(0)
    return fbp_unet(scan() if operator is None else operator, photons, widths=[32, 32])


def with_data_steps(shares=(0.5, 0.25)):
    torch.manual_seed(0)
    model = single_scan(scan(), 500.0, stages=1 + len(shares), widths=[8, 8])
    model.shares = torch.tensor(shares)
    return model


@pytest.mark.parametrize("skip", [0, 3])
def test_the_network_starts_at_zero_and_keeps_the_size(skip):
    network = UNet(2, widths=(4, 6, 8), skip=skip)
    z = torch.rand(2, 2, 13, 18)
    assert torch.equal(network(z), torch.zeros_like(z))
    torch.nn.init.normal_(network.tail.weight)
    out = network(z)
    assert out.shape == z.shape
    out.square().sum().backward()
    assert all(bool((p.grad != 0).any()) for p in network.parameters())


def test_the_network_gives_crops_what_it_gives_the_whole():
    """Away from the border of the crop, if that lies on the coarsest grid."""
    network = UNet(widths=(4, 6), skip=2)
    torch.nn.init.normal_(network.tail.weight)
    z = torch.rand(1, 1, 80, 80)
    whole, part = network(z), network(z[:, :, 16:64, 16:64])
    inside = slice(16, -16)
    torch.testing.assert_close(part[..., inside, inside], whole[..., 32:48, 32:48])


@pytest.mark.parametrize(
    ("operator", "count"),
    [
        (scan(), 8),
        (scan(slice(4, 36)), 4),  # a missing wedge around an axis: half a turn and two mirrors
        (scan(slice(0, 30)), 2),  # around a diagonal it would be four; elsewhere half a turn only
        (scan(offset=0.001), 2),  # upside down
        (scan(angles=41), 4),
    ],
)
def test_symmetries_of_a_scan(operator, count):
    kept = scan_symmetries(operator)
    assert len(kept) == count
    x = torch.rand(1, 1, SIZE, SIZE)
    u = operator.filtered_backprojection(operator(x))
    for g in DIHEDRAL:
        turned = operator.filtered_backprojection(operator(g(x)))
        same = torch.allclose(turned, g(u), rtol=0, atol=1e-9 * float(u.abs().max()))
        assert same == (g in kept)


def test_a_refined_grid_measures_the_same():
    operator = scan()
    fine = refined(operator, (96, 96))
    assert fine.pixel * 96 == pytest.approx(operator.pixel * SIZE)
    x = torch.nn.functional.avg_pool2d(slices(1)[0], 5, 1, 2)
    torch.testing.assert_close(line_integrals(x, fine), operator(x), rtol=0, atol=2e-4)
    with pytest.raises(pf.InputError, match="96 x 90 pixels does not cover"):
        refined(operator, (96, 90))


def test_noise_is_fresh_and_has_the_law_of_the_scan():
    model = small()
    images = slices(2)
    fine = refined(model.operator, (64, 64))
    pairs = SimulatedPairs(model, images, fine, SIZE, 1)
    seen = {}
    for _ in range(200):
        x, u = pairs()
        for g in DIHEDRAL:  # undo the turn
            for k, image in enumerate(images):
                if torch.equal(g.undo(x), image):
                    undone = g.undo(u)
                    seen.setdefault(k, {})[float(undone.sum())] = undone
    assert sorted(seen) == [0, 1]
    for k, found in seen.items():
        assert len(found) > 30
        draws = torch.stack(list(found.values()))
        other = torch.stack(
            [model.backproject(model.noise.draw(pairs.clean[k])[0]) for _ in range(100)]
        )
        # Draws are seen as a whole, so that mean and spread of the middle agree in standard errors.
        middle = (..., slice(14, 18), slice(14, 18))
        a, b = draws[middle].flatten(1).mean(1), other[middle].flatten(1).mean(1)
        error = math.sqrt(float(a.var()) / len(a) + float(b.var()) / len(b))
        assert abs(float(a.mean() - b.mean())) < 4 * error
        assert error < 0.1 * float(other[middle].std())
        ratio = float(draws[middle].var(0).mean() / other[middle].var(0).mean())
        assert 0.5 < ratio < 2


def test_it_learns_and_is_kept(tmp_path, single_precision):
    model = small()
    images = slices(5)
    record = pf.learn_scan(
        model, images[:4], images[4:], crop=SIZE, batch=2, steps=200, average=0.9, lr=1e-2
    )
    assert not any(p.requires_grad for p in model.parameters())
    truth = images[4]
    torch.manual_seed(5)
    y = model.noise.draw(line_integrals(truth, refined(model.operator, (64, 64))))[0]
    found, start = model(y), model.backproject(y)
    assert float(pf.psnr(found, truth)) > float(pf.psnr(start, truth)) + 4
    assert float(pf.psnr(found, truth)) > float(pf.psnr(model.operator.initial(y), truth)) + 4
    assert record.best < 0
    pf.save(tmp_path / "m.safetensors", model, images=images, seed=0)
    again = pf.load(tmp_path / "m.safetensors", type(model))
    torch.testing.assert_close(again(y), model(y), rtol=0, atol=1e-6)
    assert geometry(again.operator) == geometry(model.operator)


def test_the_loss_is_the_squared_error_in_units_of_the_error():
    model = small()
    u, x = torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8)
    model.scale_(u, x)
    error = (u - x).square().mean().sqrt()
    loss = CorrectionLoss(model)(x, u)
    torch.testing.assert_close(loss, (u - x).square().flatten(1).mean(1) / error**2)
    assert float(loss.detach().mean()) == pytest.approx(1)
    with pytest.raises(pf.InputError, match="learns from pairs"):
        CorrectionLoss(model)(x)


def test_a_data_step_is_the_most_probable_image():
    """Against a dense solution of the normal equations, with the variances of the counts."""
    model = with_data_steps((0.5,))
    model.error.fill_(0.02)
    # Twelve pixels along a side: then a few conjugate gradients are many.
    directions = (torch.arange(9, dtype=torch.float64) + 0.5) * math.pi / 9
    operator = pf.ParallelBeam((12, 12), directions, 17, pixel=0.26 / 12, spacing=0.022)
    model.operator = operator
    x = torch.rand(1, 1, 12, 12) * 0.3
    y, _ = model.noise.draw(operator(x))
    inputs = model.prepare(y)
    start, z, way = inputs.split(1, 1)
    assert torch.equal(z, start)  # networks start at zero
    basis = torch.eye(144).view(144, 1, 12, 12)
    matrix = operator(basis).flatten(1).T
    weight = (81.35858**2 * 500 * torch.exp(-81.35858 * y)).flatten()
    normal = matrix.T @ (weight[:, None] * matrix) + torch.eye(144) / (0.02 * 0.5) ** 2
    exact = torch.linalg.solve(normal, matrix.T @ (weight * (y - operator(z)).flatten()))
    error = float((way.flatten() - exact).norm() / exact.norm())
    assert error < 0.02, error
    wrong = torch.linalg.solve(normal, matrix.T @ (y - operator(z)).flatten())
    assert float((way.flatten() - wrong).norm() / wrong.norm()) > 0.1


def test_later_networks_see_what_the_earlier_ones_make():
    model = with_data_steps()
    images = slices(2)
    pairs = SimulatedPairs(model, images, refined(model.operator, (64, 64)), SIZE, 2)
    model.scale_(torch.cat([model.backproject(clean) for clean in pairs.clean]), torch.cat(images))
    x, inputs = pairs()
    assert inputs.shape == (2, 5, SIZE, SIZE)
    torch.testing.assert_close(model.results(inputs, [0, 1, 2]), inputs[:, [0, 1, 3]])
    inputs[:, 3] += 0.01  # or all stages would be wrong by the same
    wrong = [(inputs[:, [k]] - x).square().flatten(1).mean(1) / model.error**2 for k in (0, 1, 3)]
    drawn = [CorrectionLoss(model)(x, inputs) for _ in range(20)]
    found = [
        [torch.allclose(loss, wrong[0] + wrong[k], rtol=1e-6) for loss in drawn] for k in (1, 2)
    ]
    assert sorted([sum(found[0]), sum(found[1])])[0] > 0
    assert sum(found[0]) + sum(found[1]) == 20
    sum(loss.sum() for loss in drawn).backward()
    assert all(n.tail.weight.grad.abs().sum() > 0 for n in (*model.first, *model.later))
    model.requires_grad_(False)
    for network in (*model.first, *model.later):
        torch.nn.init.normal_(network.tail.weight, std=0.1)
    y = model.noise.draw(pairs.clean[0])[0]
    inputs = model.prepare(y)
    assert not torch.equal(inputs[:, 1], inputs[:, 0])
    # The last result is that of the last stage, and the ensemble commutes with the turns of the scan.
    torch.testing.assert_close(model(y), model.results(inputs, [2]).clamp(0, 1))
    turned = model.operator(slices(1)[0]), model.operator(slices(1)[0].flip(-1))
    one, other = (model(sinogram, ensemble=True) for sinogram in turned)
    scale = float(one.abs().max())
    torch.testing.assert_close(other, one.flip(-1), rtol=0, atol=1e-3 * scale)
    alone, mirrored = (model(sinogram) for sinogram in turned)
    assert float((mirrored - alone.flip(-1)).abs().max()) > 1e-2 * scale


def test_data_steps_learn_and_are_kept(tmp_path, single_precision):
    images = slices(5)
    model = single_scan(scan(), 500.0, stages=2, widths=[8, 8])
    record = pf.learn_scan(
        model, images[:4], images[4:], crop=SIZE, batch=2, steps=120, average=0.9, lr=1e-2
    )
    assert record.steps == 120
    torch.manual_seed(5)
    truth = images[4]
    y = model.noise.draw(line_integrals(truth, refined(model.operator, (64, 64))))[0]
    found = model(y, ensemble=True)
    assert float(pf.psnr(found, truth)) > float(pf.psnr(model.operator.initial(y), truth)) + 4
    pf.save(tmp_path / "m.safetensors", model, images=images, seed=0)
    again = pf.load(tmp_path / "m.safetensors", type(model))
    torch.testing.assert_close(again(y), model(y), rtol=0, atol=1e-6)
    assert again.shares.tolist() == model.shares.tolist() == pytest.approx([0.7])
    three = single_scan(scan(), 500.0, stages=3, widths=[8])
    assert three.shares.tolist() == pytest.approx([0.7, 0.4])
    with pytest.raises(pf.InputError, match="Got 0 stages and 1 members"):
        single_scan(scan(), 500.0, stages=0)
    with pytest.raises(pf.InputError, match="give as many of either and positive shares"):
        ScanNetwork(scan(), 500.0, list(again.first), list(again.later), (0.0,))


def test_total_variation_is_the_first_stage_where_directions_are_missing(
    single_precision, tmp_path
):
    images, kept = slices(3), scan(slice(6, 34))
    assert single_scan(scan(), 500.0, widths=[8]).variation is None
    model = single_scan(kept, 500.0, stages=3, widths=[8, 8])
    weight = 40 * math.sqrt(500 / 4096)
    assert model.variation == (pytest.approx(weight), 150)
    model.variation = model.variation._replace(steps=40)
    fine = refined(kept, (64, 64))
    y = model.noise.draw(line_integrals(images[0], fine))[0]
    likelihood = Likelihood(kept, model.noise)
    alone = total_variation.reconstruct(
        likelihood, y, kept.initial(y), weight=weight, max_iterations=40
    ).x
    estimate = model.estimate(y)
    torch.testing.assert_close(estimate, alone)
    inputs = model.prepare(y)
    assert torch.equal(inputs[:, [1]], estimate)
    assert torch.equal(inputs, model.prepare(y, estimate=estimate))
    torch.testing.assert_close(model(y), model.results(inputs, [2]).clamp(0, 1))
    assert inputs.shape[1] == 5
    record = pf.learn_scan(
        model, images[:2], images[2:], crop=SIZE, batch=2, steps=60, average=0.8, lr=1e-2
    )
    assert record.steps == 60
    u = model.backproject(y)
    left = (estimate - images[0]).norm() / (u - images[0]).norm()
    assert 0.5 * left < model.shares[0] < 2 * left
    assert float(model.shares[1] / model.shares[0]) == pytest.approx(0.4 / 0.7)
    assert (model(y) - images[0]).norm() < 0.9 * (estimate - images[0]).norm()
    pf.save(tmp_path / "m.safetensors", model, images=images, seed=0)
    again = pf.load(tmp_path / "m.safetensors", ScanNetwork)
    x = again(y, estimate=estimate)
    torch.testing.assert_close(x, model(y), rtol=0, atol=1e-5)
    assert again.variation == (pytest.approx(weight), 150)
    assert single_scan(scan(), 4096.0, start="tv", widths=[8]).variation == (30, 75)
    for start, stages in (("tv", 1), ("network", 0)):
        with pytest.raises(pf.InputError, match=f"as the start is '{start}'"):
            single_scan(kept, 500.0, start=start, stages=stages)
    with pytest.raises(pf.InputError, match="only later ones after total variation"):
        ScanNetwork(kept, 500.0, [], list(again.later), [0.7])


def test_where_directions_are_missing_a_share_of_each_correction_is_taken(tmp_path, monkeypatch):
    torch.manual_seed(0)
    kept = scan(slice(6, 34))
    model = single_scan(kept, 500.0, stages=3, widths=[8, 8])
    assert (model.relaxation, single_scan(scan(), 500.0, widths=[8]).relaxation) == (0.5, 1.0)
    for parameter in model.later.parameters():  # a new one changes nothing
        parameter.data += 0.1 * torch.randn_like(parameter)
    y, estimate = torch.rand(1, 1, 28, 47), torch.rand(1, 1, SIZE, SIZE)
    y, estimate = (t.to(next(model.parameters())) for t in (y, estimate))
    with torch.no_grad():
        inputs = model.prepare(y, estimate=estimate, relaxations=(0.9, 0.2))
        first = model.results(inputs, [1])
        assert (first - estimate).abs().max() > 1e-3
        torch.testing.assert_close(
            inputs[:, [3]], (estimate + 0.2 * (first - estimate)).clamp(0, 1)
        )
        own = model.prepare(y, estimate=estimate)
        torch.testing.assert_close(own[:, [3]], ((estimate + first) / 2).clamp(0, 1))
        last = (own[:, [3]] + model.results(own, [2])) / 2
        torch.testing.assert_close(model(y, estimate=estimate), last.clamp(0, 1))
    pf.save(tmp_path / "m.safetensors", single_scan(kept, 500.0, widths=[8], relaxation=0.25))
    assert pf.load(tmp_path / "m.safetensors", ScanNetwork).relaxation == 0.25
    with pytest.raises(pf.InputError, match="relaxation is 0"):
        ScanNetwork(kept, 500.0, [], list(model.later), [0.7], model.variation, 0)

    drawn = []
    monkeypatch.setattr(
        model, "prepare", lambda y, estimate, relaxations: drawn.append(relaxations) or own
    )
    monkeypatch.setattr(model, "estimate", lambda y: estimate)
    pairs = SimulatedPairs(model, [estimate] * 40, refined(kept, (2 * SIZE, 2 * SIZE)), SIZE, 1)
    pairs()
    numbers = torch.tensor(drawn[:40])
    assert numbers.shape == (40, 2)
    assert (numbers >= LEAST_RELAXATION).all()
    assert (numbers <= 1).all()
    assert numbers.std() > 0.1
    model.relaxation = 1.0
    monkeypatch.setattr(model, "prepare", lambda y, estimate: drawn.append(1) or own)
    pairs._prepare(0)
    assert drawn.pop() == 1


def test_half_of_total_variation_is_no_start(monkeypatch):
    model = single_scan(scan(slice(6, 34)), 500.0, stages=2, widths=[8, 8])
    y = torch.rand(1, 1, 28, 47)
    half = Solution(torch.zeros(1, 1, SIZE, SIZE), [1.0], 1, False, True)
    monkeypatch.setattr(scan_network, "primal_dual", lambda *arguments, **options: half)
    with pytest.raises(KeyboardInterrupt):
        model(y)


def test_noise_is_renewed_less_often_after_total_variation(monkeypatch):
    images = slices(2)
    model = single_scan(scan(slice(6, 34)), 500.0, stages=2, widths=[8, 8])
    calls = []
    monkeypatch.setattr(
        ScanNetwork, "estimate", lambda self, y: calls.append(y) or y.new_ones(1, 1, SIZE, SIZE)
    )
    pairs = SimulatedPairs(model, images, refined(model.operator, (64, 64)), SIZE, 1)
    for _ in range(REUSE * (2 * DRAWS - 1) - 1):
        pairs()
    assert len(calls) == 2
    for _ in range(REUSE * 2):
        pairs()
    assert len(calls) == 4
    assert not torch.equal(calls[0], calls[2])


def test_members_differ_and_their_mean_is_taken():
    torch.manual_seed(0)
    pair = single_scan(scan(), 500.0, stages=2, widths=[8, 8], members=2)
    for network in (*pair.first, *pair.later):
        torch.nn.init.normal_(network.tail.weight, std=0.1)
    pair.error.fill_(0.02)
    pair.requires_grad_(False)
    y = pair.noise.draw(pair.operator(slices(1)[0]))[0]
    inputs = pair.prepare(y)
    alone = [
        ScanNetwork(pair.operator, 500.0, [first], [later], [0.7])
        for first, later in zip(pair.first, pair.later, strict=True)
    ]
    for model in alone:
        model.load_state_dict({"error": pair.error}, strict=False)
        assert not torch.allclose(model.results(inputs, [1]), pair(y))
    apart = torch.cat([model.results(inputs, [1]) for model in alone], 1)
    torch.testing.assert_close(pair.results(inputs, [1]), apart)
    torch.testing.assert_close(pair(y), apart.mean(1, keepdim=True).clamp(0, 1))
    x = slices(1)[0]
    losses = [CorrectionLoss(model)(x, inputs) for model in alone]
    torch.testing.assert_close(CorrectionLoss(pair)(x, inputs), sum(losses) / 2)


def test_another_scan_is_refused():
    model = small()
    assert model.check(scan(), 500.0) == ""
    assert model.check(projector(geometry(scan())), 510.0) == ""
    shuffled = scan().select(torch.randperm(40))
    assert model.check(shuffled, 500.0) == ""
    assert "trained for 500 photons per bin, the scan has 800" in model.check(scan(), 800.0)
    for operator, photons, message in (
        (scan(), 1200.0, "1200 photons per bin but the model was trained for 500"),
        (scan(slice(4, 36)), 500.0, "angles 32 from 20.25 to 159.8 degrees but"),
        (scan(offset=0.001), 500.0, "detector offset 0.001"),
        (scan(angles=50), 500.0, "angles 50 from"),
        (pf.ParallelBeam((SIZE, SIZE), scan().angles, 47, pixel=1.0), 500.0, "pixel 1.0"),
        (pf.ParallelBeam((30, 32), scan().angles, 47), 500.0, r"image \[30, 32\]"),
    ):
        with pytest.raises(pf.InputError, match=message):
            model.check(operator, photons)


def test_bad_input_is_refused():
    model = small()

    def refused(message, images, **settings):
        with pytest.raises(pf.InputError, match=message):
            pf.learn_scan(model, images, **settings)

    refused("one grey image of 32 x 32", [torch.rand(1, 1, 30, 32)] * 2)
    refused("There are 1 training images and none to validate on", slices(1))
    refused("Got crops of 8 x 8", slices(), crop=8)
    with pytest.raises(pf.InputError, match="and -1 skip channels"):
        UNet(skip=-1)
    with pytest.raises(pf.InputError, match="preset is 'published'"):
        fbp_unet(scan(), 500.0, preset="published")
    with pytest.raises(pf.InputError, match="made for 1"):
        UNet(widths=[2])(torch.rand(1, 2, 4, 4))
    with pytest.raises(pf.InputError, match="Got 0.0 photons"):
        small(photons=0.0)


@pytest.mark.usefixtures("as_users_do")
class TestCommandLine:
    SCAN = ("--angles=30", "--photons=500", "--field-of-view=0.26", "--fine=64")
    TINY = ("--widths=[8,16]", "--crop=32", "--batch=2", "--steps=60", "--threads=1")

    @pytest.fixture(autouse=True)
    def files(self, as_users_do):
        pytest.importorskip("h5py")
        images = slices(5)
        write_image("train.tif", torch.cat(images[:4]))
        write_image("test.tif", images[4])
        assert main(["simulate", "test.tif", "--problem=ct", *self.SCAN, "-o", "y.h5"]) == 0

    def test_from_slices_to_report(self, capsys):
        assert (
            main(["train", "fbp-unet", "train.tif", *self.SCAN, *self.TINY, "-o", "m.safetensors"])
            == 0
        )
        assert "dB on the validation slices after 60 steps" in capsys.readouterr().out
        run = ["reconstruct", "y.h5", "--problem=ct", "--threads=1"]
        method = [*run, "--method=fbp-unet", "--prior=m.safetensors", "--truth=test.tif"]
        assert main([*method, "-o", "x.tif", "--report=page"]) == 0
        told = capsys.readouterr().out
        assert "Filtered backprojection corrected by a U-Net." in told
        assert main([*run, "--method=fbp", "-o", "f.tif"]) == 0
        truth = pf.read_stack("test.tif")
        quality = [float(pf.psnr(pf.read_stack(p, slack=1.0), truth)) for p in ("x.tif", "f.tif")]
        assert quality[0] > quality[1] + 1
        assert Path("page/report.html").exists()
        assert main(["info", "m.safetensors"]) == 0
        assert "(30 values)" in capsys.readouterr().out
        assert main(["reconstruct", "--config=x.yaml", "-o", "again.tif"]) == 0

    def test_a_few_slices_with_data_steps(self, capsys):
        train = ["train", "single-scan", "train.tif", *self.TINY, *self.SCAN]
        assert main([*train, "--stages=2", "--members=2", "-o", "s.safetensors"]) == 0
        run = ["reconstruct", "y.h5", "--problem=ct", "--method=single-image", "--threads=1"]
        told = capsys.readouterr().out
        assert "dB on the validation slices after 60 steps" in told
        assert main([*run, "--prior=s.safetensors", "--truth=test.tif", "-o", "x.tif"]) == 0
        assert "An unrolled network, learned from a few slices." in capsys.readouterr().out
        assert main([*run[:3], "--method=fbp", "-o", "f.tif"]) == 0
        truth = pf.read_stack("test.tif")
        quality = [float(pf.psnr(pf.read_stack(p, slack=1.0), truth)) for p in ("x.tif", "f.tif")]
        assert quality[0] > quality[1] + 1
        auto = ["reconstruct", "y.h5", "--problem=ct", "--method=auto", "--prior=s.safetensors"]
        assert main([*auto, "-o", "auto.tif"]) == 0
        assert "it was trained for this very scan" in capsys.readouterr().out
        one, other = (pf.read_stack(path, slack=1.0) for path in ("auto.tif", "x.tif"))
        assert torch.equal(one, other)
        pf.save("nr.safetensors", pf.patch_nr(size=3, layers=1, hidden=4))
        assert main([*auto[:-1], "--prior=.", "--report=page", "-o", "auto.tif"]) == 0
        told = capsys.readouterr().out
        assert "it was trained for this very scan" in told
        assert "No novelty map can be drawn, as nr.safetensors has no thresholds" in told
        Path("nr.safetensors").unlink()
        other = [word.replace("y.h5", "z.h5") for word in auto]
        scan = ["--angles=24", *self.SCAN[1:]]
        assert main(["simulate", "test.tif", "--problem=ct", *scan, "-o", "z.h5"]) == 0
        assert main([*other, "-o", "auto.tif"]) == 0
        told = capsys.readouterr().out
        assert "total variation needs no model" in told
        assert "s.safetensors is for another scan" in told
        # With missing directions a density of patches goes on from it, total variation does not.
        limited = "--limited=18:162"
        short = ["--stages=2", "--steps=15", limited]
        assert main([*train, *short, "-o", "w.safetensors"]) == 0
        wedge = [*auto[:-1], "--prior=w.safetensors", limited, "-o", "w.tif"]
        assert main(wedge) == 0
        told = capsys.readouterr().out
        assert "Method single-image with w.safetensors" in told
        assert "it was trained for this very scan" in told
        Path("s.safetensors").rename("s.hidden")
        pf.save("nr.safetensors", pf.patch_nr(size=3, layers=1, hidden=4))
        choice = choose_for_scan(".", lambda: read_scan("y.h5", ScanFlags(limited="18:162")))
        found = (choice.method, choice.prior, choice.start)
        assert found == ("patchnr", "nr.safetensors", "w.safetensors")
        assert "it improves the result of w.safetensors" in choice.reason
        assert main([*auto[:-1], "--prior=.", limited, "--steps=3", "-o", "auto.tif"]) == 0
        assert "3 steps, from the networks." in capsys.readouterr().out
        assert yaml.safe_load(Path("auto.yaml").read_text())["start"] == "w.safetensors"
        further = ["--prior=nr.safetensors", limited, "--start=w.safetensors", "--steps=3"]
        assert main([*auto[:-1], *further, "-o", "auto.tif"]) == 0
        told = capsys.readouterr().out
        assert re.search(r"patchNR, weight .*, 3 steps, from the networks\.", told)
        again = yaml.safe_load(Path("auto.yaml").read_text())
        assert (again["method"], again["start"]) == ("patchnr", "w.safetensors")
        # Error bars are of one start.
        write_image("known.tif", torch.cat(slices(8)[5:]))
        known = ["--problem=ct", *self.SCAN, "--method=patchnr", *further, "--output=bars"]
        assert main(["calibrate", "known.tif", *known]) == 0
        assert main(["calibrate", "train.tif", *known]) == 2
        assert "w.safetensors was learned from" in capsys.readouterr().err
        barred = [*auto[:3], "--method=patchnr", "--calibration=bars", "-o", "bars.tif"]
        for words, warned in ((further, ""), ([*further[:2], further[3]], r"solver \(start\);")):
            capsys.readouterr()
            assert main([*barred, *words]) == 0
            told = capsys.readouterr().out
            assert re.search(warned, told) if warned else "Warning" not in told
        for words, message in (
            (["--method=tv", "--start=w.safetensors"], "says nothing about the method tv"),
            (
                ["--prior=nr.safetensors", "--start=nr.safetensors"],
                "is no model of patchflow train",
            ),
            (["--prior=nr.safetensors", "--start=w.safetensors"], "but the model was trained for"),
        ):
            assert main(["reconstruct", "y.h5", "--problem=ct", *words]) == 2
            assert re.search(message, capsys.readouterr().err)
        Path("s.hidden").rename("s.safetensors")
        unet = [*run[:3], "--method=fbp-unet", "--prior=s.safetensors"]
        for words, message in (
            (run, "single-image needs --prior"),
            (unet, "fbp-unet does not take a model of single_scan"),
            ([*train, "--stages=0"], "Got 0 stages"),
        ):
            assert main(words) == 2
            assert message in capsys.readouterr().err

    def test_the_scan_of_a_file(self, capsys):
        train = ["train", "fbp-unet", "train.tif", "--scan=y.h5", "--fine=64", *self.TINY]
        assert main([*train, "-o", "m.safetensors"]) == 0
        model = pf.load("m.safetensors", torch.nn.Module)
        assert geometry(model.operator)["bins"] == read_sinogram("y.h5").data.shape[3]
        assert model.photons == 500

    def test_refusals(self, capsys):
        train = ["train", "fbp-unet", "train.tif", *self.TINY]
        assert main([*train, *self.SCAN, "--limited=18:162", "-o", "limited.safetensors"]) == 0
        pf.save("nr.safetensors", pf.patch_nr(size=3, layers=1, hidden=4))
        run = ["reconstruct", "y.h5", "--problem=ct", "--method=fbp-unet"]
        for words, message in (
            ([*run], "fbp-unet needs --prior"),
            ([*run, "--prior=limited.safetensors"], "trained for 24 from"),
            ([*run, "--prior=nr.safetensors"], "does not take a model of patch_nr"),
            ([*run, "--prior=limited.safetensors", "--weight=1"], "--weight 1.0 says nothing"),
            ([*run, "--prior=limited.safetensors", "--weight=auto"], "--weight auto says nothing"),
            (
                ["reconstruct", "y.h5", "--problem=ct", "--prior=limited.safetensors"],
                "does not take",
            ),
            (["reconstruct", "test.tif", "--problem=denoising", "--method=fbp-unet"], "fbp-unet"),
            (train, "needs --angles"),
            ([*train, *self.SCAN, "--size=32"], "--size 32 says nothing without --scan"),
            ([*train, "--scan=y.h5", "--bins=9"], "--bins 9 says nothing beside --scan"),
            ([*train, "--angles=30"], "give --field-of-view"),
            (["train", "fbp-unet", "test.tif", *self.SCAN], "give at least two"),
        ):
            capsys.readouterr()
            assert main(words) == 2, words
            error = capsys.readouterr().err.strip()
            assert message in error
            assert "\n" not in error
