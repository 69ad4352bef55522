r"""Periodic operators in the Fourier domain, and their exact regularised inverses.

Correlation with a kernel :math:`k`, :math:`(Kx)_i = \sum_u k_u x_{i+u-a}` with anchor :math:`a` and indices modulo the
size of the image, is diagonal: :math:`\widehat{Kx} = h\,\hat x`. Followed by subsampling :math:`S` it is not, but
:math:`S K K^\top S^\top` is diagonal on the small grid, and by the Woodbury identity

.. math:: (K^\top S^\top S K + \rho I)^{-1} b
          = \frac1\rho \Big( b - K^\top S^\top (\rho I + S K K^\top S^\top)^{-1} S K\, b \Big).

References:
    Zhao, Wei, Basarab, Dobigeon, Kouame, Tourneret, "Fast single image super-resolution using a new analytical solution
    for l2-l2 problems", 2016, https://arxiv.org/abs/1510.00143
"""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def transfer_function(
    kernel: Float[Tensor, "rows columns"], shape: tuple[int, int], anchor: tuple[int, int] = (0, 0)
) -> Complex[Tensor, "height half"]:
    r"""The factors :math:`h` of a periodic correlation, for ``rfft2``.

    Args:
        kernel: The kernel; one that is larger than the image wraps around.
        shape: Height and width of the image.
        anchor: Row and column of the kernel that sits on the output pixel.
    """
    height, width = shape
    padded = kernel.new_zeros(shape)
    rows = (torch.arange(kernel.shape[0], device=kernel.device) - anchor[0]) % height
    columns = (torch.arange(kernel.shape[1], device=kernel.device) - anchor[1]) % width
    padded.index_put_((rows[:, None], columns[None]), kernel, accumulate=True)
    return torch.fft.rfft2(padded).conj()


def multiply(
    x: Float[Tensor, "*batch height width"], factors: Tensor
) -> Float[Tensor, "*batch height width"]:
    """Apply a periodic operator given by its Fourier factors (their conjugate gives the adjoint)."""
    return torch.fft.irfft2(factors * torch.fft.rfft2(x), s=x.shape[-2:])


def fold_power(
    transfer: Complex[Tensor, "height half"], shape: tuple[int, int], stride: int
) -> Float[Tensor, "small_height small_half"]:
    r"""The Fourier factors of :math:`S K K^\top S^\top` on the small grid: :math:`|h|^2` averaged over its aliases.

    Args:
        transfer: The factors of :math:`K` for ``rfft2``.
        shape: Height and width of the large grid, divisible by the stride.
        stride: The stride of :math:`S`.
    """
    power = transfer.abs().square()
    if stride == 1:
        return power
    height, width = shape[0] // stride, shape[1] // stride
    # SKK'S' is a periodic correlation with the subsampled autocorrelation of the kernel.
    autocorrelation = torch.fft.irfft2(power, s=shape)[::stride, ::stride]
    return torch.fft.rfft2(autocorrelation, s=(height, width)).real.clamp_min(0)


def solve_subsampled(
    b: Float[Tensor, "*batch height width"],
    rho: float | int,
    transfer: Tensor,
    folded: Tensor,
    stride: int,
) -> Float[Tensor, "*batch height width"]:
    r"""Solve :math:`(K^\top S^\top S K + \rho I)\,x = b` exactly.

    Args:
        b: Right-hand sides.
        rho: The positive :math:`\rho`.
        transfer: The factors of :math:`K`.
        folded: The factors that :func:`fold_power` gives.
        stride: Stride of :math:`S`; 1 for none.
    """
    small = multiply(b, transfer)[..., ::stride, ::stride]
    small = multiply(small, 1 / (rho + folded))
    large = torch.zeros_like(b)
    large[..., ::stride, ::stride] = small
    return (b - multiply(large, transfer.conj())) / rho


def stationary_mean(
    y: Float[Tensor, "*batch small_height small_width"],
    variance: float | int,
    transfer: Tensor,
    spectrum: Float[Tensor, "height half"],
    shape: tuple[int, int],
    stride: int,
) -> Float[Tensor, "*batch height width"]:
    r"""The posterior mean of a stationary Gaussian law with a periodic covariance :math:`C`.

    .. math:: x = C K^\top S^\top (S K C K^\top S^\top + \sigma^2 I)^{-1} y

    It solves :math:`(K^\top S^\top S K + \sigma^2 C^{-1})\,x = K^\top S^\top y` exactly: the matrix in brackets is
    diagonal on the small grid. Frequencies may have no variance.

    Args:
        y: Measurements on the small grid.
        variance: The variance :math:`\sigma^2` of the noise.
        transfer: The factors of :math:`K`.
        spectrum: The factors of :math:`C`, real and not negative.
        shape: Height and width of the large grid, divisible by the stride.
        stride: Stride of :math:`S`; 1 for none.
    """
    folded = fold_power(transfer * spectrum.sqrt(), shape, stride)
    small = multiply(y, 1 / (folded + variance))
    large = y.new_zeros(*y.shape[:-2], *shape)
    large[..., ::stride, ::stride] = small
    return multiply(large, spectrum * transfer.conj())
