"""PALM and its relatives: proven rates, known critical points, the bias of estimators, and what is refused."""

import math

import pytest
import scipy.linalg
import torch

import patchflow as pf
from patchflow.energy import Energy
from patchflow.errors import InputError, NumericalError
from patchflow.models import coupling_flow
from patchflow.networks.proximal import ParsevalLayer
from patchflow.numerics import gradient_estimators as estimators
from patchflow.numerics.proximal_maps import Penalty, box, free, l1, nuclear, simplex, stiefel
from patchflow.numerics.stiefel import orthonormality_error
from patchflow.palm import palm, spring
from patchflow.palm_optimizer import Block, Palm


def leaf(t):
    return t.detach().clone().requires_grad_(True)


def quadratic(dim=6, low=1.0, high=10.0):
    """A symmetric matrix with eigenvalues from low to high, and a vector."""
    basis = torch.linalg.qr(torch.randn(dim, dim))[0]
    return basis * torch.linspace(low, high, dim) @ basis.T, torch.randn(dim)


# Penalties with points where they are finite, to compare with.
PENALTIES = {
    "free": (free(), lambda: torch.randn(4, 3)),
    "box": (box(-0.5, 0.3), lambda: 0.8 * torch.rand(4, 3) - 0.5),
    "l1": (l1(0.7), lambda: torch.randn(4, 3)),
    "simplex": (simplex(), lambda: torch.rand(4, 3).softmax(1)),
    "stiefel": (stiefel(), lambda: torch.linalg.qr(torch.randn(4, 3))[0]),
    "stiefel, iterated": (stiefel(12), lambda: torch.linalg.qr(torch.randn(4, 3))[0]),
    "nuclear": (nuclear(0.4), lambda: torch.randn(4, 3)),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_proximal_maps_minimise(name):
    """No point among many is better, near or far, and the map of an inner point of a set is itself."""
    penalty, feasible = PENALTIES[name]
    v, step = torch.randn(4, 3), 0.6

    def objective(x):
        return 0.5 / step * float((x - v).square().sum()) + penalty.value(x)

    p = penalty.prox(v, step)
    best = objective(p)
    assert math.isfinite(best)
    for _ in range(40):
        other = feasible()
        assert objective(other) >= best - 1e-9
        # On the way to another point, where the set is convex; else projected back.
        near = p + 0.01 * (other - p)
        if name.startswith("stiefel"):
            near = torch.as_tensor(scipy.linalg.polar(near.numpy())[0])
        assert objective(near) >= best - 1e-9
    if name in ("box", "simplex", "stiefel"):
        inside = feasible()
        torch.testing.assert_close(penalty.prox(inside, 0.1), inside)
        assert penalty.value(inside) == 0
        assert penalty.value(2 * inside + 1) == math.inf


def test_proximal_maps_in_closed_form():
    v = torch.tensor([[3.0, -0.2, 0.5]])
    torch.testing.assert_close(l1(2.0).prox(v, 0.25), torch.tensor([[2.5, 0.0, 0.0]]))
    torch.testing.assert_close(simplex().prox(v, 1.0), torch.tensor([[1.0, 0.0, 0.0]]))
    spread = torch.tensor([[0.6, 0.5, -1.0]])
    torch.testing.assert_close(simplex().prox(spread, 1.0), torch.tensor([[0.55, 0.45, 0.0]]))
    matrix = torch.diag(torch.tensor([3.0, 0.1]))
    torch.testing.assert_close(nuclear(1.0).prox(matrix, 0.5), torch.diag(torch.tensor([2.5, 0.0])))
    assert nuclear(2.0).value(matrix) == pytest.approx(6.2)
    assert l1(2.0).value(v) == pytest.approx(7.4)


@pytest.mark.parametrize("curvature", ["hessian", "backtracking"])
def test_strongly_convex_quadratic_at_its_proven_rate(curvature):
    r"""One block: :math:`F(x_k) - F^* \le (1 - \mu / L)^k (F(x_0) - F^*)` for gradient steps of :math:`1 / L`."""
    matrix, b = quadratic()
    best = torch.linalg.solve(matrix, b)
    lowest = float(-0.5 * b @ best)
    x = leaf(torch.randn(6))
    result = palm(
        lambda: 0.5 * x @ matrix @ x - b @ x,
        [Block("x", [x])],
        curvature=curvature,
        powers=15,
        tolerance=1e-9,
    )
    # Backtracking accepts at most twice the constant that it needs.
    rate = 1 - 0.1 / (2 if curvature == "backtracking" else 1)
    gaps = [value - lowest for value in result.objective]
    for k, gap in enumerate(gaps):
        assert gap <= rate**k * gaps[0] * (1 + 1e-6) + 1e-12
    assert result.converged
    assert result.residual[-1] <= 1e-9 < result.residual[-2]
    torch.testing.assert_close(x.detach(), best, rtol=0, atol=1e-8)


def test_lasso_at_its_proven_rate_and_solution():
    """With a diagonal matrix the solution is soft shrinkage; the rate of the proximal gradient is the same."""
    scale, b = torch.linspace(1, 10, 6), 2 * torch.randn(6)
    best = b.sign() * (b.abs() - 1.0).clamp_min(0) / scale
    x = leaf(torch.randn(6))

    def smooth():
        return 0.5 * (scale * x.square()).sum() - b @ x

    result = palm(smooth, [Block("x", [x], l1(1.0))], powers=15, tolerance=1e-10)
    lowest = float(0.5 * (scale * best.square()).sum() - b @ best + best.abs().sum())
    for k, value in enumerate(result.objective):
        assert value - lowest <= 0.9**k * (result.objective[0] - lowest) * (1 + 1e-6) + 1e-12
    torch.testing.assert_close(x.detach(), best, rtol=0, atol=1e-9)
    assert (best == 0).any()
    assert torch.equal(x.detach() == 0, best == 0)


@pytest.mark.parametrize("inertia", [0.0, 0.5])
def test_rank_one_factors_reach_a_critical_point(inertia):
    """Of half of |A - x y'|^2 the critical points are 0 and the singular parts of A; the first is the lowest."""
    left, values, right = torch.linalg.svd(torch.randn(5, 4))
    values = torch.tensor([4.0, 2.0, 1.0, 0.5])
    matrix = left[:, :4] * values @ right
    x, y = leaf(torch.randn(5)), leaf(torch.randn(4))
    result = palm(
        lambda: 0.5 * (matrix - torch.outer(x, y)).square().sum(),
        [Block("x", [x]), Block("y", [y])],
        inertia=inertia,
        lr=0.9,
        steps=3000,
        tolerance=1e-10,
    )
    assert result.converged
    assert result.objective[-1] == pytest.approx(0.5 * float(values[1:].square().sum()), abs=1e-9)
    product = torch.outer(x, y).detach()
    torch.testing.assert_close(product, 4 * torch.outer(left[:, 0], right[0]), rtol=0, atol=1e-6)
    if inertia == 0:
        assert all(
            b <= a + 1e-12 for a, b in zip(result.objective, result.objective[1:], strict=False)
        )


def test_blocks_of_several_tensors_and_penalties():
    """Orthonormal columns: the best rotation between two clouds is the polar factor of their product (Procrustes)."""
    a, b = torch.randn(30, 3), torch.randn(30, 4)
    t, c = leaf(torch.linalg.qr(torch.randn(4, 3))[0]), leaf(torch.zeros(3))
    result = palm(
        lambda: 0.5 * (b @ t + c - a).square().sum(),
        [Block("all", [t, c], [stiefel(), box(0, 0)])],
        powers=3,
        steps=300,
        tolerance=1e-7,
    )
    assert result.converged
    slope = b.T @ (b @ t.detach() - a)
    # At a critical point the gradient has no part that is tangent to the manifold.
    tangent = slope - t.detach() @ (slope.T @ t.detach())
    assert float(tangent.abs().max()) < 1e-6
    assert orthonormality_error(t.detach()) < 1e-12
    assert not c.detach().any()


def test_inertia_looks_ahead_as_published():
    """Two steps by hand: at the second the point is x + 1 / 4 (x - x_old), of which the gradient is taken."""
    x = leaf(torch.tensor([4.0]))
    optimizer = Palm([Block("x", [x])], lr=0.5, inertia=1.0)

    def loss():
        return x.square().sum()  # of curvature 2: a step of 1 / 4 times 2 z leaves z / 2

    optimizer.step(loss)
    assert x.item() == 2
    optimizer.step(loss)
    assert x.item() == pytest.approx((2 + 0.25 * (2 - 4)) / 2)
    assert optimizer.lipschitz == [2.0]


def test_curvature_is_that_of_the_batch_along_its_own_gradient():
    """An estimate along the flat axis of H(x) = (25 x_1^2 + x_2^2) / 2 must not hide the steep one."""
    x = leaf(torch.tensor([1.0, 1.0]))
    scale = torch.tensor([25.0, 1.0])
    sarah = estimators.Sarah(lambda index: 0.5 * (scale * x * x).sum(), 4, 2, probability=0)
    optimizer = Palm([Block("x", [x])], lr=1e-9)
    optimizer.advance(sarah)
    # From a wrong estimate of the past, as if the gradient were (0, 1).
    sarah.last[0] = [torch.tensor([0.0, 1.0])], [x.detach().clone()]
    optimizer.advance(sarah)
    assert not sarah.full
    expected = (scale**2).square().sum().sqrt() / scale.square().sum().sqrt()
    assert optimizer.lipschitz[0] == pytest.approx(float(expected), rel=1e-6)


def test_products_with_the_hessian():
    w, v = leaf(torch.randn(3)), leaf(torch.randn(2))
    data = torch.randn(10, 3)

    def function(w):
        return (data @ w).tanh().square().mean() * v.square().sum()

    full = torch.autograd.functional.hessian(function, w)
    direction = torch.randn(3)
    terms = [(0.25, lambda: function(w)), (0.75, lambda: function(w))]
    (found,) = estimators.hessian_product(terms, [w], [direction])
    torch.testing.assert_close(found, full @ direction)
    (zero,) = estimators.hessian_product([(1.0, lambda: (w * v.sum()).sum())], [w], [direction])
    assert not zero.any()


def least_squares(count=60, dim=4):
    matrix = torch.randn(count, dim)
    target = matrix @ torch.rand(dim) + 0.1 * torch.randn(count)

    def smooth(x):
        def mean(index):
            rows = slice(None) if index is None else index
            return 0.5 * (matrix[rows] @ x - target[rows]).square().mean()

        return mean

    return smooth


@pytest.mark.parametrize("batch", [7, 20])
def test_saga_is_unbiased(batch):
    """At a point away from that of the table: the mean over draws is the gradient, that without the table is not."""
    x = leaf(torch.randn(4))
    smooth = least_squares()(x)
    saga = estimators.Saga(smooth, 60, batch)
    saga.begin()
    first = saga.estimate(0, [x], [x])[0][0]
    torch.testing.assert_close(first, torch.autograd.grad(smooth(None), x)[0])
    with torch.no_grad():
        x.add_(torch.randn(4))
    exact = torch.autograd.grad(smooth(None), x)[0]
    state = ({0: list(saga.tables[0])}, {0: [m.clone() for m in saga.means[0]]})
    drawn, naive = [], []
    for _ in range(600):
        saga.tables, saga.means = {0: list(state[0][0])}, {0: [m.clone() for m in state[1][0]]}
        saga.begin()
        estimate, seen = saga.estimate(0, [x], [x])
        drawn.append(estimate[0].clone())
        naive.append(first + seen[0])
    drawn, naive = torch.stack(drawn), torch.stack(naive)
    error = drawn.std(0) / math.sqrt(len(drawn)) + 1e-12
    assert ((drawn.mean(0) - exact).abs() < 5 * error).all()
    assert ((naive.mean(0) - exact).abs() > 5 * error).any()
    assert float(drawn.std(0).max()) > 0
    # After each step the mean of the table is the mean of its entries.
    mean = sum(w * t[0] for w, t in zip(saga.shares, saga.tables[0], strict=True))
    torch.testing.assert_close(saga.means[0][0], mean)


def test_bias_of_sarah_is_the_error_of_the_estimate_before():
    x = leaf(torch.randn(4))
    smooth = least_squares()(x)
    there = x.detach().clone()
    sarah = estimators.Sarah(smooth, 60, 6, probability=0)
    sarah.begin()
    assert sarah.full
    exact_there = sarah.estimate(0, [x], [x])[0][0]
    torch.testing.assert_close(exact_there, torch.autograd.grad(smooth(None), x)[0])
    wrong = exact_there + torch.tensor([0.5, 0.0, -0.3, 0.0])
    with torch.no_grad():
        x.add_(torch.randn(4))
    here = x.detach().clone()
    exact = torch.autograd.grad(smooth(None), x)[0]
    drawn = []
    for _ in range(600):
        sarah.last[0] = [wrong], [there]
        sarah.begin()
        assert not sarah.full
        drawn.append(sarah.estimate(0, [x], [x])[0][0])
        assert torch.equal(x.detach(), here)
    drawn = torch.stack(drawn)
    error = drawn.std(0) / math.sqrt(len(drawn))
    bias = drawn.mean(0) - exact
    assert ((bias - (wrong - exact_there)).abs() < 5 * error).all()
    assert bias[0] > 5 * error[0]


def test_full_gradients_come_when_asked_for():
    x = leaf(torch.randn(4))
    smooth = least_squares()(x)
    sarah = estimators.Sarah(smooth, 60, 6, probability=0, every=4)
    full = []
    for _ in range(9):
        sarah.begin()
        sarah.estimate(0, [x], [x])
        full.append(sarah.full)
    assert full == [k % 4 == 0 for k in range(9)]
    assert sarah.passes == pytest.approx(3 + 6 * 2 * 0.1)
    sarah = estimators.Sarah(smooth, 60, 6, probability=0.3)
    drawn = []
    for _ in range(2000):
        sarah.begin()
        drawn.append(sarah.full)
    assert abs(sum(drawn) / 2000 - 0.3) < 5 * math.sqrt(0.21 / 2000)


@pytest.mark.parametrize("estimator", ["sarah", "saga"])
@pytest.mark.parametrize("inertia", [0.0, 0.5])
def test_stochastic_methods_reach_the_solution_of_all_data(estimator, inertia):
    build = least_squares()
    x = leaf(torch.full((4,), 0.25))
    smooth = build(x)
    palm(lambda: smooth(None), [Block("x", [x], simplex())], powers=30, tolerance=1e-11)
    z = leaf(torch.full((4,), 0.25))
    result = spring(
        build(z),
        [Block("z", [z], simplex())],
        60,
        batch=10,
        estimator=estimator,
        inertia=inertia,
        lr=0.2,
        powers=5,
        epochs=200,
        tolerance=1e-7,
    )
    assert result.converged
    assert result.steps % 6 == 0
    assert len(result.objective) == len(result.residual) == len(result.passes)
    torch.testing.assert_close(z.detach(), x.detach(), rtol=0, atol=1e-6)


def test_passes_are_counted():
    x, y = leaf(torch.randn(3)), leaf(torch.randn(3))
    blocks = [Block("x", [x]), Block("y", [y])]
    result = palm(lambda: (x * y - 1).square().sum(), blocks, steps=3, lr=0.5, tolerance=None)
    # A gradient and a product with the Hessian for each block in each step.
    assert result.passes == [0, 2, 4, 6]
    assert result.converged is None


def test_trains_a_parseval_layer_through_fit():
    """A layer on the Stiefel manifold learns, through fit, and stays on it; Adam would leave it."""
    torch.manual_seed(0)
    layer, teacher = ParsevalLayer(4, 8, "elu"), ParsevalLayer(4, 8, "elu")

    class Distance(Energy):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, condition=None):
            return (self.layer(x) - teacher(x)).square().sum(1)

    def make(parameters):
        weights = [p for name, p in parameters.items() if name.endswith("weight")]
        rest = [p for name, p in parameters.items() if not name.endswith("weight")]
        return Palm([Block("matrices", weights, stiefel()), Block("rest", rest)])

    energy = Distance()
    teacher.requires_grad_(False)
    x = torch.randn(500, 4)
    before = float(energy(x).mean().detach())
    pf.fit(energy, lambda: torch.randn(64, 4), steps=100, lr=0.5, warmup=1, optimizer=make)
    assert float(energy(x).mean()) < 0.3 * before
    assert layer.error < 1e-10
    assert not any(p.requires_grad for p in energy.parameters())


def test_trains_a_flow_by_backtracking_and_resumes_bit_by_bit(tmp_path):
    """The hand-written gradients of a flow cannot be differentiated again; backtracking does without."""

    def run(stop=None, resume=False, seed=0):
        torch.manual_seed(seed)
        flow = coupling_flow(2, layers=2, hidden=8)
        calls = 0

        def batches():
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            return 0.3 * torch.randn(64, 2) + 1

        def make(parameters):
            return Palm([Block("all", list(parameters.values()))], curvature="backtracking")

        record = pf.fit(
            flow,
            batches,
            steps=100,
            lr=0.9,
            optimizer=make,
            checkpoint=tmp_path / "state.safetensors",
            resume=resume,
        )
        return flow, record

    whole, record = run()
    assert record.losses[-1] < record.losses[0] - 0.2
    torch.manual_seed(0)
    run(stop=40)
    again, resumed = run(resume=True, seed=5)
    assert resumed.losses == record.losses
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="state of another optimiser than adam"):
        pf.fit(
            coupling_flow(2, layers=2, hidden=8),
            lambda: torch.randn(8, 2),
            steps=100,
            checkpoint=tmp_path / "state.safetensors",
            resume=True,
        )


def test_interruption_keeps_the_record():
    x = leaf(torch.ones(2))
    calls = 0

    def smooth():
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        return x.square().sum()

    result = palm(smooth, [Block("x", [x])], lr=0.1)
    assert result.interrupted
    assert result.converged is False
    assert 1 < len(result.objective) < 12


@pytest.mark.parametrize("curvature", ["hessian", "backtracking"])
def test_interruption_leaves_the_last_whole_step(curvature):
    """With inertia, gradients are taken at points outside of the box: no block may stay there."""

    def run(stop):
        x, y = leaf(torch.tensor([0.9, -0.9])), leaf(torch.tensor([0.5, 0.3]))
        calls = 0

        def smooth():
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            return 0.5 * (x - 3).square().sum() + (x * y).sum() + y.square().sum()

        blocks = [Block("x", [x], box(-1, 1)), Block("y", [y])]
        optimizer = Palm(blocks, lr=0.5, inertia=1.0, curvature=curvature)
        seen = [(x.detach().clone(), y.detach().clone())]
        try:
            for _ in range(6):
                optimizer.step(smooth)
                seen.append((x.detach().clone(), y.detach().clone()))
        except KeyboardInterrupt:
            return seen, (x.detach(), y.detach()), calls
        return seen, (x.detach(), y.detach()), calls

    whole, _, calls = run(None)
    for stop in range(2, calls):
        seen, left, _ = run(stop)
        assert all(torch.equal(a, b) for a, b in zip(seen[-1], left, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(seen[-1], whole[len(seen) - 1], strict=True))


def test_penalties_that_do_not_keep_their_promise():
    x = leaf(torch.zeros(3))

    def step(prox, value=lambda x: 0.0):
        palm(lambda: (x - 1).square().sum(), [Block("atoms", [x], Penalty(value, prox))])

    with pytest.raises(InputError, match=r"map of block 'atoms' makes \(2,\) of \(3,\); it must"):
        step(lambda v, step: v[:2])
    with pytest.raises(InputError, match="map of block 'atoms' leaves the set where"):
        step(lambda v, step: v, box(-1, 0.5).value)
    with pytest.raises(NumericalError, match="in block 'atoms' is not finite"):
        step(lambda v, step: v / 0)


def test_what_is_not_finite_names_its_block():
    x, y = leaf(torch.ones(2)), leaf(torch.ones(2))
    blocks = [Block("first", [x]), Block("second", [y])]
    with pytest.raises(NumericalError, match="constant of block 'second' is estimated as 0.0"):
        palm(lambda: x.square().sum() + y.sum(), blocks)
    with pytest.raises(NumericalError, match="constant of block 'second' is estimated as inf"):
        # Infinite wherever a step may lead.
        palm(
            lambda: x.square().sum() + y.sum() + torch.where(y == 1, 0.0, math.inf).sum(),
            [Block("second", [y])],
            curvature="backtracking",
        )
    with pytest.raises(NumericalError, match="gradient in block 'first' is nan"):
        Palm([Block("first", [x])]).step(lambda: (x * math.nan).sum())
    with pytest.raises(NumericalError, match="objective is nan after 0 steps"):
        palm(lambda: (x * math.nan).sum(), [Block("first", [x])])


def test_bad_input():
    x = leaf(torch.ones(2))
    block = Block("x", [x])
    for blocks, sentence in [
        ([], "There is no block"),
        ([Block("x", [])], "There is no block"),
        ([block, Block("y", [leaf(torch.ones(2).to("meta"))])], "'y' has a tensor on meta"),
        ([block, Block("y", [leaf(torch.ones(2, dtype=torch.float32))])], "'y' has a tensor on"),
        ([Block("y", [torch.ones(2)])], "'y' has a tensor that is no leaf"),
        ([Block("y", [x * 2])], "'y' has a tensor that is no leaf"),
        ([Block("y", [x], box(2, 3))], "'y' starts where its penalty is infinite"),
        ([Block("y", [x], [box(0, 3), free()])], "'y' has 1 tensors but 2 penalties"),
    ]:
        with pytest.raises(InputError, match=sentence):
            Palm(blocks)
    for options, sentence in [
        ({"lr": 0}, "Got lr 0, inertia"),
        ({"inertia": 1.5}, "inertia 1.5"),
        ({"powers": 0}, "and 0 powers"),
    ]:
        with pytest.raises(InputError, match=sentence):
            Palm([block], **options)
    with pytest.raises(InputError, match="number of steps is 0"):
        palm(lambda: x.sum(), [block], steps=0)
    smooth = lambda index: x.square().sum()  # noqa: E731
    with pytest.raises(InputError, match="A batch of 9 from 5 summands"):
        spring(smooth, [block], 5, batch=9)
    with pytest.raises(InputError, match="Got the probability 2"):
        spring(smooth, [block], 5, batch=2, probability=2)
    with pytest.raises(InputError, match="every 0 steps"):
        spring(smooth, [block], 5, batch=2, every=0)
    with pytest.raises(InputError, match="box from 2 to 1 is empty"):
        box(2, 1)
    with pytest.raises(InputError, match="weight is -1"):
        l1(-1)
    with pytest.raises(InputError, match="weight is inf"):
        nuclear(math.inf)
