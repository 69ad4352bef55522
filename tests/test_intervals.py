"""Error bars of pixels: exact quantiles, coverage under known laws, and what is guaranteed."""

import math

import numpy as np
import pytest
import torch

from patchflow.errors import InputError
from patchflow.uncertainty.intervals import coverage, difficulty, fit_intervals


def pair(seed, side=64, scale=1.0):
    """A reconstruction whose error grows with its contrast."""
    torch.manual_seed(seed)
    contrast = torch.logspace(-2.5, -0.5, side)
    x = 0.5 + contrast * torch.randn(1, 1, side, side)
    return x, x + scale * 0.3 * difficulty(x) * torch.randn(x.shape)


def test_the_difficulty_is_the_local_standard_deviation() -> None:
    x = torch.rand(1, 2, 9, 11)
    inside = x[0, :, 1:8, 2:9].numpy()
    expected = math.sqrt(np.mean([channel.var() for channel in inside]))
    found = difficulty(x)
    assert found.shape == x.shape
    assert abs(float(found[0, 0, 4, 5]) - expected) < 1e-12
    assert float(difficulty(torch.full((1, 1, 9, 9), 0.3)).max()) < 1e-7


def test_the_ends_are_quantiles_of_the_errors_of_each_bin() -> None:
    x, truth = pair(0, side=100)
    intervals = fit_intervals([x], [truth], level=0.8)
    assert intervals.guarantee == "empirical"
    assert "not conformal" in intervals.explain()
    assert len(intervals.edges) == 4
    assert len(intervals.low) == 5
    hard = difficulty(x).flatten().numpy()
    error = (truth - x).flatten().numpy()
    inside = error[(hard > intervals.edges[1]) & (hard <= intervals.edges[2])]
    assert len(inside) == 2000
    np.testing.assert_allclose(
        [intervals.low[2], intervals.high[2]], np.quantile(inside, [0.1, 0.9]), rtol=1e-12
    )
    told = coverage(intervals, x, truth)
    assert abs(told.share - 0.8) < 2e-3
    # Errors that are alike everywhere: the normal law's central 80 %, of both kinds of width.
    torch.manual_seed(1)
    x = torch.rand(1, 1, 200, 200)
    truth = x + 0.1 * torch.randn(x.shape)
    told = coverage(fit_intervals([x], [truth], level=0.8), x, truth)
    for width in (told.width, told.constant):
        assert abs(width / (2 * 1.2815516 * 0.1) - 1) < 0.02


def test_intervals_cover_new_images_of_the_same_law_and_not_of_another() -> None:
    intervals = fit_intervals([pair(0, 128)[0]], [pair(0, 128)[1]], level=0.9)
    shares = torch.tensor([coverage(intervals, *pair(seed, 128)).share for seed in range(1, 13)])
    error = math.sqrt(0.09 / 128**2)
    # Both the calibration image and the new one are finite: two standard errors' worth each.
    assert abs(float(shares.mean()) - 0.9) < 5 * error
    worse = coverage(intervals, *pair(20, 128, scale=1.5))
    assert worse.share < 0.9 - 5 * error
    told = coverage(intervals, *pair(1, 128))
    regions = [share for row in told.regions for share in row]
    assert len(regions) == 16
    assert max(abs(share - 0.9) for share in regions) < 5 * math.sqrt(0.09 / 32**2)
    assert len(told.intensities) == 10
    assert abs(sum(told.intensities) / 10 - told.share) < 1e-3


def test_pixels_that_are_alike_share_a_bin() -> None:
    torch.manual_seed(0)
    x = torch.full((1, 1, 128, 128), 0.5)
    x[..., 80:] += 0.1 * torch.randn(48)
    truth = x + torch.where(torch.arange(128)[:, None] < 64, 0.01, 0.05) * torch.randn(128, 128)
    intervals = fit_intervals([x], [truth], level=0.9)
    assert len(intervals.low) == len(intervals.edges) + 1
    assert intervals.edges == sorted(set(intervals.edges))
    assert abs(coverage(intervals, x, truth).share - 0.9) < 2e-3


@pytest.mark.parametrize(("level", "images"), [(0.9, 10), (0.9, 40), (0.5, 7)])
def test_the_conformal_factor_is_the_right_order_statistic(level, images) -> None:
    scales = [0.2 + 0.1 * ((7 * k) % images) for k in range(images)]
    xs, truths = zip(*(pair(k, 48, scale) for k, scale in enumerate(scales)), strict=True)
    intervals = fit_intervals(xs, truths, level=level)
    bins = images - intervals_used(images, level)
    plain = intervals._replace(factor=1.0)
    needed = []
    for x, truth in zip(xs[bins:], truths[bins:], strict=True):
        low, high = plain(x)
        middle, half = (low + high) / 2, (high - low) / 2
        ratios = ((truth - middle).abs() / half).flatten().sort().values
        needed.append(float(ratios[math.ceil(level * len(ratios)) - 1]))
    rank = math.ceil((len(needed) + 1) * level - 1e-9)
    assert intervals.factor == pytest.approx(sorted(needed)[rank - 1])


def intervals_used(images, level):
    """How many images give the factor: at least as many as the level needs, and half if that is more."""
    return max(math.ceil(level / (1 - level) - 1e-9), images - max(1, images // 2))


def test_conformal_intervals_cover_each_image_with_the_promised_probability() -> None:
    """Exchangeable images whose errors differ in size: the share of new images that reach the level."""
    torch.manual_seed(0)
    scales = torch.rand(400) + 0.5
    reached, few = [], []
    for trial in range(12):
        seeds = range(trial * 20, trial * 20 + 20)
        images = [pair(seed, 48, float(scales[seed])) for seed in seeds]
        xs, truths = zip(*images[:10], strict=True)
        intervals = fit_intervals(xs, truths, level=0.9)
        assert intervals.guarantee == "conformal"
        assert "exchangeable" in intervals.explain()
        reached += [coverage(intervals, *image).share >= 0.9 for image in images[10:]]
        empirical = fit_intervals(xs[:9], truths[:9], level=0.9)
        few += [coverage(empirical, *image).share >= 0.9 for image in images[10:]]
    # New images of one trial share their calibration: the 12 trials are what is independent.
    assert sum(reached) / 120 > 0.9 - 3 * math.sqrt(0.09 / 12)
    # Nine images are too few for a guarantee, and indeed only about half of the images reach the level.
    assert sum(few) / 120 < 0.75


def test_what_cannot_be_calibrated_is_refused() -> None:
    x, truth = pair(0)
    for arguments, level, told in (
        (([x], [truth]), 1.0, "level is 1"),
        (([x], []), 0.9, "no calibration image"),
        (([x], [truth, truth]), 0.9, "1 reconstructions of 2"),
        (([x], [truth[..., :-1]]), 0.9, "shape"),
        (([x[..., :40, :40]], [truth[..., :40, :40]]), 0.9, "1600 values but at least 2000"),
    ):
        with pytest.raises(InputError, match=told):
            fit_intervals(*arguments, level=level)
