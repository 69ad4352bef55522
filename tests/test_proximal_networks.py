"""Proximal networks: the Stiefel manifold, firm nonexpansiveness, short filters, constants of averaged operators."""

import math

import pytest
import torch

import patchflow as pf
from patchflow.networks.proximal import ParsevalLayer, ProximalNetwork, StableActivation
from patchflow.networks.proximal_convolution import (
    ConvolutionalProximalNetwork,
    ParsevalConvolution,
    norm_bound,
    parseval_error,
    parseval_penalty,
    towards_polar,
)
from patchflow.numerics import averaged, stiefel

SHAPES = [(7, 4), (4, 7), (5, 5), (6, 1)]


def point(shape):
    return stiefel.polar(torch.randn(*shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("retract", [stiefel.cayley, stiefel.project])
def test_retractions_stay_on_the_manifold_and_leave_along_the_tangent(shape, retract):
    t, g = point(shape), torch.randn(*shape)
    for step in (1e-3, 0.3, 10.0):
        assert stiefel.orthonormality_error(retract(t, g, step)) < 1e-12
    h = 1e-5
    velocity = (retract(t, g, h) - retract(t, g, -h)) / (2 * h)
    assert torch.allclose(velocity, -stiefel.tangent(t, g), atol=1e-7)
    # The whole gradient is another direction, unless there is nothing to take away: the check is not blind.
    assert not torch.allclose(velocity, -g, atol=1e-2)
    # Tangent: the product with the point is skew.
    tall = (t, velocity) if shape[0] >= shape[1] else (t.mT, velocity.mT)
    inner = tall[0].mT @ tall[1]
    assert torch.allclose(inner, -inner.mT, atol=1e-8)


def test_cayley_is_the_formula_and_follows_the_geodesic_to_second_order():
    t, g = point((6, 2)), torch.randn(6, 2)
    hat = g @ t.mT - 0.5 * t @ (t.mT @ g @ t.mT)
    w, one = hat - hat.mT, torch.eye(6)
    for step in (0.1, 2.0):
        expected = torch.linalg.solve(one + 0.5 * step * w, (one - 0.5 * step * w) @ t)
        assert torch.allclose(stiefel.cayley(t, g, step), expected, atol=1e-12)
    errors = [
        float((stiefel.cayley(t, g, h) - torch.linalg.matrix_exp(-h * w) @ t).norm())
        for h in (0.02, 0.01)
    ]
    assert 7 < errors[0] / errors[1] < 9


@pytest.mark.parametrize("shape", SHAPES)
def test_newtons_iteration_is_the_polar_factor(shape):
    near = point(shape) + 0.1 * torch.randn(*shape)
    assert torch.allclose(stiefel.polar(near, iterations=8), stiefel.polar(near), atol=1e-10)
    other = point(shape)
    assert float((stiefel.polar(near) - near).norm()) <= float((other - near).norm())


def test_a_square_layer_is_the_proximal_map_of_a_closed_form():
    """With soft shrinkage: prox of the l1 norm of T x + b; its optimality is that of the shrinkage."""
    layer = ParsevalLayer(5, 5).requires_grad_(False)
    layer.activation.threshold.fill_(0.4)
    layer.activation.bias.normal_()
    x = 2 * torch.randn(3, 5)
    u = x @ layer.weight.mT + layer.activation.bias
    shrunk = u.sign() * (u.abs() - 0.4).clamp_min(0)
    assert torch.allclose(layer(x), shrunk @ layer.weight)


@pytest.mark.parametrize("name", ["relu", "elu", "shrink", "clip", "tanh"])
def test_activations_are_proximal_maps(name):
    u = torch.linspace(-3, 3, 601)[:, None]
    activation = StableActivation(1, name).requires_grad_(False)
    slopes = activation(u).diff(dim=0) / u.diff(dim=0)
    assert slopes.min() >= -1e-12
    assert slopes.max() <= 1 + 1e-9
    assert float(activation(torch.zeros(1, 1))) == 0


def firmness(layer, x, z):
    """The smallest <D x - D z, x - z> - |D x - D z|^2 of pairs."""
    there = (layer(x) - layer(z)).flatten(1)
    return float(((there * (x - z).flatten(1)).sum(1) - there.square().sum(1)).min())


@pytest.mark.parametrize("features", [3, 6, 11])
@pytest.mark.parametrize("name", ["relu", "elu", "shrink", "clip", "tanh"])
def test_layers_are_firmly_nonexpansive(features, name):
    layer = ParsevalLayer(6, features, name).requires_grad_(False)
    layer.activation.bias.normal_()
    if name == "clip":  # else nearly all is cut off, whatever the weight
        layer.activation.threshold.fill_(4.0 / layer.activation.unit)
    x, z = 2 * torch.randn(500, 6), 2 * torch.randn(500, 6)
    assert firmness(layer, x, z) > -1e-12
    layer.weight.mul_(2)
    assert firmness(layer, x, z) < -0.1


@pytest.mark.parametrize("retraction", ["polar", "cayley"])
def test_a_dense_network_learns_on_its_manifold(retraction):
    from patchflow.learn_denoiser import Constrained

    class Loss(pf.Energy):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x, condition=None):
            return (self.network(x) - condition).square().sum(1)

    def batches():
        jumps = torch.randn(64, 1).sign() * (torch.arange(12) > torch.randint(12, (64, 1)))
        return jumps + 0.5 * torch.randn(64, 12), jumps

    network = ProximalNetwork(12, [24, 12], retraction=retraction)
    before = [layer.weight.detach().clone() for layer in network.layers]
    result = pf.fit(Loss(network), Constrained(batches, network), steps=100, lr=2e-2)
    assert result.losses[-1] < 0.85 * result.losses[0]
    network.finish_()
    assert network.error < 1e-12
    assert all(
        not torch.allclose(a, layer.weight) for a, layer in zip(before, network.layers, strict=True)
    )
    assert network.averagedness == pytest.approx(2 / 3)


def dense(convolution, side):
    channels = convolution.weight.shape[1]
    basis = torch.eye(channels * side**2).view(-1, channels, side, side)
    return convolution(basis).flatten(1).mT.detach()


@pytest.mark.parametrize(
    ("channels", "features", "size"), [(2, 5, 3), (1, 3, 3), (3, 2, 3), (2, 2, 1)]
)
def test_convolutions_against_dense_matrices(channels, features, size):
    convolution = ParsevalConvolution(channels, features, size).requires_grad_(False)
    convolution.weight.add_(0.05 * torch.randn_like(convolution.weight))
    matrix, side = dense(convolution, 6), 6
    u = torch.randn(1, features, side, side)
    assert torch.allclose(convolution.adjoint(u).flatten(), matrix.mT @ u.flatten())
    small = matrix.mT @ matrix if features >= channels else matrix @ matrix.mT
    error = small - torch.eye(len(small))
    penalty = float(parseval_penalty(convolution.weight))
    assert penalty == pytest.approx(float(error.square().sum()) / side**2)
    # A bound, and not far above the norm on large images.
    norm = float(torch.linalg.matrix_norm(dense(convolution, 12), 2))
    assert norm - 1e-9 <= norm_bound(convolution.weight) <= norm + 0.05


def test_the_iteration_is_descent_on_the_penalty():
    filters = torch.randn(5, 2, 3, 3) / 12  # below the norm from which they are scaled down
    filters.requires_grad_()
    (slope,) = torch.autograd.grad(0.25 * parseval_penalty(filters), filters)
    filters = filters.detach()
    assert torch.allclose(towards_polar(filters, 1), filters - 0.5 * slope, atol=1e-12)
    penalties = [float(parseval_penalty(towards_polar(filters, k))) for k in (0, 2, 20, 200)]
    assert penalties == sorted(penalties, reverse=True)
    assert penalties[-1] < 1e-3 * penalties[0]
    wide = towards_polar(torch.randn(2, 5, 3, 3) / 6, 200)
    assert float(parseval_error(wide).abs().max()) < 0.05
    # Large filters are scaled down before.
    assert float(parseval_penalty(towards_polar(100 * filters, 200))) < 1e-2


def test_convolutional_networks_are_nonexpansive_and_it_is_measured():
    network = ConvolutionalProximalNetwork(width=3, features=6, size=3, layers=3)
    network.requires_grad_(False)
    for layer in network.layers:
        layer.activation.bias.normal_(std=0.1)
    for convolution in network._convolutions():
        convolution.weight.add_(0.1 * torch.randn_like(convolution.weight))
    x = torch.randn(2, 1, 10, 10)
    broken = float(averaged.measured_lipschitz(network, x).max())
    assert broken > 1 + 1e-3
    with pytest.raises(pf.NumericalError, match="measured Lipschitz constant is 1"):
        averaged.check_lipschitz(network, x)
    network.finish_()
    assert network.error <= 1e-12
    assert 0.5 < averaged.check_lipschitz(network, x) <= 1
    assert network.averagedness == pytest.approx(0.75)
    assert averaged.measured_averagedness(network, x[:1], iterations=20) <= 0.75 + 0.01


def test_lipschitz_constants_are_those_of_dense_jacobians():
    network = ConvolutionalProximalNetwork(width=2, features=4, size=3, layers=2)
    network.requires_grad_(False)
    x = torch.randn(2, 1, 5, 5)
    jacobians = [
        torch.autograd.functional.jacobian(network, x[k : k + 1]).view(25, 25) for k in range(2)
    ]
    expected = [float(torch.linalg.matrix_norm(jacobian, 2)) for jacobian in jacobians]
    found = averaged.measured_lipschitz(network, x, iterations=300)
    assert found.tolist() == pytest.approx(expected, rel=1e-3)


def test_constants_of_averaged_operators():
    assert averaged.composed_averagedness([0.5] * 8) == pytest.approx(8 / 9)
    assert averaged.composed_averagedness([0.3]) == pytest.approx(0.3)
    # Within its range the bound is the published one; for gamma 5 it is 4, not 2.
    assert averaged.residual_lipschitz(1.99, 0.5) == pytest.approx(1)
    assert averaged.residual_lipschitz(1.5, 0.6) == pytest.approx(1 - 1.5 + 2 * 0.6 * 1.5)
    assert averaged.residual_lipschitz(5, 0.6) == pytest.approx(4)


def test_the_bound_of_the_residual_is_reached():
    """Psi = -alpha + (1 - alpha) times the identity is averaged, and so is the identity: the two extremes."""
    x, alpha = torch.randn(1, 8), 0.6
    for gamma in (1.0, 1.99, 5.0):
        slopes = [abs(1 - gamma * slope) for slope in (1 - 2 * alpha, 1.0)]
        assert max(slopes) == pytest.approx(averaged.residual_lipschitz(gamma, alpha))
    steep = averaged.measured_lipschitz(lambda z: z - 5 * (1 - 2 * alpha) * z, x)
    assert float(steep) == pytest.approx(2)


def test_measured_averagedness_of_linear_maps():
    scales = torch.tensor([1.0, 0.2, -0.4, 0.0])
    x = torch.randn(1, 4)
    # (1 - 2 alpha) <= -0.4.
    found = averaged.measured_averagedness(lambda z: scales * z, x)
    assert found == pytest.approx(0.7, abs=0.02)
    assert averaged.measured_averagedness(lambda z: 1.1 * z, x) == math.inf


def test_relaxation_and_reference():
    x, reference = torch.randn(1, 6), torch.randn(1, 6)
    half = averaged.relaxed(lambda z: -z, 0.5)
    assert torch.allclose(half(x), torch.zeros_like(x))
    mixed, constant = averaged.with_reference(lambda z: 4 * z, reference, 4.0)
    assert float(averaged.measured_lipschitz(mixed, x)) == pytest.approx(0.99)
    assert constant == pytest.approx(0.995)
    assert torch.allclose(mixed(x), (1 - 0.99 / 4) * reference + 0.99 * x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stiefel.polar(torch.eye(2), iterations=0), "Got 0 iterations"),
        (lambda: averaged.composed_averagedness([0.5, 1.0]), r"\[0.5, 1.0\] but must lie"),
        (lambda: averaged.residual_lipschitz(0, 0.5), "Got gamma 0"),
        (lambda: averaged.relaxed(torch.relu, 1.5), "relaxation is 1.5"),
        (lambda: averaged.with_reference(torch.relu, torch.zeros(1), 0), "constant is 0"),
        (lambda: averaged.measured_lipschitz(torch.relu, torch.ones(1, 1), iterations=0), "Got 0"),
        (lambda: ParsevalLayer(0, 3), "Got dimension 0"),
        (lambda: ProximalNetwork(3, []), "no layers"),
        (lambda: ParsevalConvolution(1, 2, 4), "length odd"),
        (lambda: ConvolutionalProximalNetwork(width=8, features=4), "width 8 and 4 features"),
        (
            lambda: ParsevalConvolution(1, 2, 5)(torch.zeros(1, 1, 8, 9)),
            "8 x 9 pixels but filters of 5 x 5 need at least 9",
        ),
    ],
)
def test_messages(call, message):
    with pytest.raises(pf.InputError, match=message):
        call()
