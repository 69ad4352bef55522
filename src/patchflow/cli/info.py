"""``patchflow info``."""

from __future__ import annotations

from collections.abc import Mapping

from patchflow.io.checkpoint import read_header

# Longer lists are told by their ends.
_LONG = 12


def info(model: str) -> None:
    """Print what a model file says about itself: name, arguments, training, data fingerprint.

    Args:
        model: The model file (.safetensors).
    """
    header = read_header(model)
    print(
        f"{header.model}, written by patchflow {header.library_version} (format {header.format_version})"
    )
    print("arguments:")
    for key, value in header.arguments.items():
        print(f"  {key}: {_short(value)}")
    if header.fingerprint:
        print(f"training data (sha256): {header.fingerprint}")
    print(f"seed: {header.seed}")
    for key, value in header.training.items():
        if key not in ("history", "seed"):
            print(f"{key}: {value}")


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(part)}" for key, part in value.items())
    if isinstance(value, list) and len(value) > _LONG:
        return f"[{value[0]}, ..., {value[-1]}] ({len(value)} values)"
    return str(value)
