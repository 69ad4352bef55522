"""Panels: labelled images, the window in which they are shown, and the region that is enlarged."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from patchflow.errors import InputError
from patchflow.io.images import encode_png


class Region(NamedTuple):
    """A rectangle of pixels of the reconstruction."""

    top: int
    left: int
    height: int
    width: int


class Panel(NamedTuple):
    """A labelled image (1, channels, height, width) with a one-line caption."""

    label: str
    image: Tensor
    caption: str = ""


class Window(NamedTuple):
    """The values that become black and white, with a name such as "lung window"."""

    label: str = ""
    low: float = 0.0
    high: float = 1.0

    def __call__(self, image: Tensor) -> Tensor:
        """The image with these values at 0 and 1; what lies outside is not cut off yet."""
        return (image - self.low) / (self.high - self.low)


def busiest_region(image: Float[Tensor, "1 channels height width"], size: int) -> Region:
    """The square of highest variance, searched on a grid of an eighth of its size.

    Args:
        image: The image.
        size: The side of the square, in pixels; cut to the image.
    """
    height, width = image.shape[-2:]
    tall, wide = min(size, height), min(size, width)
    grey = image.detach().double().cpu().mean(1, keepdim=True)
    step = max(1, size // 8)
    mean = F.avg_pool2d(grey, (tall, wide), stride=step)
    variance = F.avg_pool2d(grey.square(), (tall, wide), stride=step) - mean.square()
    row, column = divmod(int(variance.flatten().argmax()), variance.shape[-1])
    return Region(row * step, column * step, tall, wide)


def check_panel(panel: Panel) -> None:
    """Check that a panel is one image with pixels.

    Args:
        panel: The panel.

    Raises:
        InputError: It is not (1, channels, height, width).
    """
    shape = tuple(panel.image.shape)
    if len(shape) != 4 or shape[0] != 1 or 0 in shape:
        raise InputError(
            f"The panel {panel.label} has the shape {shape}, but (1, channels, height, width) is "
            "needed: give one image."
        )


def zoom_region(zoom: Region | None, panel: Panel) -> Region:
    """The region to enlarge.

    Args:
        zoom: The region asked for; None for the busiest one.
        panel: The panel in whose pixels it is counted.

    Raises:
        InputError: It lies outside.
    """
    height, width = panel.image.shape[-2:]
    if zoom is None:
        return busiest_region(panel.image, max(16, min(96, min(height, width) // 5)))
    inside = 0 <= zoom.top < zoom.top + zoom.height <= height
    if not (inside and 0 <= zoom.left < zoom.left + zoom.width <= width):
        raise InputError(
            f"The zoom {tuple(zoom)} (top, left, height, width) does not lie in the {height} x "
            f"{width} pixels of {panel.label}: choose another region."
        )
    return zoom


def sampling_of(image: Tensor, reference: Tensor) -> tuple[float, float] | None:
    """Reference pixels per pixel, down and across; None if this can only be another scene.

    Args:
        image: The image, (1, channels, height, width).
        reference: The image in whose pixels regions are counted.
    """
    down = reference.shape[-2] / image.shape[-2]
    across = reference.shape[-1] / image.shape[-1]
    return (down, across) if math.isclose(down, across, rel_tol=0.03) else None


def visible_pixels(image: Tensor) -> np.ndarray:
    """The image as (height, width, 3), clipped; of other numbers of channels, the mean.

    Args:
        image: The image, (1, channels, height, width).
    """
    image = image.detach().float().cpu().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)
    if image.shape[1] != 3:
        image = image.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return image[0].permute(1, 2, 0).numpy()


def cut_region(pixels: np.ndarray, zoom: Region, sampling: tuple[float, float]) -> np.ndarray:
    """The zoomed region, exactly, of an image of another sampling: coarse pixels may be cut.

    Args:
        pixels: The image, (height, width, 3).
        zoom: The region, in pixels of the reference.
        sampling: Reference pixels per pixel, see :func:`sampling_of`.
    """
    rows, columns = (
        # At least one sample per pixel of either image, so that neither loses detail.
        np.clip((start + size * (np.arange(count) + 0.5) / count) // ratio, 0, limit - 1)
        for start, size, ratio, limit in (
            (zoom.top, zoom.height, sampling[0], pixels.shape[0]),
            (zoom.left, zoom.width, sampling[1], pixels.shape[1]),
        )
        for count in [max(size, round(size / ratio))]
    )
    return pixels[rows.astype(int)][:, columns.astype(int)]


def png_of(pixels: np.ndarray) -> bytes:
    """Pixels as PNG, grey where all three channels agree.

    Args:
        pixels: The pixels, (height, width, 3), in [0, 1].
    """
    grey = bool((pixels[..., :1] == pixels).all())
    tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    return encode_png(tensor[:, :1] if grey else tensor)


def error_of(reconstruction: Panel, truth: Panel) -> Float[Tensor, "height width"]:
    """The absolute error of a reconstruction, mean over channels.

    Raises:
        InputError: If the sizes differ.
    """
    x, true = reconstruction.image, truth.image
    if x.shape != true.shape:
        raise InputError(
            f"The reconstruction of shape {tuple(x.shape)} and the truth of shape {tuple(true.shape)} cannot be "
            "subtracted: give images of the same size."
        )
    return (x.detach().float() - true.detach().float()).abs().mean(1)[0]
