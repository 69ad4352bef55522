"""Premade models and their files: what rebuilds a model, and its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from patchflow.denoiser_models import dncnn as dncnn
from patchflow.denoiser_models import drunet as drunet
from patchflow.denoiser_models import load_dncnn as load_dncnn
from patchflow.denoiser_models import pnn as pnn
from patchflow.errors import InputError
from patchflow.flow_models import continuous_flow as continuous_flow
from patchflow.flow_models import proximal_residual_flow as proximal_residual_flow
from patchflow.flow_models import residual_flow as residual_flow
from patchflow.generative_models import patch_gan as patch_gan
from patchflow.generative_models import patch_vae as patch_vae
from patchflow.image_models import single_image as single_image
from patchflow.io.checkpoint import ModelHeader, load_into, load_model, save_model
from patchflow.io.images import fingerprint
from patchflow.patch_models import alr as alr
from patchflow.patch_models import coupling_flow as coupling_flow
from patchflow.patch_models import epll as epll
from patchflow.patch_models import local_ar as local_ar
from patchflow.patch_models import patch_nr as patch_nr
from patchflow.patch_models import student_t as student_t
from patchflow.patch_models import wpp as wpp
from patchflow.resolution_models import acnn as acnn
from patchflow.resolution_models import wpp_flow as wpp_flow
from patchflow.resolution_models import wpp_net as wpp_net
from patchflow.tomography_models import fbp_unet as fbp_unet
from patchflow.tomography_models import single_scan as single_scan

Model = TypeVar("Model", bound=nn.Module)

_MODELS = {
    make.__name__: make
    for make in (
        acnn,
        alr,
        continuous_flow,
        coupling_flow,
        dncnn,
        drunet,
        epll,
        fbp_unet,
        local_ar,
        patch_gan,
        patch_nr,
        patch_vae,
        pnn,
        proximal_residual_flow,
        residual_flow,
        single_image,
        single_scan,
        student_t,
        wpp,
        wpp_flow,
        wpp_net,
    )
}


def save(
    path: str | Path,
    model: nn.Module,
    *,
    images: Sequence[Tensor] = (),
    seed: int | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a premade model to a file: its parameters, and what rebuilds it.

    Args:
        path: The file, usually ``*.safetensors``.
        model: What a function of this module returned.
        images: The training images; their fingerprints are kept, not their pixels.
        seed: The seed of the training.
        training: What else is worth knowing about the training: JSON values.

    Raises:
        InputError: If the model is not a premade one, or the disk refuses.
    """
    made_by = vars(model).get("made_by")
    if made_by is None:
        raise InputError(
            f"A {type(model).__name__} composed by hand has no name that rebuilds it; "
            "save a premade model, or use save_model with a header of your own."
        )
    name, arguments = made_by
    told = {**(training or {}), "images": [fingerprint([image]) for image in images]}
    header = ModelHeader(name, arguments, fingerprint(images), seed, told)
    save_model(path, model.state_dict(), header)


def load(path: str | Path, kind: type[Model]) -> Model:
    """Read a premade model from its file, frozen.

    >>> import pathlib, tempfile
    >>> from patchflow.priors.patch import PatchPrior
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "prior.safetensors"
    >>> save(path, patch_nr(size=3, hidden=8))
    >>> load(path, PatchPrior).size
    3

    Args:
        path: The file.
        kind: What it should be: ``PatchPrior`` for a patchNR, ``Flow`` for a coupling flow.

    Raises:
        InputError: If the file is missing, not a model file, truncated, of a newer version, or another model.
    """
    header, state = load_model(path)
    if header.model not in _MODELS:
        raise InputError(
            f"{path} holds the model {header.model!r}, which this patchflow does not know; upgrade patchflow, "
            f"or give a file of one of {', '.join(_MODELS)}."
        )
    try:
        model = _MODELS[header.model](**dict(header.arguments))
    except TypeError as error:
        raise InputError(
            f"{path} has arguments that this patchflow does not know ({error}); upgrade patchflow, or train it again."
        ) from error
    if not isinstance(model, kind):
        raise InputError(
            f"{path} holds the model {header.model}, but a {kind.__name__} is needed: give a file of that kind, "
            "or train one."
        )
    load_into(model, state, path)
    return model.requires_grad_(False)
