"""``patchflow simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from patchflow.cli.config import write_config
from patchflow.cli.options import check_output, check_stack, start, value_range
from patchflow.cli.problems import Settings
from patchflow.io.images import read_stack, write_image


def simulate(
    image: str,
    *,
    problem: str,
    output: str = "measurement.tif",
    noise: float = 0.01,
    scale: int = 4,
    boundary: Literal["circular", "periodic", "reflect", "valid"] | None = None,
    kernel: str | None = None,
    mask: str | None = None,
    range: str | None = None,
    grey: bool = False,
    seed: int = 0,
) -> None:
    """Simulate a noisy measurement of an image.

    Args:
        image: The image.
        problem: super-resolution, deblurring, inpainting, denoising, or a Python file that defines likelihood.
        output: File to write; floating-point TIFF or .npy keeps the noise as it is.
        noise: Standard deviation of the noise, in units of the image range.
        scale: Super-resolution: image pixels per measured pixel.
        boundary: circular or valid for super-resolution; periodic, reflect or valid for deblurring.
        kernel: Deblurring: the blur kernel, an image or .npy file.
        mask: Inpainting: an image that is white where pixels are measured.
        range: Values LO:HI of the file that become 0 and 1.
        grey: Convert a colour image to grey.
        seed: Random seed of the noise.
    """
    settings = dict(locals())
    target = Path(output)
    check_output(target, (".tif", ".tiff", ".npy", ".png", ".jpg", ".jpeg"))
    start(seed, None)
    x = read_stack(image, value_range=value_range(range), grey=grey)
    check_stack(target, len(x))
    flags = Settings(problem, noise, scale, boundary, kernel, mask)
    likelihood = flags.likelihood((x.shape[2], x.shape[3]), measured=False)
    write_image(target, likelihood.simulate(x))
    write_config(target.with_suffix(".yaml"), "simulate", settings)
    print(f"{target}: {problem} of {image}, noise {flags.std:g}.")
