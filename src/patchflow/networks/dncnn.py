r"""DnCNN: a plain chain of convolutions that predicts the noise, :math:`D(x) = x - f(x)`.

References:
    Zhang, Zuo, Chen, Meng, Zhang, "Beyond a Gaussian denoiser: residual learning of deep CNN for image denoising",
    2017, https://arxiv.org/abs/1608.03981
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.errors import InputError
from patchflow.io.checkpoint import read_tensors
from patchflow.networks.denoiser import Denoiser, Images, level_of


class DnCNN(Denoiser):
    r"""DnCNN without batch normalisation, as its weights are published with the statistics merged into them.

    It was made for one noise level; for others the image is scaled, see :mod:`patchflow.networks.denoiser`.

    Args:
        channels: Channels of the images.
        level: The noise level :math:`\sigma_0`.
        layers: Number of 3 x 3 convolutions, at least 2.
        width: Channels between them.

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        level: float | int = 25 / 255,
        layers: int = 17,
        width: int = 64,
    ) -> None:
        super().__init__(channels, (level, level))
        if layers < 2 or width < 1:
            raise InputError(f"Got {layers} layers of width {width}; use at least 2 of at least 1.")
        inputs = [channels, *[width] * (layers - 1)]
        outputs = [*inputs[1:], channels]
        parts: list[nn.Module] = []
        for i, o in zip(inputs, outputs, strict=True):
            parts += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU()]
        # The names of the published weights.
        self.model = nn.Sequential(*parts[:-1])

    def forward(self, x: Images, std: float | int | Float[Tensor, " batch"]) -> Images:
        """Remove noise; see :meth:`Denoiser.forward`."""
        scale = self.levels[1] / level_of(x, std)
        return x - self.model(scale * x) / scale


def read_dncnn(path: str | Path) -> tuple[dict[str, Tensor], int]:
    """Read published weights of a DnCNN: ``model.0.weight``, ``model.2.weight``, ... in a safetensors file.

    Args:
        path: The file.

    Returns:
        The weights, and the number of convolutions.

    Raises:
        InputError: If the file is none, or holds something else.
    """
    state = read_tensors(path)
    layers = sum(key.endswith(".weight") for key in state)
    expected = {f"model.{2 * k}.{part}" for k in range(layers) for part in ("weight", "bias")}
    if layers < 2 or set(state) != expected:
        raise InputError(
            f"{path} does not hold a DnCNN (model.0.weight, model.0.bias, model.2.weight, ...); give such a file, or a "
            "model of patchflow train denoiser."
        )
    if not all(bool(torch.isfinite(value).all()) for value in state.values()):
        raise InputError(f"{path} holds weights that are not finite; download it again.")
    return state, layers
