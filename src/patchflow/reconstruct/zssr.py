r"""Zero-shot super-resolution (ZSSR): a network that learns from the measurement alone to undo the loss of resolution.

The measurement :math:`y` is degraded once more by the operator that made it, :math:`z = A y + \sigma\xi`. A small
network learns to get :math:`y` back from the interpolated :math:`z`, and is then applied to the interpolated :math:`y`:

.. math:: \hat\theta \in \arg\min_\theta \mathbb E_g \| G_\theta(B g z) - g y \|_1, \qquad
          \hat x = \frac{1}{|S|} \sum_{g \in S} g^{-1} G_{\hat\theta}(g B y),

with turns and reflections :math:`g` and the aligned bicubic interpolation :math:`B`. A turn serves the self-ensemble
:math:`S` only if it leaves the kernel as it is; a Gaussian has all eight. Back-projection,
:math:`x \leftarrow x + B(y - A x)`, makes the result agree with the measurement, as far as the noise allows.

References:
    Shocher, Cohen, Irani, "Zero-shot super-resolution using deep internal learning", CVPR 2018,
    https://arxiv.org/abs/1712.06087
    Irani, Peleg, "Improving resolution by image registration", 1991 (back-projection)
"""

from __future__ import annotations

import math
import time
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.energy import Energy
from patchflow.errors import InputError, NumericalError
from patchflow.fit import fit
from patchflow.networks.zssr import ResidualConvolutions
from patchflow.numerics.dihedral import DIHEDRAL, self_ensemble, symmetries
from patchflow.problems.blur import Blur
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.resolution import check_low_resolution
from patchflow.progress import progress_line
from patchflow.solution import Solution

WIDTH, CROP, STEPS, LR, AVERAGE, SECONDS = 64, 64, 3000, 1e-3, 0.99, 120.0
BACK_PROJECTIONS = 10
# Shocher, Cohen and Irani: width 64, crops of 128, at most 3000 steps, the rate divided by ten where a line through
# the last 256 losses does not fall by more than its uncertainty / 1.5, looked at every 60 steps, down to 9e-6.
PUBLISHED_CROP, PUBLISHED_STEPS, PUBLISHED_LR = 128, 3000, 1e-3
_SLOPE_RATIO, _SLOPE_RANGE, _LOOK_EVERY, _LEAST_LR = 1.5, 256, 60, 9e-6
# The smallest crop that is worth learning from.
_LEAST_CROP = 8


@torch.enable_grad()
def reconstruct(
    likelihood: GaussianLikelihood,
    y: Float[Tensor, "batch channels height width"],
    *,
    network: nn.Module | None = None,
    crop: int = CROP,
    steps: int = STEPS,
    lr: float = LR,
    seconds: float | int | None = SECONDS,
    average: float = AVERAGE,
    back_projections: int = BACK_PROJECTIONS,
    ensemble: bool = True,
    preset: Literal["default", "paper"] = "default",
    progress: bool = False,
) -> Solution:
    r"""Learn from one measurement and super-resolve it.

    Args:
        likelihood: The operator, a :class:`patchflow.problems.blur.Blur` with a stride, and the noise.
        y: The measurement, of batch size one.
        network: The network :math:`G`, trained in place; by default a new
            :class:`patchflow.networks.zssr.ResidualConvolutions` for the channels of ``y``.
        crop: Side length of the crops in pixels; smaller where the measurement is.
        steps: Number of steps, one crop each.
        lr: Adam's peak step.
        seconds: Time limit of learning; the schedule ends with it.
        average: Decay of the moving average of the weights; 0 for none.
        back_projections: At most so many back-projections; they end earlier once the residual is as small as the noise.
        ensemble: Whether to average over the turns and reflections that leave the kernel as it is.
        preset: ``"paper"`` is the published training, with a rate that falls where the loss does not; it
            overrides ``crop``, ``steps``, ``lr`` and ``average``. The default has a cosine schedule.
        progress: Show a progress line.

    Returns:
        The image, and the loss of each step (default: of each 50 steps). Interrupted (Ctrl-C), what the network
        had learned by then gave it.

    Raises:
        InputError: If the operator does not lower the resolution, the measurement has another shape, is not finite or
            too small to be degraded once more, or a number is out of range.
        NumericalError: If the loss is not finite.
    """
    if steps < 1 or not lr > 0 or back_projections < 0:
        raise InputError(
            f"Got {steps} steps, lr {lr} and {back_projections} back-projections; steps and lr must be positive, "
            "back-projections 0 or more."
        )
    if preset == "paper":
        crop, steps, lr = PUBLISHED_CROP, PUBLISHED_STEPS, PUBLISHED_LR
    operator = check_low_resolution(likelihood, y)
    pairs = Pairs(operator, y, likelihood.std, crop)
    model = ResidualConvolutions(y.shape[1], width=WIDTH) if network is None else network
    model = model.to(y)
    energy = _Deviation(model)
    if preset == "paper":
        history, interrupted = _fit_as_published(energy, pairs, steps, lr, seconds, progress)
    else:
        record = fit(
            energy,
            pairs,
            steps=steps,
            lr=lr,
            warmup=20,
            average=average,
            budget=seconds,
            progress=progress,
        )
        history, interrupted = record.losses, record.stopped == "interrupted"
    turns = symmetries(operator.kernel) if ensemble else DIHEDRAL[:1]
    with torch.no_grad():
        x = self_ensemble(model, operator.initial(y), turns)
    x = back_project(likelihood, y, x, steps=back_projections)
    return Solution(x, history, len(history), not interrupted, interrupted)


class Pairs:
    """Random pairs of a crop of the measurement and of the interpolated measurement of it; noise anew in each.

    Args:
        operator: The operator that made the measurement.
        y: The measurement.
        std: The standard deviation of the noise.
        crop: Side length of the crops; smaller where the measurement is.

    Raises:
        InputError: If less than a crop of 8 x 8 pixels is left of the degraded measurement.
    """

    def __init__(self, operator: Blur, y: Tensor, std: float | int, crop: int) -> None:
        self.std = std
        rows, columns = operator.kernel.shape
        inside = min(y.shape[2] - rows, y.shape[3] - columns)
        if min(crop, inside) < _LEAST_CROP:
            raise InputError(
                f"The measurement has {y.shape[2]} x {y.shape[3]} pixels, of which a kernel of {rows} x {columns} "
                f"leaves {max(inside, 0)} to learn from, but {_LEAST_CROP} are needed; give a larger measurement or a "
                "smaller kernel."
            )
        # The kernel keeps its orientation, so that all eight teach what this operator does.
        self.fathers = [g(y) for g in DIHEDRAL]
        # Never beyond the border, whatever the operator does there: a crop of an image is not periodic.
        self.operators = [
            Blur(operator.kernel, (f.shape[2], f.shape[3]), "valid", stride=operator.stride)
            for f in self.fathers[:2]  # as it is, and turned: the two shapes
        ]
        self.sons = [self._operator(father)(father) for father in self.fathers]
        covered = self.operators[0].covered
        self.crop = min(crop, *(last - first for first, last in covered))

    def __call__(self) -> tuple[Float[Tensor, "1 c h w"], Float[Tensor, "1 c h w"]]:
        """Draw a pair: what is wanted, and what the network is given."""
        k = int(torch.randint(len(self.fathers), ()))
        father, son = self.fathers[k], self.sons[k]
        operator = self._operator(father)
        given = operator.initial(son + self.std * torch.randn_like(son))
        # Beyond the measured pixels interpolation reflects: nothing to learn from.
        window = []
        for first, last in operator.covered:
            start = first + int(torch.randint(last - first - self.crop + 1, ()))
            window.append(slice(start, start + self.crop))
        return father[:, :, window[0], window[1]], given[:, :, window[0], window[1]]

    def _operator(self, father: Tensor) -> Blur:
        shape = (father.shape[2], father.shape[3])
        return next(operator for operator in self.operators if operator.domain_shape == shape)


class _Deviation(Energy):
    """The mean absolute deviation of a network's output from what is wanted."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Float[Tensor, " batch"]:
        """For what is wanted, ``x``, given the input ``condition``."""
        return (self.network(condition) - x).abs().flatten(1).mean(1)


def _fit_as_published(
    energy: Energy, pairs: Pairs, steps: int, lr: float, seconds: float | int | None, progress: bool
) -> tuple[list[float], bool]:
    """Adam, whose rate is divided by ten where the loss no longer falls; whether it was interrupted."""
    parameters = list(energy.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    history: list[float] = []
    begun, since = time.perf_counter(), 0
    bar = progress_line(total=steps, shown=progress)
    try:
        while len(history) < steps and lr >= _LEAST_LR:
            if seconds is not None and time.perf_counter() - begun > seconds:
                break
            optimizer.zero_grad(set_to_none=True)
            wanted, given = pairs()
            loss = energy(wanted, given).mean()
            history.append(loss.item())
            if not math.isfinite(history[-1]):
                raise NumericalError(
                    f"The loss is {history[-1]} at step {len(history)}; check the data, or use the default preset."
                )
            loss.backward()
            optimizer.step()
            since += 1
            recent = history[-min(since, _SLOPE_RANGE) :]
            if since >= _SLOPE_RANGE and since % _LOOK_EVERY == 0 and is_flat(recent):
                lr, since = lr / 10, 0
                optimizer.param_groups[0]["lr"] = lr
            bar.update()
            bar.set_postfix({"loss": f"{history[-1]:.4f}", "lr": f"{lr:g}"}, refresh=False)
    except KeyboardInterrupt:
        return history, True
    finally:
        bar.close()
        energy.requires_grad_(False)
    return history, False


def is_flat(losses: list[float]) -> bool:
    """Whether a line through the losses does not fall by more than its uncertainty / 1.5 (the published rule)."""
    (slope, _), covariance = np.polyfit(np.arange(len(losses)), losses, 1, cov=True)
    return bool(-_SLOPE_RATIO * slope < math.sqrt(covariance[0, 0]))


@torch.no_grad()
def back_project(
    likelihood: GaussianLikelihood, y: Tensor, x: Tensor, *, steps: int = BACK_PROJECTIONS
) -> Tensor:
    r"""Make an image agree with its measurement: :math:`x \leftarrow x + B(y - A x)`, at most ``steps`` times.

    It ends once the residual is as small as the noise: beyond that, noise would be written into the image.

    Args:
        likelihood: The operator :math:`A`, whose ``initial`` is the interpolation :math:`B`, and the noise.
        y: The measurement.
        x: The image.
        steps: The number of steps.
    """
    for _ in range(steps):
        residual = y - likelihood.operator(x)
        if float(residual.square().mean().sqrt()) <= likelihood.std:
            break
        x = x + likelihood.operator.initial(residual)
    return x
