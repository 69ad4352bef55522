"""Model files and training states there and back, and a sentence for every other file."""

from __future__ import annotations

import errno
import json
import math
import os

import pytest
import safetensors.torch
import torch
from torch import nn

import patchflow as pf
from patchflow.errors import InputError
from patchflow.io import checkpoint
from patchflow.io.checkpoint import (
    ModelHeader,
    load_into,
    load_model,
    load_state,
    read_header,
    read_tensors,
    save_model,
    save_state,
)

HEADER = ModelHeader(
    model="patch_nr",
    arguments={"size": 6, "hidden": 256, "clamp": 1.6, "dihedral": True},
    fingerprint="ab" * 32,
    seed=3,
    training={"steps": 100, "losses": [-1.5, -2.5]},
)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, dtype=torch.float32), nn.BatchNorm1d(4))


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "prior.safetensors"
    save_model(path, small_net().state_dict(), HEADER)
    return path


def test_round_trip(model_file):
    header, state = load_model(model_file, expected="patch_nr")
    assert header == HEADER
    assert read_header(model_file) == HEADER
    net, other = small_net(), small_net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_into(other, state, model_file)
    for key, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
        assert state[key].dtype == value.dtype


def test_it_is_a_plain_safetensors_file(model_file):
    with safetensors.safe_open(model_file, "pt") as file:
        document = json.loads(file.metadata()["patchflow"])
    assert document["format"] == "patchflow-model"
    assert document["format_version"] == 1
    assert document["model"] == "patch_nr"
    assert document["library_version"]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_tensor_types_views_and_shared_memory(tmp_path, dtype):
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4).to(dtype)
    state = {"base": base, "view": base.T, "same": base, "scalar": base[0, 1], "none": base[:0]}
    save_state(tmp_path / "s", state, {})
    back, _ = load_state(tmp_path / "s")
    for key, value in state.items():
        assert torch.equal(back[key], value)
        assert back[key].dtype == dtype


def test_state_round_trip(tmp_path):
    document = {"step": 17, "best": math.inf, "nested": {"lr": [1e-3, None, "ä"]}}
    tensors = {"rng": torch.get_rng_state(), "m": torch.randn(3, dtype=torch.float64)}
    save_state(tmp_path / "state", tensors, document)
    back, read = load_state(tmp_path / "state")
    assert read == document
    assert torch.equal(back["rng"], tensors["rng"])
    assert torch.equal(back["m"], tensors["m"])


def test_header_is_read_without_the_tensors(tmp_path, monkeypatch):
    path = tmp_path / "big"
    save_model(path, {"w": torch.zeros(1000, dtype=torch.float32)}, HEADER)
    monkeypatch.setattr(checkpoint, "read_bytes", lambda *_: pytest.fail("the tensors were read"))
    assert read_header(path).seed == 3


# --- files that are something else ---------------------------------------------------------------


def test_missing_and_folder(tmp_path, model_file):
    with pytest.raises(
        InputError, match=r"no model file .*prior.safetensor: did you mean .*prior.safetensors"
    ):
        load_model(tmp_path / "prior.safetensor")
    with pytest.raises(InputError, match="is a folder, but a single model file is needed"):
        load_model(tmp_path)


def test_truncated_at_every_length(model_file):
    whole = model_file.read_bytes()
    for length in [*range(0, len(whole), 37), 7, 8, 9, len(whole) - 1]:
        model_file.write_bytes(whole[:length])
        with pytest.raises(InputError, match="is a truncated model file"):
            load_model(model_file)
        with pytest.raises(InputError, match="is a truncated model file"):
            read_header(model_file)


def test_damaged(model_file):
    whole = model_file.read_bytes()
    model_file.write_bytes(whole + b"more")
    with pytest.raises(InputError, match="damaged model file"):
        load_model(model_file)
    model_file.write_bytes(whole.replace(b'"F32"', b'"F99"'))
    with pytest.raises(InputError, match="damaged model file"):
        load_model(model_file)


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"PK\x03\x04" + bytes(100),
        b"a text file\n" * 50,
        bytes(64),
        (20).to_bytes(8, "little") + b"not a JSON document at all",
    ],
)
def test_not_safetensors(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(
        InputError, match="is not a safetensors file, but a model file in that format"
    ):
        load_model(path)


def test_safetensors_of_another_program(tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="of another program, but a patchflow model is needed"):
        load_model(path)
    assert list(read_tensors(path)) == ["w"]
    safetensors.torch.save_file({"w": torch.zeros(2)}, path, {"patchflow": "{nonsense"})
    with pytest.raises(InputError, match="description cannot be read"):
        load_model(path)
    safetensors.torch.save_file({"w": torch.zeros(2)}, path, {"patchflow": "[1]"})
    with pytest.raises(InputError, match="description cannot be read"):
        load_model(path)
    head = {"format": "patchflow-model", "format_version": 1}
    safetensors.torch.save_file({"w": torch.zeros(2)}, path, {"patchflow": json.dumps(head)})
    with pytest.raises(InputError, match="description is incomplete"):
        load_model(path)


def test_another_kind_of_our_own_files(tmp_path, model_file):
    save_state(tmp_path / "state", {}, {})
    with pytest.raises(InputError, match="is a patchflow training state, but a model is needed"):
        load_model(tmp_path / "state")
    with pytest.raises(InputError, match="is a patchflow model, but a training state is needed"):
        load_state(model_file)


def test_newer_version_and_other_model(tmp_path, monkeypatch):
    path = tmp_path / "m"
    save_model(path, {}, ModelHeader("patch_nr", format_version=2, library_version="9.1"))
    with pytest.raises(
        InputError, match=r"format version 2 \(patchflow 9.1\).*up to 1: upgrade patchflow"
    ):
        load_model(path)
    save_model(path, {}, ModelHeader("epll"))
    with pytest.raises(InputError, match="holds the model epll, but patch_nr is needed"):
        load_model(path, expected="patch_nr")


def test_tensors_that_do_not_fit(model_file):
    _, state = load_model(model_file)
    net = small_net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    missing = {key: value for key, value in state.items() if key != "1.weight"}
    with pytest.raises(InputError, match="lacks the tensor 1.weight, which the model needs"):
        load_into(net, missing, model_file)
    with pytest.raises(InputError, match="tensor 2.extra, which the model lacks"):
        load_into(net, {**state, "2.extra": torch.zeros(1)}, model_file)
    wrong = {**state, "0.bias": torch.zeros(5), "0.weight": torch.ones_like(state["0.weight"])}
    with pytest.raises(InputError, match=r"0.bias of shape \(5,\), but the model needs \(4,\)"):
        load_into(net, wrong, model_file)
    for key, value in net.state_dict().items():
        assert torch.equal(before[key], value)


def test_full_disk_keeps_the_old_file(model_file, monkeypatch):
    before = model_file.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no space left on the disk; nothing was overwritten"):
        save_model(model_file, {"w": torch.zeros(5)}, HEADER)
    assert model_file.read_bytes() == before
    assert len(list(model_file.parent.iterdir())) == 1


def test_premade_models_come_back(tmp_path):
    path = tmp_path / "prior.safetensors"
    prior = pf.patch_nr(size=3, layers=2, hidden=8, padding=2)
    pf.save(path, prior, images=[torch.ones(1, 1, 8, 8)], seed=3)
    back = pf.load(path, pf.PatchPrior)
    x = torch.rand(1, 1, 9, 9)
    assert back.padding == 2
    assert torch.equal(back(x), prior(x))
    assert not any(p.requires_grad for p in back.parameters())
    with pytest.raises(InputError, match="patch_nr, but a Flow is needed"):
        pf.load(path, pf.Flow)
    with pytest.raises(InputError, match="composed by hand"):
        pf.save(path, pf.TotalVariation())
    save_model(path, {}, ModelHeader("patch_nr", {"colour": "red"}))
    with pytest.raises(InputError, match="does not know.*colour"):
        pf.load(path, pf.PatchPrior)
    save_model(path, {}, ModelHeader("later_model"))
    with pytest.raises(InputError, match="later_model.*upgrade"):
        pf.load(path, pf.PatchPrior)
