r"""LoDoPaB-CT, a benchmark dataset for low-dose computed tomography reconstruction (2021): its geometry and its noise.

Images are 362 x 362 pixels on a square of 0.26 m; 1,000 angles, the midpoints of equal parts of a half turn, and
513 bins cover its diagonal. A measurement is simulated from the image on a finer grid (1,000 x 1,000 pixels, bilinear),
with 4,096 photons per bin; bins without a photon count 0.1.

References:
    Leuschner, Schmidt, Otero Baguer, Maass, Scientific Data 8, 2021, https://doi.org/10.1038/s41597-021-00893-z
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from patchflow.problems.attenuation import MU_MAX
from patchflow.problems.likelihood import Likelihood
from patchflow.problems.poisson import PoissonNoise
from patchflow.problems.simulated_scan import line_integrals
from patchflow.problems.tomography import MEMORY_LIMIT, ParallelBeam

SIZE, FIELD_OF_VIEW = 362, 0.26
ANGLES, BINS = 1000, 513
DETECTOR = math.sqrt(2) * FIELD_OF_VIEW
PHOTONS = 4096
FINE = 1000
# Of filtered backprojection with the Hann window, tuned by the data set's authors.
FREQUENCY_SCALING = 0.641025641025641
# The angles that a limited-angle measurement keeps: 36 of 180 degrees are missing.
LIMITED = slice(100, 900)


def geometry(size: int = SIZE, *, angles: int = ANGLES) -> ParallelBeam:
    """The projector on images of ``size`` x ``size`` pixels of the field of view.

    Args:
        size: Pixels along a side.
        angles: Number of angles.
    """
    directions = (torch.arange(angles, dtype=torch.float64) + 0.5) * (math.pi / angles)
    return ParallelBeam(
        (size, size),
        directions,
        BINS,
        pixel=FIELD_OF_VIEW / size,
        spacing=DETECTOR / BINS,
        memory_limit=MEMORY_LIMIT,
    )


def likelihood(operator: ParallelBeam, photons: float | int = PHOTONS) -> Likelihood:
    """The law of the measurement given an image in units of the largest attenuation."""
    return Likelihood(operator, PoissonNoise(photons, MU_MAX))


def simulate(
    x: Tensor, fine: ParallelBeam, photons: float | int = PHOTONS, *, scale: float = MU_MAX
) -> Tensor:
    """Measure images, through a finer grid than that of the reconstruction: no inverse crime.

    Args:
        x: Images (batch, 1, height, width) in units of ``scale``.
        fine: The projector on the finer grid.
        photons: Mean number of photons per bin without an object.
        scale: Attenuation in 1/m that an image value of 1 stands for.

    Returns:
        Line integrals after the logarithm (batch, 1, angles, bins), in units of 1/``scale``.
    """
    return PoissonNoise(photons, scale).draw(line_integrals(x, fine))[0]
