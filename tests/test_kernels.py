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
from patchflow.chains.kernel import Chain, Kernel, Reversed, Step
from patchflow.errors import InputError

DIM = 4


def lively(kernel: Kernel) -> Kernel:
    """Away from the identity that some kernels start at."""
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return kernel


KERNELS = {
    "coupling": lambda: lively(AffineCoupling(DIM, hidden=16)),
    "coupling, odd": lambda: lively(AffineCoupling(5, hidden=16)),
    "coupling, deep": lambda: lively(AffineCoupling(DIM, hidden=8, depth=3)),
    "permutation": lambda: random_permutation(DIM, 3),
    "actnorm": lambda: lively(ActNorm(DIM)),
    "linear": lambda: lively(InvertibleLinear(DIM)),
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
    there, log_ratio = kernel(x)
    back, minus = kernel.reverse(there)
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
    x1, log_ratio = kernel(x0)
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
    error, deviation = walk_errors(make().requires_grad_(False))
    assert deviation < 0.2, "blind"
    assert error < 5


class Wrong(Kernel):
    """A kernel with a planted fault."""

    bijective = True

    def __init__(self, kernel, fault):
        super().__init__()
        self.kernel, self.fault = kernel, fault

    def forward(self, x, condition=None):
        y, log_ratio = self.kernel(x, condition)
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
                x, log_ratio = kernel.reverse(x, condition)
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
    torch.testing.assert_close(tuple(found), tuple(step))
    slopes = {}
    torch.testing.assert_close(pull(g_x.clone(), g_ratio, slopes), expected[0])
    for parameter, slope in zip(learned, expected[1:], strict=True):
        if slope is not None:
            torch.testing.assert_close(slopes[parameter], slope)


def test_condition_moves_the_coupling_and_batches():
    kernel = lively(AffineCoupling(DIM, condition_dim=2, hidden=16))
    x, y = torch.randn(5, DIM), torch.randn(5, 2)
    there = kernel(x, y)
    torch.testing.assert_close(kernel.reverse(there.x, y).x, x)
    assert not torch.allclose(there.x, kernel(x, y + 1).x)
    step, pull = kernel.reverse_with_pullback(x, y)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(kernel.reverse(leaf, y).x.sum(), leaf)[0]
    torch.testing.assert_close(pull(torch.ones_like(x), torch.zeros(5), None), expected)
    torch.testing.assert_close(step.x, kernel.reverse(x, y).x)


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
