r"""Learn the posterior of super-resolution from measurements and a reference image alone: WPPFlows.

A conditional flow :math:`T` maps white noise and a measured crop to an image. It is trained by the reverse
Kullback-Leibler divergence to the posterior with the Wasserstein patch prior,

.. math:: E(T) = \mathbb E_y\, \mathbb E_z \Big[ \frac{1}{2 \sigma^2} \|A\, T(z; y) - y\|^2 + w\, R(T(z; y))
                 - \log|\det \nabla_z T(z; y)| \Big],

up to a constant. Published is this times :math:`\sigma^2`, with :math:`\lambda = 100` in front of :math:`W_2^2`: for
crops of 100 x 100 pixels :math:`w = 2 p^2 \lambda / (\sigma^2 N)`, about 8000.

References:
    Altekrueger, Hertrich, "WPPNets and WPPFlows: the power of Wasserstein patch priors for superresolution", SIAM J.
    Imaging Sci. 16(3), 2023, https://arxiv.org/abs/2201.08157
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from patchflow.chains.flow import Flow, PathKL
from patchflow.errors import InputError
from patchflow.fit import Fit, fit
from patchflow.learn_pairs import PairLoss, minus_psnr, validation_pairs
from patchflow.learn_wpp_net import MeasuredCrops, posterior_of
from patchflow.priors.multiscale import MultiscalePrior
from patchflow.problems.resolution import LowResolution
from patchflow.resolution_models import FlowNetwork, SuperResolver

# Samples of each validation image.
_SAMPLES = 8

WEIGHT, CROP, BATCH, LR, AVERAGE = 1000.0, 16, 8, 3e-3, 0.99


def learn_wpp_flow(
    model: SuperResolver,
    measurements: Sequence[Tensor],
    validation: Sequence[Tensor] = (),
    *,
    prior: MultiscalePrior,
    weight: float = WEIGHT,
    crop: int = CROP,
    dihedral: bool = True,
    batch: int = BATCH,
    steps: int = 10_000,
    lr: float = LR,
    average: float = AVERAGE,
    patience: int | None = None,
    seconds: float | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Fit:
    """Train a conditional flow on measurements alone, in float32, and leave it frozen.

    Args:
        model: The model of :func:`patchflow.wpp_flow`, with the operator and the noise that it is trained for.
        measurements: See :func:`patchflow.learn_wpp_net`, also for the other arguments.
        validation: High-resolution images; the PSNR of the mean of samples chooses the best state.
        prior: The prior of a reference image.
        weight: The weight of the prior; it also says how much samples differ.
        crop: Side length of the crops, in measured pixels.
        dihedral: Turn and mirror the crops at random, as far as the kernel stays as it is.
        batch: Crops per step.
        steps: Training steps.
        lr: Peak learning rate of Adam.
        average: Decay of the moving average of the weights; 0 for none.
        patience: Stop early after this many validations without improvement.
        seconds: Time limit; the schedule ends with it.
        checkpoint: File for the training state.
        resume: Continue from ``checkpoint``.
        progress: Show a progress line.

    Returns:
        The record of the run; losses in nats per crop, up to a constant.

    Raises:
        InputError: If the model is no flow, what is given does not fit together, or a number is out of range.
        NumericalError: If the loss is not finite.
    """
    network = model.network
    if not isinstance(network, FlowNetwork):
        raise InputError(
            f"The network is of type {type(network).__name__}, which has no samples; make the model with "
            "patchflow.wpp_flow."
        )
    posterior = posterior_of(model, prior, [*measurements, *validation], weight=weight)
    crops = MeasuredCrops(model, measurements, crop, batch, dihedral=dihedral)
    posterior.start(crop, model.channels)
    known = validation_pairs(validation, LowResolution(model.kernel, model.scale, model.noise))
    pair_loss = PairLoss(_MeanOfSamples(network))
    flow = Flow(network.flow.latent, network.flow.chain, target=posterior)

    def draw() -> tuple[Tensor, Tensor]:
        y = crops()
        return y, y

    return fit(
        PathKL(flow, forward=0.0, reverse=1.0),
        draw,
        steps=steps,
        lr=lr,
        warmup=100,
        average=average,
        validate=(lambda: minus_psnr(pair_loss, known)) if known else None,
        validate_every=min(500, max(25, steps // 40)),
        patience=patience,
        budget=seconds,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )


class _MeanOfSamples(nn.Module):
    """The mean of a few samples of a flow, the same at each call."""

    def __init__(self, network: FlowNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, y: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return torch.stack([self.network(y) for _ in range(_SAMPLES)]).mean(0)
