"""Error bars of pixels: exact quantiles, coverage under known laws, and what is guaranteed."""

import math

import numpy as np
import pytest
import torch

import patchflow as pf
from patchflow.errors import InputError
from patchflow.problems.likelihood import GaussianNoise
from patchflow.problems.poisson import PoissonNoise
from patchflow.uncertainty.intervals import coverage, difficulty, fit_intervals
from patchflow.uncertainty.noise_level import noise_level


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


def noisy(seed, dose, side=96):
    """As :func:`pair`, but the error grows with the noise level, too: along the columns, and with the image's dose."""
    torch.manual_seed(seed)
    x = 0.5 + torch.logspace(-2.5, -0.5, side)[:, None] * torch.randn(1, 1, side, side)
    level = dose * torch.linspace(1, 3, side).expand_as(x)
    return x, x + 0.3 * difficulty(x) * level * torch.randn(x.shape), level


def test_bins_that_count_the_noise_level_hold_for_another_dose() -> None:
    known = [noisy(seed, dose) for seed, dose in ((0, 1.0), (1, 0.6), (2, 1.4))]
    xs, truths, levels = map(list, zip(*known, strict=True))
    by_both = fit_intervals(xs, truths, levels, level=0.9)
    by_contrast = fit_intervals(xs, truths, level=0.9)
    means = [float(level.mean()) for level in levels]
    assert by_both.noise == (means[1], means[2])
    assert by_contrast.noise is None
    assert by_both.edges != by_contrast.edges
    error = math.sqrt(0.09 / 96**2)
    for seed, dose in ((10, 0.6), (11, 1.0), (12, 1.4)):
        x, truth, level = noisy(seed, dose)
        told = coverage(by_both, x, truth, level)
        assert abs(told.share - 0.9) < 5 * error
        columns = [sum(row[k] for row in told.regions) / 4 for k in range(4)]
        assert max(abs(share - 0.9) for share in columns) < 10 * error
        # Where contrast alone counts, both doses and sides are mistaken.
        told = coverage(by_contrast, x, truth)
        columns = [sum(row[k] for row in told.regions) / 4 for k in range(4)]
        assert max(abs(share - 0.9) for share in columns) > 20 * error
        assert dose == 1 or abs(told.share - 0.9) > 5 * error
    # With less noise than calibrated on, levels are raised to those of the least noisy image: wider than needed there,
    # and right for errors that do not shrink with the noise.
    x, truth, level = noisy(13, 0.3)
    least = 0.6 / 0.3 * level
    ends, raised = by_both(x, level), by_both(x, least)
    assert all(torch.allclose(a, b) for a, b in zip(ends, raised, strict=True))
    assert coverage(by_both, x, truth, level).share > 0.95
    alike = x + 0.3 * difficulty(x) * least * torch.randn(x.shape)
    assert abs(coverage(by_both, x, alike, level).share - 0.9) < 5 * error
    # Where noise is much more than calibrated on, the last bin is too narrow: what the command line warns of.
    x, truth, level = noisy(14, 5.0)
    assert coverage(by_both, x, truth, level).share < 0.85
    # A level of another unit is as good: the bins do not notice.
    scaled = fit_intervals(xs, truths, [1000 * level for level in levels], level=0.9)
    np.testing.assert_allclose(scaled.high, by_both.high, rtol=1e-12)
    # The conformal factor counts it as well.
    known = [noisy(seed, 1 + 0.02 * seed, 48) for seed in range(10)]
    xs, truths, levels = map(list, zip(*known, strict=True))
    conformal = fit_intervals(xs, truths, levels, level=0.9)
    x, truth, level = noisy(30, 1.1, 48)
    assert conformal.guarantee == "conformal"
    assert coverage(conformal, x, truth, level).share > 0.88
    # The first image chose the bins, all are known for their noise.
    assert conformal.noise == (float(levels[0].mean()), float(levels[9].mean()))


def test_the_noise_level_is_that_of_the_values_that_see_a_pixel() -> None:
    torch.manual_seed(0)
    angles = torch.arange(40, dtype=torch.float64) * math.pi / 40
    operator = pf.ParallelBeam((20, 20), angles, 21, pixel=0.01)
    matrix = operator(torch.eye(400).view(400, 1, 20, 20)).view(400, -1).T.numpy()
    x = torch.zeros(1, 1, 20, 20)
    x[..., 3:9, 8:14] = 0.8
    law = pf.Likelihood(operator, PoissonNoise(4096.0, 81.36))
    y = operator(x)
    found = noise_level(law, y)
    assert found.shape == x.shape
    # Of counts N the logarithm has the variance 1 / N, in units of the attenuation squared.
    variance = 1 / (81.36**2 * 4096 * np.exp(-81.36 * (matrix @ x.flatten().numpy())))
    seen = matrix.sum(0)
    expected = np.sqrt((matrix.T @ variance)[seen > 0] / seen[seen > 0])
    np.testing.assert_allclose(found.flatten().numpy()[seen > 0], expected, rtol=1e-9)
    # Noise that is alike everywhere has its own level.
    even = pf.Likelihood(operator, GaussianNoise(0.03))
    np.testing.assert_allclose(noise_level(even, y).numpy(), 0.03, rtol=1e-12)
    # It goes as the deviations of reconstructions of many scans, whose own mean over nearby pixels is noisy.
    scans = law.simulate(x.expand(1000, -1, -1, -1))
    spread = operator.initial(scans).std(0)[0]
    level = found[0, 0]
    inside = torch.hypot(*torch.meshgrid(*[torch.arange(20) - 9.5] * 2, indexing="ij")) < 8
    correlation = torch.corrcoef(torch.stack((spread[inside].log(), level[inside].log())))[0, 1]
    assert float(correlation) > 0.8
    assert float(level[inside].max() / level[inside].min()) > 1.2


def test_pixels_that_nothing_sees_have_the_largest_noise_level() -> None:
    operator = pf.ParallelBeam((16, 16), torch.tensor([0.0, 0.3]), 4, pixel=0.01)
    seen = operator.adjoint(torch.ones(1, 1, 2, 4))[0, 0] > 0
    assert not bool(seen.all())
    y = torch.linspace(0, 0.02, 8).view(1, 1, 2, 4)
    level = noise_level(pf.Likelihood(operator, PoissonNoise(100.0, 81.36)), y)[0, 0]
    assert torch.equal(level[~seen], level[seen].max().expand(int((~seen).sum())))
    with pytest.raises(InputError, match="not of function with GaussianNoise"):
        noise_level(pf.Likelihood(lambda x: x.square(), GaussianNoise(0.1)), y)


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
    with pytest.raises(InputError, match="2 noise levels of 1 images"):
        fit_intervals([x], [truth], [x, x])
    with pytest.raises(InputError, match="fitted with the noise level at each pixel; give that"):
        fit_intervals([x], [truth], [x.abs()])(x)
    with pytest.raises(InputError, match="fitted without the noise level at each pixel; leave it"):
        fit_intervals([x], [truth])(x, x)
