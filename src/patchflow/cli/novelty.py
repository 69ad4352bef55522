"""The novelty map of ``reconstruct --report``: where a prior on patches is surprised, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from patchflow import models
from patchflow.errors import InputError
from patchflow.priors.patch import PatchPrior
from patchflow.uncertainty.novelty import Novelty, has_density, novel_shares, read_novelty

_KINDS = "patch-nr, epll, student-t or patch-vae"


class Finding(NamedTuple):
    """What a report shows of the first image.

    Attributes:
        nll_map: The energy of the patches around each pixel in nats, (height, width).
        novelty: The novelty map, (height, width), see :class:`patchflow.uncertainty.novelty.Novelty`.
        notes: What there is to say about them.
    """

    nll_map: Tensor | None
    novelty: Tensor | None
    notes: list[str]


@dataclass(frozen=True)
class Watch:
    """The prior whose map is shown.

    Attributes:
        prior: The prior; None if there is none on patches.
        path: Its model file.
        novelty: The thresholds in that file; None if it has none.
        own: Whether it is the prior of the method, for which ``patchflow calibrate`` finds thresholds.
    """

    prior: PatchPrior | None
    path: str | None = None
    novelty: Novelty | None = None
    own: bool = True

    @classmethod
    def read(
        cls,
        named: str | None,
        path: str | None,
        prior: nn.Module | None,
        *,
        report: str | None,
        calibrated: bool = False,
    ) -> Watch:
        """Choose the prior, and read its thresholds.

        Args:
            named: The model file of ``--novelty``.
            path: That of the method.
            prior: The model of the method.
            report: Folder for the report.
            calibrated: Whether a calibration has thresholds, which come first.

        Raises:
            InputError: If the file of ``--novelty`` cannot be read, has no density, or would not be shown.
        """
        if named is not None:
            if report is None:
                raise InputError(
                    f"--novelty {named} is for the report; add --report, or leave it out."
                )
            if calibrated:
                raise InputError(
                    f"--novelty {named} says nothing beside a calibration with thresholds of its own; leave one out."
                )
            path, prior = named, models.load(named, nn.Module)
            if not has_density(prior):
                name, _ = vars(prior)["made_by"]
                raise InputError(
                    f"--novelty {named} holds the model {name}, which has no density of patches; give one of patchflow "
                    f"train {_KINDS}."
                )
        if not isinstance(prior, PatchPrior):
            return cls(None)
        thresholds = read_novelty(path) if path and has_density(prior) else None
        return cls(prior, path, thresholds, own=named is None)

    def check(self, x: Tensor) -> None:
        """Refuse images that the prior is not made for.

        Args:
            x: Images of the shape of the reconstruction.

        Raises:
            InputError: If their channels or sizes do not fit.
        """
        if self.prior is not None:
            self.prior.check(x)

    def find(self, x: Tensor, calibrated: Tensor | None = None) -> Finding:
        """Look at the first of some reconstructions.

        Args:
            x: The reconstructions (batch, channels, height, width).
            calibrated: The novelty map by the thresholds of a calibration, which come first.
        """
        energies = None if self.prior is None else self.prior.nll_map(x[:1])
        nll_map = None if energies is None else energies[0, 0]
        if calibrated is not None:
            return Finding(nll_map, calibrated[0, 0], [])
        if energies is None or not has_density(self.prior):
            return Finding(
                nll_map,
                None,
                [
                    "No novelty map can be drawn, as the method has no density of patches; --novelty MODEL, a model of "
                    f"patchflow train {_KINDS}, draws one."
                ],
            )
        if self.novelty is None:
            remedy = ", or give --calibration" if self.own else ""
            return Finding(
                nll_map,
                None,
                [
                    f"No novelty map can be drawn, as {self.path} has no thresholds; train it again with images held "
                    f"out{remedy}."
                ],
            )
        found = self.novelty(energies)
        surprising, smooth = novel_shares(found)
        note = (
            f"Novelty by {self.path}: {100 * surprising:.2f} % of the pixels surprise the prior, {100 * smooth:.2f} % "
            "are smoother than it knows; of those of the true images that its training held out "
            f"{100 * self.novelty.rate:g} % raise this alarm. These true images are the reference, and reconstructions "
            "are smoother: read the second share with care."
        )
        return Finding(nll_map, found[0, 0], [note])
