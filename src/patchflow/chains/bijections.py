r"""Bijections: kernels that are deterministic both ways.

A chain of these, :math:`T = T_T \circ \dots \circ T_1`, is a normalizing flow. ``forward`` maps latent to data.

References:
    Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017, https://arxiv.org/abs/1605.08803
    Kingma, Dhariwal, "Glow: generative flow with invertible 1x1 convolutions", 2018, https://arxiv.org/abs/1807.03039
    Ardizzone et al., FrEIA 0.2, https://github.com/vislearn/FrEIA (the coupling block that published weights need)
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.chains.kernel import Kernel, Pullback, Slopes, Step
from patchflow.chains.nets import MLP, joined
from patchflow.errors import InputError

# FrEIA's soft clamp has 0.636 where one expects 2/pi; published weights were trained with it.
_ATAN = 0.636


class AffineCoupling(Kernel):
    r"""Affine coupling of both halves, the GLOW block of the published flows.

    Forward, with :math:`z = (z_1, z_2)`, the first half of size ``round(dim / 2)``:

    .. math::
        x_1 = z_1 \odot e^{\sigma(s_2(z_2))} + t_2(z_2), \qquad x_2 = z_2 \odot e^{\sigma(s_1(x_1))} + t_1(x_1),

    with the soft clamp :math:`\sigma(s) = 0.636\, c \arctan(s)`; :math:`\log|\det| = \sum \sigma(s_1) + \sum
    \sigma(s_2)`.

    Args:
        dim: Dimension of the points, at least 2.
        condition_dim: Dimension of the condition that both networks see beside their half; 0 for none.
        hidden: Width of the networks' hidden layers.
        depth: Number of hidden layers.
        clamp: The clamp :math:`c`: a coupling scales by at most :math:`e^{\pm c}`.

    Raises:
        InputError: If ``dim`` is below 2 or ``clamp`` is not positive.
    """

    def __init__(
        self,
        dim: int,
        condition_dim: int = 0,
        *,
        hidden: int = 256,
        depth: int = 2,
        clamp: float = 1.6,
    ) -> None:
        super().__init__()
        if dim < 2:
            raise InputError(f"A coupling needs two halves, but dim is {dim}; use dim >= 2.")
        if clamp <= 0:
            raise InputError(
                f"The clamp is {clamp} but must be positive; the published value is 1.6."
            )
        self.dim, self.condition_dim, self.clamp = dim, condition_dim, clamp
        self.split = round(dim / 2)
        rest = dim - self.split
        self.net1 = MLP(self.split + condition_dim, 2 * rest, hidden=hidden, depth=depth)
        self.net2 = MLP(rest + condition_dim, 2 * self.split, hidden=hidden, depth=depth)

    @property
    def bijective(self) -> bool:
        """Always true."""
        return True

    def forward(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Map latent to data; see :meth:`Kernel.forward`."""
        z1, z2 = x[:, : self.split], x[:, self.split :]
        s2, t2 = self._scale_and_shift(self.net2, z2, condition)
        x1 = torch.addcmul(t2, z1, s2.exp())
        s1, t1 = self._scale_and_shift(self.net1, x1, condition)
        x2 = torch.addcmul(t1, z2, s1.exp())
        return Step(torch.cat((x1, x2), 1), s1.sum(1) + s2.sum(1))

    def reverse(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Map data to latent; see :meth:`Kernel.reverse`."""
        x1, x2 = x[:, : self.split], x[:, self.split :]
        s1, t1 = self._scale_and_shift(self.net1, x1, condition)
        z2 = (x2 - t1) * (-s1).exp()
        s2, t2 = self._scale_and_shift(self.net2, z2, condition)
        z1 = (x1 - t2) * (-s2).exp()
        return Step(torch.cat((z1, z2), 1), -s1.sum(1) - s2.sum(1))

    def reverse_with_pullback(self, x: Tensor, condition: Tensor | None = None) -> Pullback:
        """Map data to latent with a hand-written backward; see :meth:`Kernel.reverse_with_pullback`.

        Under ``torch.autocast`` the networks run in its type; scales, shifts and log-ratios keep the type of ``x``.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        # Everything below chooses its own types.
        with torch.autocast(device, enabled=False):
            x1, x2 = x[:, : self.split], x[:, self.split :]
            a1, pull1 = self.net1.forward_with_pullback(joined(x1, condition), dtype)
            raw1, t1 = a1[:, : x2.shape[1]], a1[:, x2.shape[1] :]
            s1 = self._clamp(raw1)
            shrink1 = (-s1).exp_()
            z2 = (x2 - t1).mul_(shrink1)
            a2, pull2 = self.net2.forward_with_pullback(joined(z2, condition), dtype)
            raw2, t2 = a2[:, : self.split], a2[:, self.split :]
            s2 = self._clamp(raw2)
            shrink2 = (-s2).exp_()
            z1 = (x1 - t2).mul_(shrink2)
            log_ratio = -s1.sum(1) - s2.sum(1)

        def pull(g_x: Tensor, g_ratio: Tensor, slopes: Slopes | None) -> Tensor:
            with torch.autocast(device, enabled=False):
                g1, g2 = g_x[:, : self.split], g_x[:, self.split :]
                g1, g_a2 = self._pull_half(g1, g_ratio, z1, raw2, shrink2)
                g2 = g2 + pull2(g_a2, slopes)[:, : g2.shape[1]]
                g2, g_a1 = self._pull_half(g2, g_ratio, z2, raw1, shrink1)
                g1 += pull1(g_a1, slopes)[:, : g1.shape[1]]
                return torch.cat((g1, g2), 1)

        return Pullback(Step(torch.cat((z1, z2), 1), log_ratio), pull)

    def _pull_half(
        self, g: Tensor, g_ratio: Tensor, z: Tensor, raw: Tensor, shrink: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of z = (x - t) exp(-s) and of -sum(s): in x, and in the network's output (raw s, t)."""
        g_x = g * shrink
        slope = raw.square().add_(1).reciprocal_().mul_(-self.clamp * _ATAN)
        g_raw = torch.addcmul(g_ratio[:, None], g, z).mul_(slope)
        return g_x, torch.cat((g_raw, -g_x), 1)

    def _scale_and_shift(
        self, net: MLP, x: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # Under autocast only the network is in low precision.
        raw, shift = net(joined(x, condition)).to(x.dtype).chunk(2, 1)
        return self._clamp(raw), shift

    def _clamp(self, raw: Tensor) -> Tensor:
        return (
            raw.atan().mul_(self.clamp * _ATAN)
            if not raw.requires_grad
            else self.clamp * _ATAN * raw.atan()
        )


class Permutation(Kernel):
    r"""A fixed permutation of the coordinates: :math:`x = z_\pi`.

    Args:
        order: The permutation :math:`\pi`. With ``numpy.random.RandomState(seed).permutation(dim)`` it is the published
            ``PermuteRandom(seed)``; see :func:`random_permutation`. It is saved with the model.

    Raises:
        InputError: If ``order`` is not a permutation of ``0, ..., dim - 1``.
    """

    order: Tensor
    inverse: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        if order.ndim != 1 or not torch.equal(order.sort().values, torch.arange(len(order))):
            raise InputError(
                f"The order {order.tolist()} is not a permutation; each of 0 to {order.numel() - 1} must occur once."
            )
        self.register_buffer("order", order)
        self.register_buffer("inverse", order.argsort())

    @property
    def bijective(self) -> bool:
        """Always true."""
        return True

    def forward(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Permute; see :meth:`Kernel.forward`."""
        return Step(x[:, self.order], x.new_zeros(len(x)))

    def reverse(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Permute back; see :meth:`Kernel.reverse`."""
        return Step(x[:, self.inverse], x.new_zeros(len(x)))

    def reverse_with_pullback(self, x: Tensor, condition: Tensor | None = None) -> Pullback:
        """Permute back; the pullback permutes forth; see :meth:`Kernel.reverse_with_pullback`."""
        return Pullback(self.reverse(x), lambda g_x, g_ratio, slopes: g_x[:, self.order])


def random_permutation(dim: int, seed: int) -> Permutation:
    """The published fixed random permutation of ``dim`` coordinates (FrEIA's ``PermuteRandom(seed=seed)``)."""
    return Permutation(torch.from_numpy(np.random.RandomState(seed).permutation(dim)))


class ActNorm(Kernel):
    r"""A scale and a shift per coordinate, :math:`x = e^{s} \odot z + b`, initialised from data.

    Args:
        dim: Dimension of the points.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(dim))
        self.shift = nn.Parameter(torch.zeros(dim))

    @torch.no_grad()
    def initialize(self, x: Float[Tensor, "batch dim"]) -> None:
        """Set scale and shift so that ``reverse(x)`` has mean 0 and standard deviation 1 per coordinate.

        Args:
            x: A batch of data, at least two points.

        Raises:
            InputError: If a coordinate does not vary over the batch.
        """
        scale, mean = torch.std_mean(x, 0)
        if not (scale > 0).all():
            raise InputError(
                f"Coordinate {int((~(scale > 0)).nonzero()[0])} is constant over {len(x)} points, or not finite; give "
                "data that vary."
            )
        self.log_scale.copy_(scale.log())
        self.shift.copy_(mean)

    @property
    def bijective(self) -> bool:
        """Always true."""
        return True

    def forward(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Scale and shift; see :meth:`Kernel.forward`."""
        return Step(
            torch.addcmul(self.shift, x, self.log_scale.exp()), self.log_scale.sum().expand(len(x))
        )

    def reverse(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Shift and scale back; see :meth:`Kernel.reverse`."""
        return Step(
            (x - self.shift) * (-self.log_scale).exp(), -self.log_scale.sum().expand(len(x))
        )


class InvertibleLinear(Kernel):
    r"""An invertible matrix in LU form, :math:`x = P L (U + \mathrm{diag}(\epsilon e^{s}))\, z`.

    :math:`P` is a fixed permutation, :math:`L` unit lower and :math:`U` strictly upper triangular,
    :math:`\epsilon` fixed signs; :math:`\log|\det| = \sum s`. It starts as a random rotation.

    Args:
        dim: Dimension of the points.
    """

    permutation: Tensor
    signs: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(dim, dim))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        self.register_buffer("permutation", permutation)
        self.register_buffer("signs", upper.diag().sign())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(upper.diag().abs().log())

    @property
    def bijective(self) -> bool:
        """Always true."""
        return True

    def forward(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Multiply by the matrix; see :meth:`Kernel.forward`."""
        lower, upper = self._factors()
        return Step(
            x @ (self.permutation @ lower @ upper).T, self.log_diagonal.sum().expand(len(x))
        )

    def reverse(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Solve with the two triangular factors; see :meth:`Kernel.reverse`."""
        lower, upper = self._factors()
        z = torch.linalg.solve_triangular(
            lower, (x @ self.permutation).T, upper=False, unitriangular=True
        )
        z = torch.linalg.solve_triangular(upper, z, upper=True).T
        return Step(z, -self.log_diagonal.sum().expand(len(x)))

    def _factors(self) -> tuple[Tensor, Tensor]:
        unit = torch.eye(len(self.signs), dtype=self.lower.dtype, device=self.lower.device)
        return self.lower.tril(-1) + unit, self.upper.triu(1) + torch.diag(
            self.signs * self.log_diagonal.exp()
        )
