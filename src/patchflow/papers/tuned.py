"""Weights of the tables: the best of a grid on the validation image, by ``benchmarks/tune.py``."""

from __future__ import annotations

WEIGHTS: dict[tuple[str, str], dict[str, float]] = {}
