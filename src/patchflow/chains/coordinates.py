r"""Changes of coordinates: scores of a prior, affine maps that depend on y, kernels seen through a bijection.

In the coordinates :math:`u = S^{-1}(x)` of a :class:`~patchflow.energy.Transported` prior the prior is :math:`N(0, I)`:
walls, positivity and scales are gone, and what is left of the posterior is the likelihood.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.chains.kernel import Kernel, Step
from patchflow.chains.nets import MLP
from patchflow.energy import Energy, Transported
from patchflow.errors import InputError


class FromNormal(Kernel):
    r"""The bijection :math:`x = S(u)` from normal scores to a prior's own coordinates.

    With :math:`\phi` the standard normal density, :math:`|\det \nabla S(u)| = \phi(u) / p(S(u))`.

    Args:
        prior: The prior.
    """

    def __init__(self, prior: Transported) -> None:
        super().__init__()
        self.prior = prior

    @property
    def bijective(self) -> bool:
        """Always true."""
        return True

    def forward(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Map normal scores to the prior; see :meth:`Kernel.forward`."""
        point = self.prior.from_normal(x)
        return Step(point, self.prior(point) - _normal_energy(x))

    def reverse(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Map the prior to normal scores; see :meth:`Kernel.reverse`."""
        score = self.prior.to_normal(x)
        return Step(score, _normal_energy(score) - self.prior(x))


class Pulled(Energy):
    r"""An energy in other coordinates: :math:`E(T(u) \mid y) - \log|\det \nabla T(u)|` for a bijection :math:`T`.

    Args:
        energy: The energy.
        bijection: The bijection :math:`T`.

    Raises:
        InputError: If the kernel is not a bijection.
    """

    def __init__(self, energy: Energy, bijection: Kernel) -> None:
        super().__init__()
        if not bijection.bijective:
            raise InputError("Coordinates need a bijection, but this kernel is stochastic.")
        self.energy, self.bijection = energy, bijection

    def forward(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate; see :meth:`Energy.forward`."""
        point, log_ratio, _ = self.bijection(x, condition)
        return self.energy(point, condition) - log_ratio


class Conjugated(Kernel):
    r"""A kernel applied in other coordinates: :math:`T \circ K \circ T^{-1}` for a bijection :math:`T`.

    With a trained flow as :math:`T` a Metropolis kernel of the pulled energy walks where the posterior is nearly
    normal, for broad and for narrow posteriors alike.

    Args:
        kernel: The kernel, in the coordinates :math:`u`.
        bijection: The bijection :math:`T`.

    Raises:
        InputError: If ``bijection`` is not one.

    References:
        Hoffman et al., "NeuTra-lizing bad geometry in Hamiltonian Monte Carlo", 2019, https://arxiv.org/abs/1903.03704
    """

    def __init__(self, kernel: Kernel, bijection: Kernel) -> None:
        super().__init__()
        if not bijection.bijective:
            raise InputError("Coordinates need a bijection, but this kernel is stochastic.")
        self.kernel, self.bijection = kernel, bijection

    @property
    def bijective(self) -> bool:
        """Whether the inner kernel is a bijection."""
        return self.kernel.bijective

    @property
    def invariant(self) -> Energy | None:
        """What the inner kernel's energy is pulled back from."""
        inner = self.kernel.invariant
        if isinstance(inner, Pulled) and inner.bijection is self.bijection:
            return inner.energy
        return None

    def forward(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Walk in the other coordinates; see :meth:`Kernel.forward`."""
        return self.walk(x, condition)[0]

    def reverse(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Walk back in the other coordinates; see :meth:`Kernel.reverse`."""
        u, there, _ = self.bijection.reverse(x, condition)
        return self._return(there, self.kernel.reverse(u, condition), condition)

    def walk(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> tuple[Step, Float[Tensor, " batch"] | None]:
        """The step with the inner kernel's acceptance; see :meth:`Kernel.walk`."""
        u, there, _ = self.bijection.reverse(x, condition)
        step, acceptance = self.kernel.walk(u, condition)
        return self._return(there, step, condition), acceptance

    def _return(self, there: Tensor, inner: Step, condition: Tensor | None) -> Step:
        x, back, _ = self.bijection(inner.x, condition)
        return Step(x, there + inner.log_ratio + back, inner.log_choice)


class ConditionalAffine(Kernel):
    r"""An affine map that depends on the condition: :math:`x = m(y) + L(y)\, z` with :math:`L` lower triangular.

    The normal law :math:`N(m(y), L(y) L(y)^\top)` as one layer: it carries location, scale and correlation of the
    posterior, and leaves the couplings its shape. :math:`\log|\det| = \sum_i \log L_{ii}(y)`.

    Args:
        dim: Dimension of the points.
        condition_dim: Dimension of the condition, at least 1.
        hidden: Width of the network.
        depth: Its hidden layers.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, dim: int, condition_dim: int, *, hidden: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.dim = dim
        rows, columns = torch.tril_indices(dim, dim, -1)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.net = MLP(condition_dim, 2 * dim + len(rows), hidden=hidden, depth=depth)
        with torch.no_grad():
            self.net.linears[-1].weight.mul_(0.1)
            self.net.linears[-1].bias.zero_()

    @property
    def bijective(self) -> bool:
        """Always true."""
        return True

    def forward(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Map latent to data; see :meth:`Kernel.forward`."""
        mean, log_scale, lower = self._law(condition)
        factor = lower + torch.diag_embed(log_scale.exp())
        moved = mean + torch.einsum("bij,bj->bi", factor, x)
        return Step(moved, log_scale.sum(1).expand(len(x)))

    def reverse(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Map data to latent; see :meth:`Kernel.reverse`."""
        mean, log_scale, lower = self._law(condition)
        rest, z = x - mean, []
        # Forward substitution: for a few coordinates much faster than a batch of triangular solves.
        for i in range(self.dim):
            known = sum((lower[:, i, j] * z[j] for j in range(i)), torch.zeros_like(rest[:, i]))
            z.append((rest[:, i] - known) * (-log_scale[:, i]).exp())
        return Step(torch.stack(z, 1), -log_scale.sum(1).expand(len(x)))

    def _law(self, condition: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if condition is None:
            raise InputError("An affine map that depends on y needs y; pass the condition.")
        out = self.net(condition)
        mean, log_scale, entries = out.split((self.dim, self.dim, len(self.rows)), 1)
        lower = out.new_zeros(len(out), self.dim, self.dim)
        lower[:, self.rows, self.columns] = entries
        return mean, log_scale, lower


class EulerStep(Kernel):
    r"""The deterministic limit of a diffusion or Langevin step: :math:`x = z + \epsilon g(z, y)`.

    Invertible if :math:`\epsilon\,\mathrm{Lip}(g) < 1`, by the fixed point :math:`z \leftarrow x - \epsilon g(z)`; the
    determinant is that of the Jacobian, computed exactly, so the layer is meant for few dimensions. For
    :math:`g = -\nabla E` it is the limit of Langevin steps at temperature zero.

    Args:
        drift: The map :math:`g`: a module of (points, condition).
        step: The time step :math:`\epsilon`.
        tolerance: Accuracy of the inverse.

    References:
        Behrmann et al., "Invertible residual networks", 2019, https://arxiv.org/abs/1811.00995
    """

    def __init__(self, drift: nn.Module, step: float | int, *, tolerance: float = 1e-10) -> None:
        super().__init__()
        self.drift, self.step, self.tolerance = drift, float(step), tolerance

    @property
    def bijective(self) -> bool:
        """Always true."""
        return True

    def forward(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Take the step; see :meth:`Kernel.forward`."""
        return Step(x + self.step * self.drift(x, condition), self._log_det(x, condition))

    def reverse(self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> Step:
        """Solve for where the step came from; see :meth:`Kernel.reverse`.

        Raises:
            InputError: If the fixed-point iteration does not converge: the step is not a contraction.
        """
        with torch.no_grad():
            z = x
            for _ in range(500):
                new = x - self.step * self.drift(z, condition)
                change = float((new - z).abs().max())
                z = new
                if change <= self.tolerance * (1 + float(x.abs().max())):
                    break
            else:
                raise InputError(
                    f"The step {self.step} is not a contraction, so it cannot be undone; use a smaller step."
                )
        # One Newton step at the solution has the right derivatives in x and in the parameters.
        z = z.detach()
        jacobian = self._jacobian(z, condition).detach()
        residual = x - z - self.step * self.drift(z, condition)
        z = z + torch.linalg.solve(jacobian, residual[:, :, None])[:, :, 0]
        return Step(z, -self._log_det(z, condition))

    def _jacobian(self, x: Tensor, condition: Tensor | None) -> Tensor:
        def single(point: Tensor, y: Tensor | None) -> Tensor:
            return point + self.step * self.drift(point[None], None if y is None else y[None])[0]

        over = (0, None) if condition is None else (0, 0)
        return torch.func.vmap(torch.func.jacrev(single), in_dims=over)(x, condition)

    def _log_det(self, x: Tensor, condition: Tensor | None) -> Tensor:
        return torch.linalg.slogdet(self._jacobian(x, condition)).logabsdet


def _normal_energy(u: Tensor) -> Tensor:
    return 0.5 * u.square().sum(1) + 0.5 * u.shape[1] * math.log(2 * math.pi)
