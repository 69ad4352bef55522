"""Images on disk: every format there and back, and a sentence for every unusable file."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import skimage.color
import tifffile
import torch

from patchflow.errors import InputError
from patchflow.io.atomic import atomic_path, existing_file, write_bytes, write_text
from patchflow.io.images import (
    check_finite,
    check_varies,
    encode_png,
    fingerprint,
    read_image,
    read_stack,
    to_grey,
    write_image,
)


def random_images(count: int, channels: int, levels: int | None, size=(13, 17)) -> torch.Tensor:
    generator = np.random.default_rng(count * 10 + channels)
    shape = (count, channels, *size)
    if levels is None:
        return torch.from_numpy(generator.random(shape, dtype=np.float32))
    values = generator.integers(0, levels + 1, shape).astype(np.float32) / np.float32(levels)
    return torch.from_numpy(values)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("extension", "depth", "levels"),
    [
        ("png", 8, 255),
        ("png", 16, 65535),
        ("tif", 8, 255),
        ("tiff", 16, 65535),
        ("tif", "float", None),
        ("npy", 8, 255),
        ("npy", 16, 65535),
        ("npy", "float", None),
    ],
)
def test_round_trip_is_exact(tmp_path, extension, depth, levels, channels):
    image = random_images(1, channels, levels)
    path = tmp_path / f"image.{extension}"
    write_image(path, image, depth=depth)
    back = read_image(path)
    assert back.dtype == torch.float32
    assert torch.equal(back, image)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("extension", ["tif", "npy"])
@pytest.mark.parametrize(("count", "channels"), [(5, 1), (7, 3), (2, 2), (1, 2), (6, 4), (1, 5)])
@pytest.mark.parametrize("depth", [8, "float"])
def test_stacks(tmp_path, extension, count, channels, depth):
    images = random_images(count, channels, 255 if depth == 8 else None)
    path = tmp_path / f"stack.{extension}"
    write_image(path, images, depth=depth)
    assert torch.equal(read_stack(path), images)
    if count > 1:
        with pytest.raises(InputError, match=f"holds {count} images, but one is needed"):
            read_image(path)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("extension", ["jpg", "JPEG"])
def test_jpeg_is_close(tmp_path, extension, channels):
    ramp = torch.linspace(0.1, 0.9, 64, dtype=torch.float32)
    image = (0.5 * (ramp[:, None] + ramp))[None, None].repeat(1, channels, 1, 1)
    path = tmp_path / f"image.{extension}"
    write_image(path, image)
    back = read_image(path)
    assert back.shape == image.shape
    assert float((back - image).abs().max()) < 0.02


def test_defaults_of_depth(tmp_path):
    image = random_images(1, 1, None)
    write_image(tmp_path / "a.png", image)
    write_image(tmp_path / "a.tif", image)
    assert imagecodecs.png_decode((tmp_path / "a.png").read_bytes()).dtype == np.uint8
    assert tifffile.imread(tmp_path / "a.tif").dtype == np.float32


def test_png_of_16_bit_colour_keeps_16_bits(tmp_path):
    image = random_images(1, 3, 65535)
    write_image(tmp_path / "a.png", image, depth=16)
    assert len(np.unique(imagecodecs.png_decode((tmp_path / "a.png").read_bytes()))) > 256


def test_writing_clips_integers_but_not_floats(tmp_path):
    image = torch.tensor([-0.25, 0.5, 1.5], dtype=torch.float32).expand(1, 1, 3, 3)
    write_image(tmp_path / "a.png", image)
    assert torch.equal(
        read_image(tmp_path / "a.png").unique().mul(255).round(),
        torch.tensor([0.0, 128.0, 255.0], dtype=torch.float32),
    )
    write_image(tmp_path / "a.tif", image)
    back = read_image(tmp_path / "a.tif", value_range=(-0.25, 1.5))
    assert torch.allclose(back, (image + 0.25) / 1.75)


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd", "jpeg"])
def test_compressed_tiff(tmp_path, compression):
    array = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    tifffile.imwrite(tmp_path / "a.tif", array, compression=compression)
    back = read_image(tmp_path / "a.tif")[0, 0].numpy() * 255
    assert np.abs(back - array).max() <= (3 if compression == "jpeg" else 1e-4)


def test_tiff_layouts(tmp_path):
    path = tmp_path / "a.tif"
    colour = np.random.default_rng(0).integers(0, 255, (9, 8, 3), np.uint8)
    expected = torch.from_numpy(colour.transpose(2, 0, 1)[None].astype(np.float32) / 255)
    tifffile.imwrite(path, colour.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    assert torch.allclose(read_image(path), expected)
    tifffile.imwrite(path, colour, photometric="rgb", tile=(16, 16), bigtiff=True)
    assert torch.allclose(read_image(path), expected)
    tifffile.imwrite(path, 255 - colour[..., 0], photometric="miniswhite")
    assert torch.allclose(read_image(path), expected[:, :1])
    tifffile.imwrite(path, colour.transpose(2, 0, 1), imagej=True, metadata={"axes": "CYX"})
    assert torch.allclose(read_image(path), expected)
    tifffile.imwrite(path, colour.transpose(2, 0, 1), imagej=True, metadata={"axes": "ZYX"})
    assert torch.allclose(read_stack(path), expected.transpose(0, 1))
    tifffile.imwrite(path, colour[..., 0] > 100, photometric="minisblack")
    assert torch.equal(read_image(path), torch.from_numpy(colour[..., 0] > 100).float()[None, None])


def test_value_range_maps_any_type(tmp_path):
    hounsfield = np.linspace(-1000, 2000, 12, dtype=np.int16).reshape(3, 4)
    tifffile.imwrite(tmp_path / "ct.tif", hounsfield)
    image = read_image(tmp_path / "ct.tif", value_range=(-1000, 2000))
    assert float(image.min()) == 0
    assert float(image.max()) == 1
    np.save(tmp_path / "a.npy", np.array([[0, 4095]], np.uint16))
    assert read_image(tmp_path / "a.npy", value_range=(0.0, 4095.0)).tolist() == [[[[0.0, 1.0]]]]
    np.save(tmp_path / "wide.npy", np.array([[0, 2**32 - 1]], np.uint32))
    assert read_image(tmp_path / "wide.npy").tolist() == [[[[0.0, 1.0]]]]
    np.save(tmp_path / "double.npy", np.array([[0.25, 1 + 1e-9]]))
    assert read_image(tmp_path / "double.npy").tolist() == [[[[0.25, 1.0]]]]


def test_numpy_axis_orders(tmp_path):
    path = tmp_path / "a.npy"
    for shape, expected in [
        ((6, 7), (1, 1, 6, 7)),
        ((3, 6, 7), (1, 3, 6, 7)),
        ((6, 7, 3), (1, 3, 6, 7)),
        ((6, 7, 8), (6, 1, 7, 8)),
        ((2, 3, 6, 7), (2, 3, 6, 7)),
    ]:
        np.save(path, np.zeros(shape, np.float32))
        assert read_stack(path).shape == expected
    np.save(path, np.zeros((1, 1, 2, 3, 4), np.float32))
    with pytest.raises(InputError, match="array of 5 axes, but 2 to 4"):
        read_stack(path)


def test_grey_has_the_weights_of_skimage(tmp_path):
    image = random_images(1, 3, 255)
    write_image(tmp_path / "a.png", image)
    grey = read_image(tmp_path / "a.png", grey=True)
    expected = skimage.color.rgb2gray(image[0].permute(1, 2, 0).double().numpy())
    assert np.abs(grey[0, 0].numpy() - expected).max() < 1e-6
    assert torch.equal(to_grey(grey), grey)
    with pytest.raises(InputError, match="2 channels cannot become grey"):
        to_grey(image[:, :2])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("extension", ["png", "tif"])
def test_alpha(tmp_path, channels, extension):
    path = tmp_path / f"a.{extension}"
    array = np.random.default_rng(0).integers(0, 255, (8, 9, channels + 1), np.uint8)

    def write():
        if extension == "png":
            path.write_bytes(imagecodecs.png_encode(array))
        else:
            photometric = "rgb" if channels == 3 else "minisblack"
            tifffile.imwrite(
                path,
                array,
                photometric=photometric,
                extrasamples=["unassalpha"],
                planarconfig="contig",
            )

    array[..., -1] = 255
    write()
    assert read_image(path).shape == (1, channels, 8, 9)
    array[2, 3, -1] = 254
    write()
    with pytest.raises(InputError, match=r"alpha channel that is not fully opaque \(1.4% of"):
        read_image(path)


# --- files that cannot be used -------------------------------------------------------------------


def test_missing_file_suggests_near_names(tmp_path):
    (tmp_path / "brick_left.PNG").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"There is no image .*brick_lft.png: did you mean .*brick_left.PNG\?"
    ):
        read_image(tmp_path / "brick_lft.png")
    with pytest.raises(InputError, match="check the path"):
        read_image(tmp_path / "zzzzzzzzz.png")
    with pytest.raises(InputError, match="folder .*nowhere does not exist either"):
        read_image(tmp_path / "nowhere" / "a.png")


def test_folder(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InputError, match="is a folder, but a single image is needed"):
        read_image(tmp_path / "a.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may read everything")
def test_unreadable(tmp_path):
    (tmp_path / "a.png").touch(mode=0)
    with pytest.raises(InputError, match="may not be read"):
        read_image(tmp_path / "a.png")


def test_unsupported_extension(tmp_path):
    with pytest.raises(InputError, match=r"extension '.bmp', which is not one of .png, .jpg"):
        read_image(tmp_path / "a.bmp")
    with pytest.raises(InputError, match="extension '', which is not one of"):
        write_image(tmp_path / "a", torch.zeros(1, 1, 2, 2, dtype=torch.float32))


@pytest.mark.parametrize("extension", ["png", "jpg", "tif", "npy"])
def test_not_an_image(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    path.write_bytes(b"Dear reader, this is a letter and no image at all.\n" * 20)
    with pytest.raises(InputError, match="is not a .* image or is damaged"):
        read_image(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="is an empty file"):
        read_image(path)


@pytest.mark.parametrize("extension", ["png", "jpg", "tif", "npy"])
@pytest.mark.parametrize("compressed", [True, False])
def test_truncated_at_every_kind_of_place(tmp_path, extension, compressed):
    path = tmp_path / f"a.{extension}"
    image = random_images(1, 3, 255, size=(40, 50))
    write_image(path, image, depth=8)
    if extension == "tif" and not compressed:
        tifffile.imwrite(path, image[0].permute(1, 2, 0).numpy(), photometric="rgb")
    whole = path.read_bytes()
    for length in [
        1,
        3,
        8,
        20,
        100,
        300,
        len(whole) // 2,
        len(whole) - 100,
        len(whole) - 6,
        len(whole) - 1,
    ]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"truncated|damaged") as caught:
            read_image(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_jpeg_with_an_end_marker_in_its_metadata_is_still_truncated(tmp_path):
    write_image(tmp_path / "a.jpg", random_images(1, 1, 255, size=(40, 50)))
    whole = (tmp_path / "a.jpg").read_bytes()
    thumbnail = b"\xff\xe1\x00\x06\xff\xd9\xff\xd9"
    (tmp_path / "a.jpg").write_bytes(whole[:2] + thumbnail + whole[2:])
    read_image(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((whole[:2] + thumbnail + whole[2:])[:-2])
    with pytest.raises(InputError, match="truncated JPEG"):
        read_image(tmp_path / "a.jpg")


def test_corrupt_png(tmp_path):
    write_image(tmp_path / "a.png", random_images(1, 1, 255, size=(40, 50)))
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("extension", ["tif", "npy"])
def test_not_finite(tmp_path, value, extension):
    array = np.full((4, 5), 0.5, np.float32)
    array[1, 2] = array[3, 3] = value
    path = tmp_path / f"a.{extension}"
    tifffile.imwrite(path, array) if extension == "tif" else np.save(path, array)
    with pytest.raises(InputError, match=r"has 2 NaN or infinite pixel\(s\) out of 20"):
        read_image(path)
    with pytest.raises(InputError, match="2 NaN or infinite"):
        check_finite(torch.from_numpy(array), path)
    with pytest.raises(InputError, match="2 NaN or infinite"):
        write_image(tmp_path / "b.png", torch.from_numpy(array)[None, None])
    assert not (tmp_path / "b.png").exists()


def test_noisy_measurements_may_leave_the_range_by_the_slack(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([[-0.25, 0.5], [1.0, 1.125]], np.float32))
    for read in (read_image, read_stack):
        assert read(path, slack=0.25).flatten().tolist() == [-0.25, 0.5, 1.0, 1.125]
        assert read(path, slack=1).min() == -0.25
        for slack in (0, 0.125, 0.249):
            with pytest.raises(InputError, match=r"outside the range \[0, 1\]"):
                read(path, slack=slack)
    # The slack is a share of a declared range too.
    np.save(path, np.array([[-25.0, 112.5]], np.float64))
    assert read_image(path, value_range=(0, 100), slack=0.25).tolist() == [[[[-0.25, 1.125]]]]
    with pytest.raises(InputError, match=r"outside the range \[0, 100\]"):
        read_image(path, value_range=(0, 100), slack=0.2)
    # Integers have no noise beyond their range, and NaN is never noise.
    np.save(path, np.array([[0, 101]], np.int16))
    with pytest.raises(InputError, match=r"outside the range \[0, 100\]"):
        read_image(path, value_range=(0, 100), slack=0.25)
    np.save(path, np.array([[0.0, np.nan]], np.float32))
    with pytest.raises(InputError, match="1 NaN or infinite"):
        read_image(path, slack=1.0)
    for slack in (-0.5, np.nan):
        with pytest.raises(InputError, match=f"slack {slack:g} is not a share of the range"):
            read_image(path, slack=slack)


def test_outside_the_range(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([[-3.5, 260.0]]))
    with pytest.raises(
        InputError, match=r"values from -3.5 to 260, outside the range \[0, 1\].*--range=-3.5:260\."
    ):
        read_image(path)
    with pytest.raises(InputError, match=r"outside the range \[0, 255\]"):
        read_image(path, value_range=(0.0, 255.0))
    with pytest.raises(InputError, match="5:5 is not a range"):
        read_image(path, value_range=(5.0, 5.0))
    np.save(path, np.array([[-3, 7]]))
    with pytest.raises(
        InputError, match="int64 values from -3 to 7, and signed integers.*--range=-3:7"
    ):
        read_image(path)
    np.save(path, np.array([[1j]]))
    with pytest.raises(InputError, match="type complex128"):
        read_image(path)


def test_pickled_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="is not a NumPy image or is damaged"):
        read_image(tmp_path / "a.npy")


def test_empty_and_constant(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((0, 5)))
    with pytest.raises(InputError, match="without pixels"):
        read_image(tmp_path / "a.npy")
    with pytest.raises(InputError, match=r"a.png is constant \(every pixel is 0.25\)"):
        check_varies(torch.full((1, 1, 3, 3), 0.25, dtype=torch.float32), "a.png")
    check_varies(random_images(1, 1, None), "a.png")
    with pytest.raises(InputError, match="has no pixels"):
        write_image(tmp_path / "b.png", torch.zeros(1, 1, 0, 4, dtype=torch.float32))


def test_palette_and_mixed_tiff(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path,
        np.zeros((4, 4), np.uint8),
        photometric="palette",
        colormap=np.zeros((3, 256), np.uint16),
    )
    with pytest.raises(InputError, match="colour palette"):
        read_image(path)
    with tifffile.TiffWriter(path) as writer:
        writer.write(np.zeros((4, 4), np.uint8))
        writer.write(np.zeros((5, 6), np.uint8))
    with pytest.raises(InputError, match=r"2 groups of images of shapes \(4, 4\), \(5, 6\)"):
        read_stack(path)


def test_formats_that_cannot_hold_it(tmp_path):
    with pytest.raises(InputError, match="cannot have the depth float: PNG files hold 8 or 16"):
        write_image(tmp_path / "a.png", random_images(1, 1, None), depth="float")
    with pytest.raises(InputError, match="depth 16: JPEG files hold 8"):
        write_image(tmp_path / "a.jpg", random_images(1, 1, None), depth=16)
    with pytest.raises(InputError, match=r"cannot hold 2 image\(s\) of 1 channel"):
        write_image(tmp_path / "a.png", random_images(2, 1, None))
    assert not list(tmp_path.iterdir())


# --- fingerprints --------------------------------------------------------------------------------


def test_fingerprint():
    image = random_images(1, 1, None, size=(4, 6))
    same = fingerprint([image])
    assert re.fullmatch("[0-9a-f]{64}", same)
    assert fingerprint([image.clone()]) == same
    assert fingerprint([image.double()]) != same
    assert fingerprint([image.reshape(1, 1, 6, 4)]) != same
    assert fingerprint([image, image]) != same
    changed = image.clone()
    changed[0, 0, 0, 0] += 1e-3
    assert fingerprint([changed]) != same


# --- writing -------------------------------------------------------------------------------------


def test_atomic_write_keeps_the_old_file_on_any_failure(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(error):
        with atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    for error in (RuntimeError("bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(error)
    with pytest.raises(InputError, match="no space left on the disk; nothing was overwritten"):
        fail(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(InputError, match="input/output error; nothing was overwritten"):
        fail(OSError(errno.EIO, "Input/output error"))
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.npy"])
def test_full_disk(tmp_path, monkeypatch, name):
    path = tmp_path / name
    image = random_images(1, 1, 255, size=(40, 40))
    write_image(path, image)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=f"{name} could not be written: no space left on the disk"):
        write_image(path, 1 - image)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_file_size_limit_of_the_system(tmp_path):
    """A real refusal by the kernel in the middle of a write, in a process of its own."""
    path = tmp_path / "a.npy"
    path.write_bytes(b"old")
    code = (
        "import resource, sys; from patchflow.io.atomic import write_bytes\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: write_bytes(sys.argv[1], bytes(100_000))\n"
        "except ValueError as error: print(error)"
    )
    source = Path(__file__).parents[1] / "src"
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(source)},
        check=True,
    )
    assert "no space left, the file is over the size limit; nothing was overwritten" in run.stdout
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_targets_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="no folder .*nowhere: create it"):
        write_bytes(tmp_path / "nowhere" / "a", b"")
    write_bytes(tmp_path / "made" / "for" / "it", b"x", parents=True)
    assert (tmp_path / "made" / "for" / "it").read_bytes() == b"x"
    with pytest.raises(InputError, match="is a folder, but a file is to be written"):
        write_bytes(tmp_path / "made", b"")
    with pytest.raises(InputError, match="is not an ordinary file"):
        write_bytes("/dev/null", b"")
    with pytest.raises(InputError, match="name is too long; nothing was overwritten"):
        write_bytes(tmp_path / ("a" * 300), b"")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="nothing was overwritten"):
        write_bytes(tmp_path / "file" / "a" / "b", b"", parents=True)


def test_links_and_permissions_survive(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_bytes(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert real.stat().st_mode & 0o777 == 0o640
    assert existing_file(link) == link


def test_new_files_follow_the_umask(tmp_path):
    (tmp_path / "plain").touch()
    write_bytes(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_encode_png():
    image = random_images(1, 3, 255)
    array = imagecodecs.png_decode(encode_png(image)).astype(np.float32) / np.float32(255)
    assert np.array_equal(array.transpose(2, 0, 1), image[0].numpy())
