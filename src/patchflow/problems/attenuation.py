r"""Units of computed tomography: Hounsfield units, attenuation in 1/m, and images in [0, 1].

.. math:: \mu = \mu_w + \frac{\mathrm{HU}}{1000} (\mu_w - \mu_a), \qquad x = \mu / \mu_{\max},

with water :math:`\mu_w = 20 / m` and air :math:`\mu_a = 0.02 / m` (60 keV), and the largest value
:math:`\mu_{\max} = 81.36 / m` of 12 bits, 3071 HU, as in the LoDoPaB-CT data set.

References:
    Leuschner, Schmidt, Otero Baguer, Maass, "LoDoPaB-CT, a benchmark dataset for low-dose computed tomography
    reconstruction", Scientific Data 8, 2021, https://doi.org/10.1038/s41597-021-00893-z
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchflow.errors import InputError

WATER, AIR = 20.0, 0.02
LARGEST_HU = 3071.0
MU_MAX = LARGEST_HU * (WATER - AIR) / 1000 + WATER
# Hounsfield units that a difference of 1 between images stands for.
HU_RANGE = MU_MAX * 1000 / (WATER - AIR)
# Air outside and the padding of scanners (-2000, -3024) are below -1000; metal is above 3071.
_PLAUSIBLE = (-4096.0, 65535.0)


def from_hounsfield(hu: Tensor, *, dither: bool = False) -> Tensor:
    r"""Images in [0, 1] of Hounsfield units: :math:`\mu / \mu_{\max}`, clipped.

    Args:
        hu: Hounsfield units.
        dither: Add uniform noise in [0, 1) HU first, which undoes the rounding to integers.

    Raises:
        InputError: If the values cannot be Hounsfield units: not finite, far outside, or all near [0, 1].
    """
    low, high = float(hu.min()), float(hu.max())
    if not _PLAUSIBLE[0] <= low <= high <= _PLAUSIBLE[1]:
        raise InputError(
            f"The values from {low:g} to {high:g} cannot be Hounsfield units, which lie between -1024 and 3071 or so; "
            "check the rescale slope and intercept."
        )
    # Reconstructions leave [0, 1] a little; no slice of a body spans two HU.
    if -1 <= low < high <= 2:
        raise InputError(
            f"The values from {low:g} to {high:g} are no Hounsfield units but probably normalised attenuations; "
            "do not convert them again."
        )
    if dither:
        hu = hu + torch.rand_like(hu)
    return ((hu * ((WATER - AIR) / 1000) + WATER) / MU_MAX).clamp(0, 1)


def to_hounsfield(x: Tensor) -> Tensor:
    """Hounsfield units of images in units of the largest attenuation; the inverse where nothing was clipped."""
    return (x * MU_MAX - WATER) * (1000 / (WATER - AIR))
