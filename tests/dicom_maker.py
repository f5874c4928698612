"""A maker of small CT series whose every voxel is known from a formula of its place in the patient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

CT_IMAGE, ENHANCED_CT = UID("1.2.840.10008.5.1.4.1.1.2"), UID("1.2.840.10008.5.1.4.1.1.2.1")
AXES = {
    "axial": ((1, 0, 0), (0, 1, 0)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "upside-down": ((-1, 0, 0), (0, 1, 0)),
    "oblique": ((0.8, 0.6, 0), (-0.48, 0.64, 0.6)),
}
"""Row and column directions in LPS."""

Field = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def ramp(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Hounsfield units that grow by another whole number along each patient axis: any linear interpolation is exact."""
    return points @ np.array([3.0, 5.0, 11.0]) + 40.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A CT series to be made.

    Attributes:
        size: Columns, rows, slices.
        spacing_mm: Between columns, rows, slices (along the normal).
        axes: A name of AXES, or two directions.
        origin_mm: Centre of the first voxel of the first slice, LPS.
        tilt_degrees: Slices drift along increasing rows by tan(tilt) x their distance.
        hu: Hounsfield units at `(..., 3)` points in LPS mm.
        missing: Slices (counted from 0 along the normal) that are not made.
        instance_numbers: Of slice n; None leaves the tag out.
        rescale: Slope and intercept of slice n.
        bits: Allocated and stored.
        signed: PixelRepresentation.
        syntax: Transfer syntax.
        drop: Keywords to leave out of every slice.
        tags: More tags for every slice, or others instead.
        change: Called with each slice's data set and n before it is written.
    """

    size: tuple[int, int, int] = (9, 7, 6)
    spacing_mm: tuple[float, float, float] = (0.75, 1.25, 2.5)
    axes: Any = "axial"
    origin_mm: tuple[float, float, float] = (-20.0, 15.5, 101.25)
    tilt_degrees: float = 0.0
    hu: Field = ramp
    missing: Sequence[int] = ()
    instance_numbers: Callable[[int], int | None] = lambda n: n + 1
    rescale: Callable[[int], tuple[float, float]] = lambda n: (1, -1024)
    bits: tuple[int, int] = (16, 16)
    signed: bool = True
    syntax: str = ExplicitVRLittleEndian
    drop: Sequence[str] = ()
    tags: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Dataset, int], None] = lambda dataset, n: None

    @property
    def directions(self) -> NDArray[np.float64]:
        """3x3: unit vectors of columns, rows and the normal as columns."""
        x, y = np.array(AXES[self.axes] if isinstance(self.axes, str) else self.axes, dtype=float)
        return np.stack([x, y, np.cross(x, y)], axis=1)

    def position_mm(self, n: int) -> NDArray[np.float64]:
        """Centre of the first voxel of slice n."""
        along = n * self.spacing_mm[2]
        drift = np.tan(np.radians(self.tilt_degrees)) * along
        return np.array(self.origin_mm) + self.directions @ np.array([0.0, drift, along])

    def plane(self, n: int) -> NDArray[np.float64]:
        """`[x, y]` Hounsfield units of slice n, before rounding."""
        (columns, rows, _), (dx, dy, _) = self.size, self.spacing_mm
        i, j = np.meshgrid(np.arange(columns), np.arange(rows), indexing="ij")
        in_plane = (i * dx)[..., None] * self.directions[:, 0] + (j * dy)[..., None] * self.directions[:, 1]
        return self.hu(self.position_mm(n) + in_plane)

    def numbers(self) -> list[int]:
        """The slices that are made."""
        return [n for n in range(self.size[2]) if n not in self.missing]


def _stored(plan: Plan, n: int) -> NDArray[Any]:
    """`[y, x]` as stored."""
    slope, intercept = plan.rescale(n)
    dtype = np.dtype(f"{'i' if plan.signed else 'u'}{plan.bits[0] // 8}")
    values = np.rint((plan.plane(n).T - intercept) / slope)
    limits = np.iinfo(dtype)
    assert values.min() >= limits.min
    assert values.max() <= limits.max
    return np.ascontiguousarray(values.astype(dtype))


def _common(plan: Plan, study: dict[str, Any]) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = CT_IMAGE
    columns, rows, _ = plan.size
    values = {
        "SOPClassUID": CT_IMAGE, "Modality": "CT", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "PatientName": "Muster^Maria", "PatientID": "4711-secret", "PatientBirthDate": "19500101", "PatientSex": "F",
        "StudyDate": "20200102", "StudyTime": "101500", "AccessionNumber": "ACC-99", "StudyID": "1",
        "ReferringPhysicianName": "", "SeriesDescription": "made for tests", "SeriesNumber": 3,
        "Manufacturer": "Maker", "ManufacturerModelName": "Model T", "ConvolutionKernel": "B30f", "KVP": "120",
        "SliceThickness": plan.spacing_mm[2], "PatientPosition": "HFS", "PositionReferenceIndicator": "",
        "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "Columns": columns, "Rows": rows,
        "BitsAllocated": plan.bits[0], "BitsStored": plan.bits[1], "HighBit": plan.bits[1] - 1,
        "PixelRepresentation": int(plan.signed), **study,
    }  # fmt: skip
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def _uids(plan: Plan) -> dict[str, Any]:
    return {
        keyword: generate_uid() for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
    } | plan.tags


def _finish(dataset: Dataset, plan: Plan, n: int, path: Path) -> None:
    for keyword, value in plan.tags.items():
        setattr(dataset, keyword, value)
    for keyword in plan.drop:
        if keyword in dataset:
            delattr(dataset, keyword)
    plan.change(dataset, n)
    dataset.file_meta.TransferSyntaxUID = UID(plan.syntax)
    if UID(plan.syntax).is_encapsulated:
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.compress(UID(plan.syntax), generate_instance_uid=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


def write_series(folder: Path, plan: Plan, prefix: str = "slice") -> Path:
    """Writes a series as one file per slice; returns the folder."""
    study = _uids(plan)
    for n in plan.numbers():
        dataset = _common(plan, study)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        if plan.instance_numbers(n) is not None:
            dataset.InstanceNumber = plan.instance_numbers(n)
        dataset.AcquisitionNumber = 1
        dataset.ImagePositionPatient = [round(float(v), 9) for v in plan.position_mm(n)]
        dataset.ImageOrientationPatient = [round(float(v), 9) for v in plan.directions[:, :2].T.flat]
        dataset.PixelSpacing = [plan.spacing_mm[1], plan.spacing_mm[0]]
        dataset.RescaleSlope, dataset.RescaleIntercept = plan.rescale(n)
        dataset.RescaleType = "HU"
        stored = _stored(plan, n)
        dataset.PixelData = stored.tobytes() + b"\0" * (stored.nbytes % 2)
        dataset["PixelData"].VR = "OW" if plan.bits[0] > 8 else "OB"
        _finish(dataset, plan, n, folder / f"{prefix}{n:03}.dcm")
    return folder


def _item(**values: Any) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def write_enhanced(path: Path, plan: Plan) -> Path:
    """Writes a series as one Enhanced multi-frame file, its frames in an order of their own; returns the file."""
    dataset = _common(plan, _uids(plan))
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = ENHANCED_CT
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    numbers = plan.numbers()[1::2] + plan.numbers()[::2]
    frames = []
    for n in numbers:
        slope, intercept = plan.rescale(n)
        frames.append(
            _item(
                PlanePositionSequence=Items(
                    [_item(ImagePositionPatient=[round(float(v), 9) for v in plan.position_mm(n)])]
                ),
                PixelValueTransformationSequence=Items(
                    [_item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU")]
                ),
            )
        )
    cosines = [round(float(v), 9) for v in plan.directions[:, :2].T.flat]
    shared = _item(
        PlaneOrientationSequence=Items([_item(ImageOrientationPatient=cosines)]),
        PixelMeasuresSequence=Items(
            [_item(PixelSpacing=[plan.spacing_mm[1], plan.spacing_mm[0]], SliceThickness=plan.spacing_mm[2])]
        ),
    )
    dataset.NumberOfFrames = len(frames)
    dataset.PerFrameFunctionalGroupsSequence = Items(frames)
    dataset.SharedFunctionalGroupsSequence = Items([shared])
    dataset.PixelData = b"".join(_stored(plan, n).tobytes() for n in numbers)
    dataset["PixelData"].VR = "OW"
    _finish(dataset, plan, 0, path)
    return path
