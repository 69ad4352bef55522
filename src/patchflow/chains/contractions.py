r"""Networks whose Lipschitz constant is below one by construction: what residual flows are made of.

:class:`SpectralNet` divides each weight by its spectral norm. :class:`ProximalNet` has orthonormal weights;
then each of its layers is a proximal map, and the calculus of averaged operators gives the constant. Both may depend
on a condition, without any constraint on how.

References:
    Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, "Invertible residual networks", 2019,
    https://arxiv.org/abs/1811.00995
    Chen, Behrmann, Duvenaud, Jacobsen, "Residual flows for invertible generative modeling", 2019,
    https://arxiv.org/abs/1906.02735
    Hasannasab, Hertrich, Neumayer, Plonka, Setzer, Steidl, "Parseval proximal neural networks", 2020,
    https://arxiv.org/abs/1912.10480
    Hertrich, "Proximal residual flows for Bayesian inverse problems", 2023, https://arxiv.org/abs/2211.17158
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from patchflow.chains.nets import MLP
from patchflow.errors import InputError
from patchflow.numerics.contraction import Map, MapWithJacobian
from patchflow.numerics.lipschitz import spectral_norm
from patchflow.numerics.stiefel import orthonormal

# The largest slope of x * sigmoid(x) is 1.0998.
_SWISH = 1.1
# The logarithm of the factor by which points are magnified at the start; the published proximal flows have it.
_ZOOM = 2.0


class Bound(NamedTuple):
    """A contraction at one condition, its weights normalised once for all evaluations of a walk.

    Attributes:
        value: Points (batch, dim) to values (batch, dim).
        with_jacobian: Points to values and Jacobians (batch, dim, dim), rows over outputs.
    """

    value: Map
    with_jacobian: MapWithJacobian


class Contraction(nn.Module, ABC):
    r"""A map :math:`x \mapsto g(x, y)` with a Lipschitz constant :math:`c < 1` in x, for every y.

    Args:
        dim: Dimension of the points.
        lipschitz: The constant :math:`c`, which subclasses guarantee.

    Attributes:
        scale: The factor :math:`s` of the block :math:`s\,(x + g(x, y))` that the contraction belongs to; 1 unless a
            subclass sets another.

    Raises:
        InputError: If the constant is not between 0 and 1, or the dimension not positive.
    """

    def __init__(self, dim: int, lipschitz: float) -> None:
        super().__init__()
        if dim < 1:
            raise InputError(f"The dimension is {dim} but must be positive.")
        if not 0 < lipschitz < 1:
            raise InputError(
                f"The Lipschitz constant is {lipschitz} but must lie strictly between 0 and 1, or the block is not "
                "invertible; 0.9 is usual."
            )
        self.dim, self.lipschitz, self.scale = dim, lipschitz, 1.0

    @abstractmethod
    def at(self, condition: Tensor | None) -> Bound:
        """The map for one batch of conditions.

        Args:
            condition: The measurement, (batch, condition_dim), or ``None``.
        """


class SpectralNet(Contraction):
    r"""A network with LipSwish between linear layers of bounded spectral norm.

    .. math:: g(x, y) = \tfrac1\kappa \big(W_L\, \sigma(\dots \sigma(\kappa W_1 x + b_1 + m_1(y)) \dots) + b_L
        + m_2(y)\big), \qquad \|W_l\|_2 \le c^{1/L}, \qquad \sigma(t) = t\, \mathrm{sigmoid}(\beta t) / 1.1 .

    A weight is only divided where its norm exceeds the bound. The learned factor :math:`\kappa > 0` bends the network
    more within the same constant, and weights start orthogonal, so that none of the constant is lost. LipSwish has
    slopes in :math:`[-0.1, 1]` and, unlike ReLU, a second derivative, which the gradient of the log-determinant needs.

    Args:
        dim: Dimension of the points.
        condition_dim: Dimension of the condition; 0 for none.
        coefficient: The Lipschitz constant :math:`c`.
        hidden: Width of the hidden layers.
        depth: Number of hidden layers.

    Raises:
        InputError: If a size is not positive or the coefficient not between 0 and 1.
    """

    def __init__(
        self,
        dim: int,
        condition_dim: int = 0,
        *,
        coefficient: float = 0.9,
        hidden: int = 64,
        depth: int = 2,
    ) -> None:
        super().__init__(dim, coefficient)
        _check_sizes(hidden, depth)
        sizes = [dim, *[hidden] * depth, dim]
        self.layers = nn.ModuleList(
            nn.Linear(before, after) for before, after in zip(sizes[:-1], sizes[1:], strict=True)
        )
        # softplus(0.5) is about one.
        self.sharpness = nn.Parameter(torch.full((depth,), 0.5))
        self.log_zoom = nn.Parameter(torch.tensor(_ZOOM))
        for linear in self.linears:
            nn.init.orthogonal_(linear.weight)
        nn.init.normal_(self.linears[0].bias, std=_spread(hidden))
        self.features = _features(condition_dim, hidden + dim)

    @property
    def linears(self) -> list[nn.Linear]:
        """The linear layers, first to last, their weights not yet divided."""
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def weights(self) -> list[Float[Tensor, "..."]]:
        """The weights as they act: of spectral norm at most :math:`c^{1/L}`."""
        most = self.lipschitz ** (1 / len(self.linears))
        found = [linear.weight for linear in self.linears]
        return [weight * (most / spectral_norm(weight)).clamp_max(1) for weight in found]

    def at(self, condition: Tensor | None) -> Bound:
        """The map for one batch of conditions; see :meth:`Contraction.at`."""
        weights = self.weights()
        biases = [linear.bias for linear in self.linears]
        if self.features is not None:
            features = self.features(_given(condition))
            hidden = weights[0].shape[0]
            biases = [
                biases[0] + features[:, :hidden],
                *biases[1:-1],
                biases[-1] + features[:, hidden:],
            ]
        sharpness, zoom = F.softplus(self.sharpness).unbind(), self.log_zoom.exp()

        def value(x: Tensor) -> Tensor:
            h = zoom * x @ weights[0].T + biases[0]
            for beta, weight, bias in zip(sharpness, weights[1:], biases[1:], strict=True):
                h = (h * (beta * h).sigmoid() / _SWISH) @ weight.T + bias
            return h / zoom

        def with_jacobian(x: Tensor) -> tuple[Tensor, Tensor]:
            h = zoom * x @ weights[0].T + biases[0]
            # One row per input coordinate, pushed through the layers beside the values.
            tangents = weights[0].T.expand(len(x), -1, -1)
            for beta, weight, bias in zip(sharpness, weights[1:], biases[1:], strict=True):
                gate = (beta * h).sigmoid()
                slope = gate * (1 + beta * h * (1 - gate)) / _SWISH
                h = (h * gate / _SWISH) @ weight.T + bias
                tangents = (tangents * slope[:, None, :]) @ weight.T
            return h / zoom, tangents.transpose(1, 2)

        return Bound(value, with_jacobian)


class ProximalNet(Contraction):
    r"""The contraction of a proximal residual block: :math:`x + \gamma \Psi(x) = s\,(x + g(x))`.

    A layer :math:`u \mapsto A^\top \sigma(A u + b)` with :math:`A^\top A = I` and an increasing :math:`\sigma` of
    slopes at most one (here ELU) is a proximal map, thus :math:`\tfrac12`-averaged; N of them after each other are
    :math:`\alpha`-averaged with :math:`\alpha = N / (N + 1)`, and so is

    .. math:: \Psi(x, y) = \tfrac1\kappa L^\top \Phi\big(\kappa L x + m(y)\big), \qquad L^\top L = I, \; \kappa > 0,

    for the network :math:`\Phi` of the N layers. Averaged means :math:`\Psi = (1 - \alpha) I + \alpha R` with a
    nonexpansive :math:`R`. Hence, with :math:`s = 1 + \gamma (1 - \alpha)`,

    .. math:: g = \frac{\gamma}{s} \big(\Psi - (1 - \alpha) I\big) = \frac{\gamma\alpha}{s} R, \qquad
        c = \frac{\gamma \alpha}{1 + \gamma (1 - \alpha)} < 1 \iff \gamma\, (2 \alpha - 1) < 1 .

    So :math:`\gamma` may exceed one: three layers allow :math:`\gamma < 2`; the published 1.99 is c = 0.997. Here the
    coefficient c is chosen, and :math:`\gamma` follows. The matrices are orthonormal by their parametrisation, see
    :func:`~patchflow.numerics.stiefel.orthonormal`; the published code adds a penalty and projects.

    Args:
        dim: Dimension of the points.
        condition_dim: Dimension of the condition; 0 for none.
        coefficient: The Lipschitz constant :math:`c`.
        hidden: Width of the layers, at least ``dim``.
        depth: The number of layers N.

    Raises:
        InputError: If a size does not fit or the coefficient is not between 0 and 1.

    References:
        Combettes, Yamada, "Compositions and convex combinations of averaged nonexpansive operators", 2015,
        https://arxiv.org/abs/1407.5100
    """

    def __init__(
        self,
        dim: int,
        condition_dim: int = 0,
        *,
        coefficient: float = 0.97,
        hidden: int = 64,
        depth: int = 3,
    ) -> None:
        super().__init__(dim, coefficient)
        _check_sizes(hidden, depth)
        if hidden < dim:
            raise InputError(
                f"The width is {hidden} but must be at least the dimension {dim}, which is embedded in it."
            )
        self.averaged = depth / (depth + 1)
        self.gamma = coefficient / (self.averaged - coefficient * (1 - self.averaged))
        self.scale = 1 + self.gamma * (1 - self.averaged)
        self.lift = nn.Parameter(torch.randn(hidden, dim))
        # Away from zero, so that a step of an optimiser turns a matrix a little.
        self.matrices = nn.Parameter(torch.linalg.qr(torch.randn(depth, hidden, hidden))[0])
        self.biases = nn.Parameter(_spread(hidden) * torch.randn(depth, hidden))
        self.log_zoom = nn.Parameter(torch.tensor(_ZOOM))
        self.features = _features(condition_dim, hidden)

    def weights(self) -> tuple[Float[Tensor, "hidden dim"], Float[Tensor, "depth hidden hidden"]]:
        """The orthonormal matrices L and A as they act."""
        return orthonormal(self.lift), orthonormal(self.matrices)

    def at(self, condition: Tensor | None) -> Bound:
        """The map for one batch of conditions; see :meth:`Contraction.at`."""
        lift, matrices = self.weights()
        zoom, layers = self.log_zoom.exp(), tuple(zip(matrices, self.biases, strict=True))
        shift = 0.0 if self.features is None else self.features(_given(condition))
        factor = self.gamma / self.scale
        outer, inner = factor / zoom, factor * (1 - self.averaged)

        def value(x: Tensor) -> Tensor:
            u = zoom * x @ lift.T + shift
            for matrix, bias in layers:
                u = F.elu(u @ matrix.T + bias) @ matrix
            return outer * u @ lift - inner * x

        def with_jacobian(x: Tensor) -> tuple[Tensor, Tensor]:
            u = zoom * x @ lift.T + shift
            tangents = lift.T.expand(len(x), -1, -1)
            for matrix, bias in layers:
                a = u @ matrix.T + bias
                u = F.elu(a) @ matrix
                tangents = (tangents @ matrix.T * a.clamp_max(0).exp()[:, None, :]) @ matrix
            jacobian = factor * (tangents @ lift).transpose(1, 2)
            unit = torch.eye(self.dim, dtype=x.dtype, device=x.device)
            return outer * u @ lift - inner * x, jacobian - inner * unit

        return Bound(value, with_jacobian)


def _spread(hidden: int) -> float:
    """The size of a hidden layer's entries for points of size one: there its bends should lie."""
    return math.exp(_ZOOM) / math.sqrt(hidden)


def _features(condition_dim: int, outputs: int) -> MLP | None:
    return MLP(condition_dim, outputs, hidden=64, depth=1) if condition_dim else None


def _given(condition: Tensor | None) -> Tensor:
    if condition is None:
        raise InputError("A contraction that depends on y needs y; pass the condition.")
    return condition


def _check_sizes(hidden: int, depth: int) -> None:
    if min(hidden, depth) < 1:
        raise InputError(f"Got {depth} layers of width {hidden}; use at least 1.")
