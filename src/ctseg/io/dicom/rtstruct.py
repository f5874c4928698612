"""Masks as RTSTRUCT: closed contours on the images of the CT, read back and filled again before they count."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from ctseg.codes import ANATOMY, Algorithm, Structure
from ctseg.errors import ImageError, OutputError
from ctseg.files import atomic_path
from ctseg.io.dicom.contours import outlines
from ctseg.io.dicom.derived import COLOURS, MAKER, References, instance, references
from ctseg.io.dicom.placing import Stack
from ctseg.io.dicom.read import DicomCT
from ctseg.io.dicom.rtstruct_read import roi_masks
from ctseg.io.dicom.series import Slice
from ctseg.io.dicom.silence import pydicom_silent

DECIMALS = 4
"""Of coordinates in millimetres: a tenth of a micrometre, and far from the 16 characters that a number may have."""
_CONTOUR_DATA = 0x30060050
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
"""What RTSTRUCT calls the study: a class long retired, and still the one the standard's reference wants."""


def write_rtstruct(
    path: Path, ct: DicomCT, labels: NDArray[np.uint8], structures: Sequence[Structure], algorithm: Algorithm
) -> tuple[str, ...]:
    """Writes a mask as RTSTRUCT: a ROI per structure, its outlines on every image of the CT that it appears on.

    Outlines run midway between pixel centres; a hole is joined to the outline around it, so that every reader gets it
    right. The file is read back, filled and compared with the mask before it gets its name.

    Args:
        path: Of the file.
        ct: The CT that was segmented.
        labels: On the CT's grid; 0 and the values of `structures`, which become the ROI numbers.
        structures: The ROIs; one that does not appear has no contours.
        algorithm: What made the mask.

    Returns:
        Notes: what was missing in the CT's header, or odd about the mask.

    Raises:
        OutputError: if the RTSTRUCT cannot be written, or what was read back is not the mask.
    """
    drawn = ct.on_source_slices(labels)
    with pydicom_silent():  # warnings quote values, names of patients say
        facts = references(drawn[0][0])
        dataset = _structure_set(facts, [image for image, _ in drawn], structures, algorithm)
        dataset.ROIContourSequence = [_roi_contours(n, s, drawn) for n, s in enumerate(structures)]
        with atomic_path(path) as temporary:
            dataset.save_as(temporary, enforce_file_format=True)
            _check(path, temporary, drawn, [structure.value for structure in structures])
    empty = (s.name for s in structures if not (labels == s.value).any())
    return (*facts.notes, *(f"'{name}' is nowhere: its ROI has no contours" for name in empty))


def _structure_set(
    facts: References, images: list[Slice], structures: Sequence[Structure], algorithm: Algorithm
) -> pydicom.Dataset:
    """Everything but the contours."""
    dataset = pydicom.Dataset()
    dataset.update(facts.study)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian  # explicit VRs end a contour at 65534 bytes
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = RTStructureSetStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid(prefix=None)
    now = dt.datetime.now()
    dataset.InstanceCreationDate = dataset.StructureSetDate = now.strftime("%Y%m%d")
    dataset.InstanceCreationTime = dataset.StructureSetTime = now.strftime("%H%M%S")
    dataset.Modality = "RTSTRUCT"
    dataset.Manufacturer = MAKER
    dataset.ManufacturerModelName = algorithm.name[:64]
    dataset.DeviceSerialNumber = algorithm.model[:64]
    dataset.SoftwareVersions = algorithm.version[:64]
    dataset.SeriesInstanceUID = generate_uid(prefix=None)
    dataset.SeriesNumber = facts.series_number
    dataset.SeriesDescription = f"{MAKER} {algorithm.name}"[:64]
    dataset.OperatorsName = ""
    dataset.StructureSetLabel = MAKER
    dataset.ApprovalStatus = "UNAPPROVED"
    dataset.ReferencedFrameOfReferenceSequence = [_frame_of_reference(facts, images)]
    frame = facts.study.FrameOfReferenceUID
    dataset.StructureSetROISequence = [_roi(structure, frame) for structure in structures]
    dataset.RTROIObservationsSequence = [_observation(n, structure) for n, structure in enumerate(structures, 1)]
    return dataset


def _frame_of_reference(facts: References, images: list[Slice]) -> pydicom.Dataset:
    series, study, frame = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    series.SeriesInstanceUID = facts.series_uid
    series.ContourImageSequence = [_reference(image) for image in images]
    study.ReferencedSOPClassUID = _STUDY_CLASS
    study.ReferencedSOPInstanceUID = facts.study.StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID = facts.study.FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    return frame


def _reference(image: Slice) -> pydicom.Dataset:
    dataset = pydicom.Dataset()
    dataset.ReferencedSOPClassUID, dataset.ReferencedSOPInstanceUID = instance(image)
    if image.frame is not None:
        dataset.ReferencedFrameNumber = image.frame + 1
    return dataset


def _roi(structure: Structure, frame_of_reference: str) -> pydicom.Dataset:
    dataset = pydicom.Dataset()
    dataset.ROINumber = structure.value
    dataset.ReferencedFrameOfReferenceUID = frame_of_reference
    dataset.ROIName = structure.name[:64]
    dataset.ROIGenerationAlgorithm = "AUTOMATIC"
    return dataset


def _observation(number: int, structure: Structure) -> pydicom.Dataset:
    dataset, code = pydicom.Dataset(), pydicom.Dataset()
    dataset.ObservationNumber = number
    dataset.ReferencedROINumber = structure.value
    if structure.is_public:
        code.CodeValue, code.CodingSchemeDesignator = structure.type.value, structure.type.scheme
        code.CodeMeaning = structure.type.meaning
        dataset.RTROIIdentificationCodeSequence = [code]
    dataset.RTROIInterpretedType = "ORGAN" if structure.category == ANATOMY else ""
    dataset.ROIInterpreter = ""
    return dataset


def _roi_contours(number: int, structure: Structure, drawn: list[tuple[Slice, NDArray[np.uint8]]]) -> pydicom.Dataset:
    dataset = pydicom.Dataset()
    dataset.ROIDisplayColor = list(COLOURS[number % len(COLOURS)])
    dataset.ReferencedROINumber = structure.value
    contours = [_contour(image, polygon) for image, mask in drawn for polygon in outlines(mask == structure.value)]
    for index, contour in enumerate(contours, 1):
        contour.ContourNumber = index
    if contours:
        dataset.ContourSequence = contours
    return dataset


def _contour(image: Slice, polygon: NDArray[np.float64]) -> pydicom.Dataset:
    points_mm = image.position_mm + polygon * image.spacing_mm @ image.axes
    dataset = pydicom.Dataset()
    dataset.ContourImageSequence = [_reference(image)]
    dataset.ContourGeometricType = "CLOSED_PLANAR"
    dataset.NumberOfContourPoints = len(points_mm)
    dataset[_CONTOUR_DATA] = _decimals(points_mm)
    dataset.set_original_encoding(True, True, "iso8859")  # lets the numbers be written as they stand
    return dataset


def _decimals(values: NDArray[np.float64]) -> RawDataElement:
    """Numbers as they stand in the file: pydicom's own conversion, number by number, takes ten times as long."""
    text = "\\".join(f"{value:.{DECIMALS}f}" for value in values.ravel().tolist()).encode()
    data = text + b" " * (len(text) % 2)
    return RawDataElement(Tag(_CONTOUR_DATA), "DS", len(data), data, 0, is_implicit_VR=True, is_little_endian=True)


def _check(path: Path, written: Path, drawn: list[tuple[Slice, NDArray[np.uint8]]], values: list[int]) -> None:
    """Passes if the contours, filled, are the very mask, image by image.

    Raises:
        OutputError: if they are not.
    """
    expected = np.stack([np.where(np.isin(mask, values), mask, 0) for _, mask in drawn])
    found = np.zeros_like(expected)
    try:
        stack = Stack.of([image for image, _ in drawn])
        for number, index, mask in roi_masks(pydicom.dcmread(written), set(values), stack, []):
            found[index][mask] = number
    except ImageError as error:
        raise OutputError(f"cannot write '{path}': its contours cannot be read back ({error}); report this") from error
    wrong = np.count_nonzero(found != expected)
    if wrong:
        raise OutputError(
            f"cannot write '{path}': {wrong} voxels of the contours differ from the mask when read back; report this"
        )
