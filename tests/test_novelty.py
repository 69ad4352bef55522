"""Novelty maps: false alarms at their rate, and what is found of planted scratches, textures and scales."""

import math

import pytest
import torch

from patchflow import models
from patchflow.errors import InputError
from patchflow.learn_mixture import learn_epll
from patchflow.numerics.interpolation import cubic_matrix
from patchflow.problems.blur import Blur, gaussian_kernel
from patchflow.uncertainty.novelty import Novelty, fit_novelty, novel_shares


def texture(side, seed, width=1.2):
    torch.manual_seed(seed)
    kernel = gaussian_kernel(13, width)
    field = Blur(kernel, (side, side), "periodic")(torch.randn(1, 1, side, side))
    return 0.5 + 0.1 * field / field.std()


@pytest.fixture(scope="module")
def fitted():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    prior, _ = learn_epll([texture(96, 0)], size=5, components=3, max_iterations=10)
    return prior, fit_novelty(prior, [texture(160, 1)], rate=0.02)


def test_the_rate_of_false_alarms_is_that_of_the_reference(fitted) -> None:
    prior, novelty = fitted
    found = novelty(prior.nll_map(texture(160, 1)))
    assert novel_shares(found) == pytest.approx((0.01, 0.01), abs=1e-4)
    assert sum(float((found == sign).double().sum()) for sign in (-1, 0, 1)) == found.numel()
    # Of new images of the same law; a patch of correlated pixels counts as one, on either side.
    shares = torch.tensor(
        [float((novelty(prior.nll_map(texture(160, k))) != 0).double().mean()) for k in range(2, 8)]
    )
    error = math.sqrt(0.02 * 0.98 * (5 * 5 / 160**2) * (1 + 1 / 6))
    assert abs(float(shares.mean()) - 0.02) < 4 * error


def test_a_scratch_a_foreign_texture_and_a_wrong_scale_are_found(fitted) -> None:
    prior, novelty = fitted
    scratched = texture(160, 10)
    place = torch.zeros(160, 160, dtype=torch.bool)
    place[40:120, 80:82] = True
    scratched[..., place] = 1.0
    foreign = texture(160, 11)
    torch.manual_seed(12)
    foreign[..., 40:100, 40:100] = 0.5 + 0.1 * torch.randn(60, 60)
    wide = cubic_matrix(160, 80, 2, 0.5, True)
    enlarged = wide @ texture(80, 13) @ wide.T
    for image, region, least in (
        (scratched, place, 0.95),
        (foreign, (slice(44, 96), slice(44, 96)), 0.95),
        (enlarged, (slice(None), slice(None)), 0.5),
    ):
        signs = novelty(prior.nll_map(image))
        found = (signs != 0)[0, 0]
        assert float(found[region].double().mean()) > least
    # What is enlarged is smoother, not more surprising: one tail alone would miss it.
    assert novel_shares(signs)[0] < 0.05


def test_mistakes() -> None:
    prior = models.patch_nr(size=4, hidden=8)
    image = torch.rand(1, 1, 20, 20)
    for references, rate, told in (
        ([image], 1.0, "false alarms is 1"),
        ([], 0.01, "no reference"),
        ([image], 0.01, "400 pixels but at least ten"),
        ([torch.rand(1, 3, 20, 20)], 0.1, "3 channels"),
    ):
        with pytest.raises(InputError, match=told):
            fit_novelty(prior, references, rate=rate)
    assert bool((Novelty(0.0, 1.0, 0.1)(torch.full((1, 1, 2, 2), 2.0)) == 1).all())
