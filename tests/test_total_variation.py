"""Total variation of images against independent solvers, its duality gap, and its messages."""

import numpy as np
import pytest
import scipy.optimize
import torch
from skimage.restoration import denoise_tv_chambolle

from patchflow import variation_problem
from patchflow.errors import InputError, NumericalError
from patchflow.priors.variation import TotalVariation
from patchflow.problems.blur import Blur, downsample
from patchflow.problems.likelihood import GaussianLikelihood, Likelihood, MixedNoise
from patchflow.problems.operator import Identity
from patchflow.problems.sampling import Mask
from patchflow.reconstruct import generalized_variation, total_variation

DOUBLE = torch.float64


def disc(size, noise):
    grid = torch.arange(size, dtype=DOUBLE) - size / 2
    x = (grid[:, None] ** 2 + grid[None] ** 2 < (size / 3) ** 2).to(DOUBLE)
    return x[None, None] + noise * torch.randn(1, 1, size, size, dtype=DOUBLE)


def energy(likelihood, weight, x, y, isotropic=True):
    residual = (likelihood.operator(x) - y) / likelihood.std
    variation = TotalVariation(isotropic=isotropic)(x).sum()
    return float(residual.square().sum() / 2 + weight * variation)


def test_denoising_against_skimage():
    """skimage minimises |x - y|^2 / 2 + weight TV(x): the data term with sigma = 1."""
    y = disc(32, 0.2)
    solution = total_variation.reconstruct(
        GaussianLikelihood(Identity((32, 32)), 1.0),
        y,
        y,
        weight=0.3,
        tolerance=1e-6,
        max_iterations=9000,
    )
    expected = denoise_tv_chambolle(y[0, 0].numpy(), weight=0.3, eps=1e-9, max_num_iter=4000)
    assert solution.converged
    assert np.abs(solution.x[0, 0].numpy() - expected).max() < 2e-2
    assert np.abs(solution.x[0, 0].numpy() - expected).mean() < 1e-3


def differences(size):
    """The dense forward differences of a square image, without those across the border."""
    line = np.diff(np.eye(size), axis=0)
    return np.concatenate([np.kron(line, np.eye(size)), np.kron(np.eye(size), line)])


@pytest.mark.parametrize(
    "operator",
    [
        Identity((6, 6)),
        downsample((6, 6), 2, kernel_size=4),
        Blur(torch.ones(3, 3, dtype=DOUBLE) / 9, (6, 6), "reflect"),
    ],
    ids=["denoising", "super-resolution", "deblurring"],
)
def test_anisotropic_against_quadratic_programming(operator):
    r"""With x free and t >= |Dx|, the problem is min |Ax - y|^2 / 2 s^2 + w sum t: solved by scipy, by its dual.

    Its dual is a box-constrained least-squares problem in p: x = H^-1 (A'y/s^2 - D'p), H = A'A/s^2 + small I.
    """
    std, weight, small = 0.1, 5.0, 1e-3
    y = operator(disc(6, 0.0)) + std * torch.randn(1, 1, *operator.range_shape, dtype=DOUBLE)
    dense = operator(torch.eye(36, dtype=DOUBLE).view(36, 1, 6, 6)).reshape(36, -1).T.numpy()
    hessian = dense.T @ dense / std**2 + small * np.eye(36)
    linear, d = dense.T @ y.flatten().numpy() / std**2, differences(6)
    root = np.linalg.inv(np.linalg.cholesky(hessian))
    dual = scipy.optimize.lsq_linear(
        root @ d.T, root @ linear, bounds=(-weight, weight), tol=1e-14, max_iter=1000
    )
    expected = torch.from_numpy(np.linalg.solve(hessian, linear - d.T @ dual.x)).view(1, 1, 6, 6)

    likelihood = GaussianLikelihood(operator, std)
    init = torch.zeros(1, 1, 6, 6, dtype=DOUBLE)
    solution = total_variation.reconstruct(
        likelihood, y, init, weight=weight, isotropic=False, tolerance=1e-5, max_iterations=20000
    )
    assert solution.converged
    ours = energy(likelihood, weight, solution.x, y, isotropic=False)
    assert solution.history[-1] == pytest.approx(ours)
    # The minimiser need not be unique; the energy is. The reference's small term shifts it by less than 36 * small.
    assert abs(ours - energy(likelihood, weight, expected, y, isotropic=False)) < 36 * small


@pytest.mark.parametrize("isotropic", [True, False])
@pytest.mark.parametrize(
    "operator",
    [
        downsample((12, 12), 2, kernel_size=4),
        Blur(torch.ones(3, 3, dtype=DOUBLE) / 9, (12, 12), "reflect"),
        Mask(torch.rand(12, 12, generator=torch.Generator().manual_seed(1)) < 0.6),
    ],
    ids=["closed form", "conjugate gradients", "mask"],
)
def test_the_gap_bounds_the_distance_to_the_minimum(operator, isotropic):
    likelihood = GaussianLikelihood(operator, 0.05)
    y = likelihood.simulate(disc(12, 0.0))
    if isinstance(operator, Mask):
        y = operator(y)
    init = operator.initial(y)
    lowest = total_variation.reconstruct(
        likelihood, y, init, weight=4, isotropic=isotropic, tolerance=1e-5, max_iterations=20000
    )
    assert lowest.converged
    previous = 0
    for tolerance in (0.1, 1e-2, 1e-3):
        rough = total_variation.reconstruct(
            likelihood, y, init, weight=4, isotropic=isotropic, tolerance=tolerance
        )
        assert rough.converged
        assert previous < rough.steps < lowest.steps
        value = energy(likelihood, 4, rough.x, y, isotropic)
        assert 0 <= value - lowest.history[-1] + 1e-5 * value <= tolerance * value
        previous = rough.steps
    for size in (1e-3, 1e-2, 1e-1):
        others = lowest.x + size * torch.randn(20, 1, 12, 12, dtype=DOUBLE)
        lower = [energy(likelihood, 4, x[None], y, isotropic) for x in others]
        assert min(lower) > lowest.history[-1] * (1 - 1e-5)


@pytest.mark.parametrize("weight", [1e2, 1e4, 1e9])
@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize(
    "method", [total_variation.reconstruct, generalized_variation.reconstruct], ids=["tv", "tgv"]
)
def test_a_flat_image_is_no_solution_because_it_is_flat(method, start, weight):
    """With a large weight the best image is constant (or affine): below the mean's energy, to the tolerance."""
    likelihood = GaussianLikelihood(Identity((24, 24)), 0.05)
    y = disc(24, 0.05)
    init = torch.full_like(y, start)
    solution = method(likelihood, y, init, weight=weight, max_iterations=300)
    mean = float(likelihood(y.mean().expand_as(y), y))
    assert not solution.converged or solution.history[-1] < 1.02 * mean


def test_what_was_not_measured_does_not_loosen_the_tolerance():
    """Noise at masked pixels is a constant of the energy, which the gap is compared with."""
    mask = (torch.rand(16, 16) < 0.2).to(DOUBLE)
    likelihood = GaussianLikelihood(Mask(mask), 0.01)
    y = likelihood.simulate(disc(16, 0.0))
    runs = [
        total_variation.reconstruct(
            likelihood, seen, likelihood.operator.initial(seen), weight=0.5, max_iterations=5000
        )
        for seen in (y, mask * y)
    ]
    assert all(run.converged for run in runs)
    assert runs[0].steps == runs[1].steps > 5
    torch.testing.assert_close(runs[0].x, runs[1].x)


def test_the_step_does_not_change_the_solution(monkeypatch):
    y = disc(16, 0.1)
    likelihood = GaussianLikelihood(Identity((16, 16)), 0.1)
    runs = []
    for step in (0.015, 0.03):
        monkeypatch.setattr(variation_problem, "STEP", step)
        runs.append(
            total_variation.reconstruct(
                likelihood, y, y, weight=10, tolerance=1e-5, max_iterations=5000
            )
        )
    assert all(run.converged for run in runs)
    assert len({run.steps for run in runs}) == 2
    assert torch.allclose(runs[0].x, runs[1].x, atol=2e-3)


def test_history_callback_and_interrupt():
    y, seen = disc(8, 0.1), []
    likelihood = GaussianLikelihood(Identity((8, 8)), 0.1)

    def follow(step, x, value):
        seen.append((step, energy(likelihood, 1, x, y)))
        if step == 5:
            raise KeyboardInterrupt

    solution = total_variation.reconstruct(
        likelihood, y, y, weight=1, max_iterations=3, tolerance=1e-30, callback=follow
    )
    assert (solution.steps, solution.converged) == (3, False)
    assert solution.history == pytest.approx([value for _, value in seen])
    assert [step for step, _ in seen] == [0, 1, 2]
    stopped = total_variation.reconstruct(
        likelihood, y, y, weight=1, tolerance=1e-30, callback=follow
    )
    assert (stopped.steps, stopped.converged) == (6, False)


def test_inpainting_leaves_constants():
    mask = torch.rand(10, 10) < 0.5
    y = Mask(mask)(torch.full((1, 1, 10, 10), 0.4, dtype=DOUBLE))
    solution = total_variation.reconstruct(
        GaussianLikelihood(Mask(mask), 0.01), y, y, weight=1, tolerance=1e-6
    )
    assert torch.allclose(solution.x, torch.full_like(y, 0.4), atol=1e-4)


def test_single_precision_with_conjugate_gradients_reaches_the_default_tolerance():
    operator = Blur(torch.ones(5, 5) / 25, (64, 64), "reflect")
    likelihood = GaussianLikelihood(operator, 0.01)
    y = likelihood.simulate(disc(64, 0.0).float())
    solution = total_variation.reconstruct(likelihood, y, operator.initial(y), weight=3.5)
    assert solution.converged
    assert solution.x.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0}, "variation is 0 but"),
        ({"weight": -1.0}, "variation is -1.0 but"),
        ({"tolerance": 0.0}, "tolerance is 0.0 but"),
        ({"noise": MixedNoise(0.1, 0.1)}, "not Identity and MixedNoise"),
    ],
)
def test_messages(change, message):
    likelihood, y = GaussianLikelihood(Identity((4, 4)), 0.1), torch.zeros(1, 1, 4, 4)
    if "noise" in change:
        likelihood = Likelihood(likelihood.operator, change.pop("noise"))
    options = {"weight": 1.0} | change
    with pytest.raises(InputError, match=message):
        total_variation.reconstruct(likelihood, y, y, **options)


def test_nan_stops_with_advice():
    y = torch.full((1, 1, 4, 4), torch.nan)
    with pytest.raises(NumericalError, match="nan at step 0; check the measurement"):
        total_variation.reconstruct(
            GaussianLikelihood(Identity((4, 4)), 0.1), y, torch.zeros(1, 1, 4, 4), weight=1
        )
