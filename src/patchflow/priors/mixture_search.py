r"""A faster search for the most probable component of a mixture: first a group of components, then one of its members.

The components are put into groups of about equal size that are alike: each component joins the group whose
moment-matched Gaussian it diverges least from, the clearest cases first, and the groups' Gaussians follow. A patch is
then compared with :math:`G` groups and :math:`K / G` members instead of :math:`K` components. The choice may miss
the best component; what that costs is measured in ``benchmarks/epll.py``.

References:
    Parameswaran, Deledalle, Denis, Nguyen, "Accelerating GMM-based patch priors for image restoration: three
    ingredients for a 100x speed-up", 2018, https://arxiv.org/abs/1710.08124 (a balanced tree of such groups)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError
from patchflow.priors.patch_mixture import PatchMixture

_REFINEMENTS = 20


class SearchedMixture(PatchMixture):
    """A mixture whose components are searched in groups; energies and gradients stay exact.

    Args:
        mixture: The mixture.
        groups: The number of groups.
        owner: The group of each component; found if None.

    Raises:
        InputError: If there are fewer components than groups.
    """

    owner: Tensor

    def __init__(self, mixture: PatchMixture, groups: int, owner: Tensor | None = None) -> None:
        if not 1 <= groups <= len(mixture.means):
            raise InputError(
                f"Got {groups} groups for {len(mixture.means)} components; use at least 1 and at most as many."
            )
        super().__init__(
            mixture.weights, mixture.means, mixture.covariances, remove_mean=mixture.remove_mean
        )
        self.register_buffer("owner", _group(mixture, groups) if owner is None else owner)
        weights, means, covariances = _merge(mixture, self.owner, groups)
        self.leaders = PatchMixture(weights, means, covariances, remove_mean=mixture.remove_mean)

    def blurred(self, variance: float | int) -> SearchedMixture:
        """The mixture with noise, in the same groups; see :meth:`PatchMixture.blurred`."""
        return SearchedMixture(super().blurred(variance), len(self.leaders.means), self.owner)

    def component(self, x: Float[Tensor, "batch patch"]) -> Tensor:
        """The number of the most probable component in the most probable group."""
        group = self.leaders.component(x)
        order = group.argsort()
        z = self._whiten(x[order])
        found = torch.empty_like(order)
        start = 0
        for g, size in enumerate(group.bincount(minlength=len(self.leaders.means)).tolist()):
            members = (self.owner == g).nonzero()[:, 0]
            rows = slice(start, start := start + size)
            found[rows] = members[self._best(z[:, rows], self.theta[members])]
        result = torch.empty_like(found)
        result[order] = found
        return result


def _merge(mixture: PatchMixture, owner: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and covariances of the groups."""
    share = torch.nn.functional.one_hot(owner, groups).to(mixture.means).T * mixture.weights
    weights = share.sum(1)
    share = share / weights[:, None]
    means = share @ mixture.means
    spread = mixture.means - means[owner]
    own = mixture.covariances + spread[:, :, None] * spread[:, None]
    return weights, means, (share @ own.flatten(1)).view(groups, *own.shape[1:])


def _group(mixture: PatchMixture, groups: int) -> Tensor:
    """Balanced groups of components that are alike."""
    exact = PatchMixture(
        mixture.weights.double(), mixture.means.double(), mixture.covariances.double()
    )
    count = len(exact.means)
    most = -(-count // groups)
    # The start: components of similar volume, that is of similar contrast.
    order = torch.linalg.slogdet(exact.covariances).logabsdet.argsort()
    owner = torch.empty_like(order)
    owner[order] = torch.arange(count, device=order.device) * groups // count
    for _ in range(_REFINEMENTS):
        divergence = _divergence(exact, *_merge(exact, owner, groups)[1:])
        ranked, preferred = divergence.sort(1)
        clearest = (ranked[:, min(1, groups - 1)] - ranked[:, 0]).argsort(descending=True)
        new, room = owner.clone(), [most] * groups
        for k in clearest.tolist():
            new[k] = next(g for g in preferred[k].tolist() if room[g])
            room[int(new[k])] -= 1
        # A group that nothing prefers keeps what it had.
        if len(new.unique()) < groups or torch.equal(new, owner):
            break
        owner = new
    return owner


def _divergence(mixture: PatchMixture, means: Tensor, covariances: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each component from each group, up to a constant for each component."""
    factors = torch.linalg.cholesky(covariances)
    precision = torch.cholesky_inverse(factors)
    trace = mixture.covariances.flatten(1) @ precision.flatten(1).T
    shift = mixture.means[:, None] - means
    distance = torch.einsum("kgi,gij,kgj->kg", shift, precision, shift)
    log_det = 2 * factors.diagonal(dim1=1, dim2=2).log().sum(1)
    return 0.5 * (trace + distance + log_det)
