"""Premade reconstructors of images, trained for one measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.errors import InputError
from patchflow.networks.unrolled import UnrolledNetwork
from patchflow.problems.likelihood import Likelihood
from patchflow.problems.operator import LinearOperator
from patchflow.problems.signature import disagreements, signature


class SingleImage(nn.Module):
    """Networks that were trained alike from other seeds; their mean is the reconstruction.

    Args:
        members: The networks.
        measurement: What they are for: :func:`patchflow.problems.signature.signature`.
        dihedral: Whether they learn from turned and mirrored images, too.
    """

    def __init__(
        self,
        members: Sequence[UnrolledNetwork],
        measurement: Mapping[str, Any],
        *,
        dihedral: bool = True,
    ) -> None:
        super().__init__()
        self.dihedral = dihedral
        self.members = nn.ModuleList(members)
        self.channels, self.measurement = members[0].channels, dict(measurement)

    def forward(
        self, y: Float[Tensor, "batch channels *measured"], operator: LinearOperator
    ) -> Float[Tensor, "batch channels height width"]:
        """The mean of the members' reconstructions; see :meth:`UnrolledNetwork.forward`."""
        return torch.stack([member(y, operator) for member in self.members]).mean(0)

    def check(self, x: Tensor) -> None:
        """Refuse images of other channels than the networks were made for.

        Raises:
            InputError: As said.
        """
        if x.shape[1] != self.channels:
            raise InputError(
                f"The image has {x.shape[1]} channels but the network was trained for {self.channels}; convert the "
                "image or train another."
            )

    def check_measurement(self, likelihood: Likelihood) -> None:
        """Refuse a measurement that the networks were not trained for.

        Raises:
            InputError: As said.
        """
        told = disagreements(self.measurement, signature(likelihood))
        if told:
            raise InputError(
                f"The network was trained for another {', '.join(told)}; train one for this measurement."
            )


def single_image(
    *,
    measurement: Mapping[str, Any],
    channels: int = 1,
    cell: int = 4,
    width: int = 64,
    blocks: int = 4,
    strengths: Sequence[float] = (),
    members: int = 1,
    dihedral: bool = True,
) -> SingleImage:
    """A reconstructor for one kind of measurement; train it with :func:`patchflow.learn_single_image`.

    Args:
        measurement: What it is for: :func:`patchflow.problems.signature.signature` of the likelihood.
        channels: Channels of the images.
        cell: See :class:`patchflow.networks.unrolled.UnrolledNetwork`, as for the next three.
        width: See there.
        blocks: See there.
        strengths: See there; one for each data step, so one less than there are stages.
        members: Number of networks, whose mean is taken: each of its own random start.
        dihedral: Whether they learn from turned and mirrored images: then they see measurements in all orientations.

    Raises:
        InputError: If a number is out of range.
    """
    arguments = dict(locals()) | {"measurement": dict(measurement), "strengths": list(strengths)}
    if members < 1:
        raise InputError(f"Got {members} members; use at least one.")
    networks = [
        UnrolledNetwork(
            channels=channels,
            cell=cell,
            width=width,
            blocks=blocks,
            stages=len(strengths) + 1,
            strengths=tuple(strengths),
        )
        for _ in range(members)
    ]
    model = SingleImage(networks, measurement, dihedral=dihedral)
    model.made_by = ("single_image", arguments)  # pyright: ignore[reportArgumentType]
    return model
