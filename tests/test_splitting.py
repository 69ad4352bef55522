"""Splitting methods against closed forms."""

import numpy as np
import pytest
import torch

from patchflow.errors import InputError
from patchflow.problems.blur import downsample
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.operator import Identity
from patchflow.splitting import Saddle, half_quadratic_splitting, primal_dual

DOUBLE = torch.float64


class Lasso(Saddle):
    r"""min |x - a|^2 / 2 + |M x|_1, with the steps tau and sigma; its dual is a box-constrained quadratic."""

    def __init__(self, matrix, a):
        self.matrix, self.a = matrix, a
        self.step = 1 / float(torch.linalg.matrix_norm(matrix, 2))

    def apply(self, u):
        return (self.matrix @ u[0],)

    def adjoint(self, d):
        return (self.matrix.T @ d[0],)

    def primal_step(self, u, slope):
        ahead = u[0] - self.step * slope[0]
        x = (ahead + self.step * self.a) / (1 + self.step)
        return (x,), ((ahead - x) / self.step,)

    def dual_step(self, d, ahead):
        return ((d[0] + self.step * ahead[0]).clamp(-1, 1),), torch.zeros(())

    def energies(self, u, image):
        return (u[0] - self.a).square().sum() / 2, image[0].abs().sum()

    def lowest(self, slope, u):
        # The minimiser is no longer than a.
        return -slope[0].norm() * self.a.norm()


@pytest.mark.parametrize("relaxation", [1.0, 1.9])
def test_primal_dual_with_an_orthogonal_map_is_soft_thresholding(relaxation):
    q = torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE)).Q
    a, seen = 2 * torch.randn(6, dtype=DOUBLE), []
    found = primal_dual(
        Lasso(q, a),
        (torch.zeros_like(a),),
        (torch.zeros_like(a),),
        relaxation=relaxation,
        max_iterations=500,
        tolerance=1e-12,
        callback=lambda step, x, value: seen.append((step, value)),
    )
    threshold = torch.nn.functional.softshrink(q @ a, 1.0)
    assert found.converged
    assert torch.allclose(found.x, q.T @ threshold, atol=1e-5)
    assert seen == list(enumerate(found.history))


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
    ("betas", "message"), [([], r"penalties are \[\]"), ([1.0, 0.0], r"penalties are \[1.0, 0.0\]")]
)
def test_messages(betas, message):
    y = torch.zeros(1, 1, 4, 4)
    with pytest.raises(InputError, match=message):
        half_quadratic_splitting(
            GaussianLikelihood(Identity((4, 4)), 0.1), lambda x, s: x, y, y, betas=betas
        )
