r"""Many quadratic functions of many points at once, and weighted second moments: two matrix products.

A quadratic function :math:`q_k(z) = \tfrac12 z^\top H_k z + g_k^\top z + c_k` is linear in the *features*

.. math:: \phi(z) = (1,\ z_1, \dots, z_d,\ z_1 z_1, z_1 z_2, \dots, z_d z_d), \qquad 1 + d + d(d + 1)/2 \text{ of them.}

So the values of all functions at all points are one product, and so are the weighted sums of :math:`\phi`, which
hold the weighted means and second moments: half of the work that factors of :math:`H_k` take. Points
are columns: the products of two rows of the point matrix are then contiguous.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def feature_count(dim: int) -> int:
    """The number of features of points of a dimension."""
    return 1 + dim + dim * (dim + 1) // 2


def features(
    z: Float[Tensor, "dim count"], out: Float[Tensor, "features count"] | None = None
) -> Float[Tensor, "features count"]:
    r"""The features :math:`\phi` of points.

    Args:
        z: The points, one per column.
        out: Where to write them.
    """
    dim, count = z.shape
    phi = z.new_empty(feature_count(dim), count) if out is None else out
    phi[0] = 1
    phi[1 : dim + 1] = z
    start = dim + 1
    for i in range(dim):
        torch.mul(z[i], z[i:], out=phi[start : start + dim - i])
        start += dim - i
    return phi


def coefficients(
    hessian: Float[Tensor, "functions dim dim"],
    slope: Float[Tensor, "functions dim"],
    constant: Float[Tensor, " functions"],
) -> Float[Tensor, "functions features"]:
    r"""The coefficients :math:`\theta_k` with :math:`q_k(z) = \theta_k^\top \phi(z)`.

    Args:
        hessian: The symmetric matrices :math:`H_k`.
        slope: The vectors :math:`g_k`.
        constant: The numbers :math:`c_k`.
    """
    dim = slope.shape[1]
    i, j = torch.triu_indices(dim, dim, device=slope.device)
    squares = hessian[:, i, j] * torch.where(i == j, 0.5, 1.0).to(slope)
    return torch.cat((constant[:, None], slope, squares), 1)


def moments(
    sums: Float[Tensor, "functions features"],
) -> tuple[
    Float[Tensor, " functions"],
    Float[Tensor, "functions dim"],
    Float[Tensor, "functions dim dim"],
]:
    r"""The sums :math:`\sum_n w_n`, :math:`\sum_n w_n z_n` and :math:`\sum_n w_n z_n z_n^\top` of summed features.

    Args:
        sums: Weighted sums :math:`\sum_n w_n \phi(z_n)`.
    """
    # 1 + d + d (d + 1) / 2 = features, solved for d.
    dim = round(((8 * sums.shape[1] + 1) ** 0.5 - 3) / 2)
    i, j = torch.triu_indices(dim, dim, device=sums.device)
    second = sums.new_empty(len(sums), dim, dim)
    second[:, i, j] = second[:, j, i] = sums[:, dim + 1 :]
    return sums[:, 0], sums[:, 1 : dim + 1], second


def pull_back(
    z: Float[Tensor, "dim count"], slope: Float[Tensor, "features count"]
) -> Float[Tensor, "dim count"]:
    r"""The product :math:`(D\phi(z))^\top s` for each point: from slopes in the features to slopes in the points.

    Args:
        z: The points, one per column.
        slope: One slope per point.
    """
    dim = len(z)
    result = slope[1 : dim + 1].clone()
    start = dim + 1
    for i in range(dim):
        block = slope[start : start + dim - i]
        result[i] += (block * z[i:]).sum(0)
        result[i:].addcmul_(block, z[i])
        start += dim - i
    return result
