"""Random windows of images, larger than patches and of any shape."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from patchflow.errors import InputError
from patchflow.numerics.dihedral import DIHEDRAL
from patchflow.numerics.patches import common_channels


class WindowSampler:
    """Random batches of windows of a few images, uniformly with replacement, from torch's global generator.

    Args:
        images: Images of one number of channels, each (1, channels, height, width); sizes may differ.
        shape: Height and width of a window.
        batch: Windows per call.
        dihedral: Whether each is turned and mirrored at random (eight symmetries).
        wrap: Whether images go on periodically, so that even windows of an image's own size are of many kinds.
        free: Share of the windows that are turned by any angle, mirrored at random, and magnified or shrunk instead, by
            bicubic interpolation, the image going on by reflection: views that are learned by heart less easily.
            Magnified, they are smoother than the image, and shrunk they have aliases.
        spread: Standard deviation of the logarithm of their scale.

    Raises:
        InputError: If there is no image, the numbers of channels differ, or an image is smaller than a window.
    """

    def __init__(
        self,
        images: Sequence[Tensor],
        shape: tuple[int, int],
        batch: int,
        *,
        dihedral: bool = False,
        wrap: bool = False,
        free: float = 0.0,
        spread: float = 0.5,
    ) -> None:
        common_channels(images)
        for image in images:
            if not _fits(shape, image):
                rows, columns = image.shape[-2:]
                raise InputError(
                    f"A training image has {rows} x {columns} pixels but windows have {shape[0]} x {shape[1]}; give "
                    "larger images or choose smaller windows."
                )
        self.images, self.shape, self.batch = images, shape, batch
        self.dihedral, self.wrap = dihedral, wrap
        self.free, self.spread = free, spread

    def __call__(self) -> Float[Tensor, "batch channels height width"]:
        """Draw a batch."""
        return torch.cat([self._window() for _ in range(self.batch)])

    def _window(self) -> Tensor:
        image = self.images[int(torch.randint(len(self.images), ()))]
        if self.free and float(torch.rand(())) < self.free:
            return self._free_window(image)
        turns = [
            g
            for g in (DIHEDRAL if self.dihedral else DIHEDRAL[:1])
            # Windows that are not square are turned only where the image has room for them.
            if g.turns % 2 == 0 or _fits(self.shape[::-1], image)
        ]
        turn = turns[int(torch.randint(len(turns), ()))]
        height, width = self.shape if turn.turns % 2 == 0 else self.shape[::-1]
        rows, columns = image.shape[-2:]
        if self.wrap:
            shift = (int(torch.randint(rows, ())), int(torch.randint(columns, ())))
            window = image.roll(shift, (-2, -1))[..., :height, :width]
        else:
            top = int(torch.randint(rows - height + 1, ()))
            left = int(torch.randint(columns - width + 1, ()))
            window = image[..., top : top + height, left : left + width]
        return turn(window)

    def _free_window(self, image: Tensor) -> Tensor:
        angle = float(torch.rand(())) * 2 * math.pi
        scale = math.exp(self.spread * float(torch.randn(())))
        rows, columns = image.shape[-2:]
        height, width = self.shape
        # In the coordinates of grid_sample both sides of an image go from -1 to 1, whatever their lengths.
        across, down = scale * math.cos(angle), scale * math.sin(angle)
        centre = 2 * torch.rand(2) - 1
        maps = torch.tensor(
            [
                [across * width / columns, -down * height / columns, centre[0]],
                [down * width / rows, across * height / rows, centre[1]],
            ]
        )
        grid = functional.affine_grid(maps[None].to(image), [1, 1, height, width], False)
        found = functional.grid_sample(image, grid, "bicubic", "reflection", align_corners=False)
        found = found.clamp(image.min(), image.max())
        return found.flip(-1) if int(torch.randint(2, ())) else found


def _fits(shape: Sequence[int], image: Tensor) -> bool:
    return shape[0] <= image.shape[-2] and shape[1] <= image.shape[-1]


def middle(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """The window in the middle of an image."""
    top, left = (image.shape[-2] - shape[0]) // 2, (image.shape[-1] - shape[1]) // 2
    return image[..., top : top + shape[0], left : left + shape[1]]
