r"""Image metrics: PSNR, SSIM, LPIPS. One value per image of a batch.

PSNR and SSIM are those of scikit-image with its defaults (SSIM: uniform 7 x 7 window, sample
covariances, borders of three pixels left out), which the published tables of patchNR used; LPIPS is
version 0.1 on SqueezeNet 1.1 features. PSNR and SSIM are computed in float64 whatever the images
are in.

References:
    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to
    structural similarity", 2004, https://doi.org/10.1109/TIP.2003.819861

    Zhang, Isola, Efros, Shechtman and Wang, "The unreasonable effectiveness of deep features as a
    perceptual metric", 2018, https://arxiv.org/abs/1801.03924

    Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters", 2016,
    https://arxiv.org/abs/1602.07360
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from patchflow.errors import InputError
from patchflow.io.checkpoint import load_into, read_tensors

_WINDOW = 7
_SMALLEST_LPIPS = 16


def psnr(
    x: Float[Tensor, "batch channels height width"],
    truth: Float[Tensor, "#batch channels height width"],
    data_range: float | int = 1.0,
) -> Float[Tensor, " batch"]:
    r"""The peak signal-to-noise ratio :math:`10 \log_{10} (r^2 / \mathrm{MSE})`.

    Args:
        x: Images.
        truth: What they should be; one for all, or one for each.
        data_range: The range :math:`r` of the values.

    Returns:
        One value per image, in dB, float64; infinite where both are equal.

    Raises:
        InputError: The shapes differ.
    """
    _check_pair(x, truth)
    error = (x.double() - truth.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / error)


def ssim(
    x: Float[Tensor, "batch channels height width"],
    truth: Float[Tensor, "#batch channels height width"],
    data_range: float | int = 1.0,
) -> Float[Tensor, " batch"]:
    r"""The structural similarity, as ``skimage.metrics.structural_similarity`` with its defaults.

    The mean over all complete 7 x 7 windows, and over channels, of

    .. math::
        \frac{(2 \mu_x \mu_t + c_1)(2 \sigma_{xt} + c_2)}{(\mu_x^2 + \mu_t^2 + c_1)(\sigma_x^2 +
        \sigma_t^2 + c_2)}, \qquad c_1 = (0.01 r)^2, \quad c_2 = (0.03 r)^2 .

    Args:
        x: Images.
        truth: What they should be; one for all, or one for each.
        data_range: The range :math:`r` of the values.

    Returns:
        One value per image, float64, at most 1.

    Raises:
        InputError: The shapes differ, or the images are smaller than the window.
    """
    _check_pair(x, truth)
    if min(x.shape[-2:]) < _WINDOW:
        raise InputError(
            f"SSIM needs images of at least {_WINDOW} x {_WINDOW} pixels, not {_size(x)}: "
            "use larger images or a smaller border."
        )
    # The structure part is invariant under a common shift; centring makes its differences of
    # squares exact enough.
    centre = truth.double().mean((-2, -1), keepdim=True)
    a, b = x.double() - centre, truth.double() - centre
    mean_a, mean_b, square_a, square_b, product = (
        F.avg_pool2d(values, _WINDOW, stride=1) for values in (a, b, a * a, b * b, a * b)
    )
    unbiased = _WINDOW**2 / (_WINDOW**2 - 1)
    variances = unbiased * (square_a - mean_a**2 + square_b - mean_b**2)
    covariance = unbiased * (product - mean_a * mean_b)
    mean_a, mean_b = mean_a + centre, mean_b + centre
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return (luminance * structure).flatten(1).mean(1)


def crop(
    x: Float[Tensor, "batch channels height width"], border: int
) -> Float[Tensor, "batch channels inner_height inner_width"]:
    """Remove ``border`` pixels on each side.

    Args:
        x: Images.
        border: The number of pixels, at least 0.

    Raises:
        InputError: Nothing would be left, or the border is negative.
    """
    if border < 0 or 2 * border >= min(x.shape[-2:]):
        raise InputError(
            f"A border of {border} pixels cannot be cut from images of {_size(x)}: "
            f"choose one from 0 to {(min(x.shape[-2:]) - 1) // 2}."
        )
    height, width = x.shape[-2:]
    return x[..., border : height - border, border : width - border]


class LPIPS(nn.Module):
    r"""Learned perceptual distance, version 0.1 on SqueezeNet 1.1; lower is better.

    .. math::
        d(x, t) = \sum_{l=1}^{7} \frac{1}{|\Omega_l|} \sum_{p \in \Omega_l}
        w_l \cdot (\hat\phi_l(x)_p - \hat\phi_l(t)_p)^2

    with features :math:`\hat\phi_l` normalised to length one per pixel and published weights
    :math:`w_l \ge 0`. The networks' weights are not part of the library: convert torchvision's
    ``squeezenet1_1`` features and the ``squeeze.pth`` of the authors' repository to safetensors
    once.

    Args:
        features_file: SqueezeNet 1.1 features as safetensors, with torchvision's keys below
            ``features.``.
        linear_file: The linear layers as safetensors, with keys ``lin0.model.1.weight`` to
            ``lin6.model.1.weight``.

    Raises:
        InputError: A file is missing or not such a file.

    References:
        Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric",
        2018, https://arxiv.org/abs/1801.03924
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, features_file: str | Path, linear_file: str | Path) -> None:
        super().__init__()
        self.features = _squeezenet_features()
        load_into(self.features, _read_weights(features_file), features_file)
        # Plain modules under the published names, so that the file's keys are the module's.
        self.linear = nn.ModuleDict({f"lin{i}": _Linear(c) for i, c in enumerate(_CHANNELS)})
        load_into(self.linear, _read_weights(linear_file), linear_file)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.float().eval().requires_grad_(False)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        truth: Float[Tensor, "#batch channels height width"],
    ) -> Float[Tensor, " batch"]:
        """Compare images.

        Args:
            x: Images in [0, 1], grey or colour, at least 16 pixels on each side.
            truth: What they should be; one for all, or one for each.

        Returns:
            One distance per image, float32.

        Raises:
            InputError: The shapes differ, or there are neither 1 nor 3 channels, or too few pixels.
        """
        _check_pair(x, truth)
        if x.shape[1] not in (1, 3):
            raise InputError(
                f"LPIPS compares grey or colour images, not {x.shape[1]} channels: "
                "choose the channels to compare."
            )
        if min(x.shape[-2:]) < _SMALLEST_LPIPS:
            raise InputError(
                f"LPIPS needs images of at least {_SMALLEST_LPIPS} x {_SMALLEST_LPIPS} pixels, not "
                f"{_size(x)}: "
                "use larger images."
            )
        distance = torch.zeros(len(x), dtype=torch.float32, device=x.device)
        a, b = self._prepare(x), self._prepare(truth)
        for index, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if index in _TAPS:
                linear = self.linear[f"lin{_TAPS.index(index)}"]
                difference = (_normalise(a) - _normalise(b)).square()
                distance = distance + linear(difference).flatten(1).mean(1)
        return distance

    def _prepare(self, images: Tensor) -> Tensor:
        return (2 * images.float().expand(-1, 3, -1, -1) - 1 - self.shift) / self.scale


_CHANNELS = (64, 128, 256, 384, 384, 512, 512)
# The layers of SqueezeNet 1.1 after which LPIPS compares.
_TAPS = (1, 4, 7, 9, 10, 11, 12)


class _Fire(nn.Module):
    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))


class _Linear(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        # Position 0 of the published weights' keys is a dropout, which does nothing in a metric.
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def _squeezenet_features() -> nn.Sequential:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, stride=2, ceil_mode=True)

    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2),
        nn.ReLU(),
        pool(),
        _Fire(64, 16, 64),
        _Fire(128, 16, 64),
        pool(),
        _Fire(128, 32, 128),
        _Fire(256, 32, 128),
        pool(),
        _Fire(256, 48, 192),
        _Fire(384, 48, 192),
        _Fire(384, 64, 256),
        _Fire(512, 64, 256),
    )


def _normalise(features: Tensor) -> Tensor:
    return features / torch.sqrt(features.square().sum(1, keepdim=True) + 1e-8)


def _read_weights(path: str | Path) -> dict[str, Tensor]:
    if not Path(path).exists():
        raise InputError(
            f"There is no LPIPS weight file {path}: convert torchvision's squeezenet1_1 features "
            "and the v0.1 squeeze.pth of github.com/richzhang/PerceptualSimilarity to safetensors, "
            "or leave LPIPS out."
        )
    return read_tensors(path, "LPIPS weight file")


def _size(x: Tensor) -> str:
    return f"{x.shape[-2]} x {x.shape[-1]}"


def _check_pair(x: Tensor, truth: Tensor) -> None:
    if x.shape[1:] != truth.shape[1:] or len(truth) not in (1, len(x)):
        raise InputError(
            f"Images of shape {tuple(x.shape)} cannot be compared with a truth of shape "
            f"{tuple(truth.shape)}: give images of the same size and channels."
        )
