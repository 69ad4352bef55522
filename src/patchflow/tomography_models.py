r"""Premade models that reconstruct from a sinogram: filtered backprojection, corrected by networks.

.. math:: z_1 = u_0 + s\, f_1\Big(\frac{u_0 - m}{r}\Big), \qquad u_0 = \mathrm{FBP}(y),

with mean :math:`m` and deviation :math:`r` of filtered backprojections and the usual size :math:`s` of their error.
With more than one stage there are steps towards the measurement, and a second network sees where they lead:

.. math:: u_k &= \operatorname*{argmin}_u \tfrac12 \sum_i w_i\,(A u - y)_i^2 + \frac{1}{2 s_k^2}\,\|u - z_k\|^2, \\
          z_{k+1} &= z_k + s_k\, f_2\Big(\frac{u_0 - m}{r}, \frac{z_k - m}{r}, \frac{u_k - z_k}{s_k};
                     \frac{s_k}{s}\Big),

where :math:`1/w_i` are the variances of the measured line integrals and :math:`s_k` is a share of :math:`s`: if what is
left of the error were white noise of that size, :math:`u_k` would be the most probable image. It is found by a few
conjugate gradients. The networks learn the noise and the artefacts of one scan: its geometry and its number of photons
belong to the model.

References:
    Jin, McCann, Froustey, Unser, "Deep convolutional neural network for inverse problems in imaging", IEEE TIP 26(9),
    2017, https://arxiv.org/abs/1611.03679 (one stage)
    Aggarwal, Mani, Jacob, "MoDL: model based deep learning architecture for inverse problems", IEEE TMI 38(2), 2019,
    https://arxiv.org/abs/1712.02862 (conjugate gradients, and the same network after each)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.errors import InputError
from patchflow.networks.residual_unet import ResidualUNet
from patchflow.networks.unet import UNet
from patchflow.numerics.dihedral import DIHEDRAL, Symmetry, self_ensemble
from patchflow.numerics.linalg import conjugate_gradients
from patchflow.problems.attenuation import MU_MAX
from patchflow.problems.poisson import PoissonNoise
from patchflow.problems.scan_geometry import difference, geometry, projector
from patchflow.problems.simulated_scan import scan_symmetries
from patchflow.problems.tomography import ParallelBeam

# Other numbers of photons are served up to a factor.
_SIMILAR, _MOST = 1.05, 2.0
# Of the conjugate gradients of a data step.
_ITERATIONS = 6
_IDENTITY = DIHEDRAL[:1]
# Of the error of filtered backprojection: what the first and the last data step take for what is left of it.
_FIRST, _LAST = 0.7, 0.4
# Channels of the scales of their networks.
WIDTHS = (32, 64, 96)

Images = Float[Tensor, "batch 1 height width"]
# Filtered backprojections, then of each stage but the first where it starts, and from there the way to the data.
Inputs = Float[Tensor, "batch inputs height width"]


class ScanNetwork(nn.Module):
    """Filtered backprojection and networks that correct it; see the module's formula.

    Args:
        operator: The projector of the scan.
        photons: Mean number of photons per bin without an object.
        first: The network of the first stage, from one channel to one; or several, whose mean is taken.
        later: That of all later stages, from three channels to one, which is told the share; as many.
        shares: The shares of the error of filtered backprojection that are left before each data step.

    Raises:
        InputError: If the number of photons or a share is not positive, or there are later networks without shares or
            shares without networks.
    """

    centre: Tensor
    spread: Tensor
    error: Tensor

    def __init__(
        self,
        operator: ParallelBeam,
        photons: float | int,
        first: Sequence[nn.Module],
        later: Sequence[nn.Module] = (),
        shares: Sequence[float] = (),
    ) -> None:
        super().__init__()
        count = len(first) * bool(shares)
        if not first or len(later) != count or not all(0 < share < math.inf for share in shares):
            raise InputError(
                f"Got {len(first)} first and {len(later)} later networks and the shares {list(shares)}; give as many "
                "of either and positive shares, or only first ones."
            )
        self.operator, self.shares = operator, shares
        self.first, self.later = nn.ModuleList(first), nn.ModuleList(later)
        self.noise = PoissonNoise(photons, MU_MAX)
        for name, start in (("centre", 0.0), ("spread", 1.0), ("error", 1.0)):
            self.register_buffer(name, torch.tensor(start))

    @property
    def photons(self) -> float:
        """Mean number of photons per bin without an object."""
        return self.noise.photons

    def forward(self, y: Float[Tensor, "batch 1 angles bins"], *, ensemble: bool = False) -> Images:
        """Reconstruct images, in units of the largest attenuation, from line integrals in its inverse.

        Args:
            y: The sinograms.
            ensemble: Take of each network the mean over the turns and reflections that the scan does not notice.
        """
        turns = scan_symmetries(self.operator) if ensemble else _IDENTITY
        return self._members(len(self.shares), self.prepare(y, turns), turns).mean(1, keepdim=True)

    @torch.no_grad()
    def prepare(
        self, y: Float[Tensor, "batch 1 angles bins"], turns: Sequence[Symmetry] = _IDENTITY
    ) -> Inputs:
        """What the networks are given, which is made by those before them.

        Args:
            y: The sinograms.
            turns: What each network is averaged over.
        """
        inputs = self.backproject(y)
        for k, share in enumerate(self.shares):
            z = self._members(k, inputs, turns).mean(1, keepdim=True)
            inputs = torch.cat((inputs, z, self._towards(y, z, share)), 1)
        return inputs

    def backproject(self, y: Float[Tensor, "batch 1 angles bins"]) -> Images:
        """Filtered backprojection with the Hann window up to the highest frequency, as published."""
        return self.operator.filtered_backprojection(y)

    def results(
        self, inputs: Inputs, stages: Sequence[int]
    ) -> Float[Tensor, "batch results height width"]:
        """What each network of some of the stages makes of what it is given, or of crops of it."""
        return torch.cat([self._members(k, inputs, _IDENTITY) for k in stages], 1)

    def scale_(self, u: Images, x: Images) -> None:
        """Set the three numbers of the formula by pairs of filtered backprojections and true images."""
        self.centre.copy_(u.mean())
        self.spread.copy_(u.std())
        self.error.copy_((u - x).square().mean().sqrt())

    def _members(
        self, k: int, inputs: Inputs, turns: Sequence[Symmetry]
    ) -> Float[Tensor, "batch members height width"]:
        """What the networks of a stage make of what they are given."""
        z, size = inputs[:, :1], self.error
        given = (z - self.centre) / self.spread
        networks = list(self.first)
        if k:
            z, way = inputs[:, 2 * k - 1 : 2 * k], inputs[:, 2 * k : 2 * k + 1]
            size = self.error * self.shares[k - 1]
            given = torch.cat((given, (z - self.centre) / self.spread, way / size), 1)
            number = given.new_full((1, 1, 1, 1), self.shares[k - 1])
            networks = [partial(network, number=number) for network in self.later]
        corrections = [self_ensemble(network, given, turns) for network in networks]
        # The image itself has eight bits in bfloat16: too few for small noise.
        return z + size * torch.cat(corrections, 1).to(z.dtype)

    def _towards(self, y: Tensor, z: Tensor, share: float) -> Tensor:
        """The way from an image to the minimiser of the formula."""
        weight, rho = self.noise.precision(y), (self.error * share) ** -2

        def apply(x: Tensor) -> Tensor:
            return self.operator.adjoint(weight * self.operator(x)) + rho * x

        slope = self.operator.adjoint(weight * (y - self.operator(z)))
        return conjugate_gradients(apply, slope, tolerance=1e-3, max_iterations=_ITERATIONS)

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
        wrong = difference(operator, self.operator)
        if wrong is not None:
            raise InputError(
                f"The scan has the {wrong.name} {wrong.given} but the model was trained for {wrong.own}; train one for "
                "this scan."
            )
        ratio = max(photons / self.photons, self.photons / photons)
        if ratio > _MOST:
            raise InputError(
                f"The scan has {photons:g} photons per bin but the model was trained for {self.photons:g}, another "
                "noise level; train one for this scan."
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
    widths: Sequence[int] = WIDTHS,
    blocks: int = 1,
    cell: int = 2,
    preset: str = "default",
) -> ScanNetwork:
    """Filtered backprojection and a U-Net for one scan; train it with :func:`patchflow.learn_scan`.

    By default the U-Net has residual blocks, which learn faster than the published one.

    Args:
        scan: The projector of the measured angles; or what :func:`patchflow.problems.scan_geometry.geometry` says of
            it, as model files do.
        photons: Mean number of photons per bin without an object.
        widths: Channels of each scale, finest first.
        blocks: Residual blocks of each scale, on the way down and up.
        cell: Pixels along a side of the cells of the finest scale.
        preset: ``"paper"`` is the published U-Net, but for its batch normalisation and with the sum with its input;
            it overrides ``widths``, ``blocks`` and ``cell``. It learns at rates below .001.

    Raises:
        InputError: If a number is out of range, or there is no such preset.

    References:
        Jin, McCann, Froustey, Unser, IEEE TIP 26(9), 2017, https://arxiv.org/abs/1611.03679
        Baguer, Leuschner, Schmidt, 2020, https://arxiv.org/abs/2003.04989 (the preset)
    """
    arguments = dict(locals()) | {"widths": list(widths)}
    if preset not in ("default", "paper"):
        raise InputError(f"The preset is {preset!r}; use 'default' or 'paper'.")
    network = UNet() if preset == "paper" else _corrector(1, widths, blocks, cell)
    return _named("fbp_unet", ScanNetwork(_projector(scan), photons, [network]), arguments)


def single_scan(
    scan: ParallelBeam | Mapping[str, Any],
    photons: float | int,
    *,
    stages: int = 4,
    widths: Sequence[int] = WIDTHS,
    blocks: int = 1,
    cell: int = 2,
    members: int = 1,
) -> ScanNetwork:
    """Residual U-Nets and data steps for one scan; train them on a few slices with :func:`patchflow.learn_scan`.

    Args:
        scan: See :func:`fbp_unet`.
        photons: See there.
        stages: Corrections in a row, with a data step between any two.
        widths: Channels of each scale of the networks, finest first.
        blocks: Residual blocks of each scale, on the way down and up.
        cell: Pixels along a side of the cells of the finest scale.
        members: Networks of each stage, each of its own random start, whose mean is taken.

    Raises:
        InputError: If a number is out of range.
    """
    arguments = dict(locals()) | {"widths": list(widths)}
    if min(stages, members) < 1:
        raise InputError(f"Got {stages} stages and {members} members; use at least one.")
    steps = stages - 1
    shares = [_FIRST * (_LAST / _FIRST) ** (k / max(1, steps - 1)) for k in range(steps)]
    first, later = (
        [_corrector(channels, widths, blocks, cell) for _ in range(count)]
        for channels, count in ((1, members), (3, members * bool(shares)))
    )
    model = ScanNetwork(_projector(scan), photons, first, later, shares)
    return _named("single_scan", model, arguments)


def _corrector(channels: int, widths: Sequence[int], blocks: int, cell: int) -> ResidualUNet:
    """A network that starts at zero: what it is given is where its image starts. The later one is told the share."""
    network = ResidualUNet(channels, 1, widths=widths, blocks=blocks, cell=cell, told=channels > 1)
    nn.init.zeros_(network.tail.weight)
    assert network.tail.bias is not None
    nn.init.zeros_(network.tail.bias)
    return network


def _projector(scan: ParallelBeam | Mapping[str, Any]) -> ParallelBeam:
    return scan if isinstance(scan, ParallelBeam) else projector(scan)


def _named(name: str, model: ScanNetwork, arguments: Mapping[str, Any]) -> ScanNetwork:
    """Keep what rebuilds the model."""
    scan = {"scan": geometry(model.operator), "photons": model.photons}
    model.made_by = (name, {**arguments, **scan})  # pyright: ignore[reportArgumentType]
    return model
