"""Splitting methods against independent solvers and closed forms."""

import numpy as np
import pytest
import scipy.optimize
import torch
from skimage.restoration import denoise_tv_chambolle

from patchflow.errors import InputError
from patchflow.priors.variation import TotalVariation
from patchflow.problems.blur import Blur, downsample
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.operator import Identity
from patchflow.problems.sampling import Mask
from patchflow.splitting import half_quadratic_splitting, primal_dual

DOUBLE = torch.float64


def disc(size, noise):
    grid = torch.arange(size, dtype=DOUBLE) - size / 2
    x = (grid[:, None] ** 2 + grid[None] ** 2 < (size / 3) ** 2).to(DOUBLE)
    return x[None, None] + noise * torch.randn(1, 1, size, size, dtype=DOUBLE)


def test_denoising_against_skimage():
    """skimage minimises |x - y|^2 / 2 + weight TV(x): the data term with sigma = 1."""
    y = disc(32, 0.2)
    solution = primal_dual(
        GaussianLikelihood(Identity((32, 32)), 1.0), 0.3, TotalVariation(), y, y, tolerance=1e-5
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
    expected = np.linalg.solve(hessian, linear - d.T @ dual.x)

    likelihood, variation = GaussianLikelihood(operator, std), TotalVariation(isotropic=False)
    init = torch.zeros(1, 1, 6, 6, dtype=DOUBLE)
    solution = primal_dual(
        likelihood, weight, variation, init, y, tolerance=1e-6, max_iterations=20000
    )
    energy = likelihood + weight * variation
    reference = torch.from_numpy(expected).view(1, 1, 6, 6)
    assert solution.converged
    # The minimiser need not be unique; the energy is. The reference's small term shifts it by less than 36 * small.
    assert abs(float(energy(solution.x, y) - energy(reference, y))) < 36 * small


def test_the_minimum_is_a_minimum():
    operator = downsample((12, 12), 2, kernel_size=4)
    likelihood, variation = GaussianLikelihood(operator, 0.05), TotalVariation()
    y = likelihood.simulate(disc(12, 0.0))
    energy = likelihood + 4 * variation
    solution = primal_dual(
        likelihood, 4, variation, operator.initial(y), y, tolerance=1e-7, max_iterations=20000
    )
    lowest = float(energy(solution.x, y))
    for size in (1e-3, 1e-2, 1e-1):
        others = solution.x + size * torch.randn(50, 1, 12, 12, dtype=DOUBLE)
        assert float(energy(others, y).min()) > lowest - 1e-6


def test_the_step_does_not_change_the_solution():
    y = disc(16, 0.1)
    likelihood = GaussianLikelihood(Identity((16, 16)), 0.1)
    runs = [
        primal_dual(
            likelihood, 10, TotalVariation(), y, y, step=step, tolerance=2e-5, max_iterations=2000
        )
        for step in (None, 5e-4, 3e-3)
    ]
    assert all(run.converged for run in runs)
    for run in runs[1:]:
        assert torch.allclose(run.x, runs[0].x, atol=1e-3)


def test_history_and_callback():
    y, seen = disc(8, 0.1), []
    likelihood = GaussianLikelihood(Identity((8, 8)), 0.1)
    solution = primal_dual(
        likelihood, 1, TotalVariation(), y, y, max_iterations=3, tolerance=1e-30,
        callback=lambda step, x, residual: seen.append((step, residual)),
    )  # fmt: skip
    assert (solution.steps, solution.converged) == (3, False)
    assert seen == list(enumerate(solution.history))


def test_inpainting_leaves_constants():
    mask = torch.rand(10, 10) < 0.5
    y = Mask(mask)(torch.full((1, 1, 10, 10), 0.4, dtype=DOUBLE))
    solution = primal_dual(
        GaussianLikelihood(Mask(mask), 0.01), 1, TotalVariation(), y, y, tolerance=1e-7
    )
    assert torch.allclose(solution.x, torch.full_like(y, 0.4), atol=1e-4)


def test_half_quadratic_splitting_with_a_quadratic_prior():
    r"""With R(z) = a |z|^2 / 2 and a fixed penalty b, the limit is the minimiser with a -> a b / (a + b)."""
    operator, std, a, b = downsample((8, 8), 2, kernel_size=4), 0.2, 3.0, 5.0
    likelihood = GaussianLikelihood(operator, std)
    y = torch.randn(2, 1, 4, 4, dtype=DOUBLE)

    def denoise(x, sigma):
        return x / (1 + a * sigma**2)

    solution = half_quadratic_splitting(
        likelihood, denoise, operator.initial(y), y, betas=[b] * 300
    )
    expected = operator.solve(operator.adjoint(y), std**2 * a * b / (a + b))
    assert solution.steps == len(solution.history) == 300
    assert torch.allclose(solution.x, expected, atol=1e-8)
    grown = half_quadratic_splitting(
        likelihood, denoise, operator.initial(y), y, betas=list(np.geomspace(1, 1e5, 600))
    )
    assert torch.allclose(grown.x, operator.solve(operator.adjoint(y), std**2 * a), atol=2e-2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda data, y: primal_dual(data, 0, TotalVariation(), y, y), "variation is 0 but"),
        (lambda data, y: primal_dual(data, -1.0, TotalVariation(), y, y), "variation is -1.0 but"),
        (
            lambda data, y: half_quadratic_splitting(data, lambda x, s: x, y, y, betas=[]),
            r"penalties are \[\]",
        ),
        (
            lambda data, y: half_quadratic_splitting(data, lambda x, s: x, y, y, betas=[1.0, 0.0]),
            r"penalties are \[1.0, 0.0\]",
        ),
    ],
)
def test_messages(make, message):
    with pytest.raises(InputError, match=message):
        make(GaussianLikelihood(Identity((4, 4)), 0.1), torch.zeros(1, 1, 4, 4))
