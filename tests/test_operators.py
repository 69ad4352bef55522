"""Operators: adjoints, exact solves, the papers' operators, alignment of the start images, messages."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch.nn import functional

from patchflow.errors import InputError
from patchflow.numerics.linalg import conjugate_gradients, power_iteration
from patchflow.problems.blur import Blur, downsample, gaussian_kernel
from patchflow.problems.operator import Identity, adjoint_error, operator_norm
from patchflow.problems.sampling import Mask, Subsample


def kernel(rows, columns, seed=1):
    values = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (values / values.sum()).double()


def hidden(rows, columns):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(2)) < 0.6


OPERATORS = {
    "identity": lambda: Identity((9, 7)),
    "blur-periodic": lambda: Blur(kernel(3, 4), (9, 8), "periodic"),
    "blur-periodic-fft": lambda: Blur(kernel(9, 8), (10, 9), "periodic"),
    "blur-periodic-fft-stride": lambda: Blur(kernel(17, 16), (18, 20), "periodic", stride=2),
    "blur-periodic-indivisible": lambda: Blur(kernel(3, 3), (9, 8), "periodic", stride=2),
    "blur-reflect": lambda: Blur(kernel(4, 5), (9, 8), "reflect"),
    "blur-reflect-stride": lambda: Blur(kernel(5, 4), (9, 8), "reflect", stride=2),
    "blur-reflect-fft": lambda: Blur(kernel(9, 8), (11, 10), "reflect"),
    "blur-reflect-fft-stride": lambda: Blur(kernel(17, 16), (18, 20), "reflect", stride=2),
    "blur-valid": lambda: Blur(kernel(4, 5), (9, 8), "valid"),
    "blur-valid-stride": lambda: Blur(kernel(4, 5), (13, 14), "valid", stride=3),
    "blur-valid-fft": lambda: Blur(kernel(9, 8), (11, 12), "valid"),
    "blur-valid-fft-stride": lambda: Blur(kernel(17, 16), (20, 23), "valid", stride=2),
    "downsample-circular": lambda: downsample((12, 8), 4, kernel_size=6),
    "downsample-circular-odd": lambda: downsample((9, 15), 3, kernel_size=5),
    "downsample-valid": lambda: downsample((12, 15), 2, kernel_size=6, boundary="valid"),
    "subsample": lambda: Subsample((9, 8), 3, 1),
    "mask": lambda: Mask(hidden(8, 9)),
    "transpose": lambda: downsample((8, 8), 2, kernel_size=4).T,
    "composition": lambda: Subsample((9, 8), 2) @ Blur(kernel(3, 3), (9, 8), "reflect"),
}
each = pytest.mark.parametrize("name", OPERATORS)


def matrix(operator):
    """The dense matrix of an operator, from its forward alone."""
    size = operator.domain_shape[0] * operator.domain_shape[1]
    basis = torch.eye(size, dtype=torch.float64).view(size, 1, *operator.domain_shape)
    return operator(basis).reshape(size, -1).T.numpy()


@each
def test_adjoint(name):
    operator = OPERATORS[name]()
    assert adjoint_error(operator, torch.float64) < 1e-12
    assert adjoint_error(operator, torch.float32) < 1e-6


@each
def test_shapes_and_types(name):
    operator = OPERATORS[name]()
    for dtype in (torch.float32, torch.float64):
        y = operator(torch.rand(2, 3, *operator.domain_shape, dtype=dtype))
        assert y.shape == (2, 3, *operator.range_shape)
        assert y.dtype == dtype
        for x in (
            operator.adjoint(y),
            operator.initial(y),
            operator.solve(operator.adjoint(y), 0.1),
        ):
            assert x.shape == (2, 3, *operator.domain_shape)
            assert x.dtype == dtype


@each
@pytest.mark.parametrize("rho", [1e-2, 3.0])
def test_solve(name, rho):
    operator = OPERATORS[name]()
    dense = matrix(operator)
    b = torch.randn(2, 1, *operator.domain_shape, dtype=torch.float64)
    expected = np.linalg.solve(
        dense.T @ dense + rho * np.eye(dense.shape[1]), b.reshape(2, -1).numpy().T
    ).T
    x = operator.solve(b, rho).reshape(2, -1).numpy()
    assert np.abs(x - expected).max() < 1e-8 * np.abs(expected).max()
    single = operator.solve(b.float(), rho).reshape(2, -1).numpy()
    assert np.abs(single - expected).max() < 1e-3 * np.abs(expected).max()


@each
def test_norm(name):
    operator = OPERATORS[name]()
    expected = np.linalg.norm(matrix(operator), 2)
    assert 0.98 * expected < operator_norm(operator) < (1 + 1e-5) * expected


@pytest.mark.parametrize("stride", [1, 4])
def test_nearest_is_exact_in_single_precision_too(stride):
    """With little noise nearly all of the image is determined, or nearly none of it: no digits may cancel."""
    operator = Blur(gaussian_kernel(9, 2.0), (32, 32), "periodic", stride=stride)
    x = torch.rand(1, 1, 32, 32)
    y, v, rho = operator(x), x + 0.1 * torch.randn_like(x), 1e-8
    expected = operator.nearest(v, y, rho)
    dense = operator(torch.eye(32 * 32).view(-1, 1, 32, 32)).flatten(1).T
    system = dense.T @ dense + rho * torch.eye(32 * 32)
    by_algebra = torch.linalg.solve(system, dense.T @ y.flatten() + rho * v.flatten())
    assert (expected.flatten() - by_algebra).abs().max() < 1e-6
    found = operator.nearest(v.float(), y.float(), rho)
    assert (found - expected).abs().max() < 1e-3


def test_solve_follows_the_kernel():
    operator = Blur(kernel(3, 3), (9, 8), "periodic").float()
    b = torch.randn(1, 1, 9, 8, dtype=torch.float64)
    operator.solve(b, 0.1)
    operator.kernel = kernel(3, 3, seed=5)
    x = operator.solve(b, 0.1)
    assert torch.allclose(operator.adjoint(operator(x)) + 0.1 * x, b, atol=1e-12)


def slow_gaussian(size, std):
    centre = (size - 1) / 2
    rows = [
        [np.exp(-((i - centre) ** 2 + (j - centre) ** 2) / (2 * std**2)) for j in range(size)]
        for i in range(size)
    ]
    return np.array(rows) / np.sum(rows)


def slow_correlation(x, weights, stride):
    size = len(weights)
    rows, columns = ((extent - size) // stride + 1 for extent in x.shape)
    y = np.zeros((rows, columns))
    for i in range(rows):
        for j in range(columns):
            patch = x[i * stride : i * stride + size, j * stride : j * stride + size]
            y[i, j] = (patch * weights).sum()
    return y


def test_paper_operator_circular():
    x = np.random.default_rng(0).random((40, 48))
    extended = np.pad(x, ((0, 15), (0, 15)), mode="wrap")
    expected = slow_correlation(extended, slow_gaussian(16, 2), 4)
    y = downsample((40, 48), 4)(torch.from_numpy(x)[None, None])
    assert y.shape == (1, 1, 10, 12)
    assert np.abs(y[0, 0].numpy() - expected).max() < 1e-6
    assert downsample((600, 600), 4).range_shape == (150, 150)


@pytest.mark.parametrize(("stride", "std"), [(2, 1.0), (4, 2.0)])
def test_paper_operator_valid(stride, std):
    x = np.random.default_rng(0).random((40, 51))
    expected = slow_correlation(x, slow_gaussian(16, std), stride)
    y = downsample((40, 51), stride, boundary="valid")(torch.from_numpy(x)[None, None])
    assert y.shape == (1, 1, *expected.shape)
    assert np.abs(y[0, 0].numpy() - expected).max() < 1e-6


def test_paper_shapes_valid():
    assert downsample((320, 480), 2, boundary="valid").range_shape == (153, 233)
    assert downsample((600, 600), 4, boundary="valid").range_shape == (147, 147)


@pytest.mark.parametrize(
    "shape", [(5, 3), (11, 9)]
)  # below and above the size from which it is done by Fourier
@pytest.mark.parametrize(
    ("boundary", "mode"), [("periodic", "wrap"), ("reflect", "mirror"), ("valid", "constant")]
)
def test_blur_is_correlation_centred(shape, boundary, mode):
    x = np.random.default_rng(0).random((14, 13))
    expected = scipy.ndimage.correlate(x, kernel(*shape).numpy(), mode=mode)
    if boundary == "valid":
        rows, columns = shape[0] // 2, shape[1] // 2
        expected = expected[rows:-rows, columns:-columns]
    y = Blur(kernel(*shape), (14, 13), boundary)(torch.from_numpy(x)[None, None])
    assert np.abs(y[0, 0].numpy() - expected).max() < 1e-13


def smooth_image(height, width):
    """A band-limited periodic image: its first few Fourier modes, at random."""
    spectrum = torch.zeros(1, 1, height, width // 2 + 1, dtype=torch.complex128)
    for u in range(-3, 4):
        spectrum[0, 0, u, :4] = torch.randn(4, dtype=torch.complex128)
    x = torch.fft.irfft2(spectrum, s=(height, width))
    return x / x.std()


def fitted_shift(image, truth, border):
    """Least-squares shift of ``image`` against ``truth``, in pixels, away from the border."""
    rows = (truth.roll(-1, 2) - truth.roll(1, 2)) / 2
    columns = (truth.roll(-1, 3) - truth.roll(1, 3)) / 2
    inner = [
        t[..., border:-border, border:-border].flatten() for t in (rows, columns, truth, image)
    ]
    basis = torch.stack([inner[0], inner[1], inner[2], torch.ones_like(inner[0])], 1)
    shift = torch.linalg.lstsq(basis, (inner[3] - inner[2])[:, None]).solution[:2, 0]
    return float(shift.abs().max())


ALIGNED = {
    "paper": lambda: downsample((96, 80), 4),
    "paper-valid-2": lambda: downsample((96, 80), 2, boundary="valid"),
    "paper-valid-4": lambda: downsample((96, 80), 4, boundary="valid"),
    "odd-stride": lambda: downsample((96, 81), 3, kernel_size=16),
    "odd-kernel": lambda: downsample((96, 80), 4, kernel_size=15),
    "odd-stride-valid": lambda: downsample((96, 80), 3, kernel_size=12, boundary="valid"),
    "blur": lambda: Blur(gaussian_kernel(5, 1.0), (96, 80), "reflect"),
    "blur-even": lambda: Blur(gaussian_kernel(6, 1.0), (96, 80), "periodic"),
    "subsample": lambda: Subsample((96, 80), 3, 2),
}


@pytest.mark.parametrize("name", ALIGNED)
def test_start_is_aligned(name):
    operator = ALIGNED[name]()
    x = smooth_image(*operator.domain_shape)
    assert fitted_shift(operator.initial(operator(x)), x, 20) < 0.05


def test_start_equals_shifted_bicubic():
    """Away from the seam, the start is torch's bicubic image rolled by the 6 pixels of the paper's operator."""
    operator = downsample((40, 48), 4)
    y = torch.rand(1, 1, 10, 12)
    bicubic = functional.interpolate(y, scale_factor=4, mode="bicubic", align_corners=False)
    difference = operator.initial(y) - bicubic.roll((6, 6), (2, 3))
    assert difference[..., 16:-4, 16:-4].abs().max() < 1e-5


@pytest.mark.parametrize(("stride", "pad"), [(2, 7), (4, 6)])
def test_start_of_the_zero_shot_operator(stride, pad):
    operator = downsample((40, 48), stride, boundary="valid")
    y = torch.rand(1, 1, *operator.range_shape)
    bicubic = functional.interpolate(y, scale_factor=stride, mode="bicubic", align_corners=False)
    expected = functional.pad(bicubic, (pad,) * 4, mode="reflect")
    assert expected.shape[2:] == operator.domain_shape
    assert torch.allclose(operator.initial(y), expected, atol=1e-5)


def test_start_of_a_mask_is_harmonic():
    ramp = torch.arange(12.0, dtype=torch.float64)[:, None] + 2 * torch.arange(10.0)[None]
    mask = torch.ones(12, 10, dtype=torch.bool)
    mask[3:9, 2:7] = False
    operator = Mask(mask)
    y = operator(ramp[None, None])
    x = operator.initial(y)
    # Linear functions are harmonic, so the hole closes exactly; measured pixels stay.
    assert torch.allclose(x[0, 0], ramp, atol=1e-2)
    assert torch.equal(operator(x), y)


def test_transpose_and_composition():
    a, b = Subsample((8, 8), 2), Blur(kernel(3, 3), (8, 8), "reflect")
    assert a.T.T is a
    assert a.T.domain_shape == a.range_shape
    assert np.allclose(matrix(a @ b), matrix(a) @ matrix(b))
    assert np.allclose(matrix((a @ b).T), matrix(b).T @ matrix(a).T)


def test_conjugate_gradients_solve_each_entry():
    torch.manual_seed(0)
    root = torch.randn(3, 6, 6, dtype=torch.float64)
    dense = root @ root.mT + torch.eye(6, dtype=torch.float64)
    b = torch.randn(3, 6, dtype=torch.float64)
    # An entry that is solved at the start must neither become nan nor move.
    b[1] = 0
    x = conjugate_gradients(
        lambda v: (dense @ v[..., None])[..., 0], b, tolerance=1e-12, max_iterations=200
    )
    assert torch.allclose(x, torch.linalg.solve(dense, b), atol=1e-9)
    assert torch.equal(x[1], torch.zeros(6, dtype=torch.float64))
    value = power_iteration(lambda v: dense[0] @ v, torch.randn(6, dtype=torch.float64), 500)
    assert value == pytest.approx(float(torch.linalg.eigvalsh(dense[0])[-1]), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Blur(torch.zeros(3, 3), (9, 9)), "sum is 0 but must be"),
        (lambda: Blur(torch.full((3, 3), torch.nan), (9, 9)), "must be finite"),
        (lambda: Blur(kernel(3, 3), (9, 9), stride=0), "stride is 0"),
        (lambda: Blur(kernel(9, 3), (9, 9)), "9 x 3 does not fit into an image of 9 x 9"),
        (lambda: Blur(kernel(10, 3), (9, 9), "valid"), "10 x 3 does not fit"),
        (lambda: downsample((10, 12), 4), "10 x 12 pixels is not divisible by the scale 4"),
        (lambda: gaussian_kernel(5, 0.0), "standard deviation is 0.0"),
        (lambda: Subsample((9, 9), 0), "stride 0 and offset 0"),
        (lambda: Subsample((9, 9), 2, 2), "stride 2 and offset 2"),
        (lambda: Mask(torch.zeros(4, 4, dtype=torch.bool)), "hides everything"),
        (lambda: Mask(torch.ones(1, 4, 4, dtype=torch.bool)), r"shape \(1, 4, 4\)"),
        (
            lambda: Identity((3, 4)) @ Identity((4, 3)),
            r"takes \(3, 4\) but the inner one gives \(4, 3\)",
        ),
        (
            lambda: downsample((16, 16), 4)(torch.zeros(1, 1, 16, 12)),
            "16 x 12 pixels but .* 16 x 16",
        ),
        (
            lambda: conjugate_gradients(lambda v: v, torch.ones(1, 1), tolerance=0.0),
            "tolerance is 0.0",
        ),
    ],
)
def test_messages(make, message):
    with pytest.raises(InputError, match=message):
        make()


@each
def test_derivatives(name):
    """By finite differences, first and second: some operators bring their own derivative."""
    operator = OPERATORS[name]()
    x = torch.randn(1, 1, *operator.domain_shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(operator, x)
    assert torch.autograd.gradgradcheck(lambda x: operator(x).square(), x)
