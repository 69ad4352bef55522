"""DICOM files for tests: each one slice, of a series of one patient."""

import pytest

pydicom = pytest.importorskip("pydicom")
uid = pytest.importorskip("pydicom.uid")


def save_slice(path, hu, number, series, spacing):
    """Write Hounsfield units (rows, columns); the pixel spacing is in mm."""
    dataset = pydicom.Dataset()
    elements = {
        **{"SOPClassUID": uid.CTImageStorage, "SOPInstanceUID": uid.generate_uid()},
        **{"SeriesInstanceUID": series, "StudyInstanceUID": "1.2.5", "Modality": "CT"},
        **{"PatientName": "Nobody^Known", "SeriesDescription": "Thorax"},
        **{"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "PixelSpacing": [spacing, spacing]},
        **{"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "InstanceNumber": number},
        **{
            "ImagePositionPatient": [0, 0, 2.5 * number],
            "Rows": hu.shape[0],
            "Columns": hu.shape[1],
        },
        **{"RescaleSlope": 1, "RescaleIntercept": -1024, "SamplesPerPixel": 1},
        **{"PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16},
        **{"HighBit": 15, "PixelRepresentation": 0},
        "PixelData": (hu.numpy() + 1024).astype("<u2").tobytes(),
    }
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
    return str(path)
