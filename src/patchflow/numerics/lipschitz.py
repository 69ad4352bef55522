"""The Lipschitz constant of a linear map."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def spectral_norm(weight: Float[Tensor, "rows columns"]) -> Float[Tensor, ""]:
    r"""The largest singular value, :math:`\|W\|_2 = \lambda_{\max}(W^\top W)^{1/2}`, exact up to rounding.

    The usual power iteration converges from below, so that a network that is divided by its result may miss its
    constant, and starts from a stored vector, so that values depend on what was computed before. The smaller of
    :math:`W^\top W` and :math:`W W^\top` has at most the width of a hidden layer; for one as small as those of flows
    its eigenvalues cost no more than some dozen power steps, and are a function of the matrix alone.

    Args:
        weight: The matrix W.

    Returns:
        The norm; differentiable where the largest singular value is simple, and elsewhere with a subgradient.
    """
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    largest = torch.linalg.eigvalsh(tall.T @ tall)[-1]
    # The floor is that of the derivative of the root.
    return largest.clamp_min(torch.finfo(weight.dtype).tiny).sqrt()
