"""Premade denoisers by name: functions that compose public parts, with the literature's names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from patchflow.errors import InputError
from patchflow.io.checkpoint import load_into
from patchflow.networks.dncnn import DnCNN, read_dncnn
from patchflow.networks.drunet import PUBLISHED_BLOCKS, PUBLISHED_WIDTHS, WIDTHS, DRUNet
from patchflow.networks.proximal import Activation
from patchflow.networks.proximal_convolution import ConvolutionalProximalNetwork
from patchflow.networks.proximal_denoiser import ProximalDenoiser

Model = TypeVar("Model", bound=nn.Module)


def drunet(
    *,
    channels: int = 1,
    widths: Sequence[int] = WIDTHS,
    blocks: int = 1,
    cell: int = 2,
    low: float = 0.0,
    high: float = 50 / 255,
    preset: str = "default",
) -> DRUNet:
    """A small DRUNet, the denoiser of ``dpir``; train it with :func:`patchflow.learn_denoiser`.

    Args:
        channels: Channels of the images.
        widths: Channels of each scale, finest first.
        blocks: Residual blocks of each scale, on either way.
        cell: Pixels along a side of the cells that are the finest scale.
        low: The smallest noise level to train for.
        high: The largest.
        preset: ``"paper"`` is the published network, of 32 million weights; it overrides ``widths``, ``blocks`` and
            ``cell``.

    Raises:
        InputError: If a number is out of range, or there is no such preset.

    References:
        Zhang, Li, Zuo, Zhang, Van Gool, Timofte, "Plug-and-play image restoration with deep denoiser prior", 2021,
        https://arxiv.org/abs/2008.13751
    """
    arguments = dict(locals()) | {"widths": list(widths)}
    if preset not in ("default", "paper"):
        raise InputError(f"The preset is {preset!r}; use 'default' or 'paper'.")
    if preset == "paper":
        widths, blocks, cell = PUBLISHED_WIDTHS, PUBLISHED_BLOCKS, 1
    model = DRUNet(channels=channels, widths=widths, blocks=blocks, cell=cell, levels=(low, high))
    return _named(model, "drunet", arguments)


def pnn(
    *,
    channels: int = 1,
    level: float = 25 / 255,
    gamma: float | None = None,
    width: int = 8,
    features: int = 32,
    size: int = 5,
    layers: int = 4,
    activation: Activation | None = None,
) -> ProximalDenoiser:
    r"""A convolutional proximal neural network as a denoiser; train it with :func:`patchflow.learn_denoiser`.

    Published are 8 layers of width 64, 128 features and filters of 11 x 11 with ``activation="relu"`` and
    :math:`\gamma` of 1, 1.99, 5 or 10, on a graphics card; their lift copies the image, this one is learned.

    Args:
        channels: Channels of the images.
        level: The noise level that it is made for.
        gamma: The factor of the residual form; None for the direct form, which is averaged and therefore converges in
            plug and play. See :class:`patchflow.networks.proximal_denoiser.ProximalDenoiser`.
        width: Channels between the layers.
        features: Filters of each layer.
        size: Side length of the filters.
        layers: Number of layers.
        activation: See :class:`patchflow.networks.proximal.StableActivation`. By default ``"shrink"``, and ``"clip"``
            for the residual form, where one layer with :math:`\gamma = 1` is then shrinkage of the features.

    Raises:
        InputError: If a number is out of range.

    References:
        Hertrich, Neumayer, Steidl, "Convolutional proximal neural networks and plug-and-play algorithms", 2021,
        https://arxiv.org/abs/2011.02281
    """
    if activation is None:
        activation = "shrink" if gamma is None else "clip"
    arguments = dict(locals())
    network = ConvolutionalProximalNetwork(
        channels=channels,
        width=width,
        features=features,
        size=size,
        layers=layers,
        activation=activation,
    )
    model = ProximalDenoiser(network, channels=channels, level=level, gamma=gamma)
    return _named(model, "pnn", arguments)


def dncnn(
    *, channels: int = 1, level: float = 25 / 255, layers: int = 17, width: int = 64
) -> DnCNN:
    """DnCNN; see :class:`patchflow.networks.dncnn.DnCNN`, and :func:`load_dncnn` for published weights.

    Args:
        channels: Channels of the images.
        level: The noise level that it is made for.
        layers: Number of convolutions.
        width: Channels between them.

    Raises:
        InputError: If a number is out of range.

    References:
        Zhang, Zuo, Chen, Meng, Zhang, "Beyond a Gaussian denoiser: residual learning of deep CNN for image denoising",
        2017, https://arxiv.org/abs/1608.03981
    """
    arguments = dict(locals())
    model = DnCNN(channels=channels, level=level, layers=layers, width=width)
    return _named(model, "dncnn", arguments)


def load_dncnn(path: str | Path, *, level: float = 25 / 255) -> DnCNN:
    """Read published weights of a DnCNN from a safetensors file, frozen.

    Args:
        path: The file, such as ``dncnn_25.safetensors``: keys ``model.0.weight``, ``model.0.bias``, ...
        level: The noise level that they were trained for.

    Raises:
        InputError: If the file is missing, damaged, or holds something else.
    """
    state, layers = read_dncnn(path)
    first = state["model.0.weight"]
    model = dncnn(channels=first.shape[1], level=level, layers=layers, width=first.shape[0])
    load_into(model, state, path)
    return model.requires_grad_(False)


def _named(model: Model, name: str, arguments: dict[str, Any]) -> Model:
    model.made_by = (name, arguments)  # pyright: ignore[reportArgumentType]
    return model
