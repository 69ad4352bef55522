r"""Error bars of the pixels of a reconstruction, calibrated on images whose truth is known.

A *difficulty* is predicted for each pixel: the local standard deviation of the reconstruction, times the level of the
measurement's noise at the pixel where that varies, as it does with the dose behind an object
(:func:`patchflow.uncertainty.noise_level.noise_level`). The levels of a measurement that has less noise than all those
calibrated on are raised to the mean of the least noisy one: what of the errors is no noise does not shrink with it.
Pixels of calibration images are sorted into bins of difficulty; in each bin, the interval runs between quantiles of the
errors,

.. math:: [x_i + q_{(1 - p)/2}(b_i),\ x_i + q_{(1 + p)/2}(b_i)],

of truth minus reconstruction, where :math:`b_i` is the bin of pixel :math:`i` and :math:`p` the level. Two guarantees
are possible. *Empirical*: the share :math:`p` of the calibration images' pixels is covered, and as much of an image
that is like them. *Conformal*, from ten images on: some of the images choose the bins, and each of the others has a
factor by which the intervals would have to be widened about their middles to cover the share :math:`p` of its pixels.
The largest but for :math:`\lfloor (n + 1)(1 - p) \rfloor - 1` of these :math:`n` factors widens the intervals: if the
next image is exchangeable with the calibration images, then with probability :math:`p` at least the share :math:`p` of
its pixels is covered.

References:
    Angelopoulos et al., "Image-to-image regression with distribution-free uncertainty quantification", ICML 2022,
    https://arxiv.org/abs/2202.05265
    Vovk, Gammerman, Shafer, "Algorithmic learning in a random world", 2005 (conformal prediction)
    Romano, Patterson, Candes, "Conformalized quantile regression", 2019, https://arxiv.org/abs/1905.03222
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from patchflow.errors import InputError

Image = Float[Tensor, "1 channels height width"]
# Side of the window of the local standard deviation, in pixels.
_WINDOW = 7
# Pixels of calibration in a bin: the quantiles at 5 and 95 % are then those of at least a hundred errors.
LEAST = 2000
_BINS = 20


class Intervals(NamedTuple):
    """A fitted map from reconstructions to intervals.

    Attributes:
        level: The share of the pixels to cover.
        edges: The difficulties between neighbouring bins, increasing.
        low: Of each bin, the lower quantile of truth minus reconstruction.
        high: The upper one.
        factor: The intervals are this much wider than between the quantiles; 1 unless conformal.
        images: Number of calibration images.
        guarantee: ``"empirical"`` or ``"conformal"``.
        noise: The smallest mean noise level of an image that chose the bins, and the largest of all calibration images;
            None if levels do not count.
    """

    level: float
    edges: list[float]
    low: list[float]
    high: list[float]
    factor: float
    images: int
    guarantee: str
    noise: tuple[float, float] | None = None

    def __call__(self, x: Image, noise: Image | None = None) -> tuple[Image, Image]:
        """The lower and the upper ends for a reconstruction.

        Args:
            x: The reconstruction.
            noise: The level of its measurement's noise at each pixel, if the intervals were fitted with such levels.

        Raises:
            InputError: If the level is missing, or nothing is known of how errors depend on it.
        """
        counts = self.noise is not None
        if counts != (noise is not None):
            remedy = "give that of this image" if counts else "leave it out"
            raise InputError(
                f"The intervals were fitted {'with' if counts else 'without'} the noise level at each pixel; "
                f"{remedy}, or calibrate again."
            )
        if self.noise is not None and noise is not None:
            noise = noise * (self.noise[0] / noise.mean()).clamp_min(1)
        bins = torch.bucketize(difficulty(x, noise), torch.tensor(self.edges).to(x))
        low, high = (torch.tensor(ends).to(x)[bins] for ends in (self.low, self.high))
        middle, half = (low + high) / 2, (high - low) / 2
        return x + middle - self.factor * half, x + middle + self.factor * half

    def explain(self) -> str:
        """A sentence about what is guaranteed."""
        share = f"{100 * self.level:.0f} %"
        if self.guarantee == "conformal":
            return (
                f"Conformal over {self.images} images: of a new image that is exchangeable with them, at least {share} "
                f"of the pixels lie in their intervals with probability {share}."
            )
        count = "one image" if self.images == 1 else f"{self.images} images"
        return (
            f"Empirical, not conformal: {share} of the pixels of {count} with known truth lie in their intervals; that "
            "holds as well for images like them, without a guarantee."
        )


class Coverage(NamedTuple):
    """How intervals fare on an image with known truth.

    Attributes:
        share: The share of the pixels that are covered.
        width: The mean width of the intervals.
        constant: The width of intervals of one width, about reconstruction plus median error of this image, that cover
            the same share: what the best constant would be.
        regions: The share in each of 4 x 4 parts of the image.
        intensities: The share in each tenth of the pixels, sorted by the reconstruction's value.
    """

    share: float
    width: float
    constant: float
    regions: list[list[float]]
    intensities: list[float]


def difficulty(x: Image, noise: Image | None = None) -> Image:
    """The standard deviation in a window around each pixel, over all channels: one number for a pixel's channels.

    Args:
        x: The reconstruction.
        noise: The level of its measurement's noise at each pixel, by which to multiply; in any unit.
    """
    margin = [_WINDOW // 2] * 4
    # In double precision: the difference of two means of squares cancels.
    wide = functional.pad(x.double(), margin, mode="reflect")
    mean, square = (
        functional.avg_pool2d(values, _WINDOW, stride=1) for values in (wide, wide.square())
    )
    variance = (square - mean.square()).clamp_min(0).mean(1, keepdim=True)
    spread = variance.sqrt().to(x.dtype).expand_as(x)
    return spread if noise is None else spread * noise


def fit_intervals(
    reconstructions: Sequence[Tensor],
    truths: Sequence[Tensor],
    noise: Sequence[Tensor] | None = None,
    *,
    level: float = 0.9,
) -> Intervals:
    """Fit intervals to images with known truth; conformal if there are enough of them.

    Args:
        reconstructions: What was made of their measurements, each (1, channels, height, width).
        truths: The images.
        noise: Of each, the level of its measurement's noise at each pixel, where that varies, each
            (1, 1, height, width).
        level: The share of the pixels to cover, in (0, 1).

    Raises:
        InputError: If the level is no share, numbers or sizes differ, or there are too few pixels.
    """
    check_images(truths, level)
    for name, others in (("reconstructions", reconstructions), ("noise levels", noise)):
        if others is not None and len(others) != len(truths):
            raise InputError(
                f"Got {len(others)} {name} of {len(truths)} images; give one of each image."
            )
    for x, truth in zip(reconstructions, truths, strict=True):
        if x.shape != truth.shape:
            raise InputError(
                f"A reconstruction has the shape {tuple(x.shape)}, its truth {tuple(truth.shape)}; give the images "
                "that were measured."
            )
    levels = [None] * len(truths) if noise is None else list(noise)
    known = list(zip(reconstructions, truths, levels, strict=True))
    count = _for_bins(len(truths), level)
    intervals = _fit_bins(known[:count], level)
    if not known[count:]:
        return intervals
    factors = sorted(_factor(intervals, *image) for image in known[count:])
    chosen = factors[math.ceil((len(factors) + 1) * level - 1e-9) - 1]
    if intervals.noise is not None:
        # The least is part of the map, which the images of the factor must not choose.
        intervals = intervals._replace(noise=(intervals.noise[0], max(_means(known))))
    return intervals._replace(factor=chosen, images=len(truths), guarantee="conformal")


def check_images(truths: Sequence[Tensor], level: float) -> None:
    """Refuse images that :func:`fit_intervals` cannot be fitted to, before they are reconstructed.

    Raises:
        InputError: If the level is no share, there is no image, one is too small, or there are too few pixels.
    """
    if not 0 < level < 1:
        raise InputError(f"The level is {level:g} but must lie between 0 and 1, as 0.9.")
    if not truths:
        raise InputError("There is no calibration image; give at least one.")
    for truth in truths:
        if min(truth.shape[-2:]) < _WINDOW:
            raise InputError(
                f"A calibration image has {truth.shape[-2]} x {truth.shape[-1]} pixels but must have at least "
                f"{_WINDOW} along each side; give a larger one."
            )
    values = sum(truth.numel() for truth in truths[: _for_bins(len(truths), level)])
    if values < LEAST:
        raise InputError(
            f"The calibration images have {values} values but at least {LEAST} are needed for error bars; give larger "
            "or more images."
        )


def _for_bins(images: int, level: float) -> int:
    """How many of the images choose the bins: at most half, if the others suffice for a conformal factor; or all."""
    least = math.ceil(level / (1 - level) - 1e-9)
    return min(images - least, max(1, images // 2)) if images > least else images


def coverage(intervals: Intervals, x: Image, truth: Image, noise: Image | None = None) -> Coverage:
    """Measure the coverage of an image with known truth.

    Args:
        intervals: Fitted on other images.
        x: The reconstruction.
        truth: The truth.
        noise: The level of the noise, as of :class:`Intervals`.
    """
    low, high = intervals(x, noise)
    covered = ((low <= truth) & (truth <= high)).to(x).mean(1, keepdim=True)
    share = float(covered.mean())
    error = (truth - x).flatten()
    half = _quantile((error - error.median()).abs(), torch.tensor(share).to(x))
    rows = [part.chunk(4, -1) for part in covered.chunk(4, -2)]
    order = x.mean(1).flatten().argsort()
    return Coverage(
        share=share,
        width=float((high - low).mean()),
        constant=2 * float(half),
        regions=[[float(part.mean()) for part in row] for row in rows],
        intensities=[float(part.mean()) for part in covered.flatten()[order].chunk(10)],
    )


def _fit_bins(known: Sequence[tuple[Tensor, Tensor, Tensor | None]], level: float) -> Intervals:
    """Fit bins to reconstructions, truths and noise levels."""
    errors = torch.cat([(truth - x).flatten() for x, truth, _ in known])
    hardness = torch.cat([difficulty(x, noise).flatten() for x, _, noise in known])
    levels = _means(known)
    bins = min(_BINS, len(errors) // LEAST)
    ends = [part[-1] for part in hardness.sort().values.tensor_split(bins)[:-1]]
    # Where many pixels are alike, as in flat images, there are fewer bins.
    edges = torch.stack(ends).unique() if ends else hardness[:0]
    edges = edges[edges < hardness.max()]
    places = torch.bucketize(hardness, edges)
    parts = [errors[places == k] for k in range(len(edges) + 1)]
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2]).to(errors)
    quantiles = torch.stack([_quantile(part, tails) for part in parts])
    return Intervals(
        level,
        edges.tolist(),
        quantiles[:, 0].tolist(),
        quantiles[:, 1].tolist(),
        1.0,
        len(known),
        "empirical",
        (min(levels), max(levels)) if levels else None,
    )


def _means(known: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> list[float]:
    """The mean noise levels, where there are some."""
    return [float(noise.mean()) for _, _, noise in known if noise is not None]


def _quantile(values: Tensor, shares: Tensor) -> Tensor:
    # torch.quantile takes at most 16 million values.
    ordered = values.sort().values
    places = shares * (len(ordered) - 1)
    below = places.floor().long()
    above = (below + 1).clamp_max(len(ordered) - 1)
    return ordered[below].lerp(ordered[above], places - below)


def _factor(intervals: Intervals, x: Image, truth: Image, noise: Image | None) -> float:
    """The smallest factor about the middles that covers the share of an image's pixels."""
    low, high = intervals(x, noise)
    half = ((high - low) / 2).clamp_min(torch.finfo(x.dtype).tiny)
    needed = ((truth - (low + high) / 2).abs() / half).flatten().sort().values
    return float(needed[math.ceil(intervals.level * len(needed)) - 1])
