r"""Premade models that reconstruct from a sinogram: filtered backprojection, corrected by a network.

.. math:: \hat x = u + s\, f_\theta\Big(\frac{u - m}{r}\Big), \qquad u = \mathrm{FBP}(y),

with mean :math:`m` and deviation :math:`r` of filtered backprojections and the usual size :math:`s` of their error. The
network learns the noise and the artefacts of one scan: its geometry and its number of photons belong to the model.

References:
    Jin, McCann, Froustey, Unser, "Deep convolutional neural network for inverse problems in imaging", IEEE TIP 26(9),
    2017, https://arxiv.org/abs/1611.03679
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.errors import InputError
from patchflow.networks.unet import PUBLISHED_WIDTHS, UNet
from patchflow.problems.attenuation import MU_MAX
from patchflow.problems.poisson import PoissonNoise
from patchflow.problems.tomography import ParallelBeam

# Numbers of a geometry that were rounded differently agree; other numbers of photons are served up to a factor.
_TOLERANCE, _SIMILAR, _MOST = 1e-3, 1.05, 2.0

Images = Float[Tensor, "batch 1 height width"]


class FBPUNet(nn.Module):
    """Filtered backprojection and a network that corrects it.

    Args:
        operator: The projector of the scan.
        photons: Mean number of photons per bin without an object.
        network: The network.

    Raises:
        InputError: If the number of photons is not positive.
    """

    centre: Tensor
    spread: Tensor
    error: Tensor

    def __init__(self, operator: ParallelBeam, photons: float | int, network: nn.Module) -> None:
        super().__init__()
        self.operator, self.network = operator, network
        self.noise = PoissonNoise(photons, MU_MAX)
        for name, start in (("centre", 0.0), ("spread", 1.0), ("error", 1.0)):
            self.register_buffer(name, torch.tensor(start))

    @property
    def photons(self) -> float:
        """Mean number of photons per bin without an object."""
        return self.noise.photons

    def forward(self, y: Float[Tensor, "batch 1 angles bins"]) -> Images:
        """Reconstruct images, in units of the largest attenuation, from line integrals in its inverse."""
        return self.correct(self.backproject(y))

    def backproject(self, y: Float[Tensor, "batch 1 angles bins"]) -> Images:
        """Filtered backprojection with the Hann window up to the highest frequency, as published."""
        return self.operator.filtered_backprojection(y)

    def correct(self, u: Images) -> Images:
        """Correct filtered backprojections, or crops of them."""
        # The image itself has eight bits in bfloat16: too few for small noise.
        return u + self.error * self.network((u - self.centre) / self.spread).to(u.dtype)

    def scale_(self, u: Images, x: Images) -> None:
        """Set the three numbers of the formula by pairs of filtered backprojections and true images."""
        self.centre.copy_(u.mean())
        self.spread.copy_(u.std())
        self.error.copy_((u - x).square().mean().sqrt())

    def check(self, operator: ParallelBeam, photons: float | int) -> str:
        """Refuse another scan than the model was trained for.

        Args:
            operator: The projector of the scan.
            photons: Its mean number of photons per bin without an object.

        Returns:
            A warning, if the number of photons is a little different; else nothing.

        Raises:
            InputError: If the geometry is another, or the number of photons is less than half or more than twice.
        """
        own, given = geometry(self.operator), geometry(operator)
        for name, value in own.items():
            if name == "angles":
                same = _same_angles(self.operator.angles, operator.angles)
                told = tuple(_describe_angles(o.angles) for o in (operator, self.operator))
            else:
                same = _agree(value, given[name])
                told = (given[name], value)
            if not same:
                raise InputError(
                    f"The scan has the {name} {told[0]} but the model was trained for {told[1]}; train one for this "
                    "scan with patchflow train fbp-unet."
                )
        ratio = max(photons / self.photons, self.photons / photons)
        if ratio > _MOST:
            raise InputError(
                f"The scan has {photons:g} photons per bin but the model was trained for {self.photons:g}, another "
                "noise level; train one for this scan with patchflow train fbp-unet."
            )
        if ratio <= _SIMILAR:
            return ""
        return (
            f"The model was trained for {self.photons:g} photons per bin, the scan has {photons:g}: what it takes for "
            "noise is a little too much or too little."
        )


def fbp_unet(
    scan: ParallelBeam | Mapping[str, Any],
    photons: float | int,
    *,
    widths: Sequence[int] = PUBLISHED_WIDTHS,
    skip: int = 16,
    block: int = 2,
) -> FBPUNet:
    """Filtered backprojection and a U-Net for one scan; train it with :func:`patchflow.learn_fbp_unet`.

    Published are the same widths, 4 skip channels and no blocks, which takes about three times as long; with batch
    normalisation, and without the sum with its input.

    Args:
        scan: The projector of the measured angles; or what :func:`geometry` says of it, as model files do.
        photons: Mean number of photons per bin without an object.
        widths: Channels of each scale, finest first.
        skip: Channels that each scale passes across; 0 for none.
        block: Pixels along a side of the blocks of the finest scale.

    Raises:
        InputError: If a number is out of range.

    References:
        Jin, McCann, Froustey, Unser, IEEE TIP 26(9), 2017, https://arxiv.org/abs/1611.03679
    """
    operator = scan if isinstance(scan, ParallelBeam) else projector(scan)
    arguments = {
        "scan": geometry(operator),
        "photons": float(photons),
        "widths": list(widths),
        "skip": skip,
        "block": block,
    }
    model = FBPUNet(operator, photons, UNet(widths=widths, skip=skip, block=block))
    model.made_by = ("fbp_unet", arguments)  # pyright: ignore[reportArgumentType]
    return model


def geometry(operator: ParallelBeam) -> dict[str, Any]:
    """The numbers that rebuild a projector, as JSON values: pixels, bins, lengths in metres, angles in radians."""
    return {
        "image": list(operator.domain_shape),
        "bins": operator.range_shape[1],
        "pixel": operator.pixel,
        "bin width": operator.spacing,
        "detector offset": operator.offset,
        "angles": operator.angles.tolist(),
    }


def projector(numbers: Mapping[str, Any]) -> ParallelBeam:
    """The projector of the numbers of :func:`geometry`."""
    height, width = numbers["image"]
    return ParallelBeam(
        (height, width),
        torch.tensor(numbers["angles"], dtype=torch.float64),
        numbers["bins"],
        pixel=numbers["pixel"],
        spacing=numbers["bin width"],
        offset=numbers["detector offset"],
    )


def _agree(a: Any, b: Any) -> bool:  # noqa: ANN401
    if isinstance(a, float):
        return math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=1e-9)
    return a == b


def _same_angles(a: Tensor, b: Tensor) -> bool:
    """In any order, and modulo half a turn, up to a tenth of the usual way to the next one."""
    if len(a) != len(b):
        return False
    a, b = (torch.remainder(t, math.pi).sort().values for t in (a, b))
    near = 0.1 * float(a.diff().median()) if len(a) > 1 else _TOLERANCE
    # Rounding may have carried an angle of zero to the other end.
    return any(
        bool(((a - shifted + math.pi / 2) % math.pi - math.pi / 2).abs().max() <= near)
        for shifted in (b, b.roll(1), b.roll(-1))
    )


def _describe_angles(angles: Tensor) -> str:
    degrees = torch.rad2deg(torch.remainder(angles, math.pi))
    return f"{len(degrees)} from {float(degrees.min()):.4g} to {float(degrees.max()):.4g} degrees"
