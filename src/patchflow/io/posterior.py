"""Posterior samples and their files: NetCDF as ArviZ reads it, NumPy and CSV.

``.nc`` holds everything (NetCDF-4 in the layout of ArviZ), ``.csv`` a column per parameter and one
of log-weights, ``.npy`` the samples, with their normalised weights beside it in ``*.weights.npy``.
Files are written whole or not at all, and hold nothing that could be executed. ArviZ does not know
of weights: its summaries treat all draws alike, so resample before handing weighted samples to it.

References:
    The InferenceData schema, https://python.arviz.org/en/stable/schema/schema.html
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchflow.errors import InputError
from patchflow.io.atomic import atomic_path, read_bytes, write_bytes, write_text
from patchflow.io.checkpoint import library_version

_FORMATS = (".nc", ".csv", ".npy")
_LOG_WEIGHT = "log_weight"
# They name the dimensions of the NetCDF file and the column of weights of the CSV file.
_RESERVED = ("chain", "draw", _LOG_WEIGHT)


@dataclass(frozen=True, eq=False)
class Posterior:
    """Samples of a posterior law of parameters, with what is known about their quality.

    Attributes:
        samples: The samples, (count, dim).
        log_weights: Their log-weights up to a constant, (count,): zeros where all weigh the same,
            minus infinity where the weight is zero.
        names: The names of the parameters.
        observation: The data, (data_dim,); empty if unknown.
        log_evidence: The logarithm of the evidence and its standard error, if estimated.
        ess: The effective sample size of the weights that the samples came from; NaN if unknown.
        k_hat: The Pareto shape of these weights; NaN if unknown.
        acceptance: The acceptance rate of each Metropolis layer.
        settings: What was run (command, seed, model, versions): JSON values.

    Raises:
        InputError: Shapes do not match, a name cannot be used, or a sample is not finite.
    """

    samples: Tensor
    log_weights: Tensor
    names: tuple[str, ...]
    observation: Tensor = field(default_factory=lambda: torch.zeros(0))
    log_evidence: tuple[float | int, float | int] | None = None
    ess: float | int = math.nan
    k_hat: float | int = math.nan
    acceptance: Mapping[str, float | int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for fault in _faults(self):
            raise InputError(fault)

    @property
    def weights(self) -> Tensor:
        """The normalised weights, (count,), in double precision: their sum is 1."""
        return torch.softmax(self.log_weights.detach().double(), 0)


def write_posterior(path: str | Path, posterior: Posterior) -> None:
    """Write samples in the format of the extension, whole or not at all.

    Args:
        path: ``*.nc``, ``*.csv`` or ``*.npy``; the last one gets ``*.weights.npy`` beside it.
        posterior: The samples. Only ``.nc`` keeps all of it.

    Raises:
        InputError: As :func:`check_posterior_path`, settings are not JSON values, or the disk
        refuses.
    """
    check_posterior_path(path)
    suffix = Path(path).suffix.lower()
    if suffix == ".nc":
        write_bytes(path, _encode_netcdf(path, posterior))
    elif suffix == ".csv":
        write_text(path, _encode_csv(posterior))
    else:
        beside = Path(path).with_suffix(".weights.npy")
        # Both are complete on the disk before either takes its name.
        with atomic_path(beside) as second, atomic_path(path) as first:
            for file, values in ((first, posterior.samples), (second, posterior.weights)):
                # An open file, because NumPy appends .npy to names.
                with open(file, "wb") as stream:
                    np.save(stream, _array(values), allow_pickle=False)


def read_posterior(path: str | Path) -> Posterior:
    """Read samples written by :func:`write_posterior`.

    Args:
        path: ``*.nc``, or ``*.csv`` (without a column ``log_weight``, all weigh the same).

    Returns:
        The samples, on the CPU. What the format does not hold is empty or NaN.

    Raises:
        InputError: As :func:`check_posterior_path`, or the file is missing, damaged or another one.
    """
    check_posterior_path(path)
    suffix = Path(path).suffix.lower()
    if suffix == ".npy":
        raise InputError(
            f"{path} holds numbers without names, but samples with names are needed: write .nc or "
            ".csv, or load it by numpy.load."
        )
    data = read_bytes(path, "posterior file")
    try:
        return _decode_netcdf(path, data) if suffix == ".nc" else _decode_csv(data)
    except (OSError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        fault = f"{path} does not hold samples as patchflow writes them ({reason})"
        raise InputError(f"{fault}: check the name, or write it again.") from error


def check_posterior_path(path: str | Path) -> None:
    """Check that the extension is known and its format can be used; before long computations.

    Args:
        path: The file, which need not exist.

    Raises:
        InputError: The extension is not one of ours, or h5netcdf is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise InputError(
            f"{path} has the extension '{suffix}', which is not one of {', '.join(_FORMATS)}: "
            "choose one of these."
        )
    if suffix == ".nc":
        _h5netcdf(path)


def _faults(posterior: Posterior) -> Iterator[str]:
    shape, names = tuple(posterior.samples.shape), posterior.names
    if len(shape) != 2 or 0 in shape:
        yield f"Samples have the shape {shape}, but (count, dim) is needed: reshape them."
    if len(names) != shape[1]:
        yield f"{len(names)} names do not fit {shape[1]} parameters: give one each."
    weights, y = posterior.log_weights, posterior.observation
    if weights.shape != shape[:1]:
        found = f"{tuple(weights.shape)} do not fit samples of shape {shape}"
        yield f"Log-weights of shape {found}: give one for each sample."
    if y.ndim != 1:
        yield f"The observation has the shape {tuple(y.shape)}, but (data_dim,) is needed: flatten it."
    for name in names:
        unfit = name in _RESERVED or not name.strip(". ") or "/" in name or not name.isprintable()
        if unfit or names.count(name) > 1:
            yield (
                f"{name!r} cannot name a parameter, because names must be different, not empty, "
                f"without '/' and none of {', '.join(_RESERVED)}: rename it."
            )
    broken = int((~posterior.samples.isfinite()).any(1).sum())
    if broken:
        count = f"{broken} of {shape[0]} samples"
        yield f"{count} are not finite, but all have to be: find out why, or leave them out."
    low, high = float(weights.min()), float(weights.max())
    if math.isnan(low) or not math.isfinite(high):
        yield (
            f"Log-weights reach from {low} to {high}, but none may be NaN or plus infinity and one "
            "has to be finite: find out what made them."
        )


def _h5netcdf(path: str | Path) -> Any:
    try:
        import h5netcdf
    except ImportError as error:
        remedy = "pip install 'patchflow[bayes]', or use .csv or .npy"
        raise InputError(f"{path} is a NetCDF file, which needs h5netcdf: {remedy}.") from error
    return h5netcdf


def _encode_netcdf(path: str | Path, posterior: Posterior) -> bytes:
    count, dim = posterior.samples.shape
    columns = _array(posterior.samples).T
    attributes: dict[str, Any] = {
        "inference_library": "patchflow",
        "inference_library_version": library_version(),
        # Readers may sort the variables.
        "parameters": json.dumps(posterior.names),
        "settings": _json("settings", posterior.settings),
        "acceptance": _json("acceptance rates", posterior.acceptance),
        "ess": float(posterior.ess),
        "k_hat": float(posterior.k_hat),
    }
    if posterior.log_evidence is not None:
        attributes["log_evidence"], attributes["log_evidence_se"] = posterior.log_evidence
    draws, places = {"chain": 1, "draw": count}, {"y_dim_0": posterior.observation.numel()}
    # In memory first: what HDF5 raises on a full disk is not an OSError with a number.
    buffer = io.BytesIO()
    with _h5netcdf(path).File(buffer, "w") as file:
        variables = {posterior.names[i]: columns[i] for i in range(dim)}
        _add_group(file, "posterior", draws, variables).attrs.update(attributes)
        _add_group(file, "sample_stats", draws, {_LOG_WEIGHT: _array(posterior.log_weights)})
        # A dimension of size 0 would be an unlimited one.
        if posterior.observation.numel():
            _add_group(file, "observed_data", places, {"y": _array(posterior.observation)})
    return buffer.getvalue()


def _add_group(
    file: Any, name: str, dimensions: Mapping[str, int], variables: Mapping[str, np.ndarray]
) -> Any:
    group = file.create_group(name)
    group.dimensions = dimensions
    for key, size in dimensions.items():
        group.create_variable(key, (key,), data=np.arange(size))
    for key, values in variables.items():
        shape = tuple(dimensions.values())
        group.create_variable(key, tuple(dimensions), data=values.reshape(shape))
    return group


def _decode_netcdf(path: str | Path, data: bytes) -> Posterior:
    with _h5netcdf(path).File(io.BytesIO(data), "r") as file:
        group, attributes = file["posterior"], dict(file["posterior"].attrs)
        names = tuple(json.loads(attributes["parameters"]))
        samples = np.stack([group.variables[name][0] for name in names], 1)
        log_weights = file["sample_stats"].variables[_LOG_WEIGHT][0]
        known = "observed_data" in file.groups
        observation = file["observed_data"].variables["y"][:] if known else np.zeros(0)
    evidence = None
    if "log_evidence" in attributes:
        evidence = float(attributes["log_evidence"]), float(attributes["log_evidence_se"])
    return Posterior(
        _tensor(samples),
        _tensor(log_weights),
        names,
        _tensor(observation),
        evidence,
        float(attributes["ess"]),
        float(attributes["k_hat"]),
        json.loads(attributes["acceptance"]),
        json.loads(attributes["settings"]),
    )


def _encode_csv(posterior: Posterior) -> str:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*posterior.names, _LOG_WEIGHT])
    # NumPy writes the fewest digits that give the number back, in its own precision.
    columns = [_array(posterior.samples), _array(posterior.log_weights)[:, None]]
    writer.writerows(np.hstack([values.astype(str) for values in columns]).tolist())
    return buffer.getvalue()


def _decode_csv(data: bytes) -> Posterior:
    text = io.StringIO(data.decode("utf-8-sig"), newline="")
    header = next(csv.reader(text), [])
    lines = [line for line in text if line.strip()]
    table = np.loadtxt(lines, delimiter=",", ndmin=2) if lines else np.zeros((0, len(header)))
    if table.shape[1] != len(header):
        raise ValueError(f"{len(header)} titles above {table.shape[1]} columns")
    weights = [i for i, name in enumerate(header) if name == _LOG_WEIGHT]
    log_weights = table[:, weights[0]] if weights else np.zeros(len(table))
    names = tuple(name for i, name in enumerate(header) if i not in weights)
    return Posterior(_tensor(np.delete(table, weights, 1)), _tensor(log_weights), names)


def _array(values: Tensor) -> np.ndarray:
    return _plain(values.detach().cpu().double().numpy(), values.dtype == torch.float32)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(_plain(values, values.dtype == np.float32))


def _plain(values: np.ndarray, single: bool) -> np.ndarray:
    # Single or double precision in the machine's byte order: what every reader knows.
    return np.ascontiguousarray(values, np.float32 if single else np.float64)


def _json(what: str, values: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(values), ensure_ascii=False)
    except (TypeError, ValueError) as error:
        fault = f"The {what} cannot be written ({error}), because only JSON values can"
        raise InputError(f"{fault}: turn them into numbers, strings and lists.") from error
