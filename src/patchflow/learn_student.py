r"""Maximum likelihood of a Student-t mixture by PALM and its relatives, block by block.

.. math:: H(\tilde\alpha, \tilde\nu, \mu, \tilde\Sigma)
          = -\frac1n \sum_{j=1}^n \log \sum_{k=1}^K \alpha_k\, t_{\nu_k}(x_j; \mu_k, \Sigma_k)

with :math:`\alpha = \operatorname{softmax}(\tilde\alpha)`, :math:`\nu = \tilde\nu^2 + \varepsilon` and
:math:`\Sigma_k = \tilde\Sigma_k^\top \tilde\Sigma_k + \varepsilon I`. The entries of :math:`\tilde\alpha` are kept
between 0 and 10, and other than in the paper those of :math:`\tilde\nu` between -30 and 30: components that are normal
would send their degrees of freedom to infinity, where no curvature is left. 900 degrees are normal in all but name.

References:
    Hertrich, Steidl, "Inertial stochastic PALM and applications in machine learning", 2022,
    https://arxiv.org/abs/2005.02204
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.errors import InputError
from patchflow.numerics.proximal_maps import box
from patchflow.numerics.quadratic import coefficients, features
from patchflow.palm_optimizer import Block
from patchflow.priors.student import StudentMixture, log_densities
from patchflow.priors.student_likelihood import mean_energy
from patchflow.priors.student_maximization import StudentFit

# The numbers of the paper.
_EPSILON = 0.1
_LARGEST = 10.0
# Not of the paper: see the module.
_ROOT = 30.0


class StudentObjective(nn.Module):
    r"""The function :math:`H` of the module and its four blocks, to be minimised by :mod:`patchflow.palm`.

    Args:
        points: The points.
        start: Where to start; each eigenvalue of a scatter matrix and each degree of freedom at least a little above
            :math:`\varepsilon = 0.1`, and no weight below ``exp(-10)`` of the largest.

    Raises:
        InputError: If the start is not so.
    """

    rows: Tensor

    def __init__(self, points: Float[Tensor, "count dim"], start: StudentFit) -> None:
        super().__init__()
        dim = points.shape[1]
        weights, means, scatters, degrees = (t.to(points) for t in start[:4])
        values, vectors = torch.linalg.eigh(scatters)
        logits = weights.log() - weights.log().min()
        smallest = float(torch.minimum(values.min(), degrees.min()))
        if smallest <= _EPSILON or float(logits.max()) > _LARGEST:
            raise InputError(
                f"The smallest eigenvalue or degree of freedom of the start is {smallest:g} and must be above "
                f"{_EPSILON}, and no weight may be below exp(-{_LARGEST:g}) of the largest: fit with a larger floor, "
                "or scale the points."
            )
        self.dim = dim
        # Weighted sums of these are all the squared distances.
        self.register_buffer("rows", features(points.T).T.contiguous())
        # The last batch: an optimiser asks for it several times in a row.
        self._batch: tuple[Tensor, Tensor] | None = None
        self.logits = nn.Parameter(logits)
        self.root_degrees = nn.Parameter((degrees - _EPSILON).sqrt().clamp_max(_ROOT))
        self.means = nn.Parameter(means.clone())
        roots = (values - _EPSILON).sqrt()[:, :, None] * vectors.mT
        self.root_scatters = nn.Parameter(roots)

    @property
    def blocks(self) -> list[Block]:
        """The blocks, in the order of the paper."""
        return [
            Block("weights", [self.logits], box(0, _LARGEST)),
            Block("degrees of freedom", [self.root_degrees], box(-_ROOT, _ROOT)),
            Block("locations", [self.means]),
            Block("scatter matrices", [self.root_scatters]),
        ]

    def forward(self, index: Tensor | None = None) -> Tensor:
        """The mean over points of given numbers, or over all.

        Args:
            index: The numbers.
        """
        scatters, degrees = self._scatters(), self._degrees()
        factors = torch.linalg.cholesky(scatters)
        precision = torch.linalg.inv(scatters)
        slope = (precision @ self.means[:, :, None])[:, :, 0]
        theta = coefficients(2 * precision, -2 * slope, (slope * self.means).sum(1))
        log_dets = factors.diagonal(dim1=1, dim2=2).log().sum(1)
        modes = log_densities(torch.zeros_like(log_dets)[:, None], log_dets, degrees, self.dim)
        offsets = self.logits.log_softmax(0) + modes[:, 0]
        return mean_energy(self._rows(index), theta, offsets, degrees, self.dim)

    def _rows(self, index: Tensor | None) -> Tensor:
        if index is None:
            return self.rows
        if self._batch is None or self._batch[0] is not index:
            self._batch = index, self.rows[index]
        return self._batch[1]

    def density(self) -> StudentMixture:
        """The mixture of the parameters as they are."""
        with torch.no_grad():
            weights = self.logits.softmax(0)
            return StudentMixture(
                weights, self.means.clone(), self._scatters(), self._degrees()
            ).requires_grad_(False)

    def _scatters(self) -> Tensor:
        eye = torch.eye(self.dim).to(self.root_scatters)
        return self.root_scatters.mT @ self.root_scatters + _EPSILON * eye

    def _degrees(self) -> Tensor:
        return self.root_degrees.square() + _EPSILON
