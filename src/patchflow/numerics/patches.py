r"""Patches of images: extraction, its adjoint, and random batches.

A patch is a vector of ``channels * size * size`` numbers, channel by channel and row by row. All patches of an
image are the positions of a grid of stride 1; a coarser grid is given by its stride and its *phase*, the
position of its first patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError


def grid_shape(
    shape: tuple[int, int], size: int, stride: int = 1, phase: tuple[int, int] = (0, 0)
) -> tuple[int, int]:
    """The number of rows and columns of a patch grid.

    Args:
        shape: Height and width of the image.
        size: Side length of a patch.
        stride: Distance between neighbouring patches.
        phase: Row and column of the first patch.

    Raises:
        InputError: If the image holds no patch of the grid.
    """
    rows, columns = (
        (extent - size - start) // stride + 1 for extent, start in zip(shape, phase, strict=True)
    )
    if rows < 1 or columns < 1:
        raise InputError(
            f"An image of {shape[0]} x {shape[1]} pixels is smaller than a patch of {size} x {size} "
            f"at position {phase}; use a larger image or a model of smaller patches."
        )
    return rows, columns


def extract_patches(
    image: Float[Tensor, "channels height width"],
    size: int,
    stride: int = 1,
    phase: tuple[int, int] = (0, 0),
) -> Float[Tensor, "count dim"]:
    """The patches of an image on a grid, row by row.

    Args:
        image: One image.
        size: Side length of a patch.
        stride: Distance between neighbouring patches.
        phase: Row and column of the first patch.

    Returns:
        One patch per row, of ``channels * size * size`` numbers.
    """
    grid_shape((image.shape[1], image.shape[2]), size, stride, phase)
    windows = image[:, phase[0] :, phase[1] :].unfold(1, size, stride).unfold(2, size, stride)
    return windows.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)


def add_patches(
    image: Float[Tensor, "channels height width"],
    patches: Float[Tensor, "count dim"],
    size: int,
    stride: int = 1,
    phase: tuple[int, int] = (0, 0),
) -> None:
    """Add patches to an image, in place: the adjoint of :func:`extract_patches`.

    Args:
        image: The image to add to.
        patches: One patch per grid position, in the order of :func:`extract_patches`.
        size: Side length of a patch.
        stride: Distance between neighbouring patches.
        phase: Row and column of the first patch.
    """
    channels, height, width = image.shape
    rows, columns = grid_shape((height, width), size, stride, phase)
    windows = patches.view(rows, columns, channels, size, size).permute(2, 3, 4, 0, 1)
    for i in range(size):
        for j in range(size):
            top, left = phase[0] + i, phase[1] + j
            image[
                :,
                top : top + (rows - 1) * stride + 1 : stride,
                left : left + (columns - 1) * stride + 1 : stride,
            ] += windows[:, i, j]


def dihedral_orders(channels: int, size: int) -> Tensor:
    """The eight symmetries of the square: ``patch[orders[k]]`` is the k-th turned or mirrored patch."""
    index = torch.arange(channels * size * size).view(channels, size, size)
    turned = [torch.rot90(index, k, (1, 2)) for k in range(4)]
    return torch.stack([view.flatten() for t in turned for view in (t, t.flip(2))])


def common_channels(images: Sequence[Tensor]) -> int:
    """The number of channels of images, each (1, channels, height, width).

    Raises:
        InputError: If there is no image or the numbers differ.
    """
    if not images:
        raise InputError("There are no training images; give one to six images.")
    channels = {image.shape[1] for image in images}
    if len(channels) > 1:
        raise InputError(
            f"The images have {sorted(channels)} channels; convert them all to grey or all to colour."
        )
    return channels.pop()


class PatchSampler:
    """Random batches of the patches of a few images, drawn without unfolding the images.

    Each call returns ``batch`` patches, uniformly with replacement from all patches of all images, from torch's global
    random number generator.

    Args:
        images: Images of one number of channels, each (1, channels, height, width); sizes may differ.
        size: Side length of a patch.
        batch: Number of patches per call.
        dihedral: Whether each patch is turned and mirrored at random (eight symmetries).
        noise: Standard deviation of white noise that is added to each patch.

    Raises:
        InputError: If there is no image, the numbers of channels differ, or an image is smaller than a patch.
    """

    def __init__(
        self,
        images: Sequence[Tensor],
        size: int,
        batch: int = 256,
        *,
        dihedral: bool = False,
        noise: float | int = 0.0,
    ) -> None:
        self.size, self.batch, self.noise = size, batch, noise
        self.channels = common_channels(images)
        starts, offsets, total = [], [], 0
        for image in images:
            height, width = image.shape[-2:]
            rows, columns = grid_shape((height, width), size)
            first = torch.arange(rows)[:, None] * width + torch.arange(columns)
            starts.append(total + first.flatten())
            within = torch.arange(self.channels)[:, None, None] * height * width
            within = within + torch.arange(size)[:, None] * width + torch.arange(size)
            # Images of other widths have other offsets within a patch, so each position knows its image.
            offsets.append(within.flatten())
            total += image.numel()
        self.pixels = torch.cat([image.flatten() for image in images])
        self.starts = torch.cat(starts)
        self.owner = torch.repeat_interleave(
            torch.arange(len(images)), torch.tensor([len(start) for start in starts])
        )
        self.offsets = torch.stack(offsets)
        self.orders = dihedral_orders(self.channels, size) if dihedral else None

    def __len__(self) -> int:
        """The number of different patches, symmetries not counted."""
        return len(self.starts)

    def __call__(self) -> Float[Tensor, "batch dim"]:
        """Draw a batch."""
        chosen = torch.randint(len(self.starts), (self.batch,))
        offsets = self.offsets[self.owner[chosen]]
        if self.orders is not None:
            turn = torch.randint(len(self.orders), (self.batch,))
            offsets = offsets.gather(1, self.orders[turn])
        patches = self.pixels[self.starts[chosen, None] + offsets]
        return patches + self.noise * torch.randn_like(patches) if self.noise else patches


def hold_out(
    images: Sequence[Tensor], fraction: float, size: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Cut the lowest rows off each image, for a validation.

    Args:
        images: Images, each (1, channels, height, width).
        fraction: What is cut off, in (0, 0.5]; at least the rows of one patch.
        size: Side length of a patch.

    Returns:
        What is left of the images, and what was cut off.

    Raises:
        InputError: If the fraction is out of range, or an image too small.
    """
    if not 0 < fraction <= 0.5:
        raise InputError(f"The held-out fraction is {fraction}; use one above 0 and at most 0.5.")
    kept, held = [], []
    for image in images:
        rows = max(size, round(fraction * image.shape[2]))
        if image.shape[2] - rows < size:
            raise InputError(
                f"An image of {image.shape[2]} x {image.shape[3]} pixels is too small to hold out a part of it with "
                f"patches of {size} x {size}; give a validation image or a larger training image."
            )
        kept.append(image[:, :, :-rows])
        held.append(image[:, :, -rows:])
    return kept, held
