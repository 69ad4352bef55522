"""WPPNets and WPPFlows: the loss without pairs, kernels of images, the estimated blur, and the command line."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import patchflow as pf
from patchflow.chains.images import ConvolutionalCoupling, Pixelwise, SubPixel, WhiteImages
from patchflow.cli import main
from patchflow.crop_posterior import CropPosterior
from patchflow.io.images import read_image, write_image
from patchflow.learn_wpp_net import MeasuredCrops
from patchflow.numerics.transport import exact_cost
from patchflow.problems.blur import Blur, downsample, gaussian_kernel
from patchflow.problems.estimation import estimate_kernel
from patchflow.problems.resolution import LowResolution, cell_offset
from patchflow.reconstruct import acnn, wpp_flow
from patchflow.resolution_models import FlowNetwork, SuperResolver

TINY = {"scale": 2, "kernel_shape": (6, 6), "noise": 0.02, "width": 8, "layers": 3}


def waves(rows=64, columns=64, shift=0.0):
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    wave = 0.5 + 0.2 * torch.sin(1.1 * i + shift) + 0.2 * torch.cos(0.9 * j)
    return wave[None, None].to(torch.get_default_dtype())


def kernel():
    return gaussian_kernel(6, 1.0).to(torch.get_default_dtype())


def prior_of(image, **arguments):
    return pf.learn_wpp([image], **({"size": 4, "count": 300} | arguments))


@pytest.mark.parametrize(("taps", "stride", "crop"), [(6, 2, 10), (16, 4, 8), (7, 3, 7), (4, 4, 3)])
def test_the_data_term_is_that_of_the_operator(taps, stride, crop):
    """The true image of a crop explains what is inside of it exactly; a changed pixel counts as much as it weighs."""
    blur = gaussian_kernel(taps, 1.5).to(torch.get_default_dtype())
    degrade = LowResolution(blur, stride, 0.0)
    x, y = degrade(torch.rand(2, 1, degrade.side(crop * stride), degrade.side(crop * stride)))
    posterior = CropPosterior(blur, stride, 0.1, prior_of(waves()), weight=0.0)
    torch.testing.assert_close(posterior(x, y), torch.zeros(2))
    changed = y.clone()
    changed[1, 0, crop // 2, crop // 2] += 0.3
    expected = torch.tensor([0.0, 0.5 * 0.3**2 / 0.1**2])
    torch.testing.assert_close(posterior(x, changed), expected)


def test_the_patches_of_a_batch_are_one_distribution():
    """With the potential at its maximum the prior is exact transport from the patches of all images together."""
    size, x = 3, torch.rand(3, 1, 12, 12)
    prior = pf.learn_wpp([waves()], size=size, count=40)
    cost = prior.priors[0].patch_energy
    posterior = CropPosterior(torch.ones(2, 2) / 4, 2, 1.0, prior, weight=1.0, rate=0.05)
    torch.manual_seed(4)
    i, j = torch.randint(size, (2,)).tolist()
    wide, places = np.pad(x[:, 0].numpy(), [(0, 0), (2, 2), (2, 2)], mode="reflect"), []
    for row in range(i, 14, 3):
        places += [(row, column) for column in range(j, 14, 3)]
    rows = [torch.from_numpy(image[r : r + 3, c : c + 3]) for image in wide for r, c in places]
    patches = torch.stack([patch.flatten() for patch in rows])
    expected = exact_cost(patches, cost.reference) * len(patches)
    found = []
    for step in range(800):
        posterior.rate = 0.05 / (1 + step / 30)
        torch.manual_seed(4)
        found.append(float(posterior._patches(x).sum()))
    assert max(found) <= expected + 1e-9  # the dual problem, from below
    assert max(found) > 0.98 * expected
    assert found[0] < 0.95 * expected  # without the potential it is not


def test_learning_without_pairs_beats_interpolation(single_precision, tmp_path):
    model = pf.wpp_net(**TINY).trained_for(kernel())
    truth = waves(96, 96)
    y = LowResolution(kernel(), 2, 0.02)(waves(102, 102, 0.4))[1]
    options = {"crop": 16, "batch": 4, "steps": 120, "lr": 5e-3, "weight": 200.0}
    record = pf.learn_wpp_net(model, [y], prior=prior_of(truth), **options)
    assert record.losses[-1] < 0.7 * record.losses[0]
    assert not record.validation
    likelihood = pf.GaussianLikelihood(downsample((64, 64), 2, kernel_size=6), 0.02)
    y = likelihood.simulate(waves())
    inside = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    x, start = acnn.reconstruct(likelihood, model, y).x, likelihood.operator.initial(y)
    assert pf.psnr(x[inside], waves()[inside]) > pf.psnr(start[inside], waves()[inside]) + 2
    pf.save(tmp_path / "m.safetensors", model)
    assert torch.equal(pf.load(tmp_path / "m.safetensors", SuperResolver)(y), model(y))


def lively(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


IMAGE_KERNELS = {
    "coupling": lambda: ConvolutionalCoupling(4, 2, hidden=8),
    "odd coupling": lambda: ConvolutionalCoupling(5, 2, hidden=8),
    "linear at each pixel": lambda: Pixelwise(pf.InvertibleLinear(4)),
    "affine at each pixel": lambda: Pixelwise(pf.ConditionalAffine(4, 2, hidden=8)),
    "chain": lambda: pf.Chain(
        ConvolutionalCoupling(4, 2, hidden=8), Pixelwise(pf.InvertibleLinear(4))
    ),
}


@pytest.mark.parametrize("name", IMAGE_KERNELS)
def test_kernels_of_images_invert_and_know_their_determinant(name):
    chain, channels = lively(IMAGE_KERNELS[name]()), 5 if "odd" in name else 4
    x, y = torch.randn(2, channels, 3, 2), torch.randn(2, 2, 3, 2)
    assert chain.bijective
    there, log_ratio, _ = chain(x, y)
    back, minus, _ = chain.reverse(there, y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -log_ratio)
    for k in range(2):
        jacobian = torch.autograd.functional.jacobian(
            lambda v, k=k: chain(v.view(1, channels, 3, 2), y[k : k + 1]).x.flatten(),
            x[k].flatten(),
        )
        torch.testing.assert_close(log_ratio[k], torch.linalg.slogdet(jacobian).logabsdet)


def test_sub_pixels_are_laid_out_around_the_interpolated_measurement():
    chain, y = SubPixel(2, spread=0.1), torch.rand(2, 1, 3, 4)
    z = torch.randn(2, 4, 3, 4)
    there, log_ratio, _ = chain(z, y)
    start = torch.nn.functional.interpolate(y, scale_factor=2, mode="bicubic")
    torch.testing.assert_close((there - start)[1, 0, 3, 5], 0.1 * z[1, 3, 1, 2])
    torch.testing.assert_close(log_ratio, torch.full((2,), 48 * math.log(0.1)))
    torch.testing.assert_close(chain.reverse(there, y).x, z)


def test_white_images_are_normalised_and_as_large_as_the_condition():
    latent, y = WhiteImages(3), torch.zeros(1, 1, 4, 5)
    x = latent.sample(6, y)
    assert x.shape == (6, 3, 4, 5)
    expected = -torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(latent(x, y), expected)


def test_a_flow_learns_the_posterior_of_a_linear_problem(single_precision):
    """Without a prior but with noise: what is measured of the samples has the variance of the measurement's noise."""
    noise = 0.1
    blur = torch.ones(2, 2) / 4
    flat = {"scale": 2, "kernel_shape": (2, 2), "noise": noise, "width": 4, "layers": 1}
    model = pf.wpp_flow(**flat, blocks=0).trained_for(blur)
    assert isinstance(model.network, FlowNetwork)
    y = 0.5 + 0.1 * torch.randn(1, 1, 40, 40)
    # The prior of one reference patch is Gaussian: N(q, 1 / weight) for each pixel.
    prior = pf.learn_wpp([torch.full((1, 1, 8, 8), 0.4)], size=2, count=4)
    options = {"crop": 6, "batch": 16, "steps": 250, "lr": 3e-2, "weight": 100.0, "dihedral": False}
    pf.learn_wpp_flow(model, [y], prior=prior, **options)
    y = torch.full((1, 1, 6, 6), 0.6)
    x = model(y.expand(2000, -1, -1, -1))[:, 0, 4:8, 4:8]
    # Along the mean of the cell: precision 1 / noise^2 / 4 + 100 for each pixel's share; see Bayes' formula.
    cell = torch.nn.functional.avg_pool2d(x[:, None], 2).flatten(1)
    precision = 1 / noise**2 + 100 * 4
    mean = (0.6 / noise**2 + 0.4 * 400) / precision
    # The training's own error is larger than that of 2000 samples.
    assert abs(float(cell.mean()) - mean) < 0.1 * (0.6 - 0.4)
    assert abs(float(cell.var(0).mean()) * precision - 1) < 0.25
    assert abs(float(x.var(0).mean()) / (0.75 / 100 + 1 / precision) - 1) < 0.25


def test_mean_and_deviation_of_samples():
    model = lively(pf.wpp_flow(**TINY, blocks=1, hidden=4)).trained_for(kernel())
    likelihood = pf.GaussianLikelihood(downsample((16, 20), 2, kernel_size=6), 0.02)
    y = torch.rand(1, 1, 8, 10)
    torch.manual_seed(5)
    found = wpp_flow.reconstruct(likelihood, model, y, samples=6)
    torch.manual_seed(5)
    samples = torch.cat([model(y) for _ in range(6)]).roll(cell_offset(likelihood.operator), (2, 3))
    torch.testing.assert_close(found.x[0], samples.mean(0))
    torch.testing.assert_close(found.std[0], samples.std(0))


def test_the_blur_of_a_registered_pair_is_found():
    truth, high = gaussian_kernel(5, 1.1).to(torch.get_default_dtype()), torch.rand(1, 1, 120, 90)
    truth = 1.5 * truth + 0.01 * torch.randn(5, 5)  # of no symmetry, and another brightness
    low = Blur(truth, (120, 90), "reflect", stride=3, anchor=(1, 1))(high) + 0.05
    found = estimate_kernel(high, low, size=5, ridge=0.0)
    torch.testing.assert_close(found.kernel, truth / truth.sum())
    assert found.gain == pytest.approx(float(truth.sum()))
    torch.testing.assert_close(found.calibrated(low), (low - 0.05) / truth.sum())
    assert found.bias == pytest.approx(0.05)
    assert found.residual < 1e-9
    noisy = estimate_kernel(high, low + 0.02 * torch.randn_like(low), size=5, ridge=0.0)
    unknowns = 26 / (39 * 29)
    assert noisy.residual == pytest.approx(0.02 * (1 - unknowns) ** 0.5, rel=0.1)


def net():
    return pf.wpp_net(**TINY).trained_for(kernel())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pf.learn_wpp_net(net(), [], prior=prior_of(waves())), "no training images"),
        (
            lambda: pf.learn_wpp_net(net(), [torch.ones(1, 3, 40, 40)], prior=prior_of(waves())),
            "3 channels, the prior was made for 1",
        ),
        (
            lambda: pf.learn_wpp_net(net(), [waves()], prior=prior_of(waves()), crop=2),
            "2 measured pixels are smaller than the kernel of 6",
        ),
        (
            lambda: pf.learn_wpp_net(net(), [waves()], prior=prior_of(waves(), scales=3), crop=6),
            "smaller than its patches of 4 x 4",
        ),
        (
            lambda: pf.learn_wpp_net(net(), [waves(10, 10)], prior=prior_of(waves()), crop=16),
            "smaller than a patch of 16",
        ),
        (
            lambda: pf.learn_wpp_net(net(), [waves()], prior=prior_of(waves(), padding=2)),
            "without padding",
        ),
        (
            lambda: pf.learn_wpp_net(net(), [waves()], prior=prior_of(waves()), weight=-1.0),
            "the weight -1.0",
        ),
        (lambda: MeasuredCrops(net(), [waves()], 0, 4, dihedral=True), "4 crops of 0 x 0"),
        (
            lambda: pf.learn_wpp_flow(net(), [waves()], prior=prior_of(waves())),
            "The network is of type ACNN, which has no samples",
        ),
        (lambda: pf.wpp_flow(blocks=-1), "-1 blocks"),
        (lambda: ConvolutionalCoupling(1), "Got 1 channels"),
        (lambda: SubPixel(2, spread=0.0), "spread 0.0"),
        (lambda: WhiteImages(1).sample(2), "pass one"),
        (lambda: estimate_kernel(waves(60, 60), waves(25, 30)), "a whole number of times"),
        (lambda: estimate_kernel(waves(60, 60), waves(15, 15), size=3), "kernel of 3 x 3"),
        (lambda: estimate_kernel(waves(60, 60), waves(15, 15)), "more unknowns"),
        (lambda: estimate_kernel(0 * waves(60, 60), waves(15, 15)), "is constant"),
    ],
)
def test_messages(call, message):
    with pytest.raises(pf.InputError, match=re.escape(message)):
        call()


@pytest.fixture
def files(as_users_do):
    write_image("reference.tif", waves(80, 80))
    np.save("kernel.npy", gaussian_kernel(6, 1.0).numpy())
    write_image("truth.tif", waves(48, 40, 0.7))


def test_the_command_line_from_end_to_end(files, capsys):
    problem = ["--scale=2", "--noise=0.02", "--kernel=kernel.npy"]
    use = ["--problem=super-resolution", *problem]
    assert main(["simulate", "reference.tif", *use, "-o", "low.tif"]) == 0
    assert main(["simulate", "truth.tif", *use, "-o", "y.tif"]) == 0
    options = ["--measurements=[low.tif]", "--size=4", "--count=200", "--width=4", "--layers=2"]
    options += ["--crop=10", "--batch=2", "--scales=1", "--steps=52"]
    for name, extra in (("wpp-net", []), ("wpp-flow", ["--blocks=1", "--hidden=4"])):
        model = f"{name}.safetensors"
        run = ["train", name, "reference.tif", *problem, *options, *extra, "-o", model]
        assert main([*run, "--lr=0.005"]) == 0
        told = capsys.readouterr().out
        assert re.search(r"loss [\d.]+ after 52 steps", told)
        run = ["reconstruct", "y.tif", *use, f"--method={name}", f"--prior={model}"]
        assert main([*run, "--truth=truth.tif", "--report=page", "-o", "x.tif"]) == 0
        assert ("standard deviation" in Path("page/report.html").read_text()) == (
            name == "wpp-flow"
        )
        assert read_image("x.tif", slack=1).shape == (1, 1, 48, 40)
        assert main([*run, "--noise=0.1", "-o", "x.tif"]) == 2
        assert "was trained for the noise 0.02" in capsys.readouterr().err


def test_an_estimated_blur_on_the_command_line(files, capsys):
    high = torch.rand(1, 1, 80, 80)
    write_image("high.tif", high)
    write_image("low.tif", downsample((80, 80), 2, kernel_size=6)(high).roll((1, 1), (2, 3)))
    run = ["train", "wpp-net", "reference.tif", "--scale=2", "--registered=[high.tif,low.tif]"]
    run += ["--size=4", "--count=200", "--width=4", "--layers=2", "--scales=1", "--steps=1"]
    assert main([*run, "--crop=16", "--batch=2", "-o", "m.safetensors"]) == 0
    assert "m.kernel.npy: estimated, brightness times 1.0" in capsys.readouterr().out
    assert np.load("m.kernel.npy").shape == (15, 15)
    use = ["--problem=super-resolution", "--scale=2", "--kernel=m.kernel.npy"]
    assert main(["simulate", "truth.tif", *use, "-o", "y.tif"]) == 0
    use = ["reconstruct", "y.tif", *use, "--method=wpp-net", "--prior=m.safetensors"]
    assert main([*use, "-o", "x.tif"]) == 0
    write_image("bright.tif", 0.5 * read_image("low.tif"))
    assert main([*run, "--registered=[high.tif,bright.tif]", "-o", "m.safetensors"]) == 2
    assert "has other values than its image (times 0.5" in capsys.readouterr().err
    assert main([*run, "--kernel=kernel.npy"]) == 2
    assert "no --kernel beside it" in capsys.readouterr().err
