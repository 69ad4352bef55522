r"""BM3D: denoising by collaborative filtering of similar patches; deblurring and plug and play with it.

:func:`denoise` is the filter for white noise of a known level. :func:`deblur` is BM3D-DEB for periodic blurs: a
regularised inverse makes the noise coloured, with the power spectrum :math:`\sigma^2 |r|^2` of the inverse filter
:math:`r`, and BM3D removes noise of that spectrum, twice,

.. math:: r_1 = \frac{\bar h}{|h|^2 + \alpha_1 n \sigma^2}, \qquad
          r_2 = \frac{\bar h\, |\hat z|^2}{|h|^2\, |\hat z|^2 + \alpha_2 n \sigma^2},

first by hard thresholds, then by empirical Wiener filters with the first estimate :math:`z` as pilot. For any operator,
:func:`reconstruct` is plug and play: half-quadratic splitting with BM3D as the denoiser.

The filter itself is the authors' library ``bm3d``, an optional extra: ``pip install 'patchflow[bm3d]'``. Its licence
allows non-commercial use only, and asks that its authors are cited; it is not part of patchflow. It runs on the
processor.

References:
    Dabov, Foi, Katkovnik, Egiazarian, "Image denoising by sparse 3-D transform-domain collaborative filtering", IEEE
    Trans. Image Processing 16(8), 2007
    Dabov, Foi, Katkovnik, Egiazarian, "Image restoration by sparse 3D transform-domain collaborative filtering", SPIE
    Electronic Imaging, 2008 (BM3D-DEB)
    Makinen, Azzari, Foi, "Collaborative filtering of correlated noise: exact transform-domain variance for improved
    shrinkage and patch matching", IEEE Trans. Image Processing 29, 2020
    Venkatakrishnan, Bouman, Wohlberg, "Plug-and-play priors for model based reconstruction", GlobalSIP, 2013
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Proximable
from patchflow.errors import InputError
from patchflow.numerics.fourier import transfer_function
from patchflow.problems.blur import Blur
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.operator import Identity, LinearOperator
from patchflow.solution import Solution
from patchflow.splitting import half_quadratic_splitting

# The weights of BM3D-DEB's two inverse filters, as published.
ALPHA_INVERSE, ALPHA_WIENER = 4e-4, 5e-3
# Of plug and play. On a sixth of the validation image of super-resolution x4 28.81 dB; with levels 0.2 to 0.03 28.58
# for the weight 1, 28.80 for 0.4, 28.73 for 0.23 (28.54 in five steps) and 28.09 for 0.05.
DEFAULT_WEIGHT = 0.4
LEVELS = tuple(0.3 * (0.05 / 0.3) ** (k / 7) for k in range(8))
# The library divides by the level of the noise.
_SMALLEST_LEVEL = 1e-6


@torch.no_grad()
def denoise(
    x: Float[Tensor, "batch channels height width"], std: float | int
) -> Float[Tensor, "batch channels height width"]:
    """Remove white noise, each image and channel by itself.

    Args:
        x: Noisy images, usually in [0, 1].
        std: The standard deviation of the noise.

    Raises:
        InputError: If the level is not positive, or the library is not installed.
    """
    if not std > 0:
        raise InputError(f"The noise level of BM3D is {std} but must be positive.")
    library = _require_bm3d()
    level = max(float(std), _SMALLEST_LEVEL)
    return _each(lambda image: library.bm3d(image, level), x)


def is_direct(operator: LinearOperator) -> bool:
    """Whether BM3D itself restores: by :func:`denoise`, or by :func:`deblur` a periodic blur without a stride."""
    if isinstance(operator, Identity):
        return True
    return isinstance(operator, Blur) and operator.boundary == "periodic" and operator.stride == 1


@torch.no_grad()
def deblur(
    likelihood: GaussianLikelihood, y: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch channels height width"]:
    """BM3D-DEB: regularised inverses and BM3D for the coloured noise that they leave.

    Args:
        likelihood: A periodic blur with Gaussian noise.
        y: Blurred images, usually in [0, 1].

    Raises:
        InputError: If the operator is no periodic blur, or the library is not installed.
    """
    operator, std = likelihood.operator, likelihood.std
    if not (isinstance(operator, Blur) and is_direct(operator)):
        raise InputError(
            f"BM3D-DEB needs a periodic Blur without a stride, not {type(operator).__name__}; use "
            "patchflow.reconstruct.bm3d.reconstruct for others."
        )
    library, shape = _require_bm3d(), operator.domain_shape
    half = transfer_function(operator.kernel.to(y), shape, operator.anchor)
    # On the full grid, which the library wants.
    transfer = np.fft.fft2(torch.fft.irfft2(half, s=shape).double().cpu().numpy())
    noise = std**2 * shape[0] * shape[1]

    def restore(image: np.ndarray) -> np.ndarray:
        spectrum = np.fft.fft2(image)
        inverse = transfer.conj() / (np.abs(transfer) ** 2 + ALPHA_INVERSE * noise)
        pilot: np.ndarray = library.bm3d(
            np.fft.ifft2(inverse * spectrum).real,
            noise * np.abs(inverse) ** 2,
            stage_arg=library.BM3DStages.HARD_THRESHOLDING,
        )
        power = np.abs(np.fft.fft2(pilot)) ** 2
        inverse = transfer.conj() * power / (np.abs(transfer) ** 2 * power + ALPHA_WIENER * noise)
        blurred = np.fft.ifft2(inverse * spectrum).real
        return library.bm3d(blurred, noise * np.abs(inverse) ** 2, stage_arg=pilot)

    with _trapezoidal_rule():
        return _each(restore, y)


@torch.no_grad()
def reconstruct(
    data: Proximable,
    y: Tensor,
    init: Float[Tensor, "batch channels height width"],
    *,
    weight: float | int = DEFAULT_WEIGHT,
    levels: Sequence[float] = LEVELS,
    progress: bool = False,
) -> Solution:
    r"""Plug and play: half-quadratic splitting with BM3D at falling levels :math:`s`.

    .. math:: z = \mathrm{BM3D}_s(x), \qquad x = \arg\min_x \frac{w}{2 s^2} \|x - z\|^2 - \log p(y \mid x)

    Args:
        data: The data term, with its exact proximal map.
        y: The measurement.
        init: The start image, aligned with the operator's grid (``operator.initial(y)``).
        weight: The weight :math:`w`; smaller trusts the data more.
        levels: The levels :math:`s`, one per step, in units of the image.
        progress: Show a progress line.

    Returns:
        The last point, after a step for the data, and the distance of x and z at each step. When interrupted (Ctrl-C),
        the point so far.

    Raises:
        InputError: If a number is not positive, the weight not finite, or the library is not installed.
    """
    if not (0 < weight < math.inf and levels and min(levels) > 0):
        raise InputError(
            f"Got weight {weight} and levels {list(levels)}; all must be positive, at least one level."
        )
    _require_bm3d()
    betas = [level**-2 for level in levels]
    return half_quadratic_splitting(
        data, denoise, init, y, betas=betas, weight=float(weight), progress=progress
    )


def _each(filtered: Callable[[np.ndarray], np.ndarray], x: Tensor) -> Tensor:
    """Apply a map of images in numpy to each image and channel."""
    images = x.detach().flatten(0, 1).double().cpu().numpy()
    return torch.from_numpy(np.stack([filtered(image) for image in images])).to(x).view(x.shape)


def _trapezoidal_rule() -> AbstractContextManager[object]:
    """The name of numpy's trapezoidal rule that bm4d 4.2 calls for coloured noise, and numpy 2.4 no longer has."""
    if "trapezoid" not in vars(np):
        return nullcontext()
    return patch.object(np, "trapz", np.trapezoid, create=True)


def _require_bm3d() -> Any:
    try:
        import bm3d  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            "This needs the library bm3d (for non-commercial use): run pip install 'patchflow[bm3d]'."
        ) from error
    return bm3d
