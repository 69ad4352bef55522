"""The contract of kernels, both ways, for every kernel of the registry."""

import math

import pytest
import torch

from patchflow.chains.bijections import (
    ActNorm,
    AffineCoupling,
    InvertibleLinear,
    Permutation,
    random_permutation,
)
from patchflow.chains.continuous import ContinuousFlow
from patchflow.chains.contractions import ProximalNet, SpectralNet
from patchflow.chains.coordinates import ConditionalAffine, Conjugated, EulerStep, FromNormal
from patchflow.chains.kernel import Chain, Checkpointed, Conditioned, Kernel, Reversed, Step
from patchflow.chains.residual import ResidualBlock
from patchflow.chains.splines import SplineCoupling, rational_quadratic
from patchflow.chains.velocities import Potential, Velocity, VelocityNet
from patchflow.errors import InputError
from patchflow.priors.uniform import Uniform

DIM = 4


def lively(kernel: Kernel) -> Kernel:
    """Away from the identity that some kernels start at."""
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return kernel


class Drift(torch.nn.Module):
    """A contraction after the step of 0.5."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.linalg.qr(torch.randn(DIM, DIM))[0])

    def forward(self, x, condition=None):
        return torch.tanh(x @ self.matrix)


def continuous(velocity: Velocity) -> ContinuousFlow:
    """By a solver of high order, which reaches a strict tolerance in few steps."""
    return ContinuousFlow(velocity, method="dopri8", tolerance=1e-9)


KERNELS = {
    "coupling": lambda: lively(AffineCoupling(DIM, hidden=16)),
    "coupling, odd": lambda: lively(AffineCoupling(5, hidden=16)),
    "coupling, deep": lambda: lively(AffineCoupling(DIM, hidden=8, depth=3)),
    "permutation": lambda: random_permutation(DIM, 3),
    "actnorm": lambda: lively(ActNorm(DIM)),
    "linear": lambda: lively(InvertibleLinear(DIM)),
    "spline": lambda: lively(SplineCoupling(DIM, hidden=16, bound=3.0)),
    "spline, odd": lambda: lively(SplineCoupling(5, hidden=16, bins=4)),
    "residual": lambda: lively(ResidualBlock(SpectralNet(DIM, hidden=16), trace="exact")),
    "residual, odd": lambda: lively(ResidualBlock(SpectralNet(5, hidden=16, depth=3))),
    "proximal residual": lambda: lively(ResidualBlock(ProximalNet(DIM, hidden=16))),
    "continuous": lambda: lively(continuous(VelocityNet(DIM, hidden=8))),
    "continuous, potential": lambda: continuous(Potential(DIM, hidden=8)),
    "euler step": lambda: EulerStep(Drift(), 0.5),
    "normal scores": lambda: FromNormal(Uniform(-2.0, 3.0, dim=DIM, wall=2.0)),
    "conjugated": lambda: Conjugated(lively(ActNorm(DIM)), lively(AffineCoupling(DIM, hidden=16))),
    "checkpointed": lambda: Checkpointed(lively(AffineCoupling(DIM, hidden=16))),
    "reversed": lambda: Reversed(lively(AffineCoupling(DIM, hidden=16))),
    "chain": lambda: Chain(
        lively(AffineCoupling(DIM, hidden=16)),
        random_permutation(DIM, 1),
        lively(ActNorm(DIM)),
        lively(InvertibleLinear(DIM)),
        Reversed(lively(AffineCoupling(DIM, hidden=16))),
    ),
}
EVERY = pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS.keys())


def dimension(kernel: Kernel) -> int:
    return 5 if getattr(kernel, "dim", DIM) == 5 else DIM


@EVERY
def test_inverse_and_determinant(make):
    kernel = make()
    x = torch.randn(6, dimension(kernel))
    there, log_ratio, _ = kernel(x)
    back, minus, _ = kernel.reverse(there)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -log_ratio)
    for k in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda v: kernel(v[None]).x[0], x[k])
        torch.testing.assert_close(log_ratio[k], torch.linalg.slogdet(jacobian).logabsdet)


def walk_errors(kernel: Kernel, count: int = 40_000) -> tuple[float, float]:
    """Weighted law of the forward walk against the law of the reverse walk: largest error in its standard error, and
    the largest standard error."""
    dim = dimension(kernel)
    standard = torch.distributions.Normal(0.0, 1.0)
    mu = torch.distributions.Normal(0.0, 1.6)
    x0 = mu.sample((count, dim))
    x1, log_ratio, _ = kernel(x0)
    log_weight = standard.log_prob(x1).sum(1) + log_ratio - mu.log_prob(x0).sum(1)
    y1 = standard.sample((count, dim))
    y0 = kernel.reverse(y1).x

    def features(a, b):
        both = torch.cat((a, b), 1)
        # Bounded, so that heavy tails do not blind the test; products see the order of a chain.
        return torch.cat((both.tanh(), (a * b).tanh(), torch.ones(len(a), 1)), 1)

    forward = log_weight.exp()[:, None] * features(x0, x1)
    reverse = features(y0, y1)
    error = (forward.mean(0) - reverse.mean(0)).abs()
    deviation = (forward.var(0) / count + reverse.var(0) / count).sqrt()
    return float((error / deviation.clamp_min(1e-12)).max()), float(deviation.max())


@EVERY
def test_walks_have_the_laws_that_the_ratio_says(make):
    kernel = make().requires_grad_(False)
    # Those that solve equations take longer for a point.
    slow = isinstance(kernel, ContinuousFlow | ResidualBlock)
    error, deviation = walk_errors(kernel, 4000 if slow else 40_000)
    assert deviation < 0.2, "blind"
    assert error < 5


class Wrong(Kernel):
    """A kernel with a planted fault."""

    bijective = True

    def __init__(self, kernel, fault):
        super().__init__()
        self.kernel, self.fault = kernel, fault

    def forward(self, x, condition=None):
        y, log_ratio, _ = self.kernel(x, condition)
        return Step(y, self.fault(log_ratio))

    def reverse(self, x, condition=None):
        return self.kernel.reverse(x, condition)


@pytest.mark.parametrize("fault", [lambda r: -r, lambda r: 0 * r, lambda r: r + 0.1])
def test_walk_test_sees_planted_faults(fault):
    kernel = Wrong(lively(AffineCoupling(DIM, hidden=16)), fault).requires_grad_(False)
    assert walk_errors(kernel)[0] > 8


def test_walk_test_sees_a_wrong_order():
    class Disordered(Chain):
        def reverse(self, x, condition=None):
            total = 0
            for kernel in self:
                x, log_ratio, _ = kernel.reverse(x, condition)
                total = total + log_ratio
            return Step(x, total)

    kernel = Disordered(lively(AffineCoupling(DIM, hidden=16)), random_permutation(DIM, 1))
    assert walk_errors(kernel.requires_grad_(False))[0] > 8


@EVERY
def test_pullback_is_autograd(make):
    kernel = make()
    x = torch.randn(7, dimension(kernel), requires_grad=True)
    g_x, g_ratio = torch.randn(7, dimension(kernel)), torch.randn(7)
    learned = [p for p in kernel.parameters() if p.requires_grad]
    step = kernel.reverse(x)
    loss = (step.x * g_x).sum() + (step.log_ratio * g_ratio).sum()
    expected = torch.autograd.grad(loss, [x, *learned], allow_unused=True)
    found, pull = kernel.reverse_with_pullback(x.detach())
    torch.testing.assert_close(tuple(found[:2]), tuple(step[:2]))
    slopes = {}
    torch.testing.assert_close(pull(g_x.clone(), g_ratio, slopes), expected[0])
    for parameter, slope in zip(learned, expected[1:], strict=True):
        if slope is not None:
            torch.testing.assert_close(slopes[parameter], slope)


CONDITIONAL = {
    "coupling": lambda: AffineCoupling(DIM, condition_dim=2, hidden=16),
    "spline": lambda: SplineCoupling(DIM, condition_dim=2, hidden=16),
    "affine": lambda: ConditionalAffine(DIM, 2, hidden=16),
    "residual": lambda: ResidualBlock(SpectralNet(DIM, 2, hidden=16)),
    "proximal residual": lambda: ResidualBlock(ProximalNet(DIM, 2, hidden=16)),
    "continuous": lambda: continuous(VelocityNet(DIM, 2, hidden=8)),
    "continuous, potential": lambda: continuous(Potential(DIM, 2, hidden=8)),
    "features": lambda: Conditioned(
        torch.nn.Linear(2, 3), AffineCoupling(DIM, condition_dim=3, hidden=16)
    ),
    "checkpointed": lambda: Checkpointed(ConditionalAffine(DIM, 2, hidden=16)),
    "conjugated": lambda: Conjugated(
        ConditionalAffine(DIM, 2, hidden=16), AffineCoupling(DIM, condition_dim=2, hidden=16)
    ),
}


@pytest.mark.parametrize("make", CONDITIONAL.values(), ids=CONDITIONAL.keys())
def test_condition_moves_the_kernel_and_batches(make):
    kernel = lively(make())
    x, y = torch.randn(5, DIM), torch.randn(5, 2)
    there = kernel(x, y)
    torch.testing.assert_close(kernel.reverse(there.x, y).x, x)
    torch.testing.assert_close(kernel.reverse(there.x, y).log_ratio, -there.log_ratio)
    assert not torch.allclose(there.x, kernel(x, y + 1).x)
    jacobian = torch.autograd.functional.jacobian(lambda v: kernel(v[None], y[:1]).x[0], x[0])
    torch.testing.assert_close(there.log_ratio[0], torch.linalg.slogdet(jacobian).logabsdet)
    step, pull = kernel.reverse_with_pullback(x, y)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(kernel.reverse(leaf, y).x.sum(), leaf)[0]
    torch.testing.assert_close(pull(torch.ones_like(x), torch.zeros(5), None), expected)
    torch.testing.assert_close(step.x, kernel.reverse(x, y).x)


def test_spline_is_increasing_and_the_identity_outside():
    x = torch.linspace(-6, 6, 4001)[:, None]
    shape = torch.randn(1, 1, 3 * 5 - 1).expand(len(x), -1, -1)
    y, log_slope = rational_quadratic(x, shape, bound=3.0, inverse=False)
    assert (y.diff(dim=0) > 0).all()
    torch.testing.assert_close(y[x.abs() >= 3], x[x.abs() >= 3])
    # The integral of the slope is the rise.
    torch.testing.assert_close(
        torch.trapezoid(log_slope.exp()[:, 0], x[:, 0]), y[-1, 0] - y[0, 0], atol=1e-2, rtol=0
    )
    back, minus = rational_quadratic(y, shape, bound=3.0, inverse=True)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -log_slope)


def test_splines_of_dimension_one_depend_on_the_condition():
    kernel = lively(SplineCoupling(1, 2, hidden=8))
    x, y = torch.randn(4, 1), torch.randn(4, 2)
    torch.testing.assert_close(kernel.reverse(kernel(x, y).x, y).x, x)
    with pytest.raises(InputError, match="dimension 1"):
        SplineCoupling(1)


def test_a_step_that_is_no_contraction_is_refused():
    with pytest.raises(InputError, match="not a contraction"):
        EulerStep(lambda_module(lambda x, y: 3 * x), 1.0).reverse(torch.ones(1, 2))


def lambda_module(function):
    module = torch.nn.Module()
    module.forward = function
    return module


def test_actnorm_whitens_its_first_batch():
    kernel = ActNorm(3)
    x = torch.randn(200, 3) * torch.tensor([0.1, 2.0, 30.0]) + 5
    kernel.initialize(x)
    scale, mean = torch.std_mean(kernel.reverse(x).x, 0)
    torch.testing.assert_close(scale, torch.ones(3))
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-12, rtol=0)
    with pytest.raises(InputError, match="Coordinate 1 is constant"):
        ActNorm(2).initialize(torch.stack((torch.arange(4.0), torch.ones(4)), 1))


def test_scale_is_clamped():
    kernel = AffineCoupling(2, hidden=4, clamp=1.6)
    with torch.no_grad():
        for net in (kernel.net1, kernel.net2):
            net[-1].bias.fill_(1e6)
    # Not 2/pi but 0.636, as in the published code.
    expected = 2 * 1.6 * 0.636 * math.atan(1e6)
    assert float(kernel(torch.zeros(1, 2)).log_ratio.detach()) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AffineCoupling(1), "dim is 1"),
        (lambda: AffineCoupling(4, clamp=0.0), "clamp is 0.0"),
        (lambda: Permutation(torch.tensor([0, 0, 1])), "not a permutation"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(InputError, match=message):
        make()
