"""Weights of the tables: the best of a grid on the validation image, by ``benchmarks/tune.py``."""

from __future__ import annotations

WEIGHTS: dict[tuple[str, str], dict[str, float]] = {
    ("patchnr-superresolution", ""): {
        "tv": 3.5,
        "tgv": 3.5,
        "wpp": 100.0,
        "epll": 0.2,
        "local-ar": 20.0,
        "patchnr": 0.2,
        "dip-tv": 4.0,
    },
}
