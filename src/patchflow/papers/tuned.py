"""Weights of the tables: the best of a grid on the validation image, by ``benchmarks/tune.py``."""

from __future__ import annotations

WEIGHTS: dict[tuple[str, str], dict[str, float]] = {
    ("patchnr-superresolution", ""): {
        "tv": 3.5,
        "tgv": 3.5,
        "dip-tv": 4.0,
        "wpp": 100.0,
        "local-ar": 20.0,
        "epll": 0.2,
        "patchnr": 0.2,
    },
    ("deblurring", "motion"): {
        "tv": 9.9,
        "tgv": 7.0,
        "wpp": 800.0,
        "local-ar": 80.0,
        "epll": 0.4,
    },
    ("deblurring", "Gaussian"): {
        "tikhonov": 80.0,
        "tv": 4.9,
        "tgv": 4.9,
        "wpp": 400.0,
        "local-ar": 40.0,
        "epll": 0.4,
    },
    ("inpainting", "hole"): {
        "tv": 78.0,
        "tgv": 3.5,
        "wpp": 200.0,
        "local-ar": 10.0,
        "epll": 0.28,
    },
    ("inpainting", "80 % missing"): {
        "tv": 0.06,
        "tgv": 0.06,
        "wpp": 71.0,
        "local-ar": 1.2,
        "epll": 0.035,
    },
    ("denoising", "sigma 0.05"): {
        "tikhonov": 160.0,
        "tv": 16.0,
        "tgv": 16.0,
        "wpp": 1100.0,
        "local-ar": 110.0,
        "epll": 0.57,
    },
    ("denoising", "sigma 0.1"): {
        "tikhonov": 110.0,
        "tv": 7.8,
        "tgv": 7.8,
        "wpp": 570.0,
        "local-ar": 80.0,
        "epll": 0.57,
    },
}
