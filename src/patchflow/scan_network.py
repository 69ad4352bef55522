r"""Reconstruction from a sinogram by networks that correct a first image.

.. math:: z_1 = u_0 + s\, f_1\Big(\frac{u_0 - m}{r}\Big), \qquad u_0 = \mathrm{FBP}(y),

with mean :math:`m` and deviation :math:`r` of filtered backprojections and the usual size :math:`s` of their error; or
:math:`z_1` is a reconstruction with total variation, where too much is missing for a local correction. With more than
one stage there are steps towards the measurement, and a second network sees where they lead:

.. math:: u_k &= \operatorname*{argmin}_u \tfrac12 \sum_i w_i\,(A u - y)_i^2 + \frac{1}{2 s_k^2}\,\|u - z_k\|^2, \\
          z_{k+1} &= z_k + \theta s_k\, f_2\Big(\frac{u_0 - m}{r}, \frac{z_k - m}{r}, \frac{u_k - z_k}{s_k};
                     \frac{s_k}{s}\Big),

where :math:`1/w_i` are the variances of the measured line integrals and :math:`s_k` is a share of :math:`s`: if what is
left of the error were white noise of that size, :math:`u_k` would be the most probable image. It is found by a few
conjugate gradients. All :math:`z_k` are brought into [0, 1], in units of the largest attenuation. The networks learn
the noise and the artefacts of one scan: its geometry and its number of photons belong to the model.

The relaxation :math:`\theta` is 1/2 where directions are missing, else 1. Networks that know a few slices of one
patient trust themselves too much on those of another: whole corrections make the image worse there, from the second on.

References:
    Jin, McCann, Froustey, Unser, "Deep convolutional neural network for inverse problems in imaging", IEEE TIP 26(9),
    2017, https://arxiv.org/abs/1611.03679 (one stage)
    Aggarwal, Mani, Jacob, "MoDL: model based deep learning architecture for inverse problems", IEEE TMI 38(2), 2019,
    https://arxiv.org/abs/1712.02862 (conjugate gradients, and the same network after each)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.errors import InputError
from patchflow.numerics.dihedral import DIHEDRAL, Symmetry, self_ensemble
from patchflow.numerics.linalg import conjugate_gradients
from patchflow.problems.attenuation import MU_MAX
from patchflow.problems.likelihood import Likelihood
from patchflow.problems.poisson import PoissonNoise
from patchflow.problems.scan_geometry import difference
from patchflow.problems.simulated_scan import scan_symmetries
from patchflow.problems.tomography import ParallelBeam
from patchflow.splitting import primal_dual
from patchflow.variation_problem import TOLERANCE, variation_problem

# Other numbers of photons are served up to a factor.
_SIMILAR, _MOST = 1.05, 2.0
# Of the conjugate gradients of a data step.
_ITERATIONS = 6
_IDENTITY = DIHEDRAL[:1]

Images = Float[Tensor, "batch 1 height width"]
# Filtered backprojections, then of each stage but the first where it starts, and from there the way to the data.
Inputs = Float[Tensor, "batch inputs height width"]


class Variation(NamedTuple):
    """How a reconstruction with total variation is made.

    Attributes:
        weight: Its weight, in nats per unit of variation.
        steps: Most steps of its solver.
    """

    weight: float
    steps: int


class ScanNetwork(nn.Module):
    """Filtered backprojection or total variation, and networks that correct it; see the module's formula.

    Args:
        operator: The projector of the scan.
        photons: Mean number of photons per bin without an object.
        first: The network of the first stage, from one channel to one; or several, whose mean is taken; none if the
            first stage is total variation.
        later: That of all later stages, from three channels to one, which is told the share; as many.
        shares: The shares of the error of filtered backprojection that are left before each data step.
        variation: The first stage, if it is total variation.
        relaxation: The share of the corrections of all stages but the first that is taken.

    Raises:
        InputError: If the number of photons or a share is not positive, or there are later networks without shares or
            shares without networks, or the first stage is not one of the two, or the relaxation is not in (0, 1].
    """

    centre: Tensor
    spread: Tensor
    error: Tensor
    shares: Tensor

    def __init__(
        self,
        operator: ParallelBeam,
        photons: float | int,
        first: Sequence[nn.Module] = (),
        later: Sequence[nn.Module] = (),
        shares: Sequence[float] = (),
        variation: Variation | None = None,
        relaxation: float | int = 1.0,
    ) -> None:
        super().__init__()
        if variation is None:
            fits = bool(first) and len(later) == len(first) * bool(shares)
        else:
            fits = not first and bool(later) and bool(shares)
        if not fits or not all(0 < share < math.inf for share in shares):
            raise InputError(
                f"Got {len(first)} first and {len(later)} later networks, the shares {list(shares)} and {variation}; "
                "give as many of either and positive shares, only first ones, or only later ones after total variation."
            )
        if not 0 < relaxation <= 1:
            raise InputError(f"The relaxation is {relaxation} but must be in (0, 1], such as 0.5.")
        self.operator, self.variation, self.relaxation = operator, variation, float(relaxation)
        self.first, self.later = nn.ModuleList(first), nn.ModuleList(later)
        self.noise = PoissonNoise(photons, MU_MAX)
        for name, start in (("centre", 0.0), ("spread", 1.0), ("error", 1.0)):
            self.register_buffer(name, torch.tensor(start))
        self.register_buffer("shares", torch.tensor(list(shares)))

    @property
    def photons(self) -> float:
        """Mean number of photons per bin without an object."""
        return self.noise.photons

    @property
    def members(self) -> int:
        """Networks of each stage."""
        return max(len(self.first), len(self.later))

    @property
    def left(self) -> Tensor:
        """The usual size of the error that the first of the networks corrects."""
        return self.error if self.first else self.error * self.shares[0]

    def forward(
        self,
        y: Float[Tensor, "batch 1 angles bins"],
        *,
        ensemble: bool = False,
        estimate: Images | None = None,
    ) -> Images:
        """Reconstruct images, in units of the largest attenuation, from line integrals in its inverse.

        Args:
            y: The sinograms.
            ensemble: Take of each network the mean over the turns and reflections that the scan does not notice.
            estimate: What :meth:`estimate` makes of them, where that is known.
        """
        turns = scan_symmetries(self.operator) if ensemble else _IDENTITY
        inputs = self.prepare(y, turns, estimate)
        return self._mean(len(self.shares), inputs, turns, self.relaxation)

    @torch.no_grad()
    def estimate(self, y: Float[Tensor, "batch 1 angles bins"]) -> Images | None:
        """The result of the first stage, if it is total variation.

        Raises:
            KeyboardInterrupt: If it was interrupted: half of it is no start.
        """
        if self.variation is None:
            return None
        init = self.operator.initial(y)
        likelihood = Likelihood(self.operator, self.noise)
        problem = variation_problem(likelihood, y, init, self.variation.weight)
        found = primal_dual(
            problem,
            *problem.start(init),
            relaxation=problem.relaxation,
            max_iterations=self.variation.steps,
            tolerance=TOLERANCE,
        )
        if found.interrupted:
            raise KeyboardInterrupt
        return found.x

    @torch.no_grad()
    def prepare(
        self,
        y: Float[Tensor, "batch 1 angles bins"],
        turns: Sequence[Symmetry] = _IDENTITY,
        estimate: Images | None = None,
        relaxations: Sequence[float] | None = None,
    ) -> Inputs:
        """What the networks are given, which is made by those before them.

        Args:
            y: The sinograms.
            turns: What each network is averaged over.
            estimate: What :meth:`estimate` makes of them, where that is known.
            relaxations: That of each stage but the last, in place of the model's own; that of the first has no effect.
        """
        inputs = self.backproject(y)
        relaxations = relaxations or [self.relaxation] * len(self.shares)
        z = self.estimate(y) if estimate is None else estimate
        for k, (share, relaxation) in enumerate(zip(self.shares, relaxations, strict=True)):
            if k or z is None:
                z = self._mean(k, inputs, turns, relaxation)
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

    def scale_(self, u: Images, x: Images, estimate: Images | None = None) -> None:
        """Set the numbers of the formula by filtered backprojections and true images.

        Args:
            u: Filtered backprojections.
            x: The images.
            estimate: What :meth:`estimate` makes of them, which tells the first of the shares and scales the others.
        """
        self.centre.copy_(u.mean())
        self.spread.copy_(u.std())
        self.error.copy_((u - x).square().mean().sqrt())
        if estimate is not None:
            left = (estimate - x).square().mean().sqrt() / self.error
            self.shares.mul_(left / self.shares[0])

    def _mean(self, k: int, inputs: Inputs, turns: Sequence[Symmetry], relaxation: float) -> Images:
        """What the networks of a stage make of what they are given, together; relaxed, but for the first stage."""
        z = self._members(k, inputs, turns).mean(1, keepdim=True)
        return (inputs[:, 2 * k - 1 : 2 * k].lerp(z, relaxation) if k else z).clamp(0, 1)

    def _members(
        self, k: int, inputs: Inputs, turns: Sequence[Symmetry]
    ) -> Float[Tensor, "batch members height width"]:
        """What each network of a stage makes of what it is given."""
        z, size = inputs[:, :1], self.error
        given = (z - self.centre) / self.spread
        networks = list(self.first)
        if k:
            z, way = inputs[:, 2 * k - 1 : 2 * k], inputs[:, 2 * k : 2 * k + 1]
            share = self.shares[k - 1]
            size = self.error * share
            given = torch.cat((given, (z - self.centre) / self.spread, way / size), 1)
            networks = [partial(network, number=share.view(1, 1, 1, 1)) for network in self.later]
        corrections = [self_ensemble(network, given, turns) for network in networks]
        # The image itself has eight bits in bfloat16: too few for small noise.
        return z + size * torch.cat(corrections, 1).to(z.dtype)

    def _towards(self, y: Tensor, z: Tensor, share: Tensor) -> Tensor:
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
