r"""The deep image prior with total variation: an untrained network is fitted to one measurement.

.. math:: \hat x = G_{\hat\theta}(z), \qquad
          \hat\theta \in \arg\min_\theta \; -\log p(y \mid G_\theta(z)) + w\,\mathrm{TV}(G_\theta(z)),

with fixed noise :math:`z`. Nothing is learned from other images. The network takes up structure sooner than noise, and
therefore fewer steps regularise more: either total variation holds the noise back, or the steps stop early. The
criterion for that is the variance of the last :math:`W` images,

.. math:: V_k = \frac{1}{W n} \sum_{j=k-W+1}^{k} \|x_j - \bar x_k\|^2, \qquad
          \bar x_k = \frac1W \sum_{j=k-W+1}^{k} x_j,

over :math:`n` pixels: it falls while structure settles and rises when noise is taken up.

References:
    Ulyanov, Vedaldi, Lempitsky, "Deep image prior", 2018, https://arxiv.org/abs/1711.10925
    Baguer, Leuschner, Schmidt, "Computed tomography reconstruction using deep image prior and learned reconstruction
    methods", 2020, https://arxiv.org/abs/2003.04989
    Wang, Li, Zhuang, Chen, Liang, Sun, "Early stopping for deep image prior", 2021, https://arxiv.org/abs/2112.06074
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.errors import InputError, NumericalError
from patchflow.networks.skip import SkipNet
from patchflow.numerics.precision import Precision, autocast
from patchflow.priors.variation import TotalVariation
from patchflow.problems.likelihood import Likelihood
from patchflow.problems.operator import Operator
from patchflow.progress import progress_line
from patchflow.solution import Solution

# For one core: chosen on the validation image of super-resolution x4 (600 x 600, noise 0.01), where bicubic
# interpolation has 25.86 dB and total variation 27.86. Seconds of one core of an AMD EPYC with AVX512-BF16, seed 0:
#   learned input  100 steps  27.7 dB   33 s;  200 steps  28.0   65 s;  300 steps  28.2  100 s;  500 steps  28.2  169 s
#   fixed input    500 steps  27.6 dB  151 s;  800 steps  28.0  229 s
# Seed 1 gives 28.13 dB after 300 steps, seed 0 28.18. Tried, mostly on a crop of 300 x 300: 16 to 64 channels, 4 to 32
# skip channels (4 are .3 to .5 dB worse, the published ones 1.5 dB), 1 to 32 inputs, lr .003 to .02, clips .03 to 1
# (none at all is 1.7 dB worse with lr .02), weights 2 to 6, inputs perturbed anew (.6 dB worse after 300 steps), and
# bicubic interpolation as input (worse).
CHANNELS, SKIP, INPUTS = (16, 16, 32, 32, 32, 32), (0, 16, 16, 16, 16, 16), 16
STEPS, LR, CLIP, AVERAGE, DEFAULT_WEIGHT = 300, 5e-3, 0.1, 0.9, 4.0

# Baguer, Leuschner and Schmidt, for low-dose tomography of LoDoPaB (images in [0, 1], Poisson noise), with a
# :class:`SkipNet` as it is by default, a fixed input, constant steps, anisotropic variation and no average; see
# github.com/oterobaguer/dip-ct-benchmark. Their gradient is that of the sum over pixels and always clipped. They also
# clamp the weights of the network to +-1000, which 17,000 steps of 5e-4 cannot reach.
PUBLISHED_STEPS, PUBLISHED_LR, PUBLISHED_TOMOGRAPHY_WEIGHT = 17_000, 5e-4, 7.0

# The standard deviation of the input, as published.
INPUT_STD = 0.1
# Of Wang et al.: the number of images whose variance is watched. Their patience for denoising is 1000.
WINDOW = 100


@torch.enable_grad()  # also within choose_weight
def reconstruct(
    likelihood: Likelihood,
    y: Tensor,
    *,
    weight: float | int = DEFAULT_WEIGHT,
    network: nn.Module | None = None,
    z: Float[Tensor, "batch inputs height width"] | None = None,
    shape: tuple[int, int] | None = None,
    isotropic: bool = True,
    steps: int = STEPS,
    lr: float = LR,
    schedule: Literal["cosine", "constant"] = "cosine",
    clip: float = CLIP,
    learn_input: bool = True,
    perturbation: float = 0.0,
    average: float = AVERAGE,
    patience: int | None = None,
    window: int = WINDOW,
    precision: Precision = "auto",
    callback: Callable[[int, Tensor, float], Mapping[str, str] | None] | None = None,
    progress: bool = False,
) -> Solution:
    r"""Fit a network to one measurement by Adam.

    Args:
        likelihood: :math:`-\log p(y \mid x)`, with any forward model that autograd can differentiate.
        y: The measurement, of batch size one.
        weight: The weight :math:`w`, in nats per unit of variation; 0 for the original deep image prior.
        network: The network :math:`G`, fitted in place; by default a new one of :data:`CHANNELS` for those of
            ``y``. ``SkipNet()`` is the published one: 14 times the time per step.
        z: The fixed input; by default noise for the input channels of a :class:`SkipNet`.
        shape: Height and width of the image; by default those that the operator takes.
        isotropic: See :class:`patchflow.priors.variation.TotalVariation`; published is anisotropic.
        steps: Number of steps.
        lr: Adam's (peak) step.
        schedule: ``"constant"`` as published, or ``"cosine"``, which decays from ``lr`` to zero.
        clip: The largest norm of the gradient of the energy per pixel.
        learn_input: Fit ``z`` together with the network, an option of Ulyanov et al.: a quarter of the steps, but a
            weaker prior. Baguer et al. keep it fixed.
        perturbation: Standard deviation of noise that is added to ``z`` anew in each step (Ulyanov et al.).
        average: Decay of an exponential moving average of the images, which is taken instead of one image; or 0.
        patience: Stop when the variance of the last images was not lowered for so many steps; ``None``: do not. Meant
            for constant steps, weak weights and ``average`` as it is.
        window: Number :math:`W` of these images; they are kept in memory.
        precision: See :func:`patchflow.numerics.precision.autocast`.
        callback: Called after each step with its number, the image (or average) and the energy before the step; what it
            returns is shown in the progress line.
        progress: Show a progress line.

    Returns:
        The image of lowest energy, or the last average; with ``patience`` the image or average where the variance was
        smallest. The energies along the way, and whether ``patience`` stopped it (None without). When interrupted
        (Ctrl-C), the best so far.

    Raises:
        InputError: If the measurement has another batch size, the size of the image is not known or not that of
            ``z``, or a number is out of range.
        NumericalError: If the energy is not finite.
    """
    if len(y) != 1:
        raise InputError(
            f"The measurement has a batch of {len(y)} but one network is fitted to one image; call once for each."
        )
    if not (0 <= weight < math.inf and steps >= 1 and lr > 0 and clip > 0 and perturbation >= 0):
        raise InputError(
            f"Got weight {weight}, {steps} steps, lr {lr}, clip {clip} and perturbation {perturbation}; weight and "
            "perturbation must not be negative, the others must be positive."
        )
    if not 0 <= average < 1:
        raise InputError(f"The decay of the average is {average} but must be in [0, 1), e.g. 0.99.")
    if patience is not None and not (patience >= 1 and 2 <= window <= steps):
        raise InputError(
            f"Got patience {patience} and a window of {window} images for {steps} steps; patience must be at least 1, "
            "the window between 2 and the number of steps."
        )
    model = network
    if model is None:
        model = _default_network(likelihood, y, shape)
    z = _fixed_input(likelihood, model, z, shape)
    # On CPUs convolutions are 1.2 to 1.5 times faster with the channels last.
    # The stubs lack this form of `to`.
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore
    z = z.contiguous(memory_format=torch.channels_last)
    z = z.clone().requires_grad_(learn_input)
    parameters = [*model.parameters(), *([z] if learn_input else [])]
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    energy = likelihood + weight * TotalVariation(isotropic=isotropic)
    spread = MovingVariance(window) if patience is not None else None
    history: list[float] = []
    kept = mean = None
    best, since, converged, interrupted = math.inf, 0, False, False
    bar = progress_line(total=steps, shown=progress)
    try:
        for step in range(steps):
            if schedule == "cosine":
                optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            noisy = z + perturbation * torch.randn_like(z) if perturbation else z
            with autocast(z, precision):
                x = model(noisy).to(y.dtype)
            value = energy(x, y).sum()
            history.append(value.item())
            if not math.isfinite(history[-1]):
                raise NumericalError(
                    f"The energy is {history[-1]} at step {step}; try a smaller lr than {lr:g}, or check the data."
                )
            # Per pixel, so that the clipping does not depend on the size of the image.
            optimizer.zero_grad(set_to_none=True)
            (value / x.numel()).backward()
            nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            x = x.detach()
            # As in fit: the decay grows to its value, so that the start is forgotten.
            decay = min(average, (1 + step) / (10 + step))
            mean = x if mean is None else torch.lerp(x, mean, decay)
            # Without patience, the latest average is the best one.
            score = float(-step) if average else history[-1]
            if spread is not None:
                score = spread.push(x)
            since += 1
            if score < best or best == math.inf:
                best, kept, since = score, mean, 0
            shown = {"energy": f"{history[-1]:.5g}"}
            if callback is not None:
                shown |= callback(step, mean, history[-1]) or {}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            converged = patience is not None and since >= patience
            if converged:
                break
    except KeyboardInterrupt:
        # What has been computed is worth keeping; the caller sees it.
        interrupted = True
        if kept is None:
            raise
    finally:
        bar.close()
    assert kept is not None
    stopped = None if patience is None else converged
    return Solution(kept.contiguous(), history, len(history), stopped, interrupted)


class MovingVariance:
    r"""The variance of the last :math:`W` images around their mean, per pixel; see the module.

    Args:
        window: The number :math:`W`.
    """

    def __init__(self, window: int) -> None:
        self.images: deque[Tensor] = deque(maxlen=window)
        self.window = window

    def push(self, x: Tensor) -> float:
        """Add an image and return the variance; infinity until the window is full."""
        # Running sums, in double precision because they are differences of large numbers.
        new = x.double()
        if not self.images:
            self.sum, self.squares = torch.zeros_like(new), new.new_zeros(())
        if len(self.images) == self.window:
            old = self.images[0].double()
            self.sum -= old
            self.squares -= old.square().sum()
        self.images.append(x)
        self.sum += new
        self.squares += new.square().sum()
        if len(self.images) < self.window:
            return math.inf
        variance = self.squares / self.window - (self.sum / self.window).square().sum()
        return float(variance / x.numel())


def _default_network(likelihood: Likelihood, y: Tensor, shape: tuple[int, int] | None) -> SkipNet:
    """As many scales of the default network as the image allows."""
    scales = len(CHANNELS)
    if shape is None and isinstance(likelihood.operator, Operator):
        shape = likelihood.operator.domain_shape
    if shape is not None:
        scales = max(1, min(scales, (min(shape) - 1).bit_length() - 1))
    channels, skip = CHANNELS[:scales], SKIP[:scales]
    return SkipNet(channels=channels, skip=skip, in_channels=INPUTS, out_channels=y.shape[1]).to(y)


def _fixed_input(
    likelihood: Likelihood,
    network: nn.Module,
    z: Tensor | None,
    shape: tuple[int, int] | None,
) -> Tensor:
    """The input of the network, in the type of its weights."""
    like = next(network.parameters())
    if shape is None and isinstance(likelihood.operator, Operator):
        shape = likelihood.operator.domain_shape
    if z is not None:
        if shape is not None and (len(z) != 1 or tuple(z.shape[2:]) != tuple(shape)):
            raise InputError(
                f"The input has shape {tuple(z.shape)} but the image {shape[0]} x {shape[1]} pixels; give one input "
                "of that size."
            )
        return z.to(like)
    if shape is None or not isinstance(network, SkipNet):
        raise InputError(
            f"The input of a {type(network).__name__} for an operator {type(likelihood.operator).__name__} is not "
            "known; give z, or a SkipNet and the shape of the image."
        )
    return INPUT_STD * torch.randn(1, network.in_channels, *shape).to(like)
