"""Sinograms, images in HDF5 and LoDoPaB-CT on disk: there and back, and every refusal."""

from __future__ import annotations

import math
import sys

import h5py
import numpy as np
import pytest
import tifffile
import torch

from patchflow.errors import InputError
from patchflow.io.hdf5 import read_hdf5_images
from patchflow.io.images import write_image
from patchflow.io.lodopab import is_lodopab, read_pairs
from patchflow.io.sinogram import Sinogram, check_angles, read_sinogram, write_sinogram

NUMBERS = ["detector_spacing", "pixel_spacing", "photons", "attenuation_scale", "offset"]


def values(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def half_turn(count):
    return torch.arange(count, dtype=torch.float64) * (math.pi / count)


def full_sinogram():
    return Sinogram(
        torch.from_numpy(values(3, 1, 5, 7)),
        half_turn(5),
        detector_spacing=0.1 + 0.2,
        pixel_spacing=7.2e-4,
        image_shape=(6, 4),
        photons=4096,
        attenuation_scale=81.35858,
        offset=-1e-3,
    )


def write_h5(path, datasets, attributes=(), file_attributes=()):
    """Attributes go to the first of the data sets."""
    with h5py.File(path, "w") as file:
        for name, array in datasets.items():
            file[name] = array
        file[next(iter(datasets))].attrs.update(dict(attributes))
        file.attrs.update(dict(file_attributes))
    return path


# --- sinograms there and back --------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["h5", "hdf5", "HDF5"])
def test_round_trip_is_exact(tmp_path, extension):
    sinogram, path = full_sinogram(), tmp_path / f"a.{extension}"
    write_sinogram(path, sinogram)
    back = read_sinogram(path)
    assert back.data.dtype == torch.float32
    assert back.angles.dtype == torch.float64
    assert torch.equal(back.data, sinogram.data)
    assert torch.equal(back.angles, sinogram.angles)
    for name in [*NUMBERS, "image_shape"]:
        assert getattr(back, name) == getattr(sinogram, name)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_is_unknown_stays_unknown(tmp_path):
    write_sinogram(tmp_path / "a.h5", Sinogram(torch.ones(1, 1, 2, 3, dtype=torch.float32)))
    back = read_sinogram(tmp_path / "a.h5")
    assert all(getattr(back, name) is None for name in [*NUMBERS, "angles", "image_shape"])


def test_layout_of_the_file(tmp_path):
    write_sinogram(tmp_path / "a.h5", full_sinogram())
    with h5py.File(tmp_path / "a.h5") as file:
        data = file["data"]
        assert file.attrs["patchflow_format"] == 1
        assert (data.shape, data.chunks, data.compression) == ((3, 5, 7), (1, 5, 7), "gzip")
        assert data.dtype == np.float32
        assert file["angles"].attrs["units"] == "rad"
        units = [data.attrs[f"{name}_units"] for name in [*NUMBERS, "image_shape"]]
        assert units == ["m", "m", "photons/bin", "1/m", "m", "pixels"]


def test_gradients_and_double_precision_do_not_hinder_writing(tmp_path):
    data = torch.rand(1, 1, 2, 3, requires_grad=True)
    write_sinogram(tmp_path / "a.h5", Sinogram(data, half_turn(2).float()))
    back = read_sinogram(tmp_path / "a.h5")
    assert torch.equal(back.data, data.detach().float())
    assert torch.equal(back.angles, half_turn(2).float().double())


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.h5"
    path.write_bytes(b"old")
    with pytest.raises(InputError, match="extension '.npy', but sinograms are written as .h5 or"):
        write_sinogram(path.with_suffix(".npy"), full_sinogram())
    with pytest.raises(InputError, match="no folder .*nowhere: create it"):
        write_sinogram(tmp_path / "nowhere" / "a.h5", full_sinogram())
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("extension", ["npy", "tif", "tiff", "h5"])
@pytest.mark.parametrize("shape", [(5, 7), (1, 5, 7), (6, 5, 7), (3, 4, 5)])
def test_every_format(tmp_path, extension, shape):
    array, path = values(*shape), tmp_path / f"a.{extension}"
    if extension == "npy":
        np.save(path, array.astype(">f8"))
    elif extension == "h5":
        write_h5(path, {"counts/lines": array})
    else:
        tifffile.imwrite(path, array, photometric="minisblack")
    back = read_sinogram(path)
    assert back.data.dtype == torch.float32
    assert torch.equal(back.data, torch.from_numpy(array).reshape(-1, 1, *shape[-2:]))
    assert back.angles is None


@pytest.mark.parametrize("extension", ["npy", "tif"])
def test_measurements_of_this_library(tmp_path, extension):
    data = torch.from_numpy(values(3, 1, 5, 7))
    write_image(tmp_path / f"a.{extension}", data)
    assert torch.equal(read_sinogram(tmp_path / f"a.{extension}").data, data)


def test_angles_as_attribute_and_beside_a_nested_dataset(tmp_path):
    angles = half_turn(5).numpy()
    path = write_h5(tmp_path / "a.h5", {"data": values(5, 7)}, {"angles": angles})
    assert torch.equal(read_sinogram(path).angles, half_turn(5))
    write_h5(path, {"scan/values": values(5, 7), "scan/angles": angles, "angles": angles[:2]})
    assert torch.equal(read_sinogram(path).angles, half_turn(5))


def test_degrees_beside_the_data_as_in_data_exchange(tmp_path):
    degrees = np.array([0.0, 45.0, 90.0])
    data = {"exchange/data": values(3, 4, 7), "exchange/theta": degrees}
    path = write_h5(tmp_path / "a.h5", data)
    sinogram = read_sinogram(path, dataset="exchange/data")
    expected = torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64) * math.pi
    assert torch.allclose(sinogram.angles, expected)
    # Projections, unless they say otherwise.
    assert np.array_equal(sinogram.data[:, 0], values(3, 4, 7).swapaxes(0, 1))
    turned = {"exchange/data": values(4, 3, 7), "exchange/theta": degrees}
    for axes in ("y:theta:x", b"y:theta:x"):
        other = write_h5(tmp_path / "b.h5", turned, {"axes": axes})
        found = read_sinogram(other, dataset="exchange/data").data
        assert np.array_equal(found[:, 0], values(4, 3, 7))
    with h5py.File(path, "a") as file:
        file["exchange/theta"].attrs["units"] = "rad"
    with pytest.raises(InputError, match="has angles in the unit 'rad', but 'degrees' is needed"):
        read_sinogram(path)
    write_h5(path, {"data": values(3, 7), "theta": degrees, "angles": half_turn(3).numpy()})
    assert torch.equal(read_sinogram(path).angles, half_turn(3))


def test_attributes_of_the_file_go_for_its_data(tmp_path):
    angles = half_turn(2).numpy()
    given = {"photons": 300.0, "image_shape": (4, 4), "offset": 9.0, "offset_units": "mm"}
    own = {"photons": 400.0, "offset": 0.01}
    path = write_h5(tmp_path / "a.h5", {"data": values(2, 7)}, own, {**given, "angles": angles})
    found = read_sinogram(path)
    assert (found.photons, found.image_shape, found.offset) == (400.0, (4, 4), 0.01)
    assert torch.equal(found.angles, half_turn(2))


# --- the data set that is meant ------------------------------------------------------------------


@pytest.mark.parametrize("read", [lambda p, d: read_sinogram(p, dataset=d).data, read_hdf5_images])
def test_choice_of_the_dataset(tmp_path, read):
    one, two = values(2, 5, 7), values(5, 8)
    path = write_h5(tmp_path / "a.h5", {"data": one, "in/two": two, "note": "text"})
    assert torch.equal(read(path, None)[:, 0], torch.from_numpy(one))
    for name in ("in/two", "/in/two"):
        assert torch.equal(read(path, name)[0, 0], torch.from_numpy(two))
    listed = r"data \(2, 5, 7\), in/two \(5, 8\), note \(\)"
    for name in ("in", "three", ""):
        with pytest.raises(InputError, match=f"no dataset '{name}', .*: {listed}; .*--dataset"):
            read(path, name)
    write_h5(path, {"one": one, "in/two": two, "line": values(4)})
    with pytest.raises(InputError, match=r"has 2 datasets .*in/two \(5, 8\), line.*--dataset"):
        read(path, None)
    write_h5(path, {"line": values(4), "note": "text", "mask": np.ones((2, 2), bool)})
    with pytest.raises(InputError, match=r"has 0 datasets .*--dataset"):
        read(path, None)
    with pytest.raises(InputError, match="values of type bool"):
        read(path, "mask")
    with pytest.raises(InputError, match=r"shape \(4,\), but 2 axes, or 3"):
        read(path, "line")


def test_images_are_not_scaled(tmp_path):
    path = write_h5(tmp_path / "a.hdf5", {"hu": np.array([[-1000, 3071]], np.int16)})
    images = read_hdf5_images(path)
    assert images.dtype == torch.float32
    assert images.tolist() == [[[[-1000.0, 3071.0]]]]


# --- files that cannot be used -------------------------------------------------------------------


def test_extensions(tmp_path):
    with pytest.raises(InputError, match=r"'.npz', but .* one of .h5, .*: save its array as .npy"):
        read_sinogram(tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"extension '.mat', but .*: convert it"):
        read_sinogram(tmp_path / "a.mat")
    with pytest.raises(InputError, match=r"no datasets to choose 'x' from.*leave out --dataset"):
        read_sinogram(tmp_path / "a.npy", dataset="x")


@pytest.mark.parametrize("extension", ["h5", "npy", "tif"])
def test_missing_and_damaged(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    with pytest.raises(InputError, match="There is no sinogram .*: check the path"):
        read_sinogram(path)
    for content in (b"", b"Dear reader, this is a letter.\n" * 50):
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged|empty file") as caught:
            read_sinogram(path)
        assert "\n" not in str(caught.value)


def test_truncated_and_corrupt_hdf5(tmp_path):
    path = tmp_path / "a.h5"
    write_sinogram(path, Sinogram(torch.rand(4, 1, 50, 60)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not an HDF5 file or is damaged"):
        read_sinogram(path)
    # The compressed values make up most of the file.
    path.write_bytes(whole[: len(whole) // 2] + bytes(200) + whole[len(whole) // 2 + 200 :])
    with pytest.raises(InputError, match="not an HDF5 file or is damaged"):
        read_sinogram(path)


def test_pickled_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="not a NumPy array of numbers"):
        read_sinogram(tmp_path / "a.npy")


def test_without_h5py(tmp_path, monkeypatch):
    path = tmp_path / "a.h5"
    write_sinogram(path, full_sinogram())
    monkeypatch.setitem(sys.modules, "h5py", None)
    for use in (
        lambda: read_sinogram(path),
        lambda: read_hdf5_images(path),
        lambda: write_sinogram(path, full_sinogram()),
    ):
        with pytest.raises(InputError, match=r"needs h5py: pip install patchflow\[io\]"):
            use()


@pytest.mark.parametrize("extension", ["npy", "h5", "tif"])
def test_values_that_are_no_line_integrals(tmp_path, extension):
    path = tmp_path / f"a.{extension}"

    def save(array):
        if extension == "npy":
            np.save(path, array)
        elif extension == "h5":
            write_h5(path, {"data": array})
        else:
            tifffile.imwrite(path, array, photometric="minisblack")
        return path

    array = np.ones((4, 5))
    array[1, 2] = np.nan
    array[3, 3] = np.inf
    with pytest.raises(InputError, match=r"has 2 NaN or infinite value\(s\) out of 20"):
        read_sinogram(save(array))
    # Too large for single precision.
    with pytest.raises(InputError, match=r"1 NaN or infinite"):
        read_sinogram(save(np.array([[1e39, 1.0]])))
    with pytest.raises(InputError, match=r"integers \(uint16\), as raw counts are"):
        read_sinogram(save(np.ones((4, 5), np.uint16)))
    if extension != "tif":
        for shape in [(4,), (2, 2, 4, 5), (1, 1, 2, 4, 5)]:
            with pytest.raises(InputError, match="but 2 axes, or 3 with the slices first"):
                read_sinogram(save(np.ones(shape)))
        with pytest.raises(InputError, match=r"empty (dataset|array).* of shape \(0, 5\)"):
            read_sinogram(save(np.ones((0, 5))))


def test_colour_pages_and_empty_dataspace(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", values(4, 5, 3), photometric="rgb")
    with pytest.raises(InputError, match="pages of 3 channels, but a sinogram has one"):
        read_sinogram(tmp_path / "a.tif")
    write_h5(tmp_path / "a.h5", {"data": h5py.Empty("f4")})
    with pytest.raises(InputError, match="empty dataset 'data' of shape None"):
        read_sinogram(tmp_path / "a.h5")


@pytest.mark.parametrize("name", [*NUMBERS, "image_shape"])
def test_metadata_that_cannot_be(tmp_path, name):
    path, good = tmp_path / "a.h5", (3, 3) if name == "image_shape" else 2.0
    bad = [(0, 3)] if name == "image_shape" else [math.inf, math.nan]
    bad += [0, 0.0, -1.5] if name in NUMBERS and name != "offset" else []
    for value in bad:
        with pytest.raises(InputError, match=f"The {name} is .*: correct it"):
            Sinogram(torch.ones(1, 1, 2, 3), **{name: value})
        write_h5(path, {"data": values(2, 3)}, {name: value})
        with pytest.raises(InputError, match=f"a.h5 is not a sinogram .*: The {name} is"):
            read_sinogram(path)
    for value in ("wide", [1.0, 2.0, 3.0], h5py.Empty("f8")):
        write_h5(path, {"data": values(2, 3)}, {name: value})
        with pytest.raises(InputError, match=f"has the {name} .*, but (one|two) .*: correct"):
            read_sinogram(path)
    write_h5(path, {"data": values(2, 3)}, {name: good, f"{name}_units": "furlongs"})
    with pytest.raises(InputError, match=f"has {name} in the unit 'furlongs', but .*: convert"):
        read_sinogram(path)


def test_files_of_a_later_version(tmp_path):
    path = write_h5(tmp_path / "a.h5", {"data": values(2, 3)}, (), {"patchflow_format": 2})
    with pytest.raises(InputError, match="has the format 2, but .* reads 1: upgrade patchflow"):
        read_sinogram(path)


def test_sinograms_that_cannot_be():
    for shape in [(2, 3), (1, 2, 2, 3), (0, 1, 2, 3), (1, 1, 2, 0)]:
        with pytest.raises(InputError, match=r"shape .*\(slices, 1, angles, bins\) is needed"):
            Sinogram(torch.ones(shape))
    with pytest.raises(InputError, match=r"1 NaN or infinite value\(s\) out of 2"):
        Sinogram(torch.tensor([[[[1.0, math.inf]]]]))
    for angles in (half_turn(3), half_turn(2)[None], torch.zeros(())):
        with pytest.raises(InputError, match="do not fit data with 2 angles: give one for each"):
            Sinogram(torch.ones(1, 1, 2, 3), angles)


def test_angles_that_cannot_be(tmp_path):
    path, data = tmp_path / "a.h5", values(9, 3)
    write_h5(path, {"data": data, "angles": half_turn(8).numpy()})
    with pytest.raises(InputError, match=r"a.h5 is not .*shape \(8,\) do not fit data with 9"):
        read_sinogram(path)
    write_h5(path, {"data": data, "angles": np.arange(9) * 20})
    with pytest.raises(InputError, match="a.h5 is not .*run from 0 to 160.*probably degrees"):
        read_sinogram(path)
    write_h5(path, {"data": data, "angles": ["north"] * 9})
    with pytest.raises(InputError, match="angles of type object"):
        read_sinogram(path)
    write_h5(path, {"data": data, "angles": half_turn(9).numpy()})
    with h5py.File(path, "a") as file:
        file["angles"].attrs["units"] = np.bytes_("deg")
    with pytest.raises(InputError, match="angles in the unit 'deg', but 'rad' is needed"):
        read_sinogram(path)


def test_check_angles():
    for good in (half_turn(900), torch.linspace(-math.pi, math.pi, 7), torch.zeros(1)):
        check_angles(good)
    message = r"from 0 to 179.8, which as radians is 28.6 turns; they are probably degrees: mult"
    with pytest.raises(InputError, match=message):
        check_angles(torch.arange(900) * 0.2)
    check_angles(torch.tensor([0.0, 2 * math.pi * 1.009]))
    with pytest.raises(InputError, match="1.02 turns"):
        check_angles(torch.tensor([0.0, 2 * math.pi * 1.02]))
    with pytest.raises(InputError, match="2 of 3 angles are NaN or infinite"):
        check_angles(torch.tensor([0.0, math.nan, math.inf]))
    with pytest.raises(InputError, match="There are no angles"):
        check_angles(torch.zeros(0))


# --- LoDoPaB-CT ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lodopab(tmp_path_factory):
    """Slices 0 to 2 and 128 to 129 of the test part, each constant: its number."""
    folder = tmp_path_factory.mktemp("lodopab")
    for number, count in ((0, 3), (1, 2)):
        constant = 128 * number + np.arange(count, dtype=np.float32)[:, None, None]
        for kind, shape, sign in (
            ("ground_truth", (362, 362), 1),
            ("observation", (1000, 513), -1),
        ):
            with h5py.File(folder / f"{kind}_test_{number:03d}.hdf5", "w") as file:
                whole = np.broadcast_to(sign * constant, (count, *shape))
                file.create_dataset("data", data=whole, compression="gzip", chunks=(1, *shape))
    return folder


def test_lodopab_pairs(lodopab):
    assert is_lodopab(lodopab)
    wanted = [129, 0, 2, 128, 0]
    truth, observations = read_pairs(lodopab, "test", wanted)
    assert truth.shape == (5, 1, 362, 362)
    assert observations.shape == (5, 1, 1000, 513)
    assert truth.dtype == observations.dtype == torch.float32
    assert truth.amin((1, 2, 3)).tolist() == truth.amax((1, 2, 3)).tolist() == wanted
    assert (-observations.amin((1, 2, 3))).tolist() == wanted
    assert (-observations.amax((1, 2, 3))).tolist() == wanted
    assert len(read_pairs(lodopab, "test", range(2))[0]) == 2


def test_lodopab_indices(lodopab):
    for part, count in (("train", 35820), ("validation", 3522), ("test", 3553)):
        for index in (-1, count):
            with pytest.raises(
                InputError, match=f"index {index} is out .* the {part} part has {count}"
            ):
                read_pairs(lodopab, part, [0, index])
    with pytest.raises(
        InputError, match=r"index 130 needs slice 2 of .*_001.hdf5, .* only 2 slices"
    ):
        read_pairs(lodopab, "test", [130])
    with pytest.raises(InputError, match="No slices are chosen"):
        read_pairs(lodopab, "test", [])


def test_lodopab_missing_files(lodopab, tmp_path):
    assert not is_lodopab(tmp_path)
    assert not is_lodopab(tmp_path / "nowhere")
    source = "https://zenodo.org/record/3384092"
    message = rf"no file ground_truth_test_002.hdf5 .*download ground_truth_test.zip from {source}"
    with pytest.raises(InputError, match=message):
        read_pairs(lodopab, "test", [0, 300])
    (tmp_path / "ground_truth_train_000.hdf5").write_bytes(b"")
    assert is_lodopab(tmp_path)
    with pytest.raises(InputError, match=r"no file observation_train_000.hdf5 .*_train.zip"):
        read_pairs(tmp_path, "train", [0])
    (tmp_path / "observation_train_000.hdf5").write_bytes(b"")
    with pytest.raises(InputError, match="ground_truth_train_000.hdf5 is not an HDF5 file or is"):
        read_pairs(tmp_path, "train", [0])


def test_lodopab_wrong_contents(tmp_path):
    paths = [tmp_path / f"{kind}_train_000.hdf5" for kind in ("ground_truth", "observation")]
    write_h5(paths[1], {"data": np.zeros((1, 1000, 513), np.float32)})
    for name, array, fault in [
        ("truth", np.zeros((1, 362, 362)), "no dataset 'data'"),
        ("data", np.zeros((1, 362, 361)), r"\(1, 362, 361\) and type float64, but .*362, 362\)"),
        ("data", np.zeros((362, 362)), r"data of shape \(362, 362\)"),
        ("data", np.zeros((1, 362, 362), int), "type int64, but floating-point"),
        ("data", np.full((1, 362, 362), np.nan), "NaN or infinite values in slice 0"),
    ]:
        write_h5(paths[0], {name: array})
        with pytest.raises(InputError, match=f"{paths[0].name} has .*{fault}|{fault}"):
            read_pairs(tmp_path, "train", [0])
