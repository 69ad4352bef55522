"""Reconstructors learned from one image: windows, networks, what they are for, and how they learn."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch

from patchflow import models
from patchflow.cli import main
from patchflow.errors import InputError
from patchflow.image_models import SingleImage, single_image
from patchflow.io.images import write_image
from patchflow.learn_single_image import ReconstructionLoss, learn_single_image
from patchflow.networks.unrolled import UnrolledNetwork
from patchflow.numerics.dihedral import DIHEDRAL
from patchflow.numerics.windows import WindowSampler, middle
from patchflow.problems.blur import Blur, downsample, gaussian_kernel
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.operator import Composition, Identity
from patchflow.problems.sampling import Mask, Subsample
from patchflow.problems.signature import differs, disagreements, signature
from patchflow.problems.turns import commuting
from patchflow.reconstruct.single_image import reconstruct


def test_windows_are_of_the_image_everywhere_alike() -> None:
    torch.manual_seed(0)
    image = torch.arange(35.0).view(1, 1, 5, 7)
    sampler = WindowSampler([image], (3, 4), 2000, dihedral=True)
    windows = sampler()
    assert windows.shape == (2000, 1, 3, 4)
    known = {}
    for g in DIHEDRAL:
        rows, columns = (3, 4) if g.turns % 2 == 0 else (4, 3)
        for top in range(5 - rows + 1):
            for left in range(7 - columns + 1):
                window = g(image[..., top : top + rows, left : left + columns])
                known[tuple(window.flatten().tolist())] = (g, top, left)
    seen = [known[tuple(window.flatten().tolist())] for window in windows]
    # Each symmetry has probability 1/8; then each place is alike. Five standard errors.
    for g in DIHEDRAL:
        count = sum(found[0] == g for found in seen)
        assert abs(count - 250) < 5 * math.sqrt(2000 * (1 / 8) * (7 / 8))
    straight = [found[1:] for found in seen if found[0] == DIHEDRAL[0]]
    for place in {(top, left) for top in range(3) for left in range(4)}:
        expected = len(straight) / 12
        assert abs(straight.count(place) - expected) < 5 * math.sqrt(expected)


def test_windows_go_on_periodically_if_asked() -> None:
    torch.manual_seed(0)
    image = torch.arange(16.0).view(1, 1, 4, 4)
    windows = WindowSampler([image], (4, 4), 300, wrap=True)()
    corners = {float(window[0, 0, 0]) for window in windows}
    assert len(corners) == 16
    for window in windows[:20]:
        row, column = divmod(int(window[0, 0, 0]), 4)
        assert torch.equal(window, image[0].roll((-row, -column), (-2, -1)))
    with pytest.raises(InputError, match="4 x 4 pixels but windows have 5 x 4"):
        WindowSampler([image], (5, 4), 1)
    assert torch.equal(middle(image, (2, 2))[0, 0], torch.tensor([[5.0, 6.0], [9.0, 10.0]]))


@pytest.mark.parametrize("shape", [(24, 24), (22, 26)])
def test_an_untrained_network_is_the_start_and_its_data_steps_are_proximal_maps(shape) -> None:
    torch.manual_seed(0)
    operator = Blur(gaussian_kernel(5, 1.0), shape, "periodic")
    y = operator(torch.rand(2, 1, *shape))
    network = UnrolledNetwork(cell=4, width=8, blocks=1).requires_grad_(False)
    torch.testing.assert_close(network(y, operator), operator.initial(y))
    rho = 0.3
    network = UnrolledNetwork(cell=4, width=8, blocks=1, stages=2, strengths=(rho,))
    x = network(y, operator).detach()
    # The minimiser of |A u - y|^2 / 2 + rho |u - v|^2 / 2 has no slope.
    v = operator.initial(y)
    slope = operator.adjoint(operator(x) - y) + rho * (x - v)
    assert float(slope.abs().max()) < 1e-12


def test_the_gradient_goes_through_the_data_steps() -> None:
    torch.manual_seed(0)
    operator = downsample((16, 16), 4)
    network = UnrolledNetwork(cell=4, width=4, blocks=1, stages=2, strengths=(0.2,))
    for stage in network.stages:
        torch.nn.init.normal_(stage.tail.weight, std=0.1)
    model = SingleImage([network], {})
    x = torch.rand(2, 1, 16, 16)
    y = operator(x) + 0.01 * torch.randn(2, 1, 4, 4)
    loss = ReconstructionLoss(model, operator)
    weight = network.stages[0].head.weight
    loss(x, y).sum().backward()
    direction = torch.randn_like(weight)
    slope = float((weight.grad * direction).sum())
    values = []
    for step in (-1e-5, 1e-5):
        with torch.no_grad():
            weight += step * direction
            values.append(float(loss(x, y).sum()))
            weight -= step * direction
    assert abs((values[1] - values[0]) / 2e-5 - slope) < 1e-6 * abs(slope) + 1e-9


@pytest.mark.parametrize(
    ("operator", "count"),
    [
        (downsample((48, 48)), 8),
        (downsample((48, 64)), 4),
        (downsample((48, 48), 2), 8),
        (downsample((48, 48), 2, boundary="valid"), 8),
        (Blur(gaussian_kernel(5, 1.0), (16, 16)), 8),
        (Identity((9, 9)), 8),
        (Blur(torch.tensor([[0.5, 0.3, 0.2]]), (16, 16)), 2),  # a reflection across the motion
        (Mask(torch.rand(16, 16, generator=torch.Generator().manual_seed(1)) > 0.5), 1),
    ],
)
def test_turns_that_an_operator_commutes_with(operator, count) -> None:
    turns = commuting(operator)
    assert len(turns) == count
    torch.manual_seed(5)
    x = torch.randn(1, 1, *operator.domain_shape)
    for turn in turns:
        torch.testing.assert_close(operator(turn.symmetry(x)), turn(operator(x)))


def test_descriptions_tell_measurements_apart() -> None:
    def described(operator, std=0.01):
        return signature(GaussianLikelihood(operator, std))

    blur = described(downsample((48, 48)))
    assert not differs(blur, described(downsample((96, 64))))
    assert differs(blur, described(downsample((48, 48), 2))) == ["kernel", "stride"]
    assert differs(blur, described(downsample((48, 48)), 0.02)) == ["noise"]
    assert not differs(blur, described(downsample((48, 48)), 0.010001))
    assert "operator" in differs(blur, described(Identity((48, 48))))
    mask = torch.ones(8, 8)
    one = described(Mask(mask))
    mask[0, 0] = 0
    assert differs(one, described(Mask(mask))) == ["mask"]
    composed = described(Composition(Subsample((16, 16), 2), Blur(torch.ones(3, 3), (16, 16))))
    other = described(Composition(Subsample((16, 16), 2), Blur(torch.eye(3), (16, 16))))
    assert differs(composed, other) == ["response"]

    assert disagreements(blur, described(downsample((96, 64)))) == []
    denoising = described(Identity((8, 8)), 0.02)
    told = ["problem (super-resolution, not denoising)", "noise (0.01, not 0.02)"]
    assert disagreements(blur, denoising) == told
    single = Blur(gaussian_kernel(9, 1.5), (48, 48), "periodic")
    told = ["problem (super-resolution, not deblurring)"]
    assert disagreements(blur, described(single)) == told
    assert disagreements(blur, described(downsample((48, 48), 2))) == ["scale (4, not 2)"]
    wider = Blur(gaussian_kernel(9, 2.0), (48, 48), "periodic")
    told = ["kernel", "noise (0.01, not 0.02)"]
    assert disagreements(described(single), described(wider, 0.02)) == told


def texture(side, seed):
    torch.manual_seed(seed)
    spots = Blur(gaussian_kernel(9, 1.5), (side, side), "periodic")(torch.randn(1, 1, side, side))
    return (spots > 0).to(torch.get_default_dtype()) * 0.6 + 0.2


def problem(shape):
    return GaussianLikelihood(downsample(shape, 2), 0.01)


@pytest.mark.parametrize("strengths", [(), (0.1,)])
def test_a_network_learns_a_texture(strengths, tmp_path) -> None:
    image, other = texture(64, 0), texture(48, 1)
    likelihood = problem((48, 48))
    torch.manual_seed(0)
    model = single_image(
        measurement=signature(likelihood),
        cell=2,
        width=12,
        blocks=1,
        strengths=strengths,
        members=2,
    )
    record = learn_single_image(
        model, [image], problem=problem, window=(24, 24), holdout=0.5, batch=3, steps=40, lr=1e-2
    )
    assert record.steps == 40
    y = likelihood.simulate(other)
    start = likelihood.operator.initial(y)

    def error(x):
        return float((x - other).square().mean())

    once, often = (reconstruct(likelihood, model, y, ensemble=e).x for e in (False, True))
    assert error(once) < 0.85 * error(start)
    # The mean over the turns turns with the measurement, the network alone does not.
    turn = commuting(likelihood.operator)[3]
    for ensemble, same in ((True, True), (False, False)):
        x, turned = (reconstruct(likelihood, model, z, ensemble=ensemble).x for z in (y, turn(y)))
        assert torch.allclose(turned, turn.symmetry(x), atol=1e-9) is same
    path = tmp_path / "model.safetensors"
    models.save(path, model)
    again = models.load(path, SingleImage)
    torch.testing.assert_close(reconstruct(likelihood, again, y).x, often)
    with pytest.raises(
        InputError, match=r"trained for another noise \(0\.01, not 0\.03\); train one"
    ):
        reconstruct(GaussianLikelihood(likelihood.operator, 0.03), model, y)
    with pytest.raises(InputError, match="2 channels but the network was trained for 1"):
        reconstruct(likelihood, model, y.expand(-1, 2, -1, -1))


def test_free_windows_are_turned_and_scaled_views() -> None:
    """Of a linear image: the slope of a window is as long as the scale says, in every direction alike."""
    torch.manual_seed(0)
    image = 0.01 * torch.arange(90.0)[None, None, None, :].expand(1, 1, 80, 90).clone()
    for spread in (0.0, 0.2):
        windows = WindowSampler([image], (12, 10), 300, free=1.0, spread=spread)()
        assert windows.shape == (300, 1, 12, 10)
        down, across = (windows.diff(dim=k).mean((1, 2, 3)) / 0.01 for k in (2, 3))
        # Near the border, where the image goes on by reflection, windows are bent.
        inner = (windows.amin((1, 2, 3)) > 0.02) & (windows.amax((1, 2, 3)) < 0.87)
        scales = (down**2 + across**2).sqrt()[inner]
        assert len(scales) > 150
        assert float(scales.log().std()) == pytest.approx(spread, abs=0.03)
        assert float(scales.log().mean()) == pytest.approx(0, abs=0.05)
        angles = torch.atan2(down, across)[inner]
        assert float(angles.cos().mean()) == pytest.approx(0, abs=4 * (0.5 / len(angles)) ** 0.5)


def test_the_share_of_free_windows_and_their_reflections() -> None:
    """The channels are row and column: the determinant of their slopes tells a reflection from a turn."""
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(80.0), torch.arange(90.0), indexing="ij")
    image = torch.stack((rows, columns))[None]
    windows = WindowSampler([image], (8, 8), 400, free=0.4)()
    steps = [windows.diff(dim=k).mean((2, 3)) for k in (2, 3)]
    free = torch.minimum(*(step.abs().amin(1) for step in steps)) > 1e-6
    assert float(free.to(image).mean()) == pytest.approx(0.4, abs=4 * (0.24 / 400) ** 0.5)
    orientation = (steps[0][:, 0] * steps[1][:, 1] - steps[0][:, 1] * steps[1][:, 0])[free].sign()
    assert float(orientation.mean()) == pytest.approx(0, abs=4 / float(free.sum()) ** 0.5)


def test_a_single_pass_learns_the_mean_over_the_turns() -> None:
    image, other = texture(64, 0), texture(48, 1)
    likelihood = problem((48, 48))
    torch.manual_seed(0)
    model = single_image(measurement=signature(likelihood), cell=2, width=12, blocks=1)
    shared = {"problem": problem, "window": (24, 24), "batch": 3}
    learn_single_image(model, [image], holdout=0.5, steps=40, lr=1e-2, **shared)
    y = likelihood.simulate(other)
    mean = reconstruct(likelihood, model, y, ensemble=True).x

    def gap_of(network):
        once = reconstruct(likelihood, network, y, ensemble=False).x
        return float((once - mean).square().mean())

    before = gap_of(model)
    student = copy.deepcopy(model).requires_grad_(True)
    taught = {"teacher": model, "steps": 60, "lr": 3e-3, "average": 0.9, **shared}
    learn_single_image(student, [image], [other], **taught)
    assert gap_of(student) < 0.7 * before
    assert gap_of(model) == before

    # A teacher that is too bright has bright pupils, however narrow.
    bright = copy.deepcopy(model)
    with torch.no_grad():
        bright.members[0].stages[0].tail.bias += 0.2
    torch.manual_seed(1)
    narrow = single_image(measurement=signature(likelihood), cell=2, width=4, blocks=1)
    learn_single_image(narrow, [image], [other], **(taught | {"lr": 1e-2, "teacher": bright}))
    learned = reconstruct(likelihood, narrow, y, ensemble=False).x
    assert float((learned - mean).mean()) == pytest.approx(0.2, abs=0.03)

    colours = single_image(measurement=signature(likelihood), channels=3, width=4, blocks=1)
    noisier = single_image(
        measurement=signature(GaussianLikelihood(likelihood.operator, 0.03)), width=4, blocks=1
    )
    directed = single_image(
        measurement=signature(likelihood), cell=2, width=4, blocks=1, dihedral=False
    )
    for teacher, told in (
        (student, "its own teacher"),
        (colours, "3 channels but the model was made for 1"),
        (noisier, "Of the teacher: The network was trained for another noise"),
        (directed, "preferred direction"),
    ):
        with pytest.raises(InputError, match=told):
            learn_single_image(student, [image], [other], **(taught | {"teacher": teacher}))


@pytest.mark.parametrize(
    ("operator", "dihedral", "share"),
    [
        (downsample((48, 48), 2), True, 0.5),
        (downsample((48, 48), 2), False, 0.0),
        (Identity((48, 48)), True, 0.0),
    ],
)
def test_windows_are_free_where_the_operator_lowers_the_resolution(
    operator, dihedral, share, monkeypatch
) -> None:
    made = []

    class Watched(WindowSampler):
        def __init__(self, *arguments, **settings):
            made.append(settings)
            super().__init__(*arguments, **settings)

    monkeypatch.setattr(sys.modules["patchflow.learn_single_image"], "WindowSampler", Watched)
    likelihood = GaussianLikelihood(operator, 0.1)
    model = single_image(
        measurement=signature(likelihood), cell=2, width=4, blocks=1, dihedral=dihedral
    )
    settings = {"problem": lambda shape: likelihood, "window": (48, 48), "steps": 1}
    learn_single_image(model, [texture(64, 0)], [texture(64, 1)], **settings)
    assert made[0]["free"] == share


def test_what_is_corrected_is_not_rounded_to_bfloat16(single_precision) -> None:
    """The networks' corrections may be, not the image: of the white image, 1, bfloat16 has steps of 1/256."""
    torch.manual_seed(0)
    likelihood = GaussianLikelihood(downsample((48, 48), 4), 0.01)
    model = single_image(measurement=signature(likelihood), width=16, strengths=(0.1,))
    for name, values in model.named_parameters():
        if name.endswith("tail.weight"):
            torch.nn.init.normal_(values, std=1e-3)
    y = likelihood.simulate(0.9 + 0.05 * torch.rand(1, 1, 48, 48))
    exact = reconstruct(likelihood, model, y, precision="float32").x
    rounded = reconstruct(likelihood, model, y, precision="bfloat16").x
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    correction = exact - likelihood.operator.initial(y)
    assert (rounded - exact).square().mean() < 0.02**2 * correction.square().mean()
    assert (exact.bfloat16() - exact).square().mean() > 0.1**2 * correction.square().mean()


def test_bad_images_are_refused() -> None:
    model = single_image(measurement=signature(problem((48, 48))), width=4, blocks=1)
    for image, told in (
        (torch.rand(1, 3, 64, 64), "3 channels but the model was made for 1"),
        (torch.full((1, 1, 64, 64), 0.5), "constant"),
        (torch.rand(1, 1, 40, 64), "too small|windows"),
    ):
        with pytest.raises(InputError, match=told):
            learn_single_image(model, [image], problem=problem, window=(48, 48), steps=1)
    directed = single_image(
        measurement=signature(problem((48, 48))), width=4, blocks=1, dihedral=False
    )
    for network, wrong, told in (
        (model, {"steps": 0}, "0 steps"),
        (model, {"free": 1.5}, "between 0 and 1"),
        (directed, {"free": 0.5}, "preferred direction"),
    ):
        with pytest.raises(InputError, match=told):
            learn_single_image(network, [torch.rand(1, 1, 64, 64)], problem=problem, **wrong)
    with pytest.raises(InputError, match="2 stages"):
        UnrolledNetwork(stages=2)
    with pytest.raises(InputError, match="members"):
        single_image(measurement={}, members=0)


def test_the_command_line_trains_and_uses_it(as_users_do, capsys) -> None:
    for name, seed in (("train", 0), ("other", 1)):
        write_image(f"{name}.tif", texture(64, seed))
    flags = ["--problem=super-resolution", "--scale=2", "--noise=0.01", "--threads=1"]
    small = ["--width=8", "--blocks=1", "--window=24", "--holdout=0.4", "--steps=30", "--lr=0.01"]
    run = ["train", "single-image", "train.tif", *flags, *small, "--output=s.safetensors"]
    assert main(run) == 0
    assert "dB on the validation windows after 30 steps" in capsys.readouterr().out
    assert main(["simulate", "other.tif", *flags[:3], "--output=y.tif"]) == 0
    run = ["reconstruct", "y.tif", "--method=single-image", "--prior=s.safetensors"]
    assert main([*run, *flags, "--output=x.tif", "--truth=other.tif", "--report=page"]) == 0
    assert "PSNR" in capsys.readouterr().out
    student = ["train", "single-image", "train.tif", *flags, *small, "--output=t.safetensors"]
    assert main([*student, "--teacher=s.safetensors", "--width=4"]) == 0
    assert "teacher: s.safetensors" in Path("t.yaml").read_text()
    for arguments, told in (
        ([*run, flags[0], flags[1], "--noise=0.02"], "trained for another noise (0.01, not 0.02)"),
        ([*run, *flags, "--weight=2"], "--weight 2.0 says nothing about the method single-image"),
        (
            ["train", "single-image", "train.tif", *flags, "--window=25"],
            "not divisible by the scale 2",
        ),
        (["train", "single-image", "train.tif", "--problem=ct"], "use train single-scan"),
        (["train", "single-image", "train.tif", *flags, "--stages=0"], "0 stages"),
        ([*student, "--teacher=none.safetensors"], "none.safetensors"),
        ([*student, "--teacher=t.safetensors"], "are the same file"),
        ([*student, "--free=0.5", "--dihedral=false"], "preferred direction"),
        (
            [*student, "--teacher=s.safetensors", "--noise=0.02"],
            "Of the teacher: The network was trained",
        ),
    ):
        assert main(arguments) == 2
        assert told in capsys.readouterr().err
