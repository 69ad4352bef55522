"""Residual flows: Lipschitz constants, inverses, log-determinants exact and estimated, gradients, failures, files."""

import math

import pytest
import torch

from patchflow.chains.contractions import Bound, Contraction, ProximalNet, SpectralNet
from patchflow.chains.flow import Flow
from patchflow.chains.residual import ResidualBlock
from patchflow.errors import InputError, NumericalError
from patchflow.flow_models import proximal_residual_flow, residual_flow, whiten
from patchflow.models import load, save
from patchflow.numerics.contraction import log_det_estimate, newton
from patchflow.numerics.lipschitz import spectral_norm
from patchflow.numerics.stiefel import orthonormal
from patchflow.priors.gaussian import StandardNormal

DIM = 3
NETS = {
    "spectral": lambda: SpectralNet(DIM, 2, hidden=12),
    "spectral, deep": lambda: SpectralNet(DIM, 2, hidden=8, depth=3, coefficient=0.6),
    "proximal": lambda: ProximalNet(DIM, 2, hidden=12),
    "proximal, published": lambda: ProximalNet(DIM, 2, hidden=12, coefficient=0.9967),
}
EVERY = pytest.mark.parametrize("make", NETS.values(), ids=NETS.keys())


def pushed(net):
    """With weights far above their bound, as after a long training."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    return net


@EVERY
def test_the_measured_lipschitz_constant_is_below_the_coefficient(make):
    net = pushed(make())
    y = torch.randn(400, 2)
    _, jacobian = net.at(y).with_jacobian(3 * torch.randn(400, DIM))
    measured = float(torch.linalg.matrix_norm(jacobian.detach(), 2).max())
    assert 0.02 * net.lipschitz < measured <= net.lipschitz


@EVERY
def test_jacobians_are_those_of_autograd(make):
    net, x, y = pushed(make()), torch.randn(4, DIM), torch.randn(4, 2)
    value, jacobian = net.at(y).with_jacobian(x)
    torch.testing.assert_close(value, net.at(y).value(x))
    for k in range(4):
        expected = torch.autograd.functional.jacobian(
            lambda v, row=y[k : k + 1]: net.at(row).value(v[None])[0], x[k]
        )
        torch.testing.assert_close(jacobian[k], expected)


def test_spectral_norms_and_stiefel_matrices():
    weight = torch.randn(5, 9, requires_grad=True)
    torch.testing.assert_close(spectral_norm(weight), torch.linalg.matrix_norm(weight, 2))
    assert torch.autograd.gradcheck(spectral_norm, weight)
    assert torch.autograd.gradcheck(orthonormal, torch.randn(2, 4, 3, requires_grad=True))
    for scaled in SpectralNet(4, hidden=7, coefficient=0.5).weights():
        assert float(spectral_norm(scaled).detach()) <= 0.5 ** (1 / 3) + 1e-12
    zero = torch.zeros(2, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(spectral_norm(zero), zero)
    assert slope.isfinite().all()


def test_parseval_weights_stay_orthonormal_in_training_in_single_precision():
    net = ProximalNet(2, hidden=8).float()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(5):
        x = torch.randn(16, 2, dtype=torch.float32)
        optimizer.zero_grad()
        net.at(None).value(x).square().sum().backward()
        optimizer.step()
    for matrix in net.weights():
        gram = matrix.mT @ matrix
        assert (
            float((gram - torch.eye(gram.shape[-1], dtype=gram.dtype)).detach().abs().max()) < 1e-6
        )


def test_the_proximal_block_is_the_published_formula():
    net = ProximalNet(DIM, hidden=6)
    (lift, matrices), zoom = net.weights(), net.log_zoom.exp()
    x = torch.randn(5, DIM)
    u = zoom * x @ lift.T
    for matrix, bias in zip(matrices, net.biases, strict=True):
        u = torch.nn.functional.elu(u @ matrix.T + bias) @ matrix
    expected = x + net.gamma * u @ lift / zoom
    torch.testing.assert_close(ResidualBlock(net).reverse(x).x, expected)
    c, alpha = 0.97, 3 / 4
    assert net.lipschitz == c
    assert c == pytest.approx(net.gamma * alpha / (1 + net.gamma * (1 - alpha)))
    # The published gamma is just inside gamma (2 alpha - 1) < 1.
    assert ProximalNet(2, coefficient=1.99 * alpha / (1 + 1.99 / 4)).gamma == pytest.approx(1.99)


def test_layers_are_averaged_not_only_bounded():
    net = pushed(ProximalNet(DIM, hidden=6))
    a, b = 2 * torch.randn(200, DIM), 2 * torch.randn(200, DIM)
    g = net.at(None).value
    factor = net.gamma / net.scale

    def psi(x):
        return g(x) / factor + (1 - net.averaged) * x

    psi_a, psi_b = psi(a), psi(b)
    # |Pa - Pb|^2 + (1 - alpha) / alpha |(I - P)a - (I - P)b|^2 <= |a - b|^2
    rest = ((a - psi_a) - (b - psi_b)).square().sum(1) * (1 - net.averaged) / net.averaged
    total = (psi_a - psi_b).square().sum(1) + rest
    assert (total <= (a - b).square().sum(1) * (1 + 1e-9)).all()


@EVERY
@pytest.mark.parametrize("trace", ["exact", "unbiased"])
def test_inverse_to_the_tolerance(make, trace):
    block = ResidualBlock(pushed(make()), trace=trace)
    block.requires_grad_(False)
    x, y = 3 * torch.randn(8, DIM), torch.randn(8, 2)
    z = block.reverse(x, y).x
    assert float((block(z, y).x - x).abs().max()) < 1e-8 * (1 + float(x.abs().max()))


@pytest.mark.parametrize("trace", ["exact", "unbiased"])
def test_gradients_through_the_fixed_point_are_finite_differences(trace):
    # Away from the orthogonal start, where the largest singular value is not simple.
    block = ResidualBlock(pushed(SpectralNet(2, 1, hidden=3)), trace=trace, tolerance=1e-13)
    z, y = torch.randn(1, 2, requires_grad=True), torch.randn(1, 1, requires_grad=True)
    parameters = {k: p for k, p in block.named_parameters() if "features" not in k}

    def moved(z, y, *values):
        named = dict(zip(parameters, values, strict=True))
        step = torch.func.functional_call(block, named, (z, y))
        # An estimated log-ratio has other derivatives than its value: only their means agree.
        return step.x if block.estimated else torch.cat((step.x, step.log_ratio[:, None]), 1)

    values = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(moved, (z, y, *values), atol=1e-6)


def test_energy_of_a_flow_has_the_gradient_of_finite_differences():
    flow = residual_flow(2, blocks=1, hidden=4).requires_grad_(False)
    x = torch.randn(2, 2, requires_grad=True)
    assert torch.autograd.gradcheck(flow, x)
    assert torch.autograd.gradgradcheck(flow, x)


def z_scores(samples, expected):
    mean, deviation = samples.mean(0), samples.std(0) / math.sqrt(len(samples))
    return float(((mean - expected).abs() / deviation).max()), float(deviation.max())


@pytest.fixture(scope="module")
def estimated():
    """Estimates of a log-determinant and of its gradient, and what they should be on average."""
    torch.manual_seed(3)
    matrix = torch.randn(4, 4)
    matrix *= 0.6 / torch.linalg.matrix_norm(matrix, 2)
    x = torch.zeros(200, 4)
    samples, slopes = [], []
    for _ in range(300):
        weight = matrix.clone().requires_grad_()
        _, estimate = log_det_estimate(lambda v, w=weight: v @ w.T, x, lipschitz=0.6)
        (slope,) = torch.autograd.grad(estimate.mean(), weight)
        samples.append(estimate.detach().mean())
        slopes.append(slope.flatten())
    exact = torch.eye(4) + matrix
    return matrix, torch.stack(samples), torch.stack(slopes), exact


def test_estimates_are_unbiased(estimated):
    _, samples, slopes, exact = estimated
    error, deviation = z_scores(samples[:, None], torch.linalg.slogdet(exact).logabsdet)
    assert deviation < 0.02, "blind"
    assert error < 4
    error, _ = z_scores(slopes, torch.linalg.inv(exact).T.flatten())
    assert error < 4.5


def test_the_test_of_estimates_sees_a_truncated_series(estimated):
    matrix, samples, slopes, _ = estimated
    # Without the roulette's weights the series is cut: compare with the first two terms.
    cut = matrix.trace() - (matrix @ matrix).trace() / 2
    assert z_scores(samples[:, None], cut)[0] > 5
    assert z_scores(slopes, (torch.eye(4) - matrix).T.flatten())[0] > 5


def test_a_flow_with_estimates_is_not_exact():
    block = ResidualBlock(SpectralNet(9, hidden=8))
    assert block.estimated
    assert not Flow(StandardNormal(9), block).exact
    assert Flow(StandardNormal(8), ResidualBlock(SpectralNet(8, hidden=8))).exact
    x = torch.randn(3, 9)
    value = Flow(StandardNormal(9), block.requires_grad_(False))(x)
    assert value.isfinite().all()


class Linear(Contraction):
    """A slope, and what it says that it is."""

    def __init__(self, slope, lipschitz):
        super().__init__(1, lipschitz)
        self.slope = slope

    def at(self, condition):
        def value(x):
            return self.slope * x

        return Bound(value, lambda x: (value(x), torch.full((len(x), 1, 1), self.slope)))


@pytest.mark.parametrize("trace", ["exact", "unbiased"])
def test_an_inverse_is_reached_as_promised_or_told(trace):
    # The slowest contraction: every step of the fixed point lowers the error by the constant only.
    slow = ResidualBlock(Linear(-0.99, 0.99), trace=trace)
    torch.testing.assert_close(
        slow(torch.ones(1, 1)).x, torch.full((1, 1), 100.0), atol=0, rtol=1e-8
    )
    with pytest.raises(NumericalError, match="is known to nan but should be to 1.0e-08"):
        slow(torch.full((1, 1), math.nan))


def test_a_contraction_that_is_none_is_told():
    with pytest.raises(NumericalError, match="which a Lipschitz constant of 0.5 promises"):
        ResidualBlock(Linear(3.0, 0.5), trace="unbiased")(torch.ones(1, 1))


def test_newton_falls_back_to_the_fixed_point():
    # The slope vanishes far out, where Newton's step overshoots.
    def function(x):
        return 0.99 * x.sin(), torch.diag_embed(0.99 * x.cos())

    z = torch.linspace(-20, 20, 101)[:, None]
    x = newton(function, z, lipschitz=0.99, tolerance=1e-10)
    torch.testing.assert_close(x + 0.99 * x.sin(), z)


@pytest.mark.parametrize("make", [residual_flow, proximal_residual_flow])
def test_premade_flows_are_saved_and_loaded(make, tmp_path):
    flow = make(2, blocks=2, hidden=8, condition_dim=1)
    x, y = torch.randn(50, 2) * torch.tensor([5.0, 0.1]), torch.randn(50, 1)
    whiten(flow, x, y)
    deviation, mean = torch.std_mean(flow.chain.reverse(x, y).x, 0)
    torch.testing.assert_close(deviation, torch.ones(2))
    torch.testing.assert_close(mean, torch.zeros(2), atol=1e-10, rtol=0)
    save(tmp_path / "flow.safetensors", flow)
    again = load(tmp_path / "flow.safetensors", Flow).double()
    torch.testing.assert_close(again(x, y), flow(x, y).detach())
    assert again.sample(7, y[:1]).shape == (7, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpectralNet(2, coefficient=1.0), "constant is 1.0 but must lie strictly"),
        (lambda: ProximalNet(2, depth=1, coefficient=1.0), "constant is 1.0"),
        (lambda: SpectralNet(0), "dimension is 0"),
        (lambda: SpectralNet(2, depth=0), "0 layers"),
        (lambda: ProximalNet(9, hidden=8), "width is 8 but must be at least the dimension 9"),
        (lambda: ResidualBlock(SpectralNet(2), tolerance=0.0), "tolerance is 0.0"),
        (lambda: residual_flow(2, blocks=0), "0 blocks"),
        (lambda: ResidualBlock(SpectralNet(2, 1)).reverse(torch.ones(1, 2)), "pass the condition"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(InputError, match=message):
        make()
