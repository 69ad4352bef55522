"""CT series in DICOM: there and back, and a sentence for every file that is none."""

from __future__ import annotations

import errno
import os
import sys

import numpy as np
import pytest
import torch

from patchflow.errors import InputError
from patchflow.io.dicom import check_series_folder, read_series, write_series

pydicom = pytest.importorskip("pydicom")
uid = pytest.importorskip("pydicom.uid")
pixels = pytest.importorskip("pydicom.pixels")
get_testdata_file = pytest.importorskip("pydicom.data").get_testdata_file

SERIES, SIZE = uid.generate_uid(), (5, 7)
FIXED = {
    **{"SOPClassUID": uid.CTImageStorage, "SeriesInstanceUID": SERIES, "StudyInstanceUID": "1.2.5"},
    **{"Modality": "CT", "PatientName": "Nobody^Known", "SeriesDescription": "Abdomen"},
    **{"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "PixelSpacing": [0.75, 0.5]},
    **{"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "WindowCenter": 40, "WindowWidth": 400},
    **{"RescaleSlope": 1, "RescaleIntercept": -1000, "Rows": SIZE[0], "Columns": SIZE[1]},
    **{"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"},
    **{"BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 0},
}


def stored(number):
    return np.random.default_rng(number).integers(0, 4096, SIZE)


def save(path, number=1, syntax=uid.ExplicitVRLittleEndian, **elements):
    """A CT slice with random pixels at 2.5 mm times its number; None leaves an element out."""
    ds = pydicom.Dataset()
    own = {
        "SOPInstanceUID": uid.generate_uid(),
        "InstanceNumber": number,
        "ImagePositionPatient": [-10.5, 20, 2.5 * number],
        "PixelData": stored(number).astype("<u2").tobytes(),
    }
    for name, value in (FIXED | own | elements).items():
        if value is not None:
            setattr(ds, name, value)
    if "PixelData" in ds:
        ds["PixelData"].VR = "OW"
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(path, enforce_file_format=True)
    return path


def test_order_spacing_and_units(tmp_path):
    # Names and instance numbers disagree with the positions, which win.
    for name, number, instance in (("a", 3, 6), ("b", 1, 7), ("c", 2, 5)):
        save(tmp_path / name, number, InstanceNumber=instance, RescaleSlope=0.5)
    (tmp_path / "notes.txt").write_text("not DICOM")
    (tmp_path / "folder").mkdir()
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    series = read_series([tmp_path])
    assert series.hu.shape == (3, 1, *SIZE)
    assert series.hu.dtype == torch.float32
    assert np.array_equal(series.hu[:, 0], [stored(i) * 0.5 - 1000 for i in (1, 2, 3)])
    assert series.spacing == (0.75, 0.5)
    assert series.positions == (2.5, 5.0, 7.5)
    assert [header.InstanceNumber for header in series.headers] == [7, 5, 6]
    assert not any("PixelData" in header for header in series.headers)
    again = read_series([tmp_path / "c", str(tmp_path / "a"), tmp_path / "b"])
    assert torch.equal(again.hu, series.hu)
    assert torch.equal(read_series(str(tmp_path)).hu, series.hu)


def test_positions_along_an_oblique_normal(tmp_path):
    rows, columns = [0.6, 0, 0.8], [0, 1, 0]
    normal = np.cross(rows, columns)
    for number, distance in ((1, 4.0), (2, -3.0), (3, 0.5)):
        corner = distance * normal + number * np.array(rows)
        place = {"ImagePositionPatient": corner.round(6).tolist()}
        save(tmp_path / f"{number}", number, ImageOrientationPatient=rows + columns, **place)
    series = read_series(tmp_path)
    assert series.positions == pytest.approx((-3.0, 0.5, 4.0), abs=1e-5)
    assert [header.InstanceNumber for header in series.headers] == [2, 3, 1]


def test_without_positions(tmp_path):
    none = {"ImagePositionPatient": None}
    paths = [save(tmp_path / f"{i}", i, InstanceNumber=10 - i, **none) for i in (1, 2)]
    series = read_series(paths)
    assert [header.InstanceNumber for header in series.headers] == [8, 9]
    assert np.isnan(series.positions).all()
    for i, path in enumerate(paths):
        save(path, i + 1, InstanceNumber=None, **none)
    assert np.array_equal(read_series(paths[::-1]).hu[0, 0].numpy(), stored(2) - 1000)


def test_values_that_are_hounsfield_units(tmp_path):
    raw = np.arange(-20, 15).reshape(SIZE)
    signed = {"PixelRepresentation": 1, "PixelData": raw.astype("<i2").tobytes()}
    path = save(tmp_path / "a", RescaleSlope=None, RescaleIntercept=None, **signed)
    assert np.array_equal(read_series(path).hu[0, 0].numpy(), raw)
    save(path, Modality="OT", RescaleType="HU")
    assert np.array_equal(read_series(path).hu[0, 0].numpy(), stored(1) - 1000)


def test_compression(tmp_path, monkeypatch):
    ds = pydicom.dcmread(save(tmp_path / "a"))
    ds.compress(uid.RLELossless)  # pydicom decodes it by itself
    ds.save_as(tmp_path / "a", enforce_file_format=True)
    assert np.array_equal(read_series(tmp_path / "a").hu[0, 0].numpy(), stored(1) - 1000)
    frame = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    path = save(tmp_path / "a", syntax=uid.JPEGLosslessSV1, PixelData=frame)
    monkeypatch.setattr(pixels.get_decoder(uid.JPEGLosslessSV1), "_available", {})
    remedy = "pip install pylibjpeg pylibjpeg-libjpeg .*gdcmconv --raw"
    with pytest.raises(InputError, match=f"compressed as JPEG Lossless.*{remedy}"):
        read_series([path])
    save(path, syntax=uid.ExplicitVRBigEndian)
    with pytest.raises(
        InputError, match=r"Big Endian, retired in 2006: convert it by dcmconv \+te"
    ):
        read_series([path])


REFUSED = [
    ({"PixelData": None}, "has no pixel data"),
    ({"NumberOfFrames": 2}, "is a multi-frame image.*emf2sf"),
    ({"PerFrameFunctionalGroupsSequence": [pydicom.Dataset()]}, "is a multi-frame image"),
    ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, r"is a colour image \(RGB\)"),
    ({"PhotometricInterpretation": "PALETTE COLOR"}, r"is a colour image \(PALETTE COLOR\)"),
    ({"Modality": "MR"}, "has the modality MR.*not Hounsfield units: give CT"),
    ({"Modality": "PT", "RescaleType": "BQML"}, "modality PT, rescale type 'BQML'"),
    ({"RescaleType": "Z_EFF"}, "rescale type 'Z_EFF'.*not Hounsfield units"),
    ({"RescaleIntercept": None}, "slope 1.0 and intercept None, not Hounsfield units"),
    ({"RescaleSlope": 0}, "slope 0.0 and intercept -1000.0, not Hounsfield units"),
    ({"ModalityLUTSequence": [pydicom.Dataset()]}, "not Hounsfield units"),
    ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "is a localizer"),
    ({"PixelSpacing": None}, "the PixelSpacing None, but two positive"),
    ({"PixelSpacing": [0.5, 0]}, r"the PixelSpacing \[0.5, 0.0\], but two positive"),
    ({"SeriesInstanceUID": None}, "lacks a UID"),
    ({"ImagePositionPatient": [1, 2]}, r"ImagePositionPatient \[1.0, 2.0\], not 3 number"),
    ({"PixelData": bytes(20)}, "is damaged or unusual.*gdcmconv --raw"),
]


@pytest.mark.parametrize(("elements", "sentence"), REFUSED)
def test_refused_file(tmp_path, elements, sentence):
    path = save(tmp_path / "a.dcm", **elements)
    with pytest.raises(InputError, match=f"a.dcm .*{sentence}"):
        read_series([path])


MIXED = [
    ({"SeriesInstanceUID": "1.2.3"}, "has the SeriesInstanceUID .* has 1.2.3, but"),
    ({"Rows": 4, "PixelData": bytes(56)}, "has the Rows 5 and .* has 4"),
    ({"Columns": 6, "PixelData": bytes(60)}, "has the Columns 7 and .* has 6"),
    ({"PixelSpacing": [0.75, 0.6]}, r"has the PixelSpacing \[0.75, 0.5\] and .*0.6\]"),
    ({"ImageOrientationPatient": [0, 1, 0, 1, 0, 0]}, "has the ImageOrientationPatient"),
    ({"ImageOrientationPatient": None}, "has the ImageOrientationPatient .* has None"),
    ({"ImagePositionPatient": [0, 0, 2.5]}, "have the same position 2.5"),
]


@pytest.mark.parametrize(("elements", "sentence"), MIXED)
def test_mixed_files(tmp_path, elements, sentence):
    save(tmp_path / "a", 1)
    save(tmp_path / "b", 2, **elements)
    with pytest.raises(InputError, match=sentence):
        read_series([tmp_path])


def test_rounded_decimals_are_not_mixed(tmp_path):
    save(tmp_path / "a", 1)
    nearly = [1, 0, 0.00001, 0, 1, 0]
    save(tmp_path / "b", 2, PixelSpacing=[0.75, 0.50001], ImageOrientationPatient=nearly)
    assert len(read_series(tmp_path).hu) == 2


def test_files_that_are_not_there_or_not_dicom(tmp_path):
    with pytest.raises(InputError, match="No DICOM file was given"):
        read_series([])
    with pytest.raises(InputError, match="has no DICOM file"):
        read_series(tmp_path)
    with pytest.raises(InputError, match="There is no DICOM file .*nothing"):
        read_series(tmp_path / "nothing")
    (tmp_path / "a.png").write_bytes(bytes(300))
    with pytest.raises(InputError, match=r"a.png is not a DICOM file.*dcmconv \+F"):
        read_series([tmp_path / "a.png"])
    path = save(tmp_path / "a")
    path.write_bytes(path.read_bytes().replace(b"0.75", b"0.x5"))
    with pytest.raises(InputError, match="a is damaged or unusual .*gdcmconv"):
        read_series([path])
    save(path, ImagePositionPatient=None, InstanceNumber=4)
    with pytest.raises(InputError, match="have the same InstanceNumber 4"):
        read_series([path, path])


def test_without_pydicom(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom.pixels", None)
    for call in (read_series, check_series_folder):
        with pytest.raises(InputError, match=r"pip install 'patchflow\[io\]'"):
            call(tmp_path)


@pytest.fixture
def series(tmp_path):
    (tmp_path / "in").mkdir()
    stale = {"ImageType": "ORIGINAL", "PixelPaddingValue": 63536, "SmallestImagePixelValue": 0}
    for number in (2, 1, 3):
        save(tmp_path / "in" / f"{number}", number, syntax=uid.ImplicitVRLittleEndian, **stale)
    return read_series(tmp_path / "in")


def test_derived_series(tmp_path, series):
    hu = series.hu.double() + 0.4
    hu[1, 0, 0, :4] = torch.tensor([-4e4, 4e4, -33792.0, 31743.0])
    hu[2, 0, 0, 0] = -1500.4
    paths = write_series(tmp_path / "out", hu, series, "PatchNR, lambda=2")
    assert [path.name for path in paths] == [f"slice_000{i}.dcm" for i in (1, 2, 3)]
    assert sorted((tmp_path / "out").iterdir()) == paths
    back = read_series(paths)
    expected = series.hu.clone()
    expected[1, 0, 0, :4] = torch.tensor([-33792, 31743, -33792, 31743])
    expected[2, 0, 0, 0] = -1500
    assert torch.equal(back.hu, expected)
    assert back.spacing == series.spacing
    assert back.positions == series.positions
    assert len({header.SeriesInstanceUID for header in back.headers} | {SERIES}) == 2
    old = {header.SOPInstanceUID for header in series.headers}
    assert len({header.SOPInstanceUID for header in back.headers} | old) == 6
    kept = "ImageOrientationPatient ImagePositionPatient PixelSpacing PatientName Modality Rows"
    for path, source, header in zip(paths, series.headers, back.headers, strict=True):
        for name in kept.split():
            assert header[name].value == source[name].value
        assert list(header.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
        assert header.SeriesDescription == "PatchNR, lambda=2"
        assert "PatchNR, lambda=2" in header.DerivationDescription
        assert header.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert not {"PixelPaddingValue", "SmallestImagePixelValue"} & set(header.dir())
        assert "PixelPaddingValue" in source  # the template is not touched
        file = pydicom.dcmread(path)
        assert file.file_meta.TransferSyntaxUID == uid.ExplicitVRLittleEndian
        assert file.file_meta.MediaStorageSOPInstanceUID == file.SOPInstanceUID
        assert (file.RescaleSlope, file.RescaleIntercept, file.RescaleType) == (1, -1024, "HU")


def test_real_slice(tmp_path):
    path = get_testdata_file("CT_small.dcm", download=False)
    series = read_series([path])
    source = pydicom.dcmread(path)
    hu = pixels.apply_modality_lut(pixels.pixel_array(source), source)
    assert np.array_equal(series.hu[0, 0].numpy(), hu)
    assert series.spacing == (0.661468, 0.661468)
    assert series.positions == (-75.699997,)
    (written,) = write_series(tmp_path / "out", series.hu, series, "identity")
    file = pydicom.dcmread(written)
    assert np.array_equal(pixels.apply_modality_lut(pixels.pixel_array(file), file), hu)
    assert file.PatientID == source.PatientID
    assert list(file.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
    assert file[0x0043, 0x1029].value == source[0x0043, 0x1029].value  # private


def test_refused_to_write(tmp_path, series):
    out, hu = tmp_path / "out", series.hu
    bad = hu.clone()
    bad[0, 0, 1, 1:3] = torch.tensor([np.nan, np.inf])
    with pytest.raises(InputError, match=r"out has 2 NaN or infinite pixel\(s\) out of 105"):
        write_series(out, bad, series, "m")
    for wrong in (hu[:2], hu[..., 1:]):
        with pytest.raises(InputError, match=r"have the shape .*, not \(3, 1, 5, 7\)"):
            write_series(out, wrong, series, "m")
    for method in ("", "  ", "a\\b", "é", "a\n", "a" * 65):
        with pytest.raises(InputError, match="is not one to 64 ASCII characters"):
            write_series(out, hu, series, method)
    assert not out.exists()
    for folder in (tmp_path / "in", tmp_path / "in" / "1"):
        with pytest.raises(InputError, match="is not an empty folder"):
            write_series(folder, hu, series, "m")
    with pytest.raises(InputError, match="cannot be made: there is no .*no: create it"):
        check_series_folder(tmp_path / "no" / "out")
    out.mkdir()
    assert len(write_series(out, hu, series, "m")) == 3


def test_full_disk_leaves_no_part_of_a_series(tmp_path, series, monkeypatch):
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no space left on the disk"):
        write_series(tmp_path / "out", series.hu, series, "m")
    assert not list((tmp_path / "out").iterdir())
