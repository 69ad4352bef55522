"""Samples of the posterior of an image: ``reconstruct --samples``, and their check in ``calibrate --samples``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor, nn

from patchflow.errors import InputError
from patchflow.networks.denoiser import Denoiser
from patchflow.priors.patch import PatchPrior
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.reconstruct import langevin, split_gibbs, variational
from patchflow.solution import Solution
from patchflow.uncertainty.image_samples import Check, summarise

Chain = Literal["mala", "langevin"]
# Methods whose prior is an energy with a gradient, and those with a denoiser of many levels.
_ENERGIES, _DENOISERS = ("patchnr", "student-t", "patch-vae"), ("dpir",)
# Of Markov chains: chains, steps of each by default, steps of Adam that bring them to where the mass is.
_CHAINS, _STEPS, _APPROACH = 4, 600, 100
# The share of the samples between the ends of the interval of a pixel.
LEVEL = 0.9


class Sampling(NamedTuple):
    """How many samples are drawn, and by which chain.

    Attributes:
        count: Number of samples.
        method: The method.
        chain: Of methods with an energy: mala, or langevin without rejections.
        steps: Steps of each Markov chain, the first half of them without samples, or levels of split Gibbs; None for
            the default.
    """

    count: int
    method: str
    chain: Chain
    steps: int | None

    def check(self) -> None:
        """Refuse what cannot be sampled.

        Raises:
            InputError: If the method has no sampler, or there are too few samples or steps.
        """
        if self.method not in (*_ENERGIES, *_DENOISERS):
            raise InputError(
                f"--samples {self.count} are drawn by {', '.join((*_ENERGIES, *_DENOISERS))}, not by {self.method}; "
                "leave it out, or take one of these."
            )
        if self.count < 8 or (self.method in _ENERGIES and self.count % _CHAINS):
            raise InputError(
                f"--samples {self.count} must be at least 8, for Markov chains a multiple of {_CHAINS}, such as 32."
            )
        least = 2 if self.method in _DENOISERS else 2 * self.count // _CHAINS
        if self.steps is not None and self.steps < least:
            raise InputError(
                f"--steps {self.steps} must be at least {least} for {self.count} samples."
            )
        if self.method in _DENOISERS and self.chain != "mala":
            raise InputError(
                f"--chain {self.chain} says nothing about the method {self.method}; leave it out."
            )

    @property
    def name(self) -> str:
        """The sampler, as calibrations name it."""
        chain = "split Gibbs" if self.method in _DENOISERS else self.chain
        return f"{self.count} samples by {chain}" + (f", {self.steps} steps" if self.steps else "")

    def draw(
        self, likelihood: GaussianLikelihood, y: Tensor, prior: nn.Module | None, weight: float
    ) -> Solution:
        """Draw samples; their mean is the reconstruction.

        Args:
            likelihood: The law of the measurement.
            y: The measurement of one image.
            prior: The prior or the denoiser.
            weight: The weight of the prior; denoisers have none.

        Raises:
            InputError: If there are several images, or the denoiser does not know large noise.
        """
        if len(y) != 1:
            raise InputError(f"Got a stack of {len(y)} images; draw --samples of one.")
        init = likelihood.operator.initial(y)
        if isinstance(prior, PatchPrior):
            start = variational.reconstruct(
                likelihood, prior, y, init, weight=weight, steps=_APPROACH, progress=True
            )
            steps = _STEPS if self.steps is None else self.steps
            samples = langevin.sample(
                likelihood,
                prior,
                y,
                start.x,
                weight=weight,
                draws=self.count,
                chains=_CHAINS,
                burn_in=steps // 2,
                thin=max(1, steps // 2 // (self.count // _CHAINS)),
                adjusted=self.chain == "mala",
                progress=True,
            )
        else:
            assert isinstance(prior, Denoiser)
            steps = split_gibbs.STEPS if self.steps is None else self.steps
            levels = split_gibbs.noise_levels(likelihood, prior.levels, steps)
            samples = split_gibbs.sample(
                likelihood, prior, y, init, levels=levels, draws=self.count, progress=True
            )
        found = summarise(samples, level=LEVEL)
        return Solution(
            found.mean, [], steps, None, samples.interrupted, std=found.std, samples=samples
        )


def combined(checks: Mapping[str, Check]) -> Check:
    """The check of several images: the mean ratio, and the largest deviation."""
    found = list(checks.values())
    return Check(
        sum(check.ratio for check in found) / len(found),
        max(check.deviation for check in found),
        found[0].draws,
    )
