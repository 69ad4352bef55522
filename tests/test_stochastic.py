"""Stochastic kernels: the contract of pairs, invariance, gradients through decisions, memory, infinite energies."""

import itertools
import math

import pytest
import torch

from patchflow.chains.adaptation import adapt
from patchflow.chains.bijections import AffineCoupling
from patchflow.chains.coordinates import Conjugated, FromNormal, Pulled
from patchflow.chains.flow import Flow, PathKL
from patchflow.chains.gaussian import GaussianStep, TimeNet, diffusion, vae_layer
from patchflow.chains.kernel import Chain, Checkpointed, Conditioned, Kernel, Reversed, Step
from patchflow.chains.proposals import (
    DifferenceWalk,
    Independent,
    LangevinProposal,
    RandomWalk,
    StepSize,
)
from patchflow.chains.splines import SplineCoupling
from patchflow.chains.stochastic import Langevin, Metropolis, Transition
from patchflow.energy import Energy, Interpolation
from patchflow.errors import InputError, NumericalError
from patchflow.priors.gaussian import Gaussian, StandardNormal
from patchflow.priors.uniform import Uniform

DIM, CONDITION = 2, 2


class Banana(Energy):
    """A curved law that the condition moves, not normalised."""

    def forward(self, x, condition=None):
        shift = 0.0 if condition is None else 0.5 * condition[:, 0]
        return 0.5 * (x[:, 0] - shift) ** 2 + (x[:, 1] - 0.5 * x[:, 0] ** 2 + 0.5) ** 2


class Counted(Energy):
    def __init__(self, energy):
        super().__init__()
        self.energy, self.rows = energy, 0

    def forward(self, x, condition=None):
        self.rows += len(x)
        return self.energy(x, condition)


def lively(kernel: Kernel) -> Kernel:
    with torch.no_grad():
        for parameter in kernel.parameters():
            if parameter.requires_grad:
                parameter.add_(0.15 * torch.randn_like(parameter))
    return kernel.requires_grad_(False)


def bridge() -> Energy:
    return Interpolation(StandardNormal(DIM), Banana(), 0.5)


def flow(c: int) -> Flow:
    return Flow(StandardNormal(DIM), AffineCoupling(DIM, c, hidden=8))


# Builders of kernels for a condition of dimension c; c = 0 for none.
STOCHASTIC = {
    "coupling": lambda c: AffineCoupling(DIM, c, hidden=8),
    "spline": lambda c: SplineCoupling(DIM, c, hidden=8, bins=4),
    "langevin": lambda c: Langevin(bridge(), 0.05),
    "langevin, sub-steps": lambda c: Langevin(bridge(), 0.05, steps=3),
    "metropolis-hastings": lambda c: Metropolis(bridge(), RandomWalk(StepSize(0.5, c)), 2),
    "mala": lambda c: Metropolis(Banana(), LangevinProposal(0.3)),
    "mala, sub-steps": lambda c: Metropolis(bridge(), LangevinProposal(0.2), 2, substeps=3),
    "difference walk": lambda c: Metropolis(bridge(), DifferenceWalk(torch.randn(1, 40, DIM)), 2),
    "independence": lambda c: Metropolis(Banana(), Independent(flow(c)), 2),
    "vae": lambda c: vae_layer(DIM, c, std=0.6, hidden=8),
    "diffusion": lambda c: diffusion(DIM, c, noise=(0.8, 1.0, 1.3), hidden=8),
    "walk in other coordinates": lambda c: Conjugated(
        Metropolis(Pulled(Banana(), AffineCoupling(DIM, c, hidden=8)), RandomWalk(0.5)),
        AffineCoupling(DIM, c, hidden=8),
    ),
}
EVERY = pytest.mark.parametrize("make", STOCHASTIC.values(), ids=STOCHASTIC.keys())


def contract_errors(kernel: Kernel, conditional: bool, sizes=(DIM, DIM), count=60_000):
    r"""The law P of forward walks from mu against the law Q of reverse walks from nu, with w = dQ/dP by the log-ratios.

    Tests E_P[w / (1 + w) f] = E_Q[1 / (1 + w) f] for functions f of the whole path. Both sides are bounded, so the
    test is
    not blinded by heavy weights. Returns the largest error in standard errors, and the share of the paths that count.
    """
    y = torch.randn(count, CONDITION) if conditional else None
    mu, nu = (torch.distributions.Normal(torch.zeros(size), 1.0) for size in sizes)
    x0 = mu.sample((count,))
    x1, log_ratio, _ = kernel(x0, y)
    forward = nu.log_prob(x1).sum(1) + log_ratio - mu.log_prob(x0).sum(1)
    y1 = nu.sample((count,))
    y0, log_ratio, _ = kernel.reverse(y1, y)
    reverse = nu.log_prob(y1).sum(1) - log_ratio - mu.log_prob(y0).sum(1)

    def features(a, b):
        both = torch.cat((a, b) if y is None else (a, b, y), 1).tanh()
        # Products see the order of a chain and whether the condition was used.
        pairs = torch.einsum("ni,nj->nij", both, both).flatten(1)
        return torch.cat((both, pairs, torch.ones(len(a), 1)), 1)

    left = forward.sigmoid()[:, None] * features(x0, x1)
    right = (-reverse).sigmoid()[:, None] * features(y0, y1)
    deviation = (left.var(0) / count + right.var(0) / count).sqrt()
    error = (left.mean(0) - right.mean(0)).abs() / deviation.clamp_min(1e-12)
    return float(error.max()), float(right[:, -1].mean())


@pytest.mark.parametrize("conditional", [False, True])
@EVERY
def test_contract(make, conditional):
    worst, seen = contract_errors(lively(make(CONDITION if conditional else 0)), conditional)
    assert seen > 0.05
    assert worst < 5


PAIRS = list(itertools.permutations(STOCHASTIC, 2))


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("first", STOCHASTIC)
def test_contract_of_every_pair_in_a_chain(first, conditional):
    c = CONDITION if conditional else 0
    for second in STOCHASTIC:
        chain = Chain(lively(STOCHASTIC[first](c)), lively(STOCHASTIC[second](c)))
        worst, seen = contract_errors(chain, conditional, count=15_000)
        assert seen > 0.02, second
        assert worst < 5.5, second


def test_contract_across_dimensions():
    kernel = Chain(lively(vae_layer(3, latent_dim=2, std=0.7, latent_std=0.5, hidden=8)))
    worst, seen = contract_errors(kernel, False, sizes=(2, 3))
    assert seen > 0.05
    assert worst < 5


class Faulty(Kernel):
    bijective = False

    def __init__(self, kernel, fault):
        super().__init__()
        self.kernel, self.fault = kernel, fault

    def forward(self, x, condition=None):
        return self.fault(x, self.kernel(x, condition))

    def reverse(self, x, condition=None):
        return self.fault(x, self.kernel.reverse(x, condition))


FAULTS = {
    "flipped": lambda x, s: Step(s.x, -s.log_ratio),
    "dropped": lambda x, s: Step(s.x, 0 * s.log_ratio),
    "moved": lambda x, s: Step(s.x + 0.1, s.log_ratio),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["langevin", "mala", "independence", "vae", "diffusion"])
def test_contract_sees_planted_faults(name, fault):
    kernel = Faulty(lively(STOCHASTIC[name](0)), FAULTS[fault])
    assert contract_errors(kernel, False)[0] > 8


def test_contract_sees_the_printed_diffusion_ratio():
    """Without (h_{t-1} / h_t)^d, as on the slide."""

    def printed(x, step):
        return Step(step.x, step.log_ratio - DIM * math.log(0.8 / 1.3))

    kernel = Faulty(lively(STOCHASTIC["diffusion"](0)), printed)
    assert contract_errors(kernel, False)[0] > 8


def test_contract_sees_a_dropped_proposal_ratio():
    class NoRatio(LangevinProposal):
        def propose(self, energy, place, condition):
            new, log_ratio = super().propose(energy, place, condition)
            return new, 0 * log_ratio

    assert contract_errors(Metropolis(Banana(), NoRatio(0.3)), False)[0] > 8


def test_reverse_diffusion_has_the_right_signs():
    """With the exact score of a linear equation the path divergence vanishes with the step."""

    class Linear(TimeNet):
        def __init__(self, slope):
            super().__init__(1)
            self.slope = slope

        def forward(self, x, time, condition=None):
            return self.slope(time) * x

    def divergence(steps, sign=1.0):
        # dX = -X/2 dt + dW leaves N(0, 1) alone: g = -x/2, h = 1, score -x.
        chain = diffusion(1, noise=(1.0,) * (steps + 1))
        for kernel in chain:
            kernel.do.drift = kernel.undo.drift = Linear(lambda t: -0.5)
            kernel.undo.score = Linear(lambda t: -sign)
        x = torch.randn(40_000, 1)
        end, log_ratio, _ = chain(x)
        return float((StandardNormal(1)(end) - StandardNormal(1)(x) - log_ratio).mean())

    assert abs(divergence(64)) < 0.01
    assert divergence(64, sign=-1.0) > 0.3


@pytest.mark.parametrize(
    "proposal",
    [
        RandomWalk(0.7),
        LangevinProposal(0.3),
        Independent(Gaussian(torch.zeros(2), 2 * torch.eye(2))),
    ],
    ids=["mh", "mala", "independence"],
)
def test_metropolis_leaves_its_target_invariant(proposal):
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]])
    target = Gaussian(torch.tensor([0.5, -0.3]), covariance)
    kernel = Metropolis(target, proposal, 3, substeps=1)
    x = kernel(target.sample(40_000)).x
    white = torch.linalg.solve_triangular(target.factor, (x - target.mean).T, upper=False).T
    moments = torch.cat((white, white**2 - 1, (white[:, :1] * white[:, 1:])), 1)
    error = moments.mean(0) / (moments.std(0) / math.sqrt(len(x)))
    assert float(error.abs().max()) < 4.5


def test_langevin_has_its_known_biased_variance():
    kernel = Langevin(StandardNormal(1), 0.4, steps=60)
    x = kernel(torch.randn(60_000, 1)).x
    expected = 1 / (1 - 0.4 / 2)
    error = (float(x.var()) - expected) / (expected * math.sqrt(2 / len(x)))
    assert abs(error) < 4.5
    assert abs(float(x.var()) - 1) > 0.2


class Tilted(Energy):
    """0.5 (x - theta)^2 + 0.1 x^4, to differentiate in theta."""

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x, condition=None):
        return (0.5 * (x - self.theta) ** 2 + 0.1 * x**4)[:, 0]


def expected_loss_by_quadrature(theta: float, step: float) -> float:
    """E[target(x1) - latent(x0) - ratio] of one Metropolis step from N(0, 1) with another target."""
    energy = Tilted()
    with torch.no_grad():
        energy.theta.fill_(theta)
        axis = torch.linspace(-7, 7, 1401)
        h = axis[1] - axis[0]
        e = energy(axis[:, None])
        final = 0.5 * (axis - 1.5) ** 2
        normal = (-0.5 * axis**2).exp() / math.sqrt(2 * math.pi)
        jump = (-0.5 * ((axis[None] - axis[:, None]) / step) ** 2).exp() / (
            step * math.sqrt(2 * math.pi)
        )
        alpha = (e[:, None] - e[None]).clamp_max(0).exp()
        latent = 0.5 * axis**2
        # Loss of moving from row to column, and of staying.
        moving = final[None] - latent[:, None] - (e[None] - e[:, None])
        staying = final - latent
        density = jump * alpha
        value = (normal[:, None] * density * moving).sum() * h * h
        value += (normal * (1 - density.sum(1) * h) * staying).sum() * h
    return float(value)


@pytest.mark.parametrize("accept_gradient", ["unbiased", "biased"])
def test_gradient_through_the_accept_step(accept_gradient):
    class Final(Energy):
        def forward(self, x, condition=None):
            return 0.5 * (x[:, 0] - 1.5) ** 2

    energy = Tilted()
    snf = Flow(
        StandardNormal(1),
        Chain(Metropolis(energy, RandomWalk(0.9))),
        target=Final(),
        accept_gradient=accept_gradient,
    )
    exact = (
        expected_loss_by_quadrature(0.7 + 1e-3, 0.9) - expected_loss_by_quadrature(0.7 - 1e-3, 0.9)
    ) / 2e-3
    gradients = []
    for _ in range(300):
        (g,) = torch.autograd.grad(snf.reverse_loss(1000).mean(), energy.theta)
        gradients.append(float(g))
    gradients = torch.tensor(gradients)
    error = (gradients.mean() - exact) / (gradients.std() / math.sqrt(len(gradients)))
    if accept_gradient == "unbiased":
        assert abs(float(error)) < 4.5
    else:
        assert abs(float(error)) > 20, "the published gradient is biased here"


def test_mean_weight_is_the_evidence_both_ways():
    target = Gaussian(torch.tensor([0.4, -0.2]), torch.tensor([[0.6, 0.2], [0.2, 0.5]]))
    latent = StandardNormal(2)
    half = Interpolation(latent, target, 0.5)
    chain = Chain(
        lively(AffineCoupling(2, hidden=8)),
        Metropolis(half, LangevinProposal(0.3), 2),
        Langevin(target, 0.05, 2),
        Metropolis(target, RandomWalk(0.5), 2),
    )
    # E + log 3: the evidence is 1 / 3.
    snf = Flow(latent, chain, target=target + Constant(math.log(3.0)))
    with torch.no_grad():
        weights = snf.walk(60_000).log_weights.exp()
        reverse = (target(x := target.sample(60_000)) - snf(x)).exp()
    for sample, value in ((weights, 1 / 3), (reverse, 1.0)):
        error = (sample.mean() - value) / (sample.std() / math.sqrt(len(sample)))
        assert abs(float(error)) < 4.5
        assert float(sample.std()) / math.sqrt(len(sample)) < 0.05 * value


class Constant(Energy):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, condition=None):
        return torch.full((len(x),), self.value)


@pytest.mark.parametrize("proposal", [RandomWalk(0.8), LangevinProposal(0.3)], ids=["mh", "mala"])
def test_infinite_energies_give_no_nan(proposal):
    box = Uniform(-1.0, 1.0, dim=2)
    kernel = Metropolis(box, proposal, 5)
    inside = kernel(box.sample(500))
    assert inside.log_ratio.isfinite().all()
    assert (inside.x.abs() <= 1).all()
    outside = kernel(3 * torch.ones(500, 2))
    assert not outside.x.isnan().any()
    assert not outside.log_ratio.isnan().any()
    theta = torch.tensor(0.3, requires_grad=True)
    step = kernel(box.sample(50) * theta)
    (g,) = torch.autograd.grad(step.log_ratio.sum() + step.x.sum(), theta)
    assert g.isfinite()


def test_nan_energies_stop_with_advice():
    class Broken(Energy):
        def forward(self, x, condition=None):
            return torch.where(x[:, 0] > 0, math.nan, 0.0)

    with pytest.raises(NumericalError, match="nan at"):
        Metropolis(Broken(), RandomWalk(1.0), 3)(-torch.ones(50, 1))


def test_sampling_keeps_no_graph_and_works_without_gradients():
    snf = Flow(
        StandardNormal(2),
        Chain(AffineCoupling(2, hidden=8), Langevin(Banana(), 0.05), vae_layer(2, hidden=8)),
        target=Banana(),
    )
    with torch.no_grad():
        assert not snf.sample(10).requires_grad
        assert not snf.walk(10).log_weights.requires_grad
    frozen = Flow(StandardNormal(2), Metropolis(Banana(), LangevinProposal(0.1), 2))
    x = frozen.sample(10)
    assert x.grad_fn is None, "nothing to learn: no graph, even without no_grad"


def test_callers_tensor_is_left_alone():
    x = torch.randn(5, 2)
    Metropolis(Banana(), LangevinProposal(0.1), 2)(x)
    Langevin(Banana(), 0.1)(x)
    assert not x.requires_grad


def test_one_evaluation_a_step():
    energy = Counted(Banana())
    with torch.no_grad():
        Metropolis(energy, LangevinProposal(0.1), 3)(torch.randn(10, 2))
    # The published code evaluates four times a step: the energy at both ends, and both gradients.
    assert energy.rows == 10 * (3 + 1)


def test_last_invariant_kernels_are_not_trained():
    target = Banana()
    coordinates = FromNormal(Uniform(-4.0, 4.0, dim=2))
    inner = Conjugated(Metropolis(Pulled(target, coordinates), RandomWalk(0.5)), coordinates)
    coupling = AffineCoupling(2, hidden=8)
    chain = Chain(coupling, coordinates, Metropolis(target, LangevinProposal(0.2)), inner)
    snf = Flow(StandardNormal(2), chain, target=target)
    assert len(snf.trained) == 2
    x = torch.rand(30, 2) - 0.5
    plain = Flow(StandardNormal(2), Chain(coupling, coordinates))
    torch.testing.assert_close(snf(x), plain(x))
    other = Flow(StandardNormal(2), chain, target=Banana())
    assert len(other.trained) == 4, "another energy, even if equal, is not recognised as the target"


def test_checkpointing_changes_nothing_but_memory():
    energy = Interpolation(StandardNormal(2), Banana(), 0.5, learned=True)
    coupling = AffineCoupling(2, hidden=8)
    kernels = [coupling, Langevin(energy, 0.1, 3), Metropolis(energy, LangevinProposal(0.2), 2)]
    x = torch.randn(20, 2)
    found = []
    for chain in (Chain(*kernels), Chain(*map(Checkpointed, kernels))):
        torch.manual_seed(3)
        snf = Flow(StandardNormal(2), chain)
        loss = snf(x).mean()
        wanted = [energy.logit, *coupling.parameters()]
        found.append((loss, *torch.autograd.grad(loss, wanted)))
    torch.testing.assert_close(found[0], found[1])


def test_nested_and_checkpointed_kernels_are_seen():
    target = Banana()
    metropolis = Metropolis(target, RandomWalk(9.0), 2)
    chain = Chain(
        Chain(AffineCoupling(2, hidden=8), Langevin(target, 0.1)), Checkpointed(metropolis)
    )
    assert len(chain) == 3
    snf = Flow(StandardNormal(2), chain, target=target).requires_grad_(False)
    assert len(snf.trained) == 2
    assert list(snf.walk(50).acceptance) == [2]
    assert 0.4 < adapt(snf, lambda: None)[2] < 0.9


def test_learned_interpolation_weight_has_a_gradient():
    energy = Interpolation(StandardNormal(2), Banana(), 0.3, learned=True)
    snf = Flow(StandardNormal(2), Metropolis(energy, RandomWalk(0.5)), target=Banana())
    loss = PathKL(snf, forward=0.5, reverse=0.5)(torch.randn(200, 2)).mean()
    (g,) = torch.autograd.grad(loss, energy.logit)
    assert g.isfinite()
    assert g != 0
    with pytest.raises(InputError, match=r"weight is 1\.5"):
        Interpolation(StandardNormal(2), Banana(), 1.5)


def test_step_sizes_adapt_to_broad_and_narrow_posteriors():
    class Scaled(Energy):
        """N(0, y^2)"""

        def forward(self, x, condition=None):
            return 0.5 * (x / condition).square().sum(1)

    def conditions():
        return 10 ** (-2 * torch.rand(256, 1))

    step = StepSize(0.3, 1)
    kernel = Metropolis(Scaled(), RandomWalk(step), 3)
    # One kernel over conditions that differ by a factor of 100.
    snf = Flow(ScaledNormal(), Chain(kernel), target=Scaled())
    adapt(snf, conditions, rounds=400)
    for width in (1.0, 0.1, 0.01):
        y = torch.full((2000, 1), width)
        with torch.no_grad():
            accepted = kernel.walk(width * torch.randn(2000, 2), y)[1].mean()
        assert 0.4 < float(accepted) < 0.9, width


class ScaledNormal(StandardNormal):
    """Samples as wide as the condition says."""

    def __init__(self):
        super().__init__(2)

    def sample(self, count, condition=None):
        return super().sample(count) * condition


def test_a_step_size_that_rejects_everything_is_reported():
    class Spike(Energy):
        def forward(self, x, condition=None):
            return 1e12 * (x - 5).square().sum(1)

    snf = Flow(StandardNormal(2), Chain(Metropolis(Uniform(7.0, 8.0, dim=2), RandomWalk(1e-9))))
    with pytest.raises(NumericalError, match="accepts"):
        adapt(snf, lambda: None, rounds=5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Metropolis(Banana(), RandomWalk(0.1), 0), "0 steps"),
        (lambda: Langevin(Banana(), 0.1, 0), "0 Langevin steps"),
        (lambda: RandomWalk(0.0), "step size is 0.0"),
        (lambda: GaussianStep(2, 2, std=0.0), "standard deviation is 0.0"),
        (lambda: diffusion(2, noise=(1.0, 0.0)), "noise schedule"),
        (lambda: Independent(Flow(StandardNormal(2), vae_layer(2, hidden=4))), "exact density"),
        (lambda: Pulled(Banana(), vae_layer(2, hidden=4)), "bijection"),
        (lambda: PathKL(Flow(StandardNormal(2), AffineCoupling(2)), reverse=1.0), "reverse"),
        (lambda: Flow(StandardNormal(2), AffineCoupling(2)).walk(5), "no target"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_conditioned_features_are_trained():
    features = torch.nn.Linear(2, 3)
    snf = Flow(StandardNormal(2), Conditioned(features, AffineCoupling(2, 3, hidden=8)))
    loss = snf(torch.randn(5, 2), torch.randn(5, 2)).mean()
    loss.backward()
    assert features.weight.grad is not None


def test_reversed_stochastic_kernels():
    kernel = Reversed(lively(vae_layer(DIM, std=0.6, hidden=8)))
    assert isinstance(kernel.kernel, Transition)
    assert contract_errors(kernel, False)[0] < 5
