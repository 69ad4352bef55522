r"""What samples of the posterior of an image say, and whether they may be believed.

Of n draws from the right posterior with the total variance V, a single one has the mean squared error 2 V, and their
mean :math:`V (1 + 1/n)`: one image with known truth tells whether the samples scatter as much as they err. The ratio is
1.94 for 32 draws. An overconfident sampler has a ratio near 1, one that scatters too much a large one.

References:
    Talts et al., "Validating Bayesian inference algorithms with simulation-based calibration", 2018,
    https://arxiv.org/abs/1804.06788
    Lemos, Coogan, Hezaveh, Perreault-Levasseur, "Sampling-based accuracy testing of posterior estimators for general
    inference", ICML 2023, https://arxiv.org/abs/2302.03026 (TARP)
    Vehtari, Gelman, Simpson, Carpenter, Buerkner, "Rank-normalization, folding, and localization: an improved R-hat",
    Bayesian Analysis 16(2), 2021, https://arxiv.org/abs/1903.08008
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from patchflow.errors import InputError
from patchflow.solution import Samples
from patchflow.uncertainty.calibration import tarp_coverage, tarp_deviation

# The ratio of squared errors of 32 calibrated samples, and the largest deviation of coverage of small squares.
RATIOS, DRAWS, DEVIATION = (1.8, 2.2), 32, 0.1
# Side of the squares whose coverage is tested, in pixels, and the fewest of them.
_SIDE, _FEWEST = 8, 50
# Above it chains have not met.
_RHAT = 1.05

Image = Float[Tensor, "1 channels height width"]


class Summary(NamedTuple):
    """Pixel by pixel.

    Attributes:
        mean: The mean of the samples.
        std: Their standard deviation.
        low: The lower end of the central interval.
        high: The upper end.
    """

    mean: Image
    std: Image
    low: Image
    high: Image


class Check(NamedTuple):
    """How samples fare on an image with known truth.

    Attributes:
        ratio: The mean squared error of a sample over that of the mean of all.
        deviation: The largest difference between the level of a region of small squares and its coverage (TARP).
        draws: Number of samples.
    """

    ratio: float
    deviation: float
    draws: int

    @property
    def right(self) -> float:
        r"""The ratio of samples that are drawn from the law of the truth: :math:`2 / (1 + 1/N)` of N draws."""
        return _right(self.draws)

    @property
    def accepted(self) -> tuple[float, float]:
        """The ratios that pass: those of 32 draws, as far from the right one in proportion."""
        low, high = (end * self.right / _right(DRAWS) for end in RATIOS)
        return low, high

    @property
    def passed(self) -> bool:
        """Whether the samples may be believed."""
        low, high = self.accepted
        return low <= self.ratio <= high and self.deviation <= DEVIATION

    def explain(self) -> str:
        """A sentence for reports."""
        low, high = self.accepted
        told = (
            f"a single sample has {self.ratio:.2f} times the squared error of the mean of {self.draws} (right: "
            f"{self.right:.2f}, accepted: {low:.2f} to {high:.2f}), the coverage of small squares is "
            f"off by {100 * self.deviation:.0f} points at most (accepted: {100 * DEVIATION:.0f})"
        )
        if self.passed:
            return f"The sampler passed its check on an image with known truth: {told}."
        above = "too uncertain" if self.ratio > high else "wrong about squares"
        kind = "overconfident" if self.ratio < low else above
        return f"Uncalibrated: the sampler failed its check on an image with known truth, it is {kind}: {told}."


def _right(draws: int) -> float:
    return 2 / (1 + 1 / draws)


def summarise(samples: Samples, *, level: float = 0.9) -> Summary:
    """Mean, standard deviation and central interval of each pixel.

    Args:
        samples: At least two.
        level: The share of the samples in the interval.

    Raises:
        InputError: If there is one sample, or the level is no share.
    """
    images = samples.images
    if len(images) < 2 or not 0 < level < 1:
        raise InputError(
            f"Got {len(images)} samples and the level {level}; give two samples at least, and a level between 0 and 1."
        )
    low, high = (
        torch.stack([image.quantile(q, 0) for image in images.unbind(2)], 1)[None]
        for q in ((1 - level) / 2, (1 + level) / 2)
    )
    return Summary(images.mean(0, keepdim=True), images.std(0, keepdim=True), low, high)


def check_samples(samples: Samples, truth: Image, reference: Image) -> Check:
    """Compare samples with the truth.

    Args:
        samples: Samples of the posterior of the image.
        truth: The truth.
        reference: A rough estimate that depends on the measurement alone, such as the start image: regions are balls
            about it.

    Raises:
        InputError: If there are fewer than eight samples, or the image is too small.
    """
    images = samples.images
    squares = (truth.shape[-2] // _SIDE) * (truth.shape[-1] // _SIDE)
    if len(images) < 8 or squares < _FEWEST:
        raise InputError(
            f"Got {len(images)} samples of an image with {squares} squares of {_SIDE} x {_SIDE} pixels; a check needs "
            f"at least 8 samples and {_FEWEST} squares."
        )
    single = float((images - truth).square().mean())
    together = float((images.mean(0, keepdim=True) - truth).square().mean())
    cells = torch.stack([_squares(image[None]) for image in images], 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # ties are broken at random
        levels, coverage = tarp_coverage(
            cells, _squares(truth.to(images)), references=_squares(reference.to(images))
        )
    return Check(single / together, tarp_deviation(levels, coverage), len(images))


def diagnose(samples: Samples) -> list[str]:
    """R-hat and effective sample size of Markov chains, by ArviZ, for four numbers of each sample.

    They are the mean of the image, its standard deviation, the mean size of its gradient, and the energy.

    Returns:
        Sentences for reports; none of independent draws.
    """
    chains, draws = samples.x.shape[:2]
    if samples.energies is None:
        return []
    if chains < 2 or draws < 4:
        return [f"{chains} chains of {draws} samples are too few for R-hat (2 and 4 at least)."]
    try:
        import arviz  # here, because it is an extra and slow to import
    except ImportError:
        return [
            "R-hat and effective sample size need ArviZ: pip install 'arviz<1'. Without them nobody knows whether the "
            "chains have met."
        ]
    flat = samples.x.flatten(2)
    steps = (samples.x.diff(dim=-1).abs().flatten(2), samples.x.diff(dim=-2).abs().flatten(2))
    numbers = {
        "mean": flat.mean(2),
        "contrast": flat.std(2),
        "gradient": sum(step.mean(2) for step in steps),
        "energy": samples.energies,
    }
    values = {name: torch.as_tensor(number).double().numpy() for name, number in numbers.items()}
    data = arviz.convert_to_dataset(values)
    # Data sets where data sets are given, which the annotations of ArviZ do not say.
    tables: list[Any] = [arviz.rhat(data), arviz.ess(data)]
    rhat, ess = ({name: float(table[name]) for name in numbers} for table in tables)
    worst, least = max(rhat, key=rhat.__getitem__), min(ess, key=ess.__getitem__)
    told = f"R-hat {rhat[worst]:.3f} at most ({worst}), effective samples {ess[least]:.0f} at least ({least})"
    if rhat[worst] > _RHAT:
        return [f"Warning: the chains have not met: {told}; take more --steps."]
    return [f"The chains have met: {told}."]


def _squares(image: Image) -> Float[Tensor, "squares dim"]:
    return functional.unfold(image, _SIDE, stride=_SIDE)[0].T
