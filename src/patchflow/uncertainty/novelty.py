r"""Where a patch prior has no opinion: pixels whose patches are unlike those of images that are known to be right.

The negative log-likelihood of the patches around each pixel (:meth:`PatchPrior.nll_map`, in nats) is compared with its
law on reference images: beyond the quantile :math:`1 - \alpha / 2` a pixel is more surprising than all but a share
:math:`\alpha / 2` of the reference, below the quantile :math:`\alpha / 2` it is smoother, as of a wrong scale. So a
share :math:`\alpha` of the pixels of the reference itself raises a false alarm. References that went through the same
measurement and reconstruction as the image are the right ones: reconstructions are smoother than images. A training has
only true images: its thresholds, in the header of the model file, tell what is surprising, and of what is smooth less.

References:
    Ren et al., "Likelihood ratios for out-of-distribution detection", 2019, https://arxiv.org/abs/1906.02845 (why both
    tails count)
    Chandola, Banerjee, Kumar, "Anomaly detection: a survey", ACM Computing Surveys 41(3), 2009
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchflow.energy import Density
from patchflow.errors import InputError
from patchflow.io.checkpoint import read_header
from patchflow.priors.patch import PatchPrior

# The entry of the training record of a model file.
_ENTRY = "novelty"
# Pixels of references that a training looks at: as much work as validating it 64 times.
_MOST = 2**19


class Novelty(NamedTuple):
    """Thresholds of a patch prior's map.

    Attributes:
        low: Below it a pixel is smoother than the reference, in nats.
        high: Above it a pixel is more surprising.
        rate: The share of the reference's pixels that lie outside: the false alarms.
    """

    low: float
    high: float
    rate: float

    def __call__(
        self, nll_map: Float[Tensor, "batch 1 height width"]
    ) -> Int[Tensor, "batch 1 height width"]:
        """The novelty map: 1 where a pixel is more surprising than the reference, -1 where it is smoother, else 0."""
        return (nll_map > self.high).int() - (nll_map < self.low).int()


def novel_shares(novelty: Int[Tensor, "*shape"]) -> tuple[float, float]:
    """The shares of the pixels that are more surprising than the reference, and that are smoother.

    Args:
        novelty: The novelty map.
    """
    surprising, smooth = ((novelty == sign).double().mean() for sign in (1, -1))
    return float(surprising), float(smooth)


def fit_novelty(prior: PatchPrior, references: Sequence[Tensor], *, rate: float = 0.01) -> Novelty:
    """Choose thresholds by a rate of false alarms.

    Args:
        prior: The patch prior.
        references: Images that are known to be right, each (1, channels, height, width): best reconstructions of
            simulated measurements of validation images.
        rate: The share of their pixels that may raise an alarm, in (0, 1).

    Raises:
        InputError: If the rate is no share, there is no reference, one does not fit the prior, or the rate is less
            than ten pixels of them.
    """
    check_rate(references, rate)
    for image in references:
        prior.check(image)
    values = torch.cat([prior.nll_map(image).flatten() for image in references]).sort().values
    count = round(len(values) * rate / 2)
    return Novelty(float(values[count]), float(values[-count - 1]), rate)


def has_density(model: object) -> bool:
    """Whether a model is a prior on patches with a likelihood: critics have none."""
    return isinstance(model, PatchPrior) and isinstance(model.patch_energy, Density)


def novelty_record(
    prior: PatchPrior, references: Sequence[Tensor], *, rate: float = 0.01
) -> dict[str, Any]:
    """What the training record of a model file says of novelty, for :func:`read_novelty`.

    Args:
        prior: The learned prior.
        references: Images that it was not learned from, of which the first half million pixels are taken.
        rate: See :func:`fit_novelty`.

    Raises:
        InputError: As :func:`fit_novelty`.
    """
    taken, left = [], _MOST
    for image in references:
        rows = min(image.shape[2], left // image.shape[3])
        if rows >= prior.size:
            taken.append(image[:, :, :rows])
            left -= rows * image.shape[3]
    return {_ENTRY: fit_novelty(prior, taken, rate=rate)._asdict()}


def read_novelty(path: str | Path) -> Novelty | None:
    """The thresholds that a training has left in a model file; None if there are none, as in older files.

    Args:
        path: The model file.

    Raises:
        InputError: If it is no model file, or its thresholds cannot be read.
    """
    found = read_header(path).training.get(_ENTRY)
    if found is None:
        return None
    try:
        return Novelty(*(float(found[name]) for name in Novelty._fields))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} has thresholds of novelty that cannot be read ({error!r}); train it again."
        ) from error


def check_rate(references: Sequence[Tensor], rate: float) -> None:
    """Refuse what :func:`fit_novelty` cannot be fitted to, before images are reconstructed.

    Raises:
        InputError: If the rate is no share, there is no image, or the rate is less than ten pixels.
    """
    if not 0 < rate < 1:
        raise InputError(f"The rate of false alarms is {rate:g} but must lie between 0 and 1.")
    if not references:
        raise InputError("There is no reference image; give at least one.")
    pixels = sum(image[:, :1].numel() for image in references)
    if pixels * rate < 10:
        raise InputError(
            f"A rate of {rate:g} is {pixels * rate:.1f} of the references' {pixels} pixels but at least ten are "
            "needed; give a higher rate, or more images."
        )
