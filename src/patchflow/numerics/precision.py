"""Which floating-point type multiplies matrices fastest on a device: measured once, not guessed."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["auto", "float32", "bfloat16"]


def autocast(x: Tensor, precision: Precision) -> torch.autocast:
    """A context in which networks on ``x`` run in a precision.

    Args:
        x: The data. The context changes nothing unless they are float32: float64 stays float64.
        precision: ``"float32"``, ``"bfloat16"`` (weights and hidden activations rounded, sums in float32), or
            ``"auto"``, which takes bfloat16 where :func:`fastest_dtype` finds it faster on the device of ``x``.
    """
    low = precision == "bfloat16" or (
        precision == "auto" and fastest_dtype(x.device) == torch.bfloat16
    )
    return torch.autocast(x.device.type, torch.bfloat16, enabled=low and x.dtype == torch.float32)


@lru_cache(maxsize=8)
def fastest_dtype(device: torch.device) -> torch.dtype:
    """float32, or bfloat16 where the device multiplies 512 x 512 matrices at least 1.5 times faster with it.

    Processors with AMX or AVX512-BF16 and recent GPUs do; others emulate bfloat16 slowly. The measurement
    takes some tens of milliseconds, once per process and device.

    Args:
        device: The device to measure.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(2048, 512, dtype=dtype, device=device)
        b = torch.ones(512, 512, dtype=dtype, device=device)
        seconds[dtype] = min(_seconds(a, b) for _ in range(4))
    return (
        torch.bfloat16 if seconds[torch.float32] > 1.5 * seconds[torch.bfloat16] else torch.float32
    )


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    # Reading one number waits for an asynchronous device.
    (a @ b)[0, 0].item()
    return time.perf_counter() - start
