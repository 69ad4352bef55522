"""Forward models that are not PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from patchflow.errors import InputError


class NumpyModel(nn.Module):
    """A forward model written with NumPy: values, no gradients.

    It serves every layer that needs no gradient of the energy: couplings and splines trained on simulations,
    Metropolis-Hastings, independence Metropolis, weights. Langevin and MALA layers and the reverse loss refuse it.

    Args:
        function: Maps an array (batch, dim) to an array (batch, data_dim).
    """

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate.

        Raises:
            InputError: If somebody wants the gradient, or the result has another number of rows.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise InputError(
                "This layer needs the gradient of the forward model, but a NumPy function has none; write it in "
                "PyTorch, or use layers without gradients (mcmc='mh' or 'independence')."
            )
        y = np.asarray(self.function(x.detach().cpu().numpy()))
        if y.ndim < 2 or len(y) != len(x):
            raise InputError(
                f"The forward model returned the shape {y.shape} for {len(x)} points; return ({len(x)}, data_dim)."
            )
        return torch.from_numpy(y).to(x)
