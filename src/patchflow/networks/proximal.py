r"""Proximal neural networks: compositions of layers that are firmly nonexpansive by construction.

A layer with a matrix :math:`T` on the Stiefel manifold is

.. math:: \Phi(x) = T^\top \sigma(T x + b), \qquad T^\top T = I \ (T \text{ tall})
          \quad\text{or}\quad T T^\top = I \ (T \text{ wide}),

with an activation that is increasing and has slopes of at most one, that is, a proximal map on the line. From
:math:`\langle \sigma(u) - \sigma(v), u - v\rangle \ge |\sigma(u) - \sigma(v)|^2` and :math:`\|T\| \le 1` follows

.. math:: \langle \Phi(x) - \Phi(x'), x - x'\rangle \ge \|\sigma(Tx + b) - \sigma(Tx' + b)\|^2
          \ge \|\Phi(x) - \Phi(x')\|^2:

:math:`\Phi` is firmly nonexpansive, and for this :math:`\|T\| \le 1` suffices. With a square :math:`T` it is the
proximal map of :math:`x \mapsto f(T x + b)` if :math:`\sigma` is that of :math:`f`. :math:`K` layers are
:math:`K / (K + 1)`-averaged, see :mod:`patchflow.numerics.averaged`.

References:
    Combettes, Pesquet, "Deep neural network structures solving variational inequalities", 2020,
    https://arxiv.org/abs/1808.07526
    Hasannasab, Hertrich, Neumayer, Plonka, Setzer, Steidl, "Parseval proximal neural networks", 2020,
    https://arxiv.org/abs/1912.10480
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from patchflow.errors import InputError
from patchflow.numerics.averaged import composed_averagedness
from patchflow.numerics.stiefel import cayley, orthonormality_error, polar

Activation = Literal["relu", "elu", "shrink", "clip", "tanh"]
Retraction = Literal["polar", "cayley"]
# Where the learned thresholds start, for images in [0, 1]: little is shrunk away, little is taken from the image.
_THRESHOLDS = {"shrink": 0.01, "clip": 0.03}
# Biases and thresholds of clipping are learned in this unit: at steps as long as those of the filters, biases would
# move beyond the thresholds, and from features that are cut off everywhere nothing can be learned.
_UNIT = 0.1


class StableActivation(nn.Module):
    r"""An activation that is a proximal map, with one bias for each feature.

    Increasing, with slopes in [0, 1]: ``"relu"``, ``"elu"``, ``"tanh"``, or, with a learned threshold for each
    feature, ``"shrink"``, soft shrinkage :math:`\sigma(u) = \operatorname{sign}(u) \max(|u| - \lambda, 0)`, and
    ``"clip"``, what shrinkage takes away, :math:`\sigma(u) = \min(\max(u, -\lambda), \lambda)`.

    Args:
        features: Number of features.
        name: Which.

    Raises:
        InputError: If the name is not one of these.
    """

    def __init__(self, features: int, name: Activation) -> None:
        super().__init__()
        known = get_args(Activation)
        if name not in known:
            raise InputError(
                f"The activation is {name!r} but must be a proximal map: one of {', '.join(known)}."
            )
        self.name = name
        self.bias = nn.Parameter(torch.zeros(features))
        self.unit = _UNIT if name == "clip" else 1.0
        if name in _THRESHOLDS:
            start = _THRESHOLDS[name] / self.unit
            self.threshold = nn.Parameter(torch.full((features,), start))

    def forward(self, u: Float[Tensor, "batch features *rest"]) -> Tensor:
        """Apply it, the features on the second axis."""
        bias = self._broadcast(self.unit * self.bias, u)
        if self.name == "relu":
            return (u + bias).relu()
        if self.name == "elu":
            return functional.elu(u + bias)
        if self.name == "tanh":
            return (u + bias).tanh()
        threshold = self._broadcast(self.unit * self.threshold.abs(), u)
        # The same as by minimum and maximum, whose gradients take four times as long.
        shrunk = (u + (bias - threshold)).relu() - (-u - (bias + threshold)).relu()
        return shrunk if self.name == "shrink" else u + bias - shrunk

    @staticmethod
    def _broadcast(values: Tensor, u: Tensor) -> Tensor:
        return values.view(-1, *[1] * (u.ndim - 2))


class ParsevalLayer(nn.Module):
    r"""The layer :math:`x \mapsto T^\top \sigma(T x + b)` on vectors, with :math:`T` on the Stiefel manifold.

    Args:
        dim: Dimension of the vectors.
        features: Rows of :math:`T`, more or fewer than ``dim``.
        activation: See :class:`StableActivation`.

    Raises:
        InputError: If a number is not positive.
    """

    def __init__(self, dim: int, features: int, activation: Activation = "shrink") -> None:
        super().__init__()
        if dim < 1 or features < 1:
            raise InputError(
                f"Got dimension {dim} and {features} features; both must be at least 1."
            )
        self.weight = nn.Parameter(polar(torch.randn(features, dim)))
        self.activation = StableActivation(features, activation)

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Apply the layer."""
        return self.activation(x @ self.weight.mT) @ self.weight

    @property
    def error(self) -> float:
        """How far the matrix is from the manifold, entry by entry."""
        return orthonormality_error(self.weight.detach())

    @torch.no_grad()
    def constrain_(self, previous: Tensor | None = None) -> None:
        """Bring the matrix back to the manifold after a step of an optimiser.

        Args:
            previous: The matrix before the step, from which Cayley's curve is followed; None: the polar factor.
        """
        if previous is None:
            self.weight.copy_(polar(self.weight))
        else:
            self.weight.copy_(cayley(previous, previous - self.weight, 1.0))


class ProximalNetwork(nn.Module):
    r"""A composition of :class:`ParsevalLayer`, :math:`K / (K + 1)`-averaged while its matrices are on the manifold.

    Train it with :func:`patchflow.fit.fit` and :class:`patchflow.learn_denoiser.Constrained`, which calls
    :meth:`constrain_` after every step.

    Args:
        dim: Dimension of the vectors.
        features: Features of each layer.
        activation: See :class:`StableActivation`.
        retraction: ``"polar"``, the projection to the manifold, or ``"cayley"``, the curve of Cayley's transform from
            the matrices before the step (the first call, and that after a resume, are projections).

    Raises:
        InputError: If there is no layer, or the retraction is unknown.
    """

    def __init__(
        self,
        dim: int,
        features: Sequence[int],
        *,
        activation: Activation = "shrink",
        retraction: Retraction = "polar",
    ) -> None:
        super().__init__()
        if not features:
            raise InputError("A proximal network of no layers is the identity; give at least one.")
        if retraction not in ("polar", "cayley"):
            raise InputError(f"The retraction is {retraction!r}; use 'polar' or 'cayley'.")
        self.retraction = retraction
        self.layers = nn.ModuleList(ParsevalLayer(dim, count, activation) for count in features)
        self._previous: list[Tensor] | None = None

    @property
    def averagedness(self) -> float:
        """The averagedness constant that the layers guarantee."""
        return composed_averagedness([0.5] * len(self.layers))

    @property
    def error(self) -> float:
        """The largest distance of a matrix from the manifold."""
        return max(layer.error for layer in self._parseval())

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Apply the layers, one after the other."""
        for layer in self.layers:
            x = layer(x)
        return x

    def constrain_(self) -> None:
        """Bring all matrices back to the manifold after a step of an optimiser."""
        layers = self._parseval()
        before = self._previous if self.retraction == "cayley" else None
        for k, layer in enumerate(layers):
            layer.constrain_(None if before is None else before[k])
        if self.retraction == "cayley":
            self._previous = [layer.weight.detach().clone() for layer in layers]

    def finish_(self) -> None:
        """Project all matrices, which may be an average of several: whatever was, they are on the manifold now."""
        for layer in self._parseval():
            layer.constrain_()

    def _parseval(self) -> list[ParsevalLayer]:
        return [layer for layer in self.layers if isinstance(layer, ParsevalLayer)]
