"""CT volumes as DICOM: one CT Image Storage file per slice, in a folder of its own.

The patient is left empty, as an image file does not know one; UIDs are fresh. A viewer or PACS takes such a series as
one of a new study.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import format_number_as_ds

import ctseg
from ctseg.errors import OutputError
from ctseg.files import atomic_folder
from ctseg.io.dicom.derived import decimal
from ctseg.volume import Geometry, Volume

MAX_SLICES = 9999
"""File names have four digits."""
_EMPTY = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientPosition",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
    "AcquisitionNumber",
    "PositionReferenceIndicator",
    "KVP",
)
"""What the standard wants present, not filled."""
_INT16 = np.iinfo(np.int16)
_UINT16_STEPS = 2**16 - 1


def write_series(
    folder: Path,
    volume: Volume,
    description: str = "",
    *,
    replace: bool = False,
) -> float:
    """Writes a CT as a DICOM series: `0001.dcm`, ... in the order of the array; the folder is whole or not there.

    Hounsfield units that are whole numbers within int16 are stored as they are; others on 65536 steps between the
    lowest and the highest, which is all that DICOM's CT has room for.

    Args:
        folder: Must not exist, or be empty, or be one to replace.
        volume: Hounsfield units.
        description: Of the series, at most 64 characters are kept.
        replace: The folder may hold something, which goes once the new series is whole.

    Returns:
        The largest difference between a voxel and what was stored, in HU: 0 for whole numbers.

    Raises:
        OutputError: if the folder holds something, or it cannot be written.
    """
    if volume.geometry.size[2] > MAX_SLICES:
        raise OutputError(
            f"cannot write '{folder}': at most {MAX_SLICES} slices, got {volume.geometry.size[2]}; crop it"
        )
    low, high = float(volume.array.min()), float(volume.array.max())
    slope, intercept, stored_type = _storage(volume.array, low, high)
    common = _series_header(volume.geometry, description, slope, intercept, stored_type)
    largest = 0.0
    with atomic_folder(folder, replace=replace) as temporary:
        for index in range(volume.geometry.size[2]):
            values_yx = volume.array[:, :, index].T
            stored = _stored(values_yx, slope, intercept, stored_type)
            back = stored.astype(np.float64) * slope + intercept
            largest = max(largest, float(np.abs(back - values_yx).max()))
            _slice(common, volume.geometry, index, stored).save_as(
                temporary / f"{index + 1:04d}.dcm", enforce_file_format=True
            )
    return largest


def _storage(array: NDArray[Any], low: float, high: float) -> tuple[float, float, np.dtype[Any]]:
    """Slope, intercept and stored type."""
    whole = np.issubdtype(array.dtype, np.integer) or bool((array == np.rint(array)).all())
    if whole and _INT16.min <= low and high <= _INT16.max:
        return 1.0, 0.0, np.dtype("<i2")
    # The stored header holds 16 characters; what is stored must fit what is read.
    slope = float(format_number_as_ds((high - low) / _UINT16_STEPS)) or 1.0
    return slope, float(format_number_as_ds(low)), np.dtype("<u2")


def _stored(values: NDArray[Any], slope: float, intercept: float, stored_type: np.dtype[Any]) -> NDArray[Any]:
    scaled = np.rint((values.astype(np.float64) - intercept) / slope)
    limits = np.iinfo(stored_type)
    return scaled.clip(limits.min, limits.max).astype(stored_type)


def _series_header(
    geometry: Geometry, description: str, slope: float, intercept: float, stored_type: np.dtype[Any]
) -> pydicom.Dataset:
    """What the slices share: modules Patient, Study, Series, Frame of Reference, Equipment, CT Image."""
    now = dt.datetime.now().astimezone()
    columns, rows, _ = geometry.size
    header = pydicom.Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = CTImageStorage
    header.SOPClassUID = CTImageStorage
    header.Modality = "CT"
    header.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID = (
        generate_uid(None) for _ in range(3)
    )
    header.StudyDate = header.SeriesDate = header.ContentDate = now.strftime("%Y%m%d")
    header.StudyTime = header.SeriesTime = header.ContentTime = now.strftime("%H%M%S")
    header.SeriesNumber = 1
    header.SeriesDescription = description[:64]
    header.Manufacturer = "ctseg"
    header.ManufacturerModelName = "ctseg convert"
    header.SoftwareVersions = ctseg.__version__
    for keyword in _EMPTY:
        setattr(header, keyword, None)
    header.Rows, header.Columns = rows, columns
    header.PixelSpacing = [decimal(geometry.spacing_mm[1]), decimal(geometry.spacing_mm[0])]
    header.SliceThickness = header.SpacingBetweenSlices = decimal(geometry.spacing_mm[2])
    header.ImageOrientationPatient = [decimal(value) for axis in (0, 1) for value in geometry.direction[:, axis]]
    header.SamplesPerPixel = 1
    header.PhotometricInterpretation = "MONOCHROME2"
    header.BitsAllocated = header.BitsStored = 16
    header.HighBit = 15
    header.PixelRepresentation = int(stored_type.kind == "i")
    header.RescaleSlope, header.RescaleIntercept, header.RescaleType = decimal(slope), decimal(intercept), "HU"
    return header


def _slice(common: pydicom.Dataset, geometry: Geometry, index: int, stored_yx: NDArray[Any]) -> pydicom.Dataset:
    header = pydicom.Dataset(common)
    header.file_meta = FileMetaDataset(common.file_meta)
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = generate_uid(None)
    header.InstanceNumber = index + 1
    position = geometry.affine[:3, 3] + index * geometry.affine[:3, 2]
    header.ImagePositionPatient = [decimal(value) for value in position]
    header.PixelData = np.ascontiguousarray(stored_yx).tobytes()
    return header
