r"""DualSR: an up-sampler and a down-sampler that learn from one image to undo each other; the blur may be unknown.

Of crops :math:`c` and smaller ones :math:`b` of the measurement, an up-sampler :math:`U = B + f_\theta B` (the aligned
bicubic interpolation :math:`B`, corrected), a linear down-sampler :math:`D` and a critic :math:`K` learn

.. math:: \min_{U, D} \; \mathbb E\, (K(z) - 1)^2 + 5\,\|U z - c\|_1 + 5\,\|D U b - b\|_1
          + 2\,\|m\,(U b - B b)\|_1 + 2\,r(D), \qquad z = D c + \sigma\xi,

while the critic learns to give 1 to crops :math:`b` and 0 to :math:`z`: patches look alike across scales, so that the
right blur makes patches that look like those of the measurement. The mask :math:`m` is one where the interpolated image
is flat and falls to zero at its edges: where there is nothing to sharpen, nothing shall be invented. The penalty
:math:`r` keeps the sum of the kernel at one and its centre in the middle. The operator's kernel is not used, only its
stride and where its pixels lie. What :math:`D` makes has less noise than the measurement, so noise joins it.

References:
    Emad, Peemen, Corporaal, "DualSR: zero-shot dual learning for real-world super-resolution", WACV 2021
    Bell-Kligler, Shocher, Irani, "Blind super-resolution kernel estimation using an internal-GAN", 2019,
    https://arxiv.org/abs/1909.06581
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from patchflow.errors import InputError, NumericalError
from patchflow.networks.dual_sr import LinearDownsampler, PatchCritic
from patchflow.networks.zssr import ResidualConvolutions
from patchflow.problems.blur import Blur
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.resolution import check_low_resolution
from patchflow.progress import progress_line
from patchflow.solution import Solution

# Published: width 64, crops of 128 in batches of 2, 3000 steps, these rates (constant) and weights of the losses.
WIDTH, CROP, STEPS, SECONDS = 32, 64, 3000, 120.0
LR, LR_DOWN, BETAS = 1e-3, 2e-4, (0.5, 0.999)
CYCLE, INTERPOLATION, REGULARITY = 5.0, 2.0, 2.0
# Slopes of the interpolated image, per pixel, at which the mask has fallen to a half; ours.
EDGE = 0.02
# What the down-sampler must leave of a crop.
_LEAST = 8


class Losses(NamedTuple):
    """The parts of the loss, without their weights."""

    critic: Tensor
    forward: Tensor
    backward: Tensor
    interpolation: Tensor
    regularity: Tensor

    def total(self) -> Tensor:
        """The weighted sum."""
        return (
            self.critic
            + CYCLE * (self.forward + self.backward)
            + INTERPOLATION * self.interpolation
            + REGULARITY * self.regularity
        )


class Dual(nn.Module):
    """The three networks, and how they see crops of one size.

    Args:
        channels: Channels of the image.
        operator: The operator, of which stride and parity are taken.
        std: The standard deviation of the noise.
        crop: Side length of the crops.

    Raises:
        InputError: If the down-sampler leaves less than 8 x 8 pixels of a crop.
    """

    def __init__(self, channels: int, operator: Blur, std: float | int, crop: int) -> None:
        super().__init__()
        self.std = std
        self.up = ResidualConvolutions(channels, width=WIDTH)
        # A kernel of the other parity would be centred half a pixel beside.
        self.down = LinearDownsampler(operator.stride, even=operator.kernel.shape[0] % 2 == 0)
        self.critic = PatchCritic(channels)
        side, stride = self.down.side, operator.stride
        self.small = (crop - side) // stride + 1
        if self.small < _LEAST:
            raise InputError(
                f"Of crops of {crop} x {crop} pixels a kernel of {side} x {side} and a stride of {stride} leave "
                f"{max(self.small, 0)} x {max(self.small, 0)}, but {_LEAST} are needed; give a larger measurement."
            )
        # So that the kernel's last place is the crop's last pixel.
        self.crop = (self.small - 1) * stride + side
        box = torch.full((side, side), 1 / side**2)
        # It knows where pixels lie; its kernel is not used.
        self.grid = Blur(box, (self.crop, self.crop), "valid", stride=stride)

    def coarse(self, c: Tensor) -> Tensor:
        """What the down-sampler makes of a crop, and noise."""
        z = self.down(c)
        return z + self.std * torch.randn_like(z)

    def losses(self, c: Tensor, b: Tensor) -> Losses:
        """The losses of a crop ``c`` of ``crop`` pixels and another, ``b``, of ``small`` pixels along a side."""
        z = self.coarse(c)
        starts = self.grid.initial(torch.cat((z, b)))
        again, large = self.up(starts).split(1)
        # Beyond the measured pixels interpolation reflects.
        (top, bottom), (left, right) = self.grid.covered
        return Losses(
            (self.critic(z) - 1).square().mean(),
            (again - c)[:, :, top:bottom, left:right].abs().mean(),
            (self.down(large) - b).abs().mean(),
            (flatness(starts[1:]) * (large - starts[1:]).abs()).mean(),
            irregularity(self.down.kernel()),
        )

    def critic_loss(self, c: Tensor, b: Tensor) -> Tensor:
        """What the critic lowers: a crop of the measurement should be 1, what is made of one 0."""
        with torch.no_grad():
            made = self.coarse(c)
        return (self.critic(b) - 1).square().mean() + self.critic(made).square().mean()


def flatness(image: Tensor) -> Tensor:
    r"""The mask :math:`1 / (1 + (|\nabla u| / e)^2)` of the steepest channel: 1 where an image is flat, 0 at edges."""
    padded = functional.pad(image.detach(), [1, 1, 1, 1], mode="replicate")
    down = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    across = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    steepest = (down.square() + across.square()).amax(1, keepdim=True)
    return 1 / (1 + steepest / EDGE**2)


def irregularity(kernel: Float[Tensor, "side side"]) -> Tensor:
    """How far the sum of a kernel is from one, and its centre from the middle, in pixels."""
    total = kernel.sum()
    place = torch.arange(len(kernel)).to(kernel) - (len(kernel) - 1) / 2
    centre = torch.stack(((kernel.sum(1) * place).sum(), (kernel.sum(0) * place).sum()))
    return (total - 1).abs() + centre.abs().sum()


@torch.enable_grad()
def reconstruct(
    likelihood: GaussianLikelihood,
    y: Float[Tensor, "batch channels height width"],
    *,
    crop: int = CROP,
    steps: int = STEPS,
    seconds: float | int | None = SECONDS,
    progress: bool = False,
) -> Solution:
    """Learn from one measurement and super-resolve it.

    Args:
        likelihood: The operator, a :class:`patchflow.problems.blur.Blur` with a stride, and the noise; its kernel is
            not used.
        y: The measurement, of batch size one.
        crop: Side length of the crops in pixels; smaller where the measurement is.
        steps: Number of steps, one crop each.
        seconds: Time limit of learning; the schedule of the up-sampler's rate ends with it.
        progress: Show a progress line.

    Returns:
        The image, and the loss of each step. Interrupted (Ctrl-C), what the up-sampler had learned by then gave it.

    Raises:
        InputError: If the operator does not lower the resolution, the measurement has another shape, is not finite or
            too small, or there is no step.
        NumericalError: If the loss is not finite.
    """
    if steps < 1:
        raise InputError(f"Got {steps} steps; give at least 1.")
    operator = check_low_resolution(likelihood, y)
    model = Dual(y.shape[1], operator, likelihood.std, min(crop, *y.shape[2:])).to(y)
    if seconds is not None and not seconds > 0:
        raise InputError(f"The time limit is {seconds} s but must be positive; or leave it out.")
    history, interrupted = _learn(model, y, steps, seconds, progress)
    with torch.no_grad():
        x = model.up(operator.initial(y))
    return Solution(x, history, len(history), None, interrupted)


def _learn(
    model: Dual, y: Tensor, steps: int, seconds: float | int | None, progress: bool
) -> tuple[list[float], bool]:
    """Update both samplers and the critic in turn; whether it was interrupted."""
    up = torch.optim.Adam(model.up.parameters(), LR, BETAS, fused=True)
    down = torch.optim.Adam(model.down.parameters(), LR_DOWN, BETAS, fused=True)
    critic = torch.optim.Adam(model.critic.parameters(), LR_DOWN, BETAS, fused=True)
    history: list[float] = []
    begun = time.perf_counter()
    bar = progress_line(total=steps, shown=progress)
    try:
        while len(history) < steps:
            spent = 0.0 if seconds is None else (time.perf_counter() - begun) / seconds
            done = max(spent, len(history) / steps)
            if done >= 1:
                break
            up.param_groups[0]["lr"] = LR * 0.5 * (1 + math.cos(math.pi * done))
            # Crops as they lie: a turned one would have a turned blur.
            c, b = _crop(y, model.crop), _crop(y, model.small)
            loss = model.losses(c, b).total()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NumericalError(
                    f"The loss is {value} at step {len(history)}; check the data, or use another seed."
                )
            for optimizer in (up, down):
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for optimizer in (up, down):
                optimizer.step()
            critic.zero_grad(set_to_none=True)
            model.critic_loss(c, b).backward()
            critic.step()
            history.append(value)
            bar.update()
            bar.set_postfix({"loss": f"{value:.3f}"}, refresh=False)
    except KeyboardInterrupt:
        return history, True
    finally:
        bar.close()
        model.requires_grad_(False)
    return history, False


def _crop(y: Tensor, side: int) -> Tensor:
    top, left = (int(torch.randint(n - side + 1, ())) for n in y.shape[2:])
    return y[:, :, top : top + side, left : left + side]
