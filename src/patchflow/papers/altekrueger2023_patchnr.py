r"""PatchNR: learning from very few images by patch normalizing flow regularization (2023).

The paper's numbers and choices, and nothing else. Its objective for super-resolution is, as coded by its authors,

.. math:: \|f(x) - y\|^2 + \lambda \frac{1}{N} \sum_{i=1}^{N} E(P_i x),

a sum over pixels against a mean over patches; the library's is :math:`\frac{1}{2\sigma^2}\|f(x) - y\|^2 + w\,
R(x)` with
:math:`R(x) = \frac{1}{p^2} \sum_i E(P_i x)`. They have the same minimisers for
:math:`w = \frac{\lambda}{2 \sigma^2} \frac{p^2}{N}`.

References:
    Altekrueger, Denker, Hagemann, Hertrich, Maass, Steidl, Inverse Problems 39(6), 2023, https://arxiv.org/abs/2205.12021
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from patchflow.chains.kernel import Chain
from patchflow.errors import InputError
from patchflow.models import patch_nr
from patchflow.numerics.patches import grid_shape
from patchflow.priors.patch import PatchPrior
from patchflow.problems.likelihood import Likelihood
from patchflow.reconstruct import variational
from patchflow.solution import Solution

SIZE = 6
NOISE = 0.01
LAMBDA = 0.15
STEPS = 300
STEP_SIZE = 0.03
RANDOM_PATCHES = 130_000
TRAINING_STEPS = 750_000
TRAINING_BATCH = 32
TRAINING_LR = 1e-4
# Pixels removed on each side before the metrics are taken.
CROP = 40

# Computed tomography: the weight of the mean over patches against the Poisson likelihood in nats, and the reflected
# pixels around the image.
CT_LAMBDA = 700.0
CT_PADDING = 4
# Its procedure: steps for all angles and where some are missing, and what each step takes.
CT_STEPS, CT_LIMITED_STEPS = 300, 3000
CT_STEP_SIZE = 0.005
CT_RANDOM_PATCHES = 40_000

# Super-resolution of the material, x4, means over 100 images; SSIM with data range 1.
PUBLISHED = {
    "bicubic": {"psnr": 25.63, "ssim": 0.699, "lpips": 0.406},
    "dpir": {"psnr": 27.78, "ssim": 0.770, "lpips": 0.322},
    "dip-tv": {"psnr": 27.99, "ssim": 0.764, "lpips": 0.191},
    "epll": {"psnr": 28.11, "ssim": 0.779, "lpips": 0.244},
    "wpp": {"psnr": 27.80, "ssim": 0.749, "lpips": 0.167},
    "patchnr": {"psnr": 28.53, "ssim": 0.780, "lpips": 0.159},
    "acnn": {"psnr": 28.89, "ssim": 0.804, "lpips": 0.203},
}

# Zero-shot super-resolution x2, means over the 68 photographs of BSD68; SSIM with data range 1.
PUBLISHED_ZERO_SHOT = {
    "tv": {"psnr": 28.35, "ssim": 0.820, "lpips": 0.184},
    "dip-tv": {"psnr": 28.44, "ssim": 0.821, "lpips": 0.215},
    "zssr": {"psnr": 28.83, "ssim": 0.834, "lpips": 0.224},
    "dual-sr": {"psnr": 28.64, "ssim": 0.829, "lpips": 0.216},
    "patchnr": {"psnr": 29.08, "ssim": 0.846, "lpips": 0.202},
}


def weight_of_lambda(
    shape: tuple[int, int], *, noise: float = NOISE, lam: float = LAMBDA, size: int = SIZE
) -> float:
    r"""The library's weight :math:`w` of the paper's :math:`\lambda` for images of a shape.

    Args:
        shape: Height and width of the reconstructed image.
        noise: Standard deviation of the measurement noise.
        lam: The paper's :math:`\lambda`.
        size: Side length of the patches.
    """
    rows, columns = grid_shape(shape, size)
    return lam / (2 * noise**2) * size**2 / (rows * columns)


def weight_of_mean(lam: float, shape: tuple[int, int], prior: PatchPrior) -> float:
    r"""The library's weight :math:`w = \lambda p^2 / N` where the data term of the paper is in nats.

    Args:
        lam: The paper's :math:`\lambda`, the weight of the mean over patches.
        shape: Height and width of the reconstructed image.
        prior: The patch prior, for its patch size and padding.
    """
    height, width = (extent + 2 * prior.padding for extent in shape)
    rows, columns = grid_shape((height, width), prior.size)
    return lam * prior.size**2 / (rows * columns)


def reconstruct_ct(
    likelihood: Likelihood,
    prior: PatchPrior,
    y: Tensor,
    init: Tensor,
    *,
    weight: float | None = None,
    steps: int = CT_STEPS,
    callback: Callable[[int, Tensor, float], Mapping[str, str] | None] | None = None,
    progress: bool = False,
) -> Solution:
    r"""The published procedure of computed tomography: Adam at a constant 0.005, each step on 40,000 random patches.

    Args:
        likelihood: The data term, a projector with Poisson noise.
        prior: The patch prior; ``patch_nr(preset="paper", padding=4)`` for the published one.
        y: Sinograms.
        init: The start image, filtered backprojection with the Hann window: ``operator.initial(y)``.
        weight: The library's weight; by default that of the paper's :math:`\lambda` = 700.
        steps: :data:`CT_STEPS`, or :data:`CT_LIMITED_STEPS` where angles are missing.
        callback: See :func:`patchflow.solve.minimize`.
        progress: Show a progress line.
    """
    if weight is None:
        weight = weight_of_mean(CT_LAMBDA, (init.shape[2], init.shape[3]), prior)
    return variational.reconstruct(
        likelihood,
        prior,
        y,
        init,
        weight=weight,
        steps=steps,
        lr=CT_STEP_SIZE,
        schedule="constant",
        random_patches=CT_RANDOM_PATCHES,
        callback=callback,
        progress=progress,
    )


def load_published(state: Mapping[str, Tensor]) -> PatchPrior:
    """A patch prior with published weights.

    Args:
        state: The state dict of the published network (FrEIA 0.2: keys ``module_list.K.subnet1.0.weight``, ...), as the
            user loaded it.

    Returns:
        The prior, frozen.

    Raises:
        InputError: If a tensor is missing or has another shape.
    """
    prior = patch_nr(preset="paper")
    chain = prior.patch_energy.get_submodule("chain")
    assert isinstance(chain, Chain)
    for k in range(len(chain)):
        kernel = chain[k]
        # FrEIA numbers the blocks and permutations in order and calls our net1 and net2 subnet1 and subnet2.
        names = {
            key: f"module_list.{k}."
            + key.replace("net", "subnet").replace("order", "perm").replace("inverse", "perm_inv")
            for key in kernel.state_dict()
        }
        missing = [name for name in names.values() if name not in state]
        if missing:
            raise InputError(
                f"The published weights lack {missing[0]!r}; give the state dict of the authors' 5-block network."
            )
        try:
            kernel.load_state_dict(
                {key: torch.as_tensor(state[name]) for key, name in names.items()}
            )
        except RuntimeError as error:
            raise InputError(
                f"The published weights do not fit block {k}: {str(error).splitlines()[-1].strip()}"
            ) from error
    prior.requires_grad_(False)
    return prior
