"""Model files and training states: one safetensors file each, with a JSON document in its metadata.

A file holds tensors and one JSON document and nothing that could be executed: no pickle, ever. The
document of a model says what rebuilds it (the name of the model and its arguments) and where it
comes from (library version, data fingerprint, seed, training). Files are written whole or not at
all, so a resumable training never loses its last good state.

References:
    Hugging Face, safetensors, https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from patchflow.errors import InputError
from patchflow.io.atomic import existing_file, read_bytes, write_bytes

FORMAT_VERSION = 1
MODEL = "patchflow-model"
TRAINING = "patchflow-training"

# The entry of the safetensors metadata that holds our document; metadata values are strings.
_ENTRY = "patchflow"
_NAMES = {MODEL: "model", TRAINING: "training state"}


def library_version() -> str:
    """The version of the installed patchflow, or "unknown" when it runs from a source tree."""
    try:
        return importlib.metadata.version("patchflow")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class ModelHeader:
    """What a model file says about its tensors.

    Attributes:
        model: The name of the premade model (a function of ``patchflow.models``).
        arguments: Its keyword arguments: JSON values, so tuples come back as lists.
        fingerprint: The SHA-256 of the training images, see
            :func:`patchflow.io.images.fingerprint`.
        seed: The seed of the training, if there was one.
        training: Settings and results of the training (steps, seconds, losses): JSON values.
        library_version: The version of patchflow that wrote the file.
        format_version: The version of the file format.
    """

    model: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    seed: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    library_version: str = field(default_factory=library_version)
    format_version: int = FORMAT_VERSION


def save_model(path: str | Path, module_state: Mapping[str, Tensor], header: ModelHeader) -> None:
    """Write a model file, whole or not at all.

    Args:
        path: The file, usually ``*.safetensors``.
        module_state: The state of the module (``module.state_dict()``).
        header: What it is.

    Raises:
        InputError: The disk refuses.
    """
    _save(path, module_state, {"format": MODEL, **asdict(header)})


def load_model(
    path: str | Path, *, expected: str | None = None
) -> tuple[ModelHeader, dict[str, Tensor]]:
    """Read a model file.

    Args:
        path: The file.
        expected: The model that it has to be, if only one will do.

    Returns:
        The header and the tensors, on the CPU; see :func:`load_into`.

    Raises:
        InputError: The file is missing, not a model file, truncated, of a newer format, or another
        model.
    """
    header = read_header(path)
    if expected is not None and header.model != expected:
        raise InputError(
            f"{path} holds the model {header.model}, but {expected} is needed: give a file of that "
            "model, or train one."
        )
    return header, read_tensors(path, "model file")


def read_header(path: str | Path) -> ModelHeader:
    """Read what a model file says about itself, without its tensors.

    Args:
        path: The file.

    Raises:
        InputError: As :func:`load_model`.
    """
    document = _read_document(path, MODEL)
    try:
        return ModelHeader(
            model=str(document["model"]),
            arguments=dict(document["arguments"]),
            fingerprint=str(document["fingerprint"]),
            seed=document["seed"],
            training=dict(document["training"]),
            library_version=str(document["library_version"]),
            format_version=document["format_version"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is a model file whose description is incomplete ({error}): train or download "
            "it again."
        ) from error


def save_state(
    path: str | Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> None:
    """Write a resumable training state, whole or not at all.

    Args:
        path: The file.
        tensors: Weights, optimiser moments, random states: any flat mapping.
        document: Everything that is not a tensor: JSON values; infinities and NaN are kept.

    Raises:
        InputError: The disk refuses.
    """
    head = {
        "format": TRAINING,
        "format_version": FORMAT_VERSION,
        "library_version": library_version(),
    }
    _save(path, tensors, {**head, "state": dict(document)})


def load_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a training state written by :func:`save_state`.

    Args:
        path: The file.

    Returns:
        The tensors and the document.

    Raises:
        InputError: The file is missing, not a training state, truncated, or of a newer format.
    """
    document = _read_document(path, TRAINING)
    return read_tensors(path, "training state file"), dict(document.get("state", {}))


def load_into(module: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy tensors into a module, or say which one does not fit and leave the module as it was.

    Args:
        module: The module, built from the header's arguments.
        state: Its tensors.
        path: The file that they come from, for the message.

    Raises:
        InputError: A tensor is missing, has another shape, or has no place in the module.
    """
    own = module.state_dict()
    remedy = "the file belongs to other arguments or another version of the model; train it again"
    for key, value in own.items():
        if key not in state:
            raise InputError(f"{path} lacks the tensor {key}, which the model needs: {remedy}.")
        if state[key].shape != value.shape:
            raise InputError(
                f"{path} has the tensor {key} of shape {tuple(state[key].shape)}, but the model "
                f"needs {tuple(value.shape)}: {remedy}."
            )
    for key in state:
        if key not in own:
            raise InputError(f"{path} has the tensor {key}, which the model lacks: {remedy}.")
    module.load_state_dict(dict(state))


def read_tensors(path: str | Path, kind: str = "safetensors file") -> dict[str, Tensor]:
    """Read the tensors of any safetensors file, whoever wrote it.

    Args:
        path: The file.
        kind: What it is to be, for the messages.

    Raises:
        InputError: It is missing, not a safetensors file, or truncated.
    """
    _read_metadata(path, kind)
    try:
        return safetensors.torch.load(read_bytes(path, kind))
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path} is a damaged {kind} ({_one_line(error)}): copy, download or train it again."
        ) from error


def _save(path: str | Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    # Copies, because safetensors refuses tensors that share memory (tied weights, views).
    plain = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }
    write_bytes(path, safetensors.torch.save(plain, {_ENTRY: json.dumps(document)}))


def _read_document(path: str | Path, format_name: str) -> dict[str, Any]:
    name = _NAMES[format_name]
    metadata = _read_metadata(path, f"{name} file")
    if _ENTRY not in metadata:
        raise InputError(
            f"{path} is a safetensors file of another program, but a patchflow {name} is needed: "
            "give a file that patchflow train has written."
        )
    try:
        document = json.loads(metadata[_ENTRY])
        found, version = document["format"], int(document["format_version"])
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is a patchflow file whose description cannot be read ({_one_line(error)}): "
            "train or download it again."
        ) from error
    if found != format_name:
        raise InputError(
            f"{path} is a patchflow {_NAMES.get(found, repr(found))}, but a {name} is needed: "
            "give the other file of the training."
        )
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version} (patchflow {document.get('library_version', '?')}),"
            f" but this patchflow reads up to {FORMAT_VERSION}: upgrade patchflow."
        )
    return document


def _read_metadata(path: str | Path, kind: str) -> dict[str, str]:
    """The metadata of a safetensors file, from its header alone, once its size is checked."""
    path = existing_file(path, kind)
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        # The format's own limit; without it, any eight bytes of a picture would ask for exabytes.
        if length > 100_000_000:
            raise _foreign(path, kind)
        text = file.read(length)
    if len(start) < 8 or len(text) < length:
        # A short text file looks like this too.
        if text and not text.startswith(b"{"):
            raise _foreign(path, kind)
        raise _truncated(path, kind)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise _foreign(path, kind) from error
    if size < 8 + length + end:
        raise _truncated(path, kind)
    return metadata


def _foreign(path: Path, kind: str) -> InputError:
    return InputError(
        f"{path} is not a safetensors file, but a {kind} in that format is needed: check the name "
        "(pickled .pt files are never loaded)."
    )


def _truncated(path: Path, kind: str) -> InputError:
    return InputError(
        f"{path} is a truncated {kind} ({path.stat().st_size} bytes are there): "
        "copy, download or train it again."
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:80]
