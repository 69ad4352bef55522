r"""Learn to correct filtered backprojections from images alone: their scans are simulated.

The training loss is an energy of the networks' parameters, the published squared error in units of what is to be
corrected,

.. math:: E(x \mid u_0, z_1, u_1, \dots) = \frac{1}{s^2 n} \big(\|z_1 - x\|^2 + \|z_k - x\|^2\big),

for crops of :math:`n` pixels of an image :math:`x`, with the results :math:`z_k` of the networks
(:mod:`patchflow.scan_network`) and a stage :math:`k > 1` that is drawn anew in each step, if there is one. Of
several networks of a stage each has this loss, and their mean is taken. Where the first stage is total variation, the
first term is missing and :math:`s` is the size of its error. What the later networks are given is made of whole images
by all of them, as they are at that time, and no gradient goes through it; with a random relaxation, if there is one.
Line integrals are computed once; the noise is drawn anew, image by image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.fit import Fit, fit
from patchflow.metrics import psnr
from patchflow.numerics.precision import Precision
from patchflow.problems.simulated_scan import line_integrals, refined, scan_symmetries
from patchflow.problems.tomography import ParallelBeam
from patchflow.progress import progress_line
from patchflow.scan_network import Images, Inputs, ScanNetwork

# The largest norm of gradients. Later stages learn from what earlier ones make: one bad step would be learned from.
_CLIP = 1.0
# The smallest crop that is worth learning from.
_LEAST_CROP = 16
# How often each pixel of a measurement is used where its preparation takes data steps, which cost more than learning.
REUSE = 8
# How often a measurement is prepared anew, by networks that have learned, before its noise is drawn anew where total
# variation is computed of it, which takes longer than all else.
DRAWS = 8
# Where a share of each correction is to be taken, it is a random one, at least this, so that later stages learn from
# errors that are as large as those of images that nothing was learned from.
LEAST_RELAXATION = 0.25


class CorrectionLoss(Energy):
    """The energy of the module, for true images ``x`` given what the networks are given as ``condition``.

    Args:
        model: The model.
    """

    def __init__(self, model: ScanNetwork) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate; see :meth:`Energy.forward`.

        Raises:
            InputError: If there is nothing to correct.
        """
        if condition is None:
            raise InputError("A correction learns from pairs; pass a filtered backprojection.")
        stages, later = [0] * bool(self.model.first), len(self.model.shares)
        if later:
            stages.append(1 + int(torch.randint(later, ())))
        wrong = (self.model.results(condition, stages) - x) / self.model.left
        return wrong.square().flatten(2).mean(2).sum(1) / self.model.members


class SimulatedPairs:
    """Random crops of pairs of an image and what the networks are given of its noisy measurement.

    Crops are turned and mirrored as the scan's symmetries allow, see
    :func:`patchflow.problems.simulated_scan.scan_symmetries`. The measurement of one image after the other is renewed
    at such a rate that each of its pixels is used once on average, or :data:`REUSE` times if there are data steps.
    After total variation only one in :data:`DRAWS` has new noise.

    Args:
        model: The model, which knows the scan.
        images: The images, each (1, 1, height, width).
        fine: The projector on a finer grid, which simulates.
        crop: Side length of the crops.
        batch: Crops per call.
        progress: Show a progress line while total variation is computed of the first measurements.
    """

    def __init__(
        self,
        model: ScanNetwork,
        images: Sequence[Tensor],
        fine: ParallelBeam,
        crop: int,
        batch: int,
        progress: bool = False,
    ) -> None:
        self.model, self.images, self.crop, self.batch = model, list(images), crop, batch
        self.clean = [line_integrals(image, fine) for image in images]
        self.inputs: list[Tensor] = []
        self.turns = scan_symmetries(model.operator)
        self._next, self._used = 0, 0.0
        self._uses = REUSE if len(model.shares) else 1
        self._draws = 1 if model.variation is None else DRAWS
        self._left = [self._draws] * len(self.images)
        self.measured = _all_measured(model, self.clean, progress)

    def _prepare(self, k: int) -> Inputs:
        if self._left[k] == 0:
            self.measured[k], self._left[k] = _measured(self.model, self.clean[k]), self._draws
        self._left[k] -= 1
        y, estimate = self.measured[k]
        if self.model.relaxation == 1:
            return self.model.prepare(y, estimate=estimate)
        relaxations = torch.empty(len(self.model.shares)).uniform_(LEAST_RELAXATION, 1).tolist()
        return self.model.prepare(y, estimate=estimate, relaxations=relaxations)

    def __call__(self) -> tuple[Images, Inputs]:
        """Draw a batch: images, and what the networks are given of them."""
        if not self.inputs:  # not before: a resumed run has read its networks now
            self.inputs = [self._prepare(k) for k in range(len(self.images))]
        height, width = self.model.operator.domain_shape
        self._used += self.batch * self.crop**2 / (height * width)
        while self._used >= self._uses:
            self.inputs[self._next] = self._prepare(self._next)
            self._next, self._used = (self._next + 1) % len(self.images), self._used - self._uses
        pairs = []
        for _ in range(self.batch):
            k, top, left, turn = (
                int(torch.randint(count, ()))
                for count in (
                    len(self.images),
                    height - self.crop + 1,
                    width - self.crop + 1,
                    len(self.turns),
                )
            )
            pair = torch.cat((self.images[k], self.inputs[k]), 1)
            pairs.append(
                self.turns[turn](pair[:, :, top : top + self.crop, left : left + self.crop])
            )
        drawn = torch.cat(pairs)
        return drawn[:, :1], drawn[:, 1:]


def _measured(model: ScanNetwork, clean: Tensor) -> tuple[Tensor, Images | None]:
    """A noisy sinogram, and total variation of it where the model starts there."""
    y, _ = model.noise.draw(clean)
    return y, model.estimate(y)


def _all_measured(
    model: ScanNetwork, clean: Sequence[Tensor], progress: bool
) -> list[tuple[Tensor, Images | None]]:
    shown = progress and model.variation is not None
    line = progress_line(clean, title="total variation", unit="slice", shown=shown)
    return [_measured(model, integrals) for integrals in line]


def learn_scan(
    model: ScanNetwork,
    images: Sequence[Tensor],
    validation: Sequence[Tensor] = (),
    *,
    fine: ParallelBeam | None = None,
    crop: int = 96,
    batch: int = 4,
    steps: int = 20_000,
    lr: float = 2e-3,
    schedule: Literal["cosine", "constant"] = "cosine",
    warmup: int = 50,
    average: float = 0.99,
    patience: int | None = None,
    seconds: float | None = None,
    precision: Precision = "auto",
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Fit:
    """Train the networks of a model on simulated scans of images, and leave them frozen at their best validated state.

    Args:
        model: The model to train, see :func:`patchflow.models.fbp_unet` and :func:`patchflow.models.single_scan`; it
            knows the scan.
        images: Training images, each (1, 1, height, width) of the scan's pixels, in units of the largest attenuation.
        validation: Images to validate on; without them the middle one of the training images is held out.
        fine: The projector on a finer grid, which simulates; by default on twice as many pixels along a side.
        crop: Side length of the crops; smaller where the images are.
        batch: Crops per step.
        steps: Training steps.
        lr: Peak learning rate of Adam.
        schedule: ``"cosine"`` decay after the warm-up, or ``"constant"``.
        warmup: Steps of linear warm-up.
        average: Decay of the moving average of the weights; 0 for none.
        patience: Stop early after this many validations without improvement.
        seconds: Time limit, after the first total variation; the schedule ends with it.
        precision: Precision of the network during training.
        checkpoint: File for the training state.
        resume: Continue from ``checkpoint``; the noise is drawn anew.
        progress: Show a progress line.

    Returns:
        The record of the run; its validation values are minus the mean PSNR in decibels of whole images, each with
        its own range.

    Raises:
        InputError: If the images do not have the pixels of the scan, there is none to validate on, or a number is out
            of range.
    """
    shape = model.operator.domain_shape
    for image in (*images, *validation):
        if tuple(image.shape) != (1, 1, *shape):
            raise InputError(
                f"An image has the shape {tuple(image.shape)} but the scan is of one grey image of {shape[0]} x "
                f"{shape[1]} pixels; crop or resample it, or make a model of its pixels."
            )
    if len(images) < (1 if validation else 2):
        raise InputError(
            f"There are {len(images)} training images and none to validate on; give at least two, or images for the "
            "validation."
        )
    crop = min(crop, *shape)
    if crop < _LEAST_CROP or batch < 1 or steps < 1:
        raise InputError(
            f"Got crops of {crop} x {crop}, {batch} of them in each of {steps} steps; use at least {_LEAST_CROP} "
            "pixels and one of each."
        )
    if not validation:
        middle = len(images) // 2
        validation = images[middle : middle + 1]
        images = [*images[:middle], *images[middle + 1 :]]
    if fine is None:
        fine = refined(model.operator, (2 * shape[0], 2 * shape[1]))
    # The same whatever the seed: a resumed run has the same scales and the same validation.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        held = _all_measured(model, [line_integrals(x, fine) for x in validation], progress)
        pairs = SimulatedPairs(model, images, fine, crop, batch, progress)
    del fine  # its matrices may be large
    estimates = [estimate for _, estimate in pairs.measured if estimate is not None]
    model.scale_(
        torch.cat([model.backproject(y) for y, _ in pairs.measured]),
        torch.cat(list(images)),
        torch.cat(estimates) if estimates else None,
    )

    def validate() -> float:
        values = [
            psnr(model(y, estimate=estimate), x, float(x.max() - x.min()))
            for x, (y, estimate) in zip(validation, held, strict=True)
        ]
        return -float(torch.cat(values).mean())

    return fit(
        CorrectionLoss(model),
        pairs,
        steps=steps,
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        average=average,
        clip=_CLIP,
        validate=validate,
        validate_every=min(250, max(25, steps // 40)),
        patience=patience,
        budget=seconds,
        precision=precision,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )
