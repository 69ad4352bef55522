"""Total generalised variation: its derivatives, its null space, and solutions against a general solver."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import torch

import patchflow as pf
from patchflow.priors.differences import (
    FirstDifferences,
    SecondDifferences,
    minus_symmetrised_divergence,
    symmetrised_derivative,
)
from patchflow.problems.poisson import PoissonNoise
from patchflow.problems.tomography import ParallelBeam
from patchflow.reconstruct import generalized_variation, total_variation

SIZE = 8
PRIORS = {"first": FirstDifferences(), "second": SecondDifferences(2.0)}


def ramps(size):
    """Two planes of different slopes with a jump between them."""
    grid = torch.arange(float(size)) / size
    x = 0.5 * grid[:, None] + 0.2 * grid[None]
    return torch.where(grid[:, None] + 0 * grid > 0.5, x + 0.4, 0.9 - x)[None, None]


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_adjoints(prior):
    u = tuple(torch.randn_like(a) for a in prior.start(torch.randn(2, 3, 7, 9)))
    image = prior.apply(u)
    p = tuple(torch.randn_like(a) for a in image)
    there = sum(float((a * b).sum()) for a, b in zip(image, p, strict=True))
    back = sum(float((a * b).sum()) for a, b in zip(u, prior.adjoint(p), strict=True))
    assert there == pytest.approx(back, rel=1e-12)


def test_the_symmetrised_derivative_by_autograd():
    """Its adjoint is the derivative of <E v, e>; and |E v|^2 < 8 |v|^2, which the steps need."""
    v, e = torch.randn(2, 1, 1, 6, 5, requires_grad=True), torch.randn(3, 1, 1, 6, 5)
    (gradient,) = torch.autograd.grad((symmetrised_derivative(v) * e).sum(), v)
    assert torch.allclose(gradient, minus_symmetrised_divergence(e))
    dense = torch.autograd.functional.jacobian(
        lambda w: symmetrised_derivative(w.view(2, 1, 1, 6, 5)).flatten(), v.detach().flatten()
    )
    assert 6 < float(torch.linalg.matrix_norm(torch.as_tensor(dense), 2)) ** 2 < 8


def test_the_symmetrised_derivative_is_the_hessian_of_a_gradient():
    """Of a quadratic, whose differences are exact; rigid rotations have none."""
    i, j = torch.meshgrid(torch.arange(9.0), torch.arange(11.0), indexing="ij")
    x = (1.5 * i**2 - 0.7 * j**2 + 0.9 * i * j + 2 * i - j)[None, None]
    e = symmetrised_derivative(pf.priors.variation.image_gradient(x))[:, 0, 0, 1:-2, 1:-2]
    expected = torch.tensor([3.0, -1.4, math.sqrt(2) * 0.9])
    assert torch.allclose(e, expected[:, None, None].expand_as(e))
    rotation = torch.stack((j, -i))[:, None, None]
    assert float(symmetrised_derivative(rotation).abs().max()) == 0


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_projection_is_the_proximal_map_of_the_conjugate(prior):
    """By Moreau: what is left of p is the point that lowers w |a| + |a - p|^2 / 2."""
    p = tuple(3 * torch.randn_like(a) for a in prior.apply(prior.start(torch.randn(1, 1, 4, 5))))
    inside = prior.project(p, 1.5)
    left = tuple((a - b).requires_grad_() for a, b in zip(p, inside, strict=True))
    grown = tuple(a.detach().requires_grad_() for a in left)
    slopes = torch.autograd.grad(1.5 * prior.value(grown), grown)
    for a, b, slope, point in zip(p, inside, slopes, left, strict=True):
        moved = point.abs().sum(0) > 1e-9
        assert bool(moved.any())
        assert torch.allclose(slope[:, moved], b[:, moved])
        assert torch.equal(a[:, ~moved], b[:, ~moved])


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_symbols_are_those_of_an_infinite_image(prior):
    """A wave in the middle of an image, where no border is seen."""
    k0, k1 = torch.tensor(0.7), torch.tensor(-1.1)
    i, j = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij")
    wave = torch.exp(1j * (k0 * i + k1 * j))[None, None]
    for field in range(1 if len(prior.start(wave.real)) == 1 else 3):
        parts = []
        for part in (wave.real, wave.imag):
            x, *others = prior.start(torch.zeros_like(part))
            stack = torch.cat((x[None], *others))
            stack[field] = part
            parts.append(prior.apply((stack[0], *((stack[1:],) if others else ()))))
        symbols = prior.symbols(k0, k1)
        for real, imaginary, symbol in zip(*parts, symbols, strict=True):
            seen = torch.complex(real, imaginary)[:, 0, 0, 2, 2] / wave[0, 0, 2, 2]
            assert torch.allclose(seen, symbol[:, field])


OPERATORS = {
    "super-resolution": pf.downsample((SIZE, SIZE), 2, kernel_size=4),
    "deblurring": pf.Blur(torch.ones(3, 3) / 9, (SIZE, SIZE), "periodic"),
    "inpainting": pf.Mask(torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) < 0.7),
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_affine_images_come_back_from_exact_measurements(operator):
    """Their TGV is zero: the energy of the minimiser is zero, whatever the weight."""
    i, j = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    x = (0.2 + 0.05 * i - 0.03 * j)[None, None]
    likelihood = pf.GaussianLikelihood(operator, 0.1)
    y = operator(x)
    found = generalized_variation.reconstruct(
        likelihood, y, operator.initial(y), weight=3, max_iterations=1500, tolerance=1e-30
    )
    assert found.history[-1] < 1e-2
    assert torch.allclose(found.x, x, atol=4e-3)
    smooth = total_variation.reconstruct(likelihood, y, operator.initial(y), weight=3).x
    assert float((smooth - x).abs().max()) > 0.02


def dense_differences(size):
    """Staggered differences by Kronecker products: rows and where in (kind, row of it, pixel) they go."""
    eye, line, inner = (
        np.eye(size),
        np.diff(np.eye(size), axis=0),
        np.diff(np.eye(size - 1), axis=0),
    )
    gradient = np.kron(line, eye), np.kron(eye, line)
    here, nothing = np.eye(size * (size - 1)), np.zeros((size * (size - 1), size * (size - 1)))
    first = np.block([[gradient[0], -here, nothing], [gradient[1], nothing, -here]])
    straight = np.kron(inner, eye), np.kron(eye, inner)
    mixed = np.concatenate((np.kron(np.eye(size - 1), line), np.kron(line, np.eye(size - 1))), 1)
    rows = np.zeros((straight[0].shape[0], size**2))
    e00 = np.concatenate((rows, straight[0], 0 * straight[0]), 1)
    e11 = np.concatenate((rows, 0 * straight[1], straight[1]), 1)
    e01 = np.concatenate((np.zeros((mixed.shape[0], size**2)), mixed / math.sqrt(2)), 1)
    index = np.arange(size**2).reshape(size, size)
    places = [index[:-1].ravel(), index[:, :-1].ravel()]
    places += [index[1:-1].ravel(), index[:, 1:-1].ravel(), index[:-1, :-1].ravel()]
    return np.concatenate((first, e00, e11, e01)), places


def general_solution(data, start, weight, ratio, smooth=1e-7):
    """The lowest energy over x and v, with smoothed norms, by L-BFGS on dense matrices."""
    matrix, places = dense_differences(SIZE)
    matrix = torch.from_numpy(matrix)
    sizes = [len(p) for p in places]

    def objective(flat, smooth=smooth):
        u = torch.from_numpy(flat).requires_grad_()
        parts = (matrix @ u).split(sizes)
        squares = [torch.zeros(SIZE**2), torch.zeros(SIZE**2)]
        for k, (part, place) in enumerate(zip(parts, places, strict=True)):
            kind = 0 if k < 2 else 1
            squares[kind] = squares[kind].index_add(0, torch.from_numpy(place), part.square())
        norms = [(s + smooth).sqrt().sum() for s in squares]
        value = data(u[: SIZE**2].view(1, 1, SIZE, SIZE)) + weight * (norms[0] + ratio * norms[1])
        value.backward()
        assert u.grad is not None
        return value.item(), u.grad.numpy()

    flat = np.concatenate((start.flatten().numpy(), np.zeros(2 * SIZE * (SIZE - 1))))
    for level in (1e-3, 1e-5, smooth):
        best = scipy.optimize.minimize(
            lambda u, level=level: objective(u, level), flat, jac=True, method="L-BFGS-B",
            options={"maxiter": 3000, "maxfun": 4000, "ftol": 1e-15, "gtol": 1e-7},
        )  # fmt: skip
        flat = best.x
    return best.fun


@pytest.mark.parametrize(
    ("operator", "ratio"),
    list(zip(OPERATORS.values(), (2.0, 2.0, 0.7), strict=True)),
    ids=OPERATORS,
)
def test_energy_is_that_of_a_general_solver(operator, ratio):
    likelihood = pf.GaussianLikelihood(operator, 0.05)
    y = likelihood.simulate(ramps(SIZE))
    if isinstance(operator, pf.Mask):
        y = operator(y)
    init = operator.initial(y)

    def data(x):
        return (operator(x) - y).square().sum() / (2 * 0.05**2)

    ours = generalized_variation.reconstruct(
        likelihood, y, init, weight=6.0, ratio=ratio, tolerance=1e-3, max_iterations=10000
    )
    assert ours.converged
    expected = general_solution(data, init, 6.0, ratio)
    # The smoothed norms are larger, by sqrt(smooth) each where they vanish.
    bound = 6.0 * (1 + ratio) * SIZE**2 * math.sqrt(1e-7)
    assert expected - bound - 1e-9 <= ours.history[-1] <= expected * (1 + 1e-3)


def _scan():
    angles = (torch.arange(12, dtype=torch.float64) + 0.5) * math.pi / 12
    operator = ParallelBeam((SIZE, SIZE), angles, 13, pixel=0.02)
    likelihood = pf.Likelihood(operator, PoissonNoise(3000, 30.0))
    return likelihood, likelihood.simulate(0.5 * ramps(SIZE))


def test_sinograms_against_a_general_solver():
    likelihood, y = _scan()
    init = likelihood.operator.initial(y)
    best = likelihood.noise.log_prob(y, y).sum()
    ours = generalized_variation.reconstruct(
        likelihood, y, init, weight=20.0, tolerance=1e-4, max_iterations=10000
    )
    assert ours.converged
    expected = general_solution(lambda x: best + likelihood(x, y).sum(), init, 20.0, 2.0)
    bound = 20.0 * 3 * SIZE**2 * math.sqrt(1e-7)
    assert expected - bound - 1e-9 <= ours.history[-1] <= expected * (1 + 1e-3)


@pytest.mark.parametrize("kind", ["image", "sinogram"])
def test_the_gap_bounds_the_distance_to_the_minimum(kind):
    if kind == "sinogram":
        likelihood, y = _scan()
    else:
        likelihood = pf.GaussianLikelihood(OPERATORS["deblurring"], 0.05)
        y = likelihood.simulate(ramps(SIZE))
    init, weight = likelihood.operator.initial(y), 8.0
    lowest = generalized_variation.reconstruct(
        likelihood, y, init, weight=weight, tolerance=1e-4, max_iterations=10000
    )
    previous = 0
    for tolerance in (0.1, 1e-2):
        rough = generalized_variation.reconstruct(
            likelihood, y, init, weight=weight, tolerance=tolerance, max_iterations=10000
        )
        assert rough.converged
        assert previous < rough.steps < lowest.steps
        assert rough.history[-1] >= lowest.history[-1] * (1 - 1e-4)
        assert rough.history[-1] - lowest.history[-1] <= tolerance * rough.history[-1]
        previous = rough.steps


def test_slopes_are_kept_where_total_variation_makes_stairs():
    x = ramps(32)
    likelihood = pf.GaussianLikelihood(pf.Identity((32, 32)), 0.05)
    y = likelihood.simulate(x)
    flat = total_variation.reconstruct(likelihood, y, y, weight=10).x
    sloped = generalized_variation.reconstruct(likelihood, y, y, weight=10).x
    assert float(pf.psnr(sloped, x)) > float(pf.psnr(flat, x)) + 1
    assert float(pf.psnr(flat, x)) > float(pf.psnr(y, x)) + 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0.0}, "variation is 0.0 but"),
        ({"ratio": -1.0}, "two orders is -1.0 but"),
        ({"noise": pf.MixedNoise(0.1, 0.1)}, "not Identity and MixedNoise"),
    ],
)
def test_messages(change, message):
    likelihood, y = pf.GaussianLikelihood(pf.Identity((4, 4)), 0.1), torch.zeros(1, 1, 4, 4)
    if "noise" in change:
        likelihood = pf.Likelihood(likelihood.operator, change["noise"])
    options = {k: v for k, v in change.items() if k != "noise"}
    with pytest.raises(pf.InputError, match=message):
        generalized_variation.reconstruct(likelihood, y, y, **({"weight": 1.0} | options))
