"""Continuous flows: derivatives of velocities, walks, estimates, penalties, failures of the solver, files."""

import math
import sys

import pytest
import torch

from patchflow.chains import continuous
from patchflow.chains.bijections import ActNorm
from patchflow.chains.continuous import ContinuousFlow, TransportKL
from patchflow.chains.flow import Flow
from patchflow.chains.kernel import Chain
from patchflow.chains.proposals import RandomWalk
from patchflow.chains.stochastic import Metropolis
from patchflow.chains.velocities import Potential, Velocity, VelocityNet
from patchflow.errors import InputError, NumericalError
from patchflow.flow_models import continuous_flow
from patchflow.models import load, save
from patchflow.priors.gaussian import StandardNormal

DIM = 3


def lively(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


class Affine(Velocity):
    """The velocity M x + s, whose flow is known; s makes it leave the finite numbers or the solver's reach."""

    def __init__(self, matrix, push=None):
        super().__init__(len(matrix))
        self.matrix, self.push = torch.nn.Parameter(matrix), push

    def forward(self, time, x, condition):
        v = x @ self.matrix.T
        return v if self.push is None else v + self.push(time, x)


NETS = {
    "net": lambda: VelocityNet(DIM, 2, hidden=6),
    "potential": lambda: Potential(DIM, 2, hidden=6),
}
EVERY = pytest.mark.parametrize("make", NETS.values(), ids=NETS.keys())


@EVERY
def test_divergences_are_those_of_autograd(make):
    net, time = lively(make()), torch.tensor(0.3)
    x, y = torch.randn(5, DIM), torch.randn(5, 2)
    v, divergence = net.with_divergence(time, x, y)
    torch.testing.assert_close(v, net(time, x, y))
    torch.testing.assert_close((v, divergence), Velocity.with_divergence(net, time, x, y))
    jacobian = torch.autograd.functional.jacobian(lambda u: net(time, u[None], y[:1])[0], x[0])
    torch.testing.assert_close(divergence[0], jacobian.trace())


def test_slopes_of_a_potential_are_those_of_autograd():
    net = lively(Potential(DIM, 2, hidden=6))
    x, y = torch.randn(5, DIM, requires_grad=True), torch.randn(5, 2)
    time = torch.tensor(0.3, requires_grad=True)
    found = net.slopes(time, x, y)
    torch.testing.assert_close(found.point, torch.autograd.grad(net.value(time, x, y).sum(), x)[0])
    (slope,) = torch.autograd.grad(net.value(time, x, y).sum(), time)
    torch.testing.assert_close(found.time.sum(), slope)


def test_hutchinson_is_unbiased_and_the_test_is_not_blind():
    net = lively(VelocityNet(DIM, hidden=6)).requires_grad_(False)
    x = torch.randn(1, DIM).expand(20_000, -1)
    noise = torch.randint(0, 2, x.shape).double() * 2 - 1
    time = torch.tensor(0.3)
    _, exact = net.with_divergence(time, x[:1], None)
    _, estimates = net.with_estimate(time, x, None, noise)
    deviation = float(estimates.std()) / math.sqrt(len(x))
    assert deviation < 0.02
    assert abs(float(estimates.mean() - exact)) < 4 * deviation
    # Normal noise of another variance is a planted fault.
    _, wrong = net.with_estimate(time, x, None, 1.1 * noise)
    assert abs(float(wrong.mean() - exact)) > 5 * deviation


def test_log_ratios_of_estimated_flows_are_unbiased():
    net = lively(VelocityNet(DIM, hidden=6)).requires_grad_(False)
    x = torch.randn(1, DIM).expand(4000, -1)
    exact = ContinuousFlow(net, tolerance=1e-7)
    rough = ContinuousFlow(net, trace="unbiased", tolerance=1e-7)
    assert rough.estimated
    assert not Flow(StandardNormal(DIM), rough).exact
    assert Flow(StandardNormal(DIM), exact).exact
    estimates = rough.reverse(x).log_ratio
    deviation = float(estimates.std()) / math.sqrt(len(x))
    assert 0 < deviation < 0.02
    wanted = float(exact.reverse(x[:1]).log_ratio)
    assert abs(float(estimates.mean()) - wanted) < 4 * deviation
    # An estimate that forgets a tenth of the divergence would be seen.
    assert 0.1 * abs(wanted) > 4 * deviation


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4"])
def test_a_linear_field_is_solved_by_the_matrix_exponential(method):
    matrix = 0.5 * torch.randn(DIM, DIM)
    kernel = ContinuousFlow(Affine(matrix), method=method, tolerance=1e-7, steps=20)
    x = torch.randn(4, DIM)
    with torch.no_grad():
        z, log_ratio, _ = kernel.reverse(x)
        back, minus, _ = kernel(z)
    torch.testing.assert_close(z, x @ torch.matrix_exp(matrix).T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_ratio, matrix.trace().expand(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(minus, -log_ratio, atol=1e-5, rtol=0)


@EVERY
@pytest.mark.parametrize(("method", "steps"), [("rk4", 2), ("dopri5", 1)])
def test_gradients_are_finite_differences(make, method, steps):
    flow = Flow(StandardNormal(DIM), ContinuousFlow(make(), method=method, steps=steps))
    names, values = zip(*flow.named_parameters(), strict=True)

    def energy(x, y, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(flow, named, (x, y))

    inputs = (torch.randn(2, DIM), torch.randn(2, 2), *values)
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
    # In random directions.
    assert torch.autograd.gradcheck(energy, inputs, fast_mode=True)


def test_costs_of_a_straight_path():
    # Phi = b x moves all points by -b at a constant velocity.
    net = Potential(2, hidden=3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.linear[:2] = torch.tensor([1.0, -2.0])
        net.linear[2] = 2.5  # d Phi / dt = |b|^2 / 2: the Hamilton-Jacobi-Bellman equation holds
    x = torch.randn(5, 2)
    step, costs = ContinuousFlow(net).reverse_with_costs(x)
    torch.testing.assert_close(step.x, x - torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(costs.transport, torch.full((5,), 2.5))
    torch.testing.assert_close(costs.hjb, torch.zeros(5))
    with torch.no_grad():
        net.linear[2] = 2.0
    torch.testing.assert_close(
        ContinuousFlow(net).reverse_with_costs(x)[1].hjb, torch.full((5,), 0.5)
    )


def test_transport_kl_adds_the_costs_and_trains():
    flow = continuous_flow(2, velocity="potential", hidden=4, method="rk4", steps=4)
    x = torch.randn(6, 2)
    kernel = flow.chain[0]
    _, costs = kernel.reverse_with_costs(flow.chain[1].reverse(x).x)
    expected = flow(x) + 0.3 * costs.transport + 0.7 * costs.hjb
    loss = TransportKL(flow, transport=0.3, hjb=0.7)
    torch.testing.assert_close(loss(x), expected)
    loss(x).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


def test_transport_cost_shortens_paths():
    x = 3 * torch.randn(16, 2)

    def length(transport):
        torch.manual_seed(0)
        net = VelocityNet(2, hidden=6, depth=1)
        flow = Flow(StandardNormal(2), ContinuousFlow(net, method="rk4", steps=1))
        loss = TransportKL(flow, transport=transport)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            loss(x).mean().backward()
            optimizer.step()
        with torch.no_grad():
            return float(flow.chain.reverse_with_costs(x)[1].transport.mean())

    # The latent law is three times as narrow as the data, so the likelihood alone moves the points.
    free = length(0.0)
    assert free > 1
    assert length(10.0) < 0.1 * free


def test_failures_of_the_solver_are_sentences(monkeypatch):
    x, zero = torch.ones(2, 1), torch.zeros(1, 1)
    monkeypatch.setattr(continuous, "_MOST", 30)
    stiff = ContinuousFlow(Affine(zero, lambda t, x: 1e4 * (1e4 * t).sin().expand_as(x)))
    missed = (
        r"^The ODE solver dopri5 did not reach its tolerance 1e-05: it took 30 steps, or [^.]*\.$"
    )
    for walk in (stiff, stiff.reverse, stiff.reverse_with_costs):
        with pytest.raises(NumericalError, match=missed):
            walk(x)
    exploding = Affine(zero, lambda t, x: x.square() * 50)
    with pytest.raises(NumericalError, match="rk4 left the finite numbers"):
        ContinuousFlow(exploding, method="rk4").reverse(x)
    absent = Affine(zero, lambda t, x: x * math.nan)
    with pytest.raises(NumericalError, match=missed):
        ContinuousFlow(absent).reverse(x)
    # A smooth field needs few steps.
    ContinuousFlow(Affine(zero, lambda t, x: (3 * t).sin().expand_as(x))).reverse(x)


def test_a_missing_library_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(InputError, match=r"torchdiffeq: run pip install 'patchflow\[ode\]'"):
        continuous_flow(2)


def test_exact_walks_draw_no_random_numbers():
    kernel, before = ContinuousFlow(VelocityNet(2, hidden=4)), torch.get_rng_state()
    kernel.reverse(torch.ones(1, 2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("velocity", ["net", "potential"])
def test_premade_flows_are_saved_and_loaded(velocity, tmp_path):
    flow = continuous_flow(2, velocity=velocity, hidden=4, condition_dim=1)
    save(tmp_path / "flow.safetensors", flow)
    again = load(tmp_path / "flow.safetensors", Flow)
    x, y = torch.randn(5, 2), torch.randn(5, 1)
    torch.testing.assert_close(again(x, y), flow(x, y).detach(), atol=1e-6, rtol=1e-6)
    assert again.sample(7, y[:1]).shape == (7, 2)


def with_metropolis():
    kernel = Metropolis(StandardNormal(2), RandomWalk(0.1))
    return Flow(StandardNormal(2), Chain(ContinuousFlow(VelocityNet(2)), kernel))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VelocityNet(2, depth=0), "0 layers"),
        (lambda: Potential(0), "dimension is 0"),
        (lambda: Potential(2, rank=0), "rank 0"),
        (lambda: ContinuousFlow(VelocityNet(2), tolerance=0.0), "tolerance 0.0"),
        (lambda: ContinuousFlow(VelocityNet(2), steps=0), "0 steps"),
        (lambda: TransportKL(Flow(StandardNormal(2), ActNorm(2))), "0 continuous flows"),
        (lambda: TransportKL(with_metropolis()), "1 continuous flows; .* only bijections"),
        (
            lambda: TransportKL(continuous_flow(2), hjb=1.0),
            "hjb=1.0 needs the velocity of a Potential",
        ),
        (lambda: TransportKL(continuous_flow(2), transport=-1.0), "must not be negative"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(InputError, match=message):
        make()
