r"""Averaged operators: their constants, and Lipschitz constants measured where it matters.

An operator is :math:`\alpha`-averaged, :math:`0 < \alpha < 1`, if it is :math:`(1 - \alpha) I + \alpha R` with a
nonexpansive :math:`R`; with :math:`\alpha \le \tfrac12` it is firmly nonexpansive, as proximal maps are. Iterations of
an averaged operator with a fixed point converge to one, and their steps never grow. The constants here are exact
consequences of given ones:

* a composition of :math:`\alpha_i`-averaged operators is averaged with :math:`\big(1 + (\sum_i
  \tfrac{\alpha_i}{1 - \alpha_i})^{-1}\big)^{-1}`, so that :math:`K` firmly nonexpansive ones give :math:`K / (K + 1)`;
* :math:`I - \gamma\Psi` with an :math:`\alpha`-averaged :math:`\Psi` has the Lipschitz constant :math:`|1 - \gamma(1 -
  \alpha)| + \gamma\alpha` at most. This is :math:`1 - \gamma + 2\alpha\gamma` while :math:`\gamma (1 - \alpha) \le
  1`, the only range of the published form: for :math:`\gamma = 5, \alpha = 0.6` the bound is 4, not 2;
* a :math:`q`-contraction, :math:`q < 1`, is :math:`(1 + q) / 2`-averaged.

References:
    Combettes, Yamada, "Compositions and convex combinations of averaged nonexpansive operators", 2015,
    https://arxiv.org/abs/1407.5100
    Hertrich, Neumayer, Steidl, "Convolutional proximal neural networks and plug-and-play algorithms", 2021,
    https://arxiv.org/abs/2011.02281
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError, NumericalError

Map = Callable[[Tensor], Tensor]


def composed_averagedness(constants: Sequence[float]) -> float:
    r"""The averagedness of a composition, :math:`\big(1 + (\sum_i \alpha_i / (1 - \alpha_i))^{-1}\big)^{-1}`.

    Args:
        constants: Those of its parts, each in (0, 1).

    Raises:
        InputError: If there is none, or one is out of range.
    """
    if not constants or not all(0 < constant < 1 for constant in constants):
        raise InputError(
            f"The averagedness constants are {list(constants)} but must lie in (0, 1), at least one of them."
        )
    return 1 / (1 + 1 / sum(constant / (1 - constant) for constant in constants))


def residual_lipschitz(gamma: float | int, averagedness: float) -> float:
    r"""The bound :math:`|1 - \gamma (1 - \alpha)| + \gamma \alpha` of the Lipschitz constant of :math:`I - \gamma\Psi`.

    Args:
        gamma: The factor :math:`\gamma > 0`.
        averagedness: The constant :math:`\alpha` of :math:`\Psi`, in (0, 1].

    Raises:
        InputError: If one of them is out of range.
    """
    if not (0 < gamma < math.inf and 0 < averagedness <= 1):
        raise InputError(
            f"Got gamma {gamma} and averagedness {averagedness}; gamma must be positive, the other in (0, 1]."
        )
    return abs(1 - gamma * (1 - averagedness)) + gamma * averagedness


def relaxed(apply: Map, weight: float | int) -> Map:
    r"""The operator :math:`(1 - s) I + s D`, which has the fixed points of :math:`D`.

    If :math:`D` is :math:`\alpha`-averaged it is :math:`s\alpha`-averaged, also for :math:`\alpha = 1` (nonexpansive).

    Args:
        apply: The operator :math:`D`.
        weight: The weight :math:`s`, in (0, 1].

    Raises:
        InputError: If the weight is out of range.
    """
    if not 0 < weight <= 1:
        raise InputError(f"The weight of the relaxation is {weight} but must lie in (0, 1].")
    return lambda x: torch.lerp(x, apply(x), float(weight))


def with_reference(
    apply: Map, reference: Tensor, lipschitz: float | int, *, contraction: float | int = 0.99
) -> tuple[Map, float]:
    r"""Mix an operator that is too steep with a fixed reference: :math:`x \mapsto (1 - t)\, x_{\mathrm{ref}} + t D(x)`.

    With :math:`t = \min(1, q / c)` for a :math:`c`-Lipschitz :math:`D` it is a :math:`q`-contraction. Published is
    :math:`t = 1 / c` (the reference is called oracle, a result of BM3D), which is nonexpansive but not averaged.

    Args:
        apply: The operator :math:`D`.
        reference: The image :math:`x_{\mathrm{ref}}`: a result of another method.
        lipschitz: A bound :math:`c` on its Lipschitz constant, such as :func:`residual_lipschitz`.
        contraction: The constant :math:`q`, in (0, 1).

    Returns:
        The mixture and its averagedness :math:`(1 + q) / 2`.

    Raises:
        InputError: If a constant is out of range.
    """
    if not (0 < lipschitz < math.inf and 0 < contraction < 1):
        raise InputError(
            f"The Lipschitz constant is {lipschitz} and the contraction {contraction}; the first must be positive, "
            "the second in (0, 1)."
        )
    weight = min(1.0, contraction / lipschitz)
    return lambda x: torch.lerp(reference, apply(x), weight), (1 + contraction) / 2


def measured_lipschitz(
    apply: Map, x: Float[Tensor, "batch *event"], *, iterations: int = 50
) -> Float[Tensor, " batch"]:
    r"""The norms :math:`\|J(x)\|` of the Jacobians at given points, from below, by power iteration on :math:`J^\top J`.

    The largest of them is a lower bound of the Lipschitz constant; at the points that an operator is used at, it is the
    constant that matters.

    Args:
        apply: The operator, which acts on each batch entry separately.
        x: The points.
        iterations: Number of products with :math:`J^\top J`.

    Raises:
        InputError: If the number of iterations is not positive.
    """
    if iterations < 1:
        raise InputError(f"Got {iterations} iterations of the power method; use at least 1.")
    # The start is the same for all calls, so that two measurements of one operator agree.
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(x.shape, generator=generator).to(x)
    tiny = torch.finfo(x.dtype).tiny
    norms = x.new_zeros(len(x))
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        y = apply(x)
        # J v is the derivative of J'u in u: torch's forward mode takes a minute to load.
        u = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, x, u, create_graph=True)
        for _ in range(iterations):
            v = v / _norms(v).clamp_min(tiny).view(-1, *[1] * (x.ndim - 1))
            (pushed,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
            norms = _norms(pushed)
            (v,) = torch.autograd.grad(y, x, pushed, retain_graph=True)
    return norms.detach()


def check_lipschitz(
    apply: Map,
    x: Float[Tensor, "batch *event"],
    *,
    bound: float | int = 1.0,
    slack: float = 1e-3,
    iterations: int = 50,
) -> float:
    """Measure a Lipschitz constant and refuse one above a bound.

    Args:
        apply: The operator.
        x: The points to measure at.
        bound: The bound.
        slack: What may be above it.
        iterations: See :func:`measured_lipschitz`.

    Returns:
        The largest measured value.

    Raises:
        NumericalError: If it is above the bound, or not a number.
    """
    found = float(measured_lipschitz(apply, x, iterations=iterations).max())
    if not found <= bound + slack:
        raise NumericalError(
            f"The measured Lipschitz constant is {found:.5g} but must be at most {bound:g} + {slack:g}; project the "
            "layers again (finish_), or mix the operator with a reference (with_reference)."
        )
    return found


def measured_averagedness(
    apply: Map, x: Float[Tensor, "batch *event"], *, iterations: int = 50, slack: float = 1e-4
) -> float:
    r"""The smallest :math:`\alpha` for which the operator looks :math:`\alpha`-averaged at given points, by bisection.

    That is, for which :math:`R = (D - (1 - \alpha) I) / \alpha` has a measured Lipschitz constant of at most 1: a lower
    bound of the true constant, to a hundredth. Where nothing is proved, it is the empirical constant of the literature.

    Args:
        apply: The operator :math:`D`.
        x: The points.
        iterations: See :func:`measured_lipschitz`.
        slack: What the constant of :math:`R` may be above 1.

    Returns:
        The constant; infinity if the operator is not even nonexpansive.
    """

    def seems(constant: float) -> bool:
        def outer(z: Tensor) -> Tensor:
            return (apply(z) - (1 - constant) * z) / constant

        return bool(measured_lipschitz(outer, x, iterations=iterations).max() <= 1 + slack)

    if not seems(1.0):
        return math.inf
    low, high = 0.0, 1.0
    while high - low > 0.01:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if seems(middle) else (middle, high)
    return high


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)
