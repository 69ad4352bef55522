"""Metrics against scikit-image, and LPIPS against torchmetrics' documentation."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import skimage.metrics
import torch

from patchflow.errors import InputError
from patchflow.metrics import LPIPS, crop, psnr, ssim

DATA = Path(os.environ.get("PATCHFLOW_DATA", Path(__file__).parents[2] / "shared" / "data"))
FEATURES = DATA / "weights" / "lpips_squeezenet11_features.safetensors"
LINEAR = DATA / "weights" / "lpips_v0.1_squeeze_lin.safetensors"
needs_weights = pytest.mark.skipif(
    not (FEATURES.exists() and LINEAR.exists()), reason=f"no LPIPS weights in {DATA}"
)


def pair(name: str, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    array = getattr(skimage.data, name)()[40:160, 30:180].astype(np.float64) / 255
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    truth = torch.from_numpy(array)[None]
    generator = torch.Generator().manual_seed(1)
    x = truth + noise * torch.randn(truth.shape, generator=generator, dtype=truth.dtype)
    return x, truth


@pytest.mark.parametrize("noise", [0.001, 0.05, 0.5])
@pytest.mark.parametrize("name", ["brick", "camera", "astronaut"])
def test_psnr_and_ssim_equal_scikit_image(name, noise):
    x, truth = pair(name, noise)
    a, b = x[0].numpy(), truth[0].numpy()
    expected = skimage.metrics.structural_similarity(a, b, data_range=1.0, channel_axis=0)
    assert abs(float(ssim(x, truth)) - expected) < 1e-9
    expected = skimage.metrics.peak_signal_noise_ratio(b, a, data_range=1.0)
    assert abs(float(psnr(x, truth)) - expected) < 1e-9
    # Another range, from single precision, of a batch.
    large, truth_large = (255 * x).float().repeat(2, 1, 1, 1), (255 * truth).float()
    assert torch.allclose(ssim(large, truth_large, 255.0), ssim(x, truth).expand(2), atol=1e-6)
    assert torch.allclose(psnr(large, truth_large, 255.0), psnr(x, truth).expand(2), atol=1e-4)
    assert torch.equal(ssim(large, truth_large, 255), ssim(large, truth_large, 255.0))
    assert torch.equal(psnr(large, truth_large, 255), psnr(large, truth_large, 255.0))


def test_equal_images():
    _, truth = pair("brick", 0.0)
    assert float(ssim(truth, truth)) == pytest.approx(1.0, abs=1e-12)
    assert float(psnr(truth, truth)) == np.inf
    flat = torch.full((1, 1, 9, 9), 0.7, dtype=torch.float64)
    assert float(ssim(flat, flat)) == pytest.approx(1.0, abs=1e-12)


def test_crop():
    x = torch.arange(63, dtype=torch.float32).reshape(1, 1, 7, 9)
    assert torch.equal(crop(x, 2), x[..., 2:5, 2:7])
    assert torch.equal(crop(x, 0), x)
    for border in (4, -1):
        with pytest.raises(
            InputError, match=f"border of {border} pixels cannot be cut from images of 7 x 9"
        ):
            crop(x, border)


def test_pairs_that_cannot_be_compared():
    x = torch.zeros(2, 1, 6, 9, dtype=torch.float32)
    with pytest.raises(InputError, match="at least 7 x 7 pixels, not 6 x 9"):
        ssim(x, x)


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return LPIPS(FEATURES, LINEAR)


def uniform(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(count, 3, 100, 100, generator=generator, dtype=torch.float32)


@needs_weights
@pytest.mark.parametrize(("seed", "count", "printed"), [(42, 10, 0.1005), (123, 10, 0.1008)])
def test_lpips_equals_the_documentation_of_torchmetrics(lpips, seed, count, printed):
    """Their images are ``2 * rand - 1`` in [-1, 1]; ours are the ``rand`` in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x, truth = uniform(count, generator), uniform(count, generator)
    assert float(lpips(x, truth).mean()) == pytest.approx(printed, abs=5.1e-5)


@needs_weights
def test_lpips_per_image_equals_the_documentation_of_torchmetrics(lpips):
    generator = torch.Generator().manual_seed(42)
    x, truth = uniform(2, generator), uniform(2, generator)
    assert lpips(x, truth).tolist() == pytest.approx([0.1024, 0.0938], abs=5.1e-5)
    both, alone = lpips(x, truth[:1])[0], lpips(x[:1], truth[:1])[0]
    torch.testing.assert_close(both, alone)


@needs_weights
def test_lpips_of_grey_and_equal_images(lpips):
    x, truth = pair("brick", 0.05)
    assert float(lpips(truth, truth)) == 0
    grey, colour = lpips(x, truth), lpips(x.repeat(1, 3, 1, 1), truth.repeat(1, 3, 1, 1))
    assert float(grey) == float(colour) > 0
    assert grey.dtype == torch.float32
    noisier, _ = pair("brick", 0.2)
    assert float(lpips(noisier, truth)) > float(grey)
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


@needs_weights
def test_lpips_refuses(lpips, tmp_path):
    small = torch.zeros(1, 1, 15, 40, dtype=torch.float32)
    with pytest.raises(InputError, match="at least 16 x 16 pixels, not 15 x 40"):
        lpips(small, small)
    two = torch.zeros(1, 2, 40, 40, dtype=torch.float32)
    with pytest.raises(InputError, match="not 2 channels"):
        lpips(two, two)
    with pytest.raises(InputError, match="lacks the tensor 0.weight"):
        LPIPS(LINEAR, LINEAR)
    broken = tmp_path / "weights.safetensors"
    broken.write_bytes(FEATURES.read_bytes()[:10_000])
    with pytest.raises(InputError, match="truncated LPIPS weight file"):
        LPIPS(broken, LINEAR)


def test_missing_lpips_weights_say_where_to_get_them(tmp_path):
    with pytest.raises(
        InputError, match=r"no LPIPS weight file .*: convert torchvision's squeezenet1_1"
    ):
        LPIPS(tmp_path / "a", tmp_path / "b")
