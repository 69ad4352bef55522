"""``patchflow info``."""

from __future__ import annotations

from patchflow.io.checkpoint import read_header


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
        print(f"  {key}: {value}")
    if header.fingerprint:
        print(f"training data (sha256): {header.fingerprint}")
    print(f"seed: {header.seed}")
    for key, value in header.training.items():
        if key not in ("history", "seed"):
            print(f"{key}: {value}")
