"""Masks as DICOM SEG on the images of the CT, written by highdicom and read back by pydicom before they count."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.sr.coding import Code as DicomCode
from pydicom.uid import generate_uid

from ctseg.codes import Algorithm, Code, Structure
from ctseg.errors import ImageError, OutputError
from ctseg.files import atomic_path
from ctseg.io.dicom.derived import COLOURS, MAKER, References, decimal, decimals, instance, references
from ctseg.io.dicom.placing import Stack
from ctseg.io.dicom.read import DicomCT
from ctseg.io.dicom.seg_read import segment_masks
from ctseg.io.dicom.series import Slice
from ctseg.io.dicom.silence import pydicom_silent

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription

SegType = Literal["binary", "labelmap"]
_FAR_MM = 1e6
"""Where frames of a multi-frame file are said to lie that are no part of the CT: nothing is drawn on them."""


def write_seg(
    path: Path,
    ct: DicomCT,
    labels: NDArray[np.uint8],
    structures: Sequence[Structure],
    algorithm: Algorithm,
    *,
    seg_type: SegType = "binary",
    keep_empty_frames: bool = False,
) -> tuple[str, ...]:
    """Writes a mask as DICOM SEG: a segment per structure, a frame per image of the CT that it appears on.

    Every frame lies on the pixels of its source image: slices that filled a gap have no frame, the shear of a tilted
    series is undone. The file is read back and compared with the mask before it gets its name.

    Args:
        path: Of the file.
        ct: The CT that was segmented.
        labels: On the CT's grid; 0 and the values of `structures`.
        structures: Segment 1, 2, ... in this order.
        algorithm: What made the mask.
        seg_type: One bit per voxel and structure, which every viewer reads, or one label map (DICOM 2024).
        keep_empty_frames: Frames of images that a structure does not appear on are written too.

    Returns:
        Notes: what was missing in the CT's header, or odd about the mask.

    Raises:
        ImageError: if the CT consists of several multi-frame files.
        OutputError: if the SEG cannot be written, or what was read back is not the mask.
    """
    drawn = [(image, _numbered(mask, structures)) for image, mask in ct.on_source_slices(labels)]
    with pydicom_silent():  # warnings quote values, names of patients say
        return _write(path, drawn, structures, algorithm, seg_type, keep_empty_frames)


def _write(
    path: Path,
    drawn: list[tuple[Slice, NDArray[np.uint8]]],
    structures: Sequence[Structure],
    algorithm: Algorithm,
    seg_type: SegType,
    keep_empty_frames: bool,
) -> tuple[str, ...]:
    facts = references(drawn[0][0])
    notes = [*facts.notes]
    notes += [f"'{s.name}' has no code in the recipe: named by one of our own" for s in structures if not s.is_public]
    empty = not any(mask.any() for _, mask in drawn)
    if empty and not keep_empty_frames:
        notes.append("the mask is empty: the SEG holds one empty frame for each structure, as it must hold some")
    written = drawn[:1] if empty and not keep_empty_frames else drawn
    dataset = _segmentation(
        written, facts, structures, algorithm, seg_type, omit_empty=not keep_empty_frames and not empty
    )
    with atomic_path(path) as temporary:
        dataset.save_as(temporary)
        _check(path, temporary, drawn, len(structures))
    return tuple(notes)


def _numbered(mask: NDArray[np.uint8], structures: Sequence[Structure]) -> NDArray[np.uint8]:
    """The mask with 1, 2, ... for the values of `structures`."""
    numbers = np.zeros(256, np.uint8)
    numbers[[structure.value for structure in structures]] = np.arange(1, len(structures) + 1)
    return numbers[mask]


def _segmentation(
    drawn: list[tuple[Slice, NDArray[np.uint8]]],
    facts: References,
    structures: Sequence[Structure],
    algorithm: Algorithm,
    seg_type: SegType,
    omit_empty: bool,
) -> pydicom.Dataset:
    from highdicom import PlanePositionSequence
    from highdicom.seg import Segmentation

    images = [image for image, _ in drawn]
    multi_frame = images[0].frame is not None
    singles = [] if multi_frame else [_source(image, images[0].axes, facts) for image in images]
    sources = singles or [_multi_frame_source(images, facts)]
    positions = [PlanePositionSequence("PATIENT", decimals(image.position_mm)) for image in images]
    dataset = Segmentation(
        source_images=sources,
        pixel_array=np.stack([mask.T for _, mask in drawn]),
        segmentation_type=seg_type.upper(),
        segment_descriptions=[_description(n, s, algorithm) for n, s in enumerate(structures, 1)],
        series_instance_uid=generate_uid(prefix=None),
        series_number=facts.series_number,
        sop_instance_uid=generate_uid(prefix=None),
        instance_number=1,
        manufacturer=MAKER,
        manufacturer_model_name=algorithm.name[:64],
        software_versions=algorithm.version[:64],
        device_serial_number=algorithm.model[:64],
        content_label="SEGMENTATION",
        content_description=", ".join(s.name for s in structures)[:64],
        content_creator_name=f"{MAKER}^",
        series_description=f"{MAKER} {algorithm.name}"[:64],
        transfer_syntax_uid=pydicom.uid.ExplicitVRLittleEndian,
        plane_positions=positions if multi_frame else None,
        omit_empty_frames=omit_empty,
    )
    return dataset


def _description(number: int, structure: Structure, algorithm: Algorithm) -> SegmentDescription:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription

    family = DicomCode("123110", "DCM", "Artificial Intelligence")
    return SegmentDescription(
        segment_number=number,
        segment_label=structure.name[:64],
        segmented_property_category=_code(structure.category),
        segmented_property_type=_code(structure.type),
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=f"{MAKER} {algorithm.name}"[:64], family=family, version=algorithm.version[:64], source=MAKER
        ),
        tracking_uid=generate_uid(prefix=None),
        tracking_id=f"{structure.name[:48]} {number}",
        anatomic_regions=[_code(structure.region)] if structure.region else None,
        display_color=CIELabColor.from_rgb(*COLOURS[(number - 1) % len(COLOURS)]),
    )


def _code(code: Code) -> DicomCode:
    return DicomCode(code.value, code.scheme, code.meaning)


def _source(image: Slice, axes: NDArray[np.float64], facts: References) -> pydicom.Dataset:
    """A header of one source image that holds what highdicom asks for, and only valid values.

    `axes` are those of the whole series: highdicom takes a difference in the last digit for another orientation.
    """
    dataset = pydicom.Dataset()
    dataset.update(facts.study)
    dataset.SOPClassUID, dataset.SOPInstanceUID = instance(image)
    dataset.SeriesInstanceUID = facts.series_uid
    dataset.Modality = "CT"
    dataset.Columns, dataset.Rows = image.size
    dataset.ImagePositionPatient = decimals(image.position_mm)
    dataset.ImageOrientationPatient = decimals(axes.ravel())
    dataset.update(_measures(image))
    return dataset


def _multi_frame_source(images: list[Slice], facts: References) -> pydicom.Dataset:
    """The same for the one multi-frame file that all images are frames of."""
    if len({(image.source.shown, image.value("SOPInstanceUID")) for image in images}) > 1:
        raise ImageError(
            "a SEG can lie on one multi-frame file only, the series has several; choose --format rtstruct or nifti"
        )
    dataset = _source(images[0], images[0].axes, facts)
    del dataset.ImagePositionPatient, dataset.ImageOrientationPatient, dataset.PixelSpacing, dataset.SliceThickness
    number = max(int(images[0].value("NumberOfFrames") or 1), *(int(image.frame or 0) + 1 for image in images))
    dataset.NumberOfFrames = number
    orientation, shared = pydicom.Dataset(), pydicom.Dataset()
    orientation.ImageOrientationPatient = decimals(images[0].axes.ravel())
    shared.PlaneOrientationSequence = [orientation]
    shared.PixelMeasuresSequence = [_measures(images[0])]
    dataset.SharedFunctionalGroupsSequence = [shared]
    places = {image.frame: image.position_mm for image in images}
    far_mm = images[0].position_mm + _FAR_MM * images[0].normal
    dataset.PerFrameFunctionalGroupsSequence = [_place(places.get(n, far_mm)) for n in range(number)]
    return dataset


def _place(position_mm: NDArray[np.float64]) -> pydicom.Dataset:
    position, item = pydicom.Dataset(), pydicom.Dataset()
    position.ImagePositionPatient = decimals(position_mm)
    item.PlanePositionSequence = [position]
    return item


def _measures(image: Slice) -> pydicom.Dataset:
    dataset = pydicom.Dataset()
    dataset.PixelSpacing = [decimal(image.spacing_mm[1]), decimal(image.spacing_mm[0])]
    thickness: Any = image.value("SliceThickness")
    try:
        valid = 0 < float(thickness) < _FAR_MM
    except (TypeError, ValueError):
        valid = False
    dataset.SliceThickness = decimal(thickness) if valid else decimal(min(image.spacing_mm))
    return dataset


def _check(path: Path, written: Path, drawn: list[tuple[Slice, NDArray[np.uint8]]], num_segments: int) -> None:
    """Passes if the file holds the very mask, image by image, wherever the patient lies.

    Raises:
        OutputError: if it does not.
    """
    expected = np.stack([mask for _, mask in drawn])
    found = np.zeros_like(expected)
    try:
        stack = Stack.of([image for image, _ in drawn])
        for number, index, mask in segment_masks(pydicom.dcmread(written), set(range(1, num_segments + 1)), stack):
            found[index][mask] = number
    except ImageError as error:
        raise OutputError(
            f"cannot write '{path}': the SEG cannot be read back ({error}); report this as a bug"
        ) from error
    wrong = np.count_nonzero(found != expected)
    if wrong:
        raise OutputError(
            f"cannot write '{path}': {wrong} voxels of the SEG read back differ from the mask; report this as a bug"
        )
