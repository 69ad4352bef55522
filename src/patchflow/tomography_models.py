"""Premade models that reconstruct from a sinogram, see :mod:`patchflow.scan_network`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from patchflow.errors import InputError
from patchflow.networks.residual_unet import ResidualUNet
from patchflow.networks.unet import UNet
from patchflow.numerics.ramp import misses_directions
from patchflow.problems.scan_geometry import geometry, projector
from patchflow.problems.tomography import ParallelBeam
from patchflow.scan_network import ScanNetwork, Variation

# Of the error of filtered backprojection: what the first and the last data step take for what is left of it.
_FIRST, _LAST = 0.7, 0.4
# The relaxation where directions are missing, on the three tuning slices (benchmarks/start_ct.py --slices 3 --steps).
_RELAXATION = 0.5
# Total variation as a start, by whether directions are missing: the weights that are best with so many photons, on
# three slices (benchmarks/tune_ct.py). They grow with the root of the photons, as the noise falls with it.
TUNED_PHOTONS = 4096.0
VARIATION = {False: Variation(30.0, 75), True: Variation(40.0, 150)}
# Channels of the scales of their networks.
WIDTHS = (32, 64, 96)


def fbp_unet(
    scan: ParallelBeam | Mapping[str, Any],
    photons: float | int,
    *,
    widths: Sequence[int] = WIDTHS,
    blocks: int = 1,
    cell: int = 2,
    preset: str = "default",
) -> ScanNetwork:
    """Filtered backprojection and a U-Net for one scan; train it with :func:`patchflow.learn_scan`.

    By default the U-Net has residual blocks, which learn faster than the published one.

    Args:
        scan: The projector of the measured angles; or what :func:`patchflow.problems.scan_geometry.geometry` says of
            it, as model files do.
        photons: Mean number of photons per bin without an object.
        widths: Channels of each scale, finest first.
        blocks: Residual blocks of each scale, on the way down and up.
        cell: Pixels along a side of the cells of the finest scale.
        preset: ``"paper"`` is the published U-Net, but for its batch normalisation and with the sum with its input;
            it overrides ``widths``, ``blocks`` and ``cell``. It learns at rates below .001.

    Raises:
        InputError: If a number is out of range, or there is no such preset.

    References:
        Jin, McCann, Froustey, Unser, IEEE TIP 26(9), 2017, https://arxiv.org/abs/1611.03679
        Baguer, Leuschner, Schmidt, 2020, https://arxiv.org/abs/2003.04989 (the preset)
    """
    arguments = dict(locals()) | {"widths": list(widths)}
    if preset not in ("default", "paper"):
        raise InputError(f"The preset is {preset!r}; use 'default' or 'paper'.")
    network = UNet() if preset == "paper" else _corrector(1, widths, blocks, cell)
    return _named("fbp_unet", ScanNetwork(_projector(scan), photons, [network]), arguments)


def single_scan(
    scan: ParallelBeam | Mapping[str, Any],
    photons: float | int,
    *,
    start: Literal["auto", "network", "tv"] = "auto",
    stages: int = 4,
    widths: Sequence[int] = WIDTHS,
    blocks: int = 1,
    cell: int = 2,
    members: int = 1,
    relaxation: float | None = None,
) -> ScanNetwork:
    """Residual U-Nets and data steps for one scan; train them on a few slices with :func:`patchflow.learn_scan`.

    Args:
        scan: See :func:`fbp_unet`.
        photons: See there.
        start: The first of the stages: ``"network"`` corrects filtered backprojections, ``"tv"`` is total variation,
            which takes longer and fills in missing directions; ``"auto"`` takes it where directions are missing.
        stages: Stages in a row, with a data step between any two.
        widths: Channels of each scale of the networks, finest first.
        blocks: Residual blocks of each scale, on the way down and up.
        cell: Pixels along a side of the cells of the finest scale.
        members: Networks of each stage, each of its own random start, whose mean is taken.
        relaxation: The share of each correction after the first stage that is taken; by default one half where
            directions are missing, else all of it.

    Raises:
        InputError: If a number is out of range, or there is no such start.
    """
    operator = _projector(scan)
    limited = misses_directions(operator.angles)
    if start == "auto":
        start = "tv" if limited else "network"
    if relaxation is None:
        relaxation = _RELAXATION if limited else 1.0
    arguments = {
        "start": start,
        "stages": stages,
        "widths": list(widths),
        "blocks": blocks,
        "cell": cell,
        "members": members,
        "relaxation": relaxation,
    }
    if start not in ("network", "tv"):
        raise InputError(f"The start is {start!r}; use 'auto', 'network' or 'tv'.")
    least = 2 if start == "tv" else 1
    if stages < least or members < 1:
        raise InputError(
            f"Got {stages} stages and {members} members; use at least {least} and one, as the start is {start!r}."
        )
    steps = stages - 1
    shares = [_FIRST * (_LAST / _FIRST) ** (k / max(1, steps - 1)) for k in range(steps)]
    first, later = (
        [_corrector(channels, widths, blocks, cell) for _ in range(count)]
        for channels, count in (
            (1, members * (start == "network")),
            (3, members * bool(shares)),
        )
    )
    variation = None
    if start == "tv":
        weight, most = VARIATION[limited]
        variation = Variation(weight * math.sqrt(photons / TUNED_PHOTONS), most)
    model = ScanNetwork(operator, photons, first, later, shares, variation, relaxation)
    return _named("single_scan", model, arguments)


def _corrector(channels: int, widths: Sequence[int], blocks: int, cell: int) -> ResidualUNet:
    """A network that starts at zero: what it is given is where its image starts. The later one is told the share."""
    network = ResidualUNet(channels, 1, widths=widths, blocks=blocks, cell=cell, told=channels > 1)
    nn.init.zeros_(network.tail.weight)
    assert network.tail.bias is not None
    nn.init.zeros_(network.tail.bias)
    return network


def _projector(scan: ParallelBeam | Mapping[str, Any]) -> ParallelBeam:
    return scan if isinstance(scan, ParallelBeam) else projector(scan)


def _named(name: str, model: ScanNetwork, arguments: Mapping[str, Any]) -> ScanNetwork:
    """Keep what rebuilds the model."""
    scan = {"scan": geometry(model.operator), "photons": model.photons}
    model.made_by = (name, {**arguments, **scan})  # pyright: ignore[reportArgumentType]
    return model
