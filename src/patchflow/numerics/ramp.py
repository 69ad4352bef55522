r"""The ramp filter of filtered backprojection, with its windows.

The inversion formula :math:`f(p) = \int_0^\pi (h * y_\theta)(\langle p, n_\theta\rangle)\,d\theta` filters each
projection with :math:`\hat h(\omega) = |\omega|`. Its band-limited kernel, sampled at multiples of the bin width
:math:`s`, is

.. math:: h_0 = \frac{1}{4 s^2}, \quad h_{2k} = 0, \quad h_{2k+1} = -\frac{1}{\pi^2 (2k+1)^2 s^2}.

Sampling the kernel instead of :math:`|\omega|` keeps the mean of the image right.

References:
    Ramachandran, Lakshminarayanan, "Three-dimensional reconstruction from radiographs and electron micrographs", 1971
    Shepp, Logan, "The Fourier reconstruction of a head section", IEEE Trans. Nucl. Sci. 21(3), 1974
    Kak, Slaney, "Principles of computerized tomographic imaging", 1988, chapter 3
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError

# With fewer degrees some directions are missing.
_FULL = 170.0

Window = Literal["ram-lak", "shepp-logan", "cosine", "hamming", "hann"]


def filter_projections(
    y: Float[Tensor, "*batch angles bins"],
    spacing: float | int,
    *,
    window: Window = "hann",
    frequency_scaling: float | int = 1.0,
) -> Float[Tensor, "*batch angles bins"]:
    r"""Filter projections along the detector, as if they were zero outside.

    Args:
        y: Projections.
        spacing: Width of a bin; the result is in units of ``y`` per its square, times a length.
        window: What the ramp is multiplied with. With the frequency :math:`f` as a share of the cut-off: 1
            (``"ram-lak"``), :math:`\mathrm{sinc}(f/2)` (``"shepp-logan"``), :math:`\cos(\pi f/2)` (``"cosine"``),
            :math:`0.54 + 0.46 \cos \pi f` (``"hamming"``), :math:`0.5 + 0.5 \cos \pi f` (``"hann"``).
        frequency_scaling: The cut-off as a share of the highest frequency of the detector, in (0, 1].

    Raises:
        InputError: If the window is unknown or the frequency scaling is not in (0, 1].
    """
    if window not in get_args(Window):
        raise InputError(
            f"There is no filter {window!r}; choose from {', '.join(get_args(Window))}."
        )
    if not 0 < frequency_scaling <= 1:
        raise InputError(
            f"The frequency scaling is {frequency_scaling} but must be above 0 and at most 1."
        )
    bins = y.shape[-1]
    # Twice the length, so that the periodic convolution does not wrap around.
    length = 2 ** math.ceil(math.log2(2 * bins))
    k = torch.arange(length, device=y.device, dtype=torch.float64)
    k = torch.minimum(k, length - k)
    kernel = torch.where(k % 2 == 1, -1 / (math.pi * k.clamp_min(1)).square(), 0.0)
    kernel[0] = 0.25
    share = torch.linspace(0, 1, length // 2 + 1, device=y.device, dtype=torch.float64)
    share = share / frequency_scaling
    windows = {
        "ram-lak": torch.ones_like(share),
        "shepp-logan": torch.sinc(share / 2),
        "cosine": torch.cos(math.pi / 2 * share),
        "hamming": 0.54 + 0.46 * torch.cos(math.pi * share),
        "hann": 0.5 + 0.5 * torch.cos(math.pi * share),
    }
    factors = torch.where(share <= 1, torch.fft.rfft(kernel).real * windows[window], 0.0) / spacing
    spectrum = torch.fft.rfft(y, n=length) * factors.to(y.dtype)
    return torch.fft.irfft(spectrum, n=length)[..., :bins]


def angle_weights(angles: Float[Tensor, " angles"]) -> Float[Tensor, " angles"]:
    """The share of the half circle that each angle stands for, in radians: half the way to both its neighbours.

    Args:
        angles: Angles in radians; those that differ by a multiple of pi are the same direction.
    """
    folded, order = torch.remainder(angles, math.pi).sort()
    if len(angles) == 1:
        return torch.full_like(angles, math.pi)
    gaps = torch.diff(folded, append=folded[:1] + math.pi)
    typical = gaps[gaps > 1e-9].median()
    # A wide gap is a missing wedge: nobody stands for it.
    gaps = torch.where(gaps > 2 * typical, typical, gaps)
    weights = torch.empty_like(angles)
    weights[order] = (gaps + gaps.roll(1)) / 2
    return weights


def covered_degrees(angles: Float[Tensor, " angles"]) -> float:
    """The part of the half turn that angles stand for, in degrees."""
    return math.degrees(float(angle_weights(angles).sum()))


def misses_directions(angles: Float[Tensor, " angles"]) -> bool:
    """Whether more than a few degrees of the half turn are missing."""
    return covered_degrees(angles) < _FULL
