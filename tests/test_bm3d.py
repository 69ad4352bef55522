"""BM3D's wrapper: noise of a known level, coloured noise of an inverse filter, plug and play."""

import sys

import numpy as np
import pytest
import skimage.data
import torch

import patchflow as pf
from patchflow.reconstruct.bm3d import _trapezoidal_rule, deblur, denoise, reconstruct

SHAPE = (64, 64)


@pytest.fixture
def library():
    return pytest.importorskip("bm3d")


def bricks():
    return torch.from_numpy(skimage.data.brick()[64:128, 64:128] / 255.0)[None, None]


def test_denoising_is_the_librarys_for_each_image_and_channel(library):
    x = bricks().expand(2, 1, *SHAPE)
    y = (x + 0.1 * torch.randn(2, 1, *SHAPE)).float()
    found = denoise(y, 0.1)
    assert found.dtype == torch.float32
    expected = library.bm3d(y[1, 0].double().numpy(), 0.1)
    # The library's own results differ by 1e-4 from run to run.
    assert np.allclose(found[1, 0].numpy(), expected, atol=1e-3)
    assert bool((pf.psnr(found, x.float()) > pf.psnr(y, x.float()) + 4).all())


def test_the_level_is_what_is_removed(library):
    """Too small a level leaves the noise."""
    x = bricks()
    y = x + 0.1 * torch.randn(x.shape)
    figures = [float(pf.psnr(denoise(y, std), x)) for std in (0.02, 0.1)]
    assert figures[1] > figures[0] + 3


def test_deblurring_is_the_librarys_up_to_its_conventions(library):
    """The library convolves around the middle; we correlate around an anchor. Better than a linear filter by far."""
    kernel, anchor = torch.rand(5, 5), (0, 1)
    kernel = kernel / kernel.sum()
    operator = pf.Blur(kernel, SHAPE, "periodic", anchor=anchor)
    likelihood = pf.GaussianLikelihood(operator, 0.01)
    x = bricks()
    y = likelihood.simulate(x)
    found = deblur(likelihood, y)
    centred = torch.roll(y, (2 - anchor[0], 2 - anchor[1]), (-2, -1))[0, 0, ..., None].numpy()
    with _trapezoidal_rule():
        expected = library.bm3d_deblurring(centred, 0.01, kernel.flip(0, 1).numpy())
    assert np.abs(found[0, 0].numpy() - expected).max() < 1e-3
    assert float(pf.psnr(found, x)) > float(pf.psnr(y, x)) + 3


def test_plug_and_play_improves_the_start_and_fits_the_data(library):
    operator = pf.downsample(SHAPE, 4)
    likelihood = pf.GaussianLikelihood(operator, 0.01)
    x = bricks()
    y = likelihood.simulate(x)
    init = operator.initial(y)
    found = reconstruct(likelihood, y, init, levels=(0.1, 0.05))
    assert found.steps == 2
    assert float(pf.psnr(found.x, x)) > float(pf.psnr(init, x)) + 0.5
    # The last step is one for the data: for the weight 0 their proximal point.
    close = reconstruct(likelihood, y, init, weight=1e-6, levels=(0.05,))
    assert float((operator(close.x) - y).square().mean().sqrt()) < 0.02


def test_plug_and_play_alternates_with_the_librarys_denoiser(monkeypatch):
    """With a library that halves every image all is linear: each step by dense algebra."""
    called = []

    class Library:
        @staticmethod
        def bm3d(image, level):
            called.append(level)
            return image / 2

    monkeypatch.setitem(sys.modules, "bm3d", Library)
    operator = pf.downsample((8, 8), 2, kernel_size=3)
    likelihood = pf.GaussianLikelihood(operator, 0.1)
    y, x = torch.rand(1, 1, 4, 4), torch.rand(1, 1, 8, 8)
    found = reconstruct(likelihood, y, x, weight=0.5, levels=(0.2, 0.1))
    matrix = operator(torch.eye(64).view(64, 1, 8, 8)).view(64, 16).T
    for level in (0.2, 0.1):
        pull = 0.5 / level**2
        left = matrix.T @ matrix / 0.01 + pull * torch.eye(64)
        right = matrix.T @ y.flatten() / 0.01 + pull * x.flatten() / 2
        x = torch.linalg.solve(left, right)
    assert torch.allclose(found.x.flatten(), x)
    assert called == pytest.approx([0.2, 0.1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data, y: denoise(y, 0), "level of BM3D is 0 but"),
        (lambda data, y: deblur(data, y), "not Identity; use"),
        (lambda data, y: reconstruct(data, y, y, weight=0), "Got weight 0 and levels"),
        (lambda data, y: reconstruct(data, y, y, levels=[]), r"levels \[\]; all must"),
    ],
)
def test_messages(call, message):
    with pytest.raises(pf.InputError, match=message):
        call(pf.GaussianLikelihood(pf.Identity(SHAPE), 0.1), torch.zeros(1, 1, *SHAPE))


def test_without_the_library_there_is_advice(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm3d", None)
    with pytest.raises(pf.InputError, match=r"non-commercial use\): run pip install"):
        denoise(torch.zeros(1, 1, 8, 8), 0.1)
