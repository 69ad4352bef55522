"""What a measurement is, in a few JSON values: so that a network trained for one is not used for another."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from patchflow.problems.blur import Blur
from patchflow.problems.likelihood import GaussianLikelihood, Likelihood
from patchflow.problems.operator import Identity, Operator
from patchflow.problems.poisson import PoissonNoise
from patchflow.problems.sampling import Mask
from patchflow.problems.tomography import ParallelBeam

# The number of photons, which only scans have.
PHOTONS = "number of photons"
# Relative, of responses computed by other numbers of threads or in other precision.
_TOLERANCE = 1e-3
# Operators in the words of the command line.
_PROBLEMS = {"Identity": "denoising", "Mask": "inpainting", "ParallelBeam": "tomography"}
# What is another one if the scale is.
_OF_BLURS = {"stride", "kernel", "anchor", "boundary"}
# Digits of an angle in degrees: of single precision, an angle of half a turn is still one of zero.
_DIGITS = 4


def signature(likelihood: Likelihood) -> dict[str, Any]:
    """Describe an operator and its noise; operators that fit any image are described without its size.

    Args:
        likelihood: The law of the measurement.

    Returns:
        JSON values. Of operators without a description of their own they are the response to a fixed image.
    """
    operator = likelihood.operator
    name = type(operator).__name__
    if isinstance(operator, Blur):
        rest = {"kernel": _digest(operator.kernel), "stride": operator.stride}
        rest |= {"boundary": operator.boundary, "anchor": list(operator.anchor)}
    elif isinstance(operator, Identity):
        rest = {}
    elif isinstance(operator, Mask):
        rest = {"mask": _digest(operator.mask)}
    elif isinstance(operator, ParallelBeam):
        rest = _geometry(operator)
    else:
        assert isinstance(operator, Operator)
        rest = {"shape": list(operator.domain_shape), "response": _response(likelihood)}
    noise: dict[str, Any] = {}
    if isinstance(likelihood, GaussianLikelihood):
        noise = {"noise": likelihood.std}
    elif isinstance(likelihood.noise, PoissonNoise):
        law = likelihood.noise
        noise = {PHOTONS: law.photons, "scale of attenuation": law.scale}
    return {"operator": name, **rest, **noise}


def differs(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The keys in which two descriptions differ; numbers may differ by a thousandth."""
    return sorted(
        key for key in one.keys() | other.keys() if not _close(one.get(key), other.get(key))
    )


def disagreements(own: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """What differs in words: numbers as they are, of lists their lengths, of digests that they do.

    Args:
        own: The description of the measurement that something was made for.
        given: That of the measurement.
    """
    keys = differs(own, given)
    told = []
    if _problem(own) != _problem(given):  # of which the rest follows
        told.append(f"problem ({_problem(own)}, not {_problem(given)})")
        keys = [key for key in keys if key in own.keys() & given.keys() - _OF_BLURS - {"operator"}]
    elif "stride" in keys:
        told.append(f"scale ({own['stride']}, not {given['stride']})")
        keys = [key for key in keys if key not in _OF_BLURS]
    return told + [_differ(key, own.get(key), given.get(key)) for key in keys]


def _differ(key: str, own: object, given: object) -> str:
    if isinstance(own, list) and isinstance(given, list):
        own, given = len(own), len(given)
    numbers = isinstance(own, int | float) and isinstance(given, int | float) and own != given
    return f"{key} ({own:g}, not {given:g})" if numbers else key


def _problem(described: dict[str, Any]) -> str:
    name = described["operator"]
    if name == "Blur":
        return "super-resolution" if described["stride"] > 1 else "deblurring"
    return str(_PROBLEMS.get(name, name))


def _close(a: object, b: object) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_close(u, v) for u, v in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= _TOLERANCE * max(abs(a), abs(b))
    return a == b


def _geometry(operator: ParallelBeam) -> dict[str, Any]:
    """The numbers of a scan: lengths in metres; directions in degrees, in order, those of the same rays once."""
    # From the opposite side the bins are in the opposite order, which are the same ones if they are centred.
    period = 360.0 if operator.offset else 180.0
    degrees = [round(math.degrees(angle), _DIGITS) % period for angle in operator.angles.tolist()]
    return {
        "image size": list(operator.domain_shape),
        "pixel size": operator.pixel,
        "number of bins": operator.range_shape[1],
        "width of a bin": operator.spacing,
        "shift of the detector": operator.offset,
        "set of angles": sorted(degrees),
    }


def _digest(values: Tensor) -> str:
    rounded = (values.double() * 1e6).round().to(torch.int64).contiguous()
    return hashlib.sha256(
        str(tuple(values.shape)).encode() + rounded.numpy().tobytes()
    ).hexdigest()[:16]


def _response(likelihood: Likelihood) -> list[float]:
    """The root mean squares of what is measured of a fixed image, and of its noise."""
    operator = likelihood.operator
    assert isinstance(operator, Operator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.rand(1, 1, *operator.domain_shape)
        clean = operator(image)
        noise = likelihood.simulate(image) - clean
    return [float(part.square().mean().sqrt()) for part in (clean, noise)]
