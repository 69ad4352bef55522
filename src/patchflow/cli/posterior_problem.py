"""Problem files of posterior sampling, measurements and models: read and tried before anything long."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchflow.chains.flow import Flow
from patchflow.cli.options import start
from patchflow.cli.problems import failure_in_file, likelihood_of, run_file
from patchflow.energy import Density
from patchflow.errors import InputError
from patchflow.io.atomic import digest, existing_file, read_bytes
from patchflow.io.checkpoint import read_header
from patchflow.io.posterior import Posterior
from patchflow.posterior_models import load_posterior_model
from patchflow.problems.likelihood import Likelihood

# Points of the prior at which a problem is tried.
_TRIAL = 64


@dataclass(frozen=True)
class Problem:
    """What a problem file defines, tried at some points of the prior.

    Attributes:
        path: The file.
        likelihood: Its likelihood.
        prior: Its prior.
        names: The names of the parameters.
        data_dim: Number of values of a measurement.
        checksum: SHA-256 of the file.
    """

    path: str
    likelihood: Likelihood
    prior: Density
    names: tuple[str, ...]
    data_dim: int
    checksum: str


def at_least(lowest: int, values: Mapping[str, int]) -> None:
    """Refuse flags whose values are below ``lowest``.

    Raises:
        InputError: If there is one.
    """
    for name, value in values.items():
        if value < lowest:
            raise InputError(f"--{name} is {value} but must be at least {lowest}.")


def given(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings without those left open."""
    return {key: value for key, value in settings.items() if value is not None}


def load_problem(path: str, *, seed: int, threads: int | None, gradients: bool = False) -> Problem:
    """Run a problem file, seed, and try the problem at points of the prior.

    Args:
        path: The file; it assigns ``likelihood``, ``prior`` and perhaps ``names``.
        seed: The seed, set after the file has run.
        threads: Number of threads, or ``None`` for all cores.
        gradients: Whether the gradient of the forward model will be needed.

    Raises:
        InputError: If the file fails, lacks something, or its forward model returns what cannot be used.
    """
    if not path.endswith(".py"):
        raise InputError(
            f"The problem {path!r} is not a Python file; give one that defines likelihood and prior."
        )
    variables = run_file(path)
    start(seed, threads)
    likelihood, prior = likelihood_of(path, variables), variables.get("prior")
    if not isinstance(prior, Density):
        raise InputError(
            f"{path} defines no prior; it must assign a patchflow.Density to that name, for example a "
            "patchflow.priors.uniform.Uniform."
        )
    try:
        x, y = _tried(path, likelihood, prior)
        if gradients:
            (likelihood + prior).value_and_grad(x, y)
    except InputError:
        raise
    except Exception as error:
        raise failure_in_file(path, error) from error
    names = _names(path, variables.get("names"), x.shape[1])
    torch.manual_seed(seed)
    checksum = digest(path, "problem file")
    return Problem(path, likelihood, prior, names, y.shape[1], checksum)


@torch.no_grad()
def _tried(path: str, likelihood: Likelihood, prior: Density) -> tuple[Tensor, Tensor]:
    x = prior.sample(_TRIAL)
    if x.ndim != 2:
        raise InputError(
            f"The prior of {path} has samples of shape {tuple(x.shape[1:])}, but vectors of parameters are needed; "
            "flatten them in the forward model."
        )
    a: Any = likelihood.operator(x)
    if not isinstance(a, Tensor):
        raise InputError(
            f"The forward model of {path} returns {type(a).__name__}, but a tensor is needed; wrap a NumPy function "
            "in patchflow.problems.external.NumpyModel."
        )
    if a.ndim != 2 or len(a) != _TRIAL or not a.shape[1]:
        raise InputError(
            f"The forward model of {path} returns the shape {tuple(a.shape)} for {_TRIAL} points, but "
            f"({_TRIAL}, data_dim) is needed; return one row of values for each point."
        )
    if a.dtype != x.dtype:
        raise InputError(
            f"The forward model of {path} returns {a.dtype} for parameters of {x.dtype}, but the same type is "
            "needed; end it with .to(x)."
        )
    y = likelihood.simulate(x)
    energy = (likelihood + prior)(x, y)
    broken = ~(y.isfinite().all(1) & energy.isfinite())
    if broken.any():
        point = ", ".join(f"{value:.4g}" for value in x[broken][0].tolist())
        raise InputError(
            f"The forward model of {path} or its noise is not finite at {int(broken.sum())} of {_TRIAL} points of the "
            f"prior, for example at ({point}); mend it, or restrict the prior to where it works."
        )
    return x, y


def _names(path: str, given: object, dim: int) -> tuple[str, ...]:
    if given is None:
        return tuple(f"x{k + 1}" for k in range(dim))
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        raise InputError(f"The names in {path} are {given!r}, but a list of strings is needed.")
    names = tuple(given)
    try:
        # Samples will carry the names; they refuse what files could not hold.
        Posterior(torch.zeros(1, dim), torch.zeros(1), names)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return names


def model_data_dim(path: str) -> int:
    """The number of measured values that a model file was learned for.

    Raises:
        InputError: If the file is missing, or of another model.
    """
    header = read_header(path)
    if header.model != "conditional_snf" or "condition_dim" not in header.arguments:
        raise InputError(
            f"{path} holds the model {header.model!r}, but sampling needs one of patchflow train conditional-snf."
        )
    return int(header.arguments["condition_dim"])


def load_fitting(path: str, problem: Problem) -> tuple[Flow, list[str]]:
    """Read a model file for a problem.

    Returns:
        The flow, and warnings.

    Raises:
        InputError: If the model was learned for a problem of other dimensions.
    """
    training = read_header(path).training
    for what, found, learned in (
        ("measured values", problem.data_dim, model_data_dim(path)),
        ("parameters", len(problem.names), training.get("parameters", len(problem.names))),
    ):
        if found != learned:
            raise InputError(
                f"The problem {problem.path} has {found} {what}, but {path} was learned for {learned}; give the "
                "problem file of the training, or train again."
            )
    flow = load_posterior_model(path, problem.likelihood, problem.prior)
    if training.get("problem_sha256", problem.checksum) == problem.checksum:
        return flow, []
    return flow, [
        f"{problem.path} is not the file that {path} was learned with: if its forward model, noise or prior "
        "changed, train again."
    ]


def read_values(path: str, what: str) -> tuple[Tensor, list[str]]:
    """Read one vector from a ``.csv`` file (one row or one column, with or without a header line) or a ``.npy`` file.

    Args:
        path: The file.
        what: What it holds, for messages.

    Returns:
        The values, in the default precision; and the titles of the columns, if there are any.

    Raises:
        InputError: If the file is missing or of another kind, or does not hold one vector of finite numbers.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".csv", ".npy"):
        raise InputError(
            f"The {what} {path} has the extension {suffix!r}; give a .csv or .npy file."
        )
    table, titles = _read_npy(path, what) if suffix == ".npy" else _read_csv(path, what)
    if table.ndim > 2 or (table.ndim == 2 and min(table.shape) > 1):
        raise InputError(
            f"{path} holds numbers of shape {' x '.join(map(str, table.shape))}, but the {what} is one row or one "
            "column; give one vector per file."
        )
    values = torch.from_numpy(table.reshape(-1)).to(torch.get_default_dtype())
    broken = (~values.isfinite()).nonzero()[:, 0].tolist()
    if broken or not len(values):
        fault = f"nan or infinite at value {broken[0] + 1}" if broken else "empty"
        raise InputError(
            f"The {what} in {path} is {fault}, but finite numbers are needed; leave out what was not measured in the "
            "forward model too."
        )
    return values, titles if len(titles) == len(values) else []


def _read_npy(path: str, what: str) -> tuple[np.ndarray, list[str]]:
    file = existing_file(path, f"{what} file")
    try:
        return np.asarray(np.load(file, allow_pickle=False)).astype(np.float64, casting="safe"), []
    except (ValueError, EOFError, TypeError, OSError) as error:
        raise InputError(
            f"{path} is not a NumPy file of real numbers; save it with numpy.save."
        ) from error


def _read_csv(path: str, what: str) -> tuple[np.ndarray, list[str]]:
    try:
        text = read_bytes(path, f"{what} file").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file; save it as CSV in UTF-8.") from error
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    separator = next((mark for mark in ",;\t " if any(mark in line for line in lines)), ",")
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    rows = [[cell.strip() for cell in row] for row in reader]
    titles = rows.pop(0) if rows and not any(_is_number(cell) for cell in rows[0]) else []
    for place, row in enumerate(rows, 1 + bool(titles)):
        wrong = [cell for cell in row if not _is_number(cell)]
        if wrong or len(row) != len(rows[0]):
            fault = f"the entry {wrong[0]!r}" if wrong else f"{len(row)} entries"
            raise InputError(
                f"{path} has {fault} in line {place}, but a table of numbers is needed; separate them by commas and "
                "write decimal points."
            )
    return np.array([[float(cell) for cell in row] for row in rows]), titles


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
