"""What every format has in common: which files are refused, label rules, writing whole or not at all."""

import gzip
import os
import resource
from collections.abc import Callable, Iterator
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from numpy.typing import NDArray

from ctseg.errors import ImageError, OutputError
from ctseg.io.images import (
    check_ct,
    grid_problems,
    read_extent,
    read_geometry,
    read_image,
    read_labels,
    write_image,
    write_labels,
)
from ctseg.scratch import new_array
from ctseg.volume import Geometry, LabelStream, Volume, to_ras

Maker = Callable[..., bytes]
SUFFIXES = [".nii", ".nii.gz", ".nrrd", ".mha"]
PACKED_TEXT = gzip.compress(b"dear reader\n" * 50, mtime=0)  # no time: all processes name the tests alike
KNOWN = "(known: .nii.gz, .nii, .nrrd, .mha)"
ORIENTATIONS = [
    "".join(pair[bit] for pair, bit in zip(axes, bits, strict=True))
    for axes in permutations(("LR", "PA", "IS"))
    for bits in product((0, 1), repeat=3)
]


def refusal(path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"cannot read '{path}': ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "data", "fragment"),
    [
        ("ct.nii", b"", "the file is empty; copy it again from its source"),
        ("ct.nrrd", b"", "the file is empty"),
        ("ct.nii", b"dear reader, this is text\n" * 50, "not NIfTI: it must begin with a header of 348 or 540 bytes"),
        ("ct.nii.gz", b"dear reader", "'.nii.gz' must be gzip data, got something else"),
        ("ct.nii.gz", PACKED_TEXT, "not NIfTI: it must begin with a header"),
        ("ct.nii.gz", gzip.compress(b"", mtime=0), "not NIfTI"),
        ("ct.nii.gz", b"\x1f\x8b", "truncated: the compressed data end early"),
        ("ct.nii", PACKED_TEXT, "'.nii' must not be compressed, got gzip data; rename it"),
        ("ct.nii", b"x", "not NIfTI"),
        ("ct.nrrd", b"dear reader\n" * 50, "not NRRD: it must begin with 'NRRD000'"),
        ("ct.nrrd", b"NRRD0004\ntype: short\n", "truncated: its header has no end"),
        ("ct.mha", b"dear reader\n" * 50, "not MetaImage: its header must end in 'ElementDataFile = LOCAL'"),
        ("ct.hdr", b"x", f"'.hdr' is a .hdr/.img pair; convert it to .nii.gz {KNOWN}"),
        ("ct.img.gz", b"x", "'.img.gz' is a .hdr/.img pair"),
        ("ct.nhdr", b"x", f"'.nhdr' is a header without its voxels; convert it to .nrrd {KNOWN}"),
        ("ct.mhd", b"x", "'.mhd' is a header without its voxels; convert it to .mha"),
        ("ct.dcm", b"x", "'.dcm' is one DICOM slice; `ctseg convert` reads the folder of its series"),
        ("ct.png", b"x", f"its suffix is unknown; convert it {KNOWN}"),
        ("ct", b"x", "its suffix is unknown"),
    ],
)
def test_files_that_are_no_volumes(tmp_path: Path, name: str, data: bytes, fragment: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert fragment in refusal(path)
    with pytest.raises(ImageError, match="cannot read"):
        read_geometry(path)


def test_missing_folder_and_pipe(tmp_path: Path) -> None:
    assert "No such file or directory; check the path" in refusal(tmp_path / "none.nii.gz")
    (tmp_path / "folder.nrrd").mkdir()
    assert "it must be a file, got a folder" in refusal(tmp_path / "folder.nrrd")
    os.mkfifo(tmp_path / "pipe.mha")
    assert "it must be a file, got a device or pipe" in refusal(tmp_path / "pipe.mha")


def test_no_permission(tmp_path: Path, nifti: Maker, ct: NDArray[np.int16]) -> None:
    path = tmp_path / "ct.nii"
    path.write_bytes(nifti(ct))
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        assert "Permission denied; check the path and its permissions" in refusal(path)
    finally:
        if root:
            os.seteuid(0)


def test_suffix_in_capitals(tmp_path: Path, nifti: Maker, ct: NDArray[np.int16]) -> None:
    path = tmp_path / "CT.NII.GZ"
    path.write_bytes(gzip.compress(nifti(ct)))
    np.testing.assert_array_equal(read_image(path).array, ct)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda a: np.where(a > 100, np.nan, a), "every voxel must be a number, got 84 NaN or infinite"),
        (lambda a: np.where(a == 100, -np.inf, a), "got 1 NaN or infinite; export it again"),
        (lambda a: np.full_like(a, -1000), "every voxel is -1000.0: not a CT; is this the right file?"),
        (lambda a: np.full_like(a, -1000).astype(np.int16), "every voxel is -1000: not a CT"),
    ],
)
def test_ct_rules(
    tmp_path: Path,
    nifti: Maker,
    ct: NDArray[np.int16],
    change: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    fragment: str,
) -> None:
    path = tmp_path / "ct.nii.gz"
    array = change(ct.astype(np.float32))
    path.write_bytes(gzip.compress(nifti(array.astype(np.float32) if array.dtype == np.float64 else array)))
    assert fragment in refusal(path)


def test_check_ct_passes_a_ct(ct: NDArray[np.int16], oblique: Geometry) -> None:
    check_ct(Volume(ct, oblique), Path("ct.nii.gz"))
    check_ct(Volume(ct.astype(np.float32), oblique), Path("ct.nii.gz"))


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4", "f8"])
def test_labels_of_any_type_become_uint8(tmp_path: Path, nifti: Maker, labels: NDArray[np.uint8], dtype: str) -> None:
    path = tmp_path / "labels.nii.gz"
    path.write_bytes(gzip.compress(nifti(labels.astype(dtype))))
    volume = read_labels(path)
    assert volume.array.dtype == np.uint8
    np.testing.assert_array_equal(volume.array, labels)


@pytest.mark.parametrize(("value", "dtype"), [(256, "i2"), (-1, "i2"), (0.5, "f4"), (np.nan, "f4"), (np.inf, "f8")])
def test_values_that_are_no_labels(
    tmp_path: Path, nifti: Maker, labels: NDArray[np.uint8], value: float, dtype: str
) -> None:
    path = tmp_path / "labels.nii"
    array = labels.astype(dtype)
    array[2, 3, 1] = array[3, 3, 1] = value
    path.write_bytes(nifti(array))
    expected = rf"labels must be whole numbers in 0\.\.255, got 2 voxels that are not, the first is {value}; is this"
    with pytest.raises(ImageError, match=expected):
        read_labels(path)


def test_empty_labels_are_labels(tmp_path: Path, nifti: Maker, labels: NDArray[np.uint8]) -> None:
    path = tmp_path / "labels.nii"
    path.write_bytes(nifti(np.zeros_like(labels)))
    assert not read_labels(path).array.any()


def test_grid_rules(oblique: Geometry) -> None:
    assert grid_problems(oblique) == []
    for index, value, fragment in [((0, 3), np.nan, "finite"), ((0, 0), np.inf, "finite"), ((0, 0), 9.0, "a shear of")]:
        affine = oblique.affine.copy()
        affine[index] = value
        (problem,) = grid_problems(Geometry(oblique.size, affine))
        assert fragment in problem
    flat = oblique.affine * [1, 0, 1, 1]
    assert "spacing must be positive, got 0.7" in grid_problems(Geometry(oblique.size, flat))[0]


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_all_orientations_of_one_head(real_data: Path, codes: str) -> None:
    path = real_data / "nifti_orientations" / f"{codes}.nii.gz"
    volume, image, peer = read_image(path), SimpleITK.ReadImage(str(path)), nibabel.load(path)
    assert volume.geometry.axis_codes == codes
    np.testing.assert_allclose(volume.array, np.asanyarray(peer.dataobj), rtol=1e-6)
    np.testing.assert_allclose(volume.array, SimpleITK.GetArrayFromImage(image).T, rtol=1e-6)
    np.testing.assert_allclose(volume.geometry.affine_ras, peer.affine, atol=1e-6)
    for index in [(0, 0, 0), (3, 17, 40), tuple(n - 1 for n in volume.geometry.size)]:
        position = (volume.geometry.affine @ [*index, 1])[:3]
        np.testing.assert_allclose(position, image.TransformIndexToPhysicalPoint(index), atol=1e-3)
    reference = to_ras(read_image(path.with_name("RAS.nii.gz")))
    assert to_ras(volume).geometry.agrees_with(reference.geometry)
    np.testing.assert_array_equal(to_ras(volume).array, reference.array)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("order", ["F", "C"])
def test_written_labels_are_read_alike_by_all(
    tmp_path: Path, labels: NDArray[np.uint8], oblique: Geometry, suffix: str, order: str
) -> None:
    path = tmp_path / f"labels{suffix}"
    write_labels(path, np.asarray(labels, order=order), oblique)
    ours, image = read_labels(path), SimpleITK.ReadImage(str(path))
    np.testing.assert_array_equal(ours.array, labels)
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image).T, labels)
    tolerance = 1e-4 if ".nii" in suffix else 1e-12
    np.testing.assert_allclose(ours.geometry.affine, oblique.affine, atol=tolerance)
    np.testing.assert_allclose(image.GetOrigin(), oblique.origin_mm, atol=tolerance)
    np.testing.assert_allclose(image.GetSpacing(), oblique.spacing_mm, atol=tolerance)
    np.testing.assert_allclose(np.reshape(image.GetDirection(), (3, 3)), oblique.direction, atol=tolerance)
    if ".nii" in suffix:
        peer = nibabel.load(path)
        np.testing.assert_array_equal(np.asanyarray(peer.dataobj), labels)
        np.testing.assert_allclose(peer.affine, oblique.affine_ras, atol=tolerance)
        np.testing.assert_allclose(peer.get_qform(), oblique.affine_ras, atol=tolerance)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i2", "u2", "i4", "f4", "f8"])
def test_images_of_every_type_are_what_simpleitk_reads(
    tmp_path: Path, ct: NDArray[np.int16], oblique: Geometry, suffix: str, dtype: str
) -> None:
    path = tmp_path / f"ct{suffix}"
    array = (ct + (200 if "u" in dtype else 0)).clip(0 if "u" in dtype else None, 255 if dtype == "u1" else None)
    array = array.astype(dtype) + (np.array(0.25, dtype) if dtype[0] == "f" else np.array(0, dtype))
    write_image(path, Volume(array, oblique))
    ours, image = read_image(path), SimpleITK.ReadImage(str(path))
    assert ours.array.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(ours.array, array)
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image).T, array)
    assert SimpleITK.GetArrayFromImage(image).dtype == ours.array.dtype
    np.testing.assert_allclose(image.GetOrigin(), oblique.origin_mm, atol=1e-4)
    np.testing.assert_allclose(np.reshape(image.GetDirection(), (3, 3)), oblique.direction, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bool", "f2", "complex64"])
def test_images_of_other_types_are_refused(
    tmp_path: Path, ct: NDArray[np.int16], oblique: Geometry, dtype: str
) -> None:
    with pytest.raises(ValueError, match="voxels must be integers or floats of 1 to 8 bytes"):
        write_image(tmp_path / "ct.nii", Volume(ct.astype(dtype), oblique))
    with pytest.raises(ValueError, match="does not fit its grid"):
        write_image(tmp_path / "ct.nii", Volume(ct[1:], oblique))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_sform_of_the_source_is_kept_bit_for_bit(
    tmp_path: Path, nifti: Maker, ct: NDArray[np.int16], labels: NDArray[np.uint8], suffix: str
) -> None:
    source, path = tmp_path / "ct.nii", tmp_path / f"labels{suffix}"
    source.write_bytes(nifti(ct, qform_code=0))
    write_labels(path, labels, read_geometry(source))
    before, after = nibabel.load(source).header, nibabel.load(path).header
    for row in ("srow_x", "srow_y", "srow_z"):
        assert before[row].tobytes() == after[row].tobytes()
    assert (after["sform_code"], after["qform_code"]) == (1, 1)


def test_nothing_but_the_grid_is_written(tmp_path: Path, labels: NDArray[np.uint8], oblique: Geometry) -> None:
    for suffix in SUFFIXES:
        write_labels(tmp_path / f"DOE_JOHN{suffix}", labels, oblique)
        data = (tmp_path / f"DOE_JOHN{suffix}").read_bytes()
        assert b"DOE" not in data
        write_labels(tmp_path / f"again{suffix}", labels, oblique)
        assert (tmp_path / f"again{suffix}").read_bytes() == data
    header = nibabel.load(tmp_path / "DOE_JOHN.nii.gz").header
    assert all(not header[name].item() for name in ("descrip", "aux_file", "db_name", "intent_name"))
    assert (tmp_path / "again.nii.gz").read_bytes()[4:8] == bytes(4), "gzip's time of writing"


def test_slight_shear_leaves_out_the_qform(tmp_path: Path, oblique: Geometry) -> None:
    """A quaternion cannot hold it; two transforms that differ would be refused on reading."""
    size = (3, 3, 2000)
    affine = oblique.affine.copy()
    affine[:3, 2] += 0.0009 * affine[:3, 0] / 0.7 * 2.5
    write_labels(tmp_path / "labels.nii.gz", np.zeros(size, np.uint8), Geometry(size, affine))
    header = nibabel.load(tmp_path / "labels.nii.gz").header
    assert (header["sform_code"], header["qform_code"]) == (1, 0)
    np.testing.assert_allclose(read_geometry(tmp_path / "labels.nii.gz").affine, affine, atol=1e-4)


def test_an_axis_too_long_for_nifti_1(tmp_path: Path, oblique: Geometry) -> None:
    labels = np.zeros((1, 1, 40000), np.uint8, order="F")
    labels[0, 0, 39999] = 7
    write_labels(tmp_path / "labels.nii.gz", labels, Geometry(labels.shape, oblique.affine))
    np.testing.assert_array_equal(read_labels(tmp_path / "labels.nii.gz").array, labels)
    assert type(nibabel.load(tmp_path / "labels.nii.gz")).__name__ == "Nifti2Image"


def test_wrong_use_of_write_labels(tmp_path: Path, labels: NDArray[np.uint8], oblique: Geometry) -> None:
    with pytest.raises(ValueError, match="labels must be uint8 of size"):
        write_labels(tmp_path / "a.nii", labels.astype(np.int16), oblique)
    with pytest.raises(ValueError, match="labels must be uint8 of size"):
        write_labels(tmp_path / "a.nii", labels[1:], oblique)
    with pytest.raises(OutputError, match=r"its suffix must be one of \.nii\.gz, \.nii, \.nrrd, \.mha; rename it"):
        write_labels(tmp_path / "a.png", labels, oblique)
    with pytest.raises(OutputError, match="No such file or directory"):
        write_labels(tmp_path / "none" / "a.nii", labels, oblique)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def noise(oblique: Geometry) -> tuple[NDArray[np.uint8], Geometry]:
    """1 MiB that does not compress."""
    size = (128, 128, 64)
    return np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8), Geometry(size, oblique.affine)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_full_disk(small_disk: Path, noise: tuple[NDArray[np.uint8], Geometry], suffix: str) -> None:
    with pytest.raises(OutputError, match=r"cannot write '.*': No space left on device; free space"):
        write_labels(small_disk / f"labels{suffix}", *noise)
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_size_limit(tmp_path: Path, noise: tuple[NDArray[np.uint8], Geometry], suffix: str) -> None:
    """Like a full disk, for whoever cannot mount one; the file that was there before stays as it was."""
    path = tmp_path / f"labels{suffix}"
    path.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(OutputError, match="File too large"):
            write_labels(path, *noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_writing_copies_no_fortran_array(tmp_path: Path, oblique: Geometry, at_most: Callable[..., object]) -> None:
    labels = np.zeros((256, 256, 256), np.uint8, order="F")
    with at_most(4 * 2**20):
        write_labels(tmp_path / "labels.nii.gz", labels, Geometry(labels.shape, oblique.affine))


SCALINGS = [
    ("<i2", 1, 0),
    (">i2", 1, 0),
    (">u2", 1, -1024),
    ("<u2", 1, -40_000),
    ("u1", 1, -1024),
    ("<i2", 0.5, 3),
    (">f4", 2, -1),
    ("<f8", 1.25, 7.5),
    ("<f8", 1, 0),
    ("<i4", 1, 5),
]
"""Type of the stored voxels, slope, intercept."""


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("dtype", "slope", "intercept"), SCALINGS)
def test_a_ct_read_to_disk_is_the_one_in_memory(
    tmp_path: Path, dtype: str, slope: float, intercept: float, suffix: str
) -> None:
    """Several slabs of it; nibabel is the judge."""
    stored = np.random.default_rng(0).integers(0, 255, (150, 130, 70)).astype(dtype)
    stored[0, 0, 0], stored[-1, -1, -1] = 0, 255
    header = nibabel.Nifti1Header(endianness=">" if dtype[0] == ">" else "<")
    image = nibabel.Nifti1Image(stored, np.diag([-2.0, -2.0, 3.0, 1.0]), header)
    image.header.set_data_dtype(stored.dtype)
    image.header["vox_offset"], image.header["magic"] = 352, b"n+1"
    image.header["scl_slope"], image.header["scl_inter"] = slope, intercept
    path = tmp_path / f"ct{suffix}"
    data = bytes(image.header.binaryblock) + bytes(4) + stored.tobytes(order="F")
    path.write_bytes(gzip.compress(data, 1) if suffix == ".nii.gz" else data)
    in_memory, on_disk = read_image(path), read_image(path, tmp_path)
    assert on_disk.array.dtype == in_memory.array.dtype
    np.testing.assert_array_equal(on_disk.array, in_memory.array)
    np.testing.assert_allclose(on_disk.array, stored.astype(np.float64) * slope + intercept, rtol=1e-6)
    assert list(tmp_path.iterdir()) == [path]
    extent = read_extent(path)
    np.testing.assert_array_equal(extent.geometry.affine, in_memory.geometry.affine)
    widened = intercept == -40_000  # which a header cannot tell, and no CT is
    assert extent.held_bytes == in_memory.array.nbytes // (2 if widened else 1)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_mask_on_disk_is_written_as_one_in_memory(tmp_path: Path, suffix: str) -> None:
    labels = np.asfortranarray(np.random.default_rng(0).integers(0, 3, (90, 80, 7)), dtype=np.uint8)
    on_disk = new_array(labels.shape[::-1], np.uint8, tmp_path).T
    on_disk[...] = labels
    grid = Geometry(labels.shape, np.diag([1.0, 1.0, 2.0, 1.0]))
    for name, array in (("a", labels), ("b", on_disk)):
        write_labels(tmp_path / f"{name}{suffix}", array, grid)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_mask_that_is_made_while_it_is_written_is_the_same(tmp_path: Path, suffix: str, oblique: Geometry) -> None:
    labels = np.asfortranarray(np.random.default_rng(0).integers(0, 3, (300, 290, 7)), dtype=np.uint8)
    grid = Geometry(labels.shape, oblique.affine)
    pieces = (labels.T[start:stop] for start, stop in ((0, 1), (1, 5), (5, 7)))
    write_labels(tmp_path / f"a{suffix}", labels, grid)
    write_labels(tmp_path / f"b{suffix}", LabelStream(grid, pieces), grid)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_mask_whose_making_ends_early_is_not_written(tmp_path: Path, suffix: str, oblique: Geometry) -> None:
    grid = Geometry((9, 8, 7), oblique.affine)

    def fails() -> Iterator[NDArray[np.uint8]]:
        yield np.zeros((3, 8, 9), np.uint8)
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        write_labels(tmp_path / f"a{suffix}", LabelStream(grid, fails()), grid)
    with pytest.raises(ValueError, match="a label map of 3 planes does not fit"):
        write_labels(tmp_path / f"a{suffix}", LabelStream(grid, iter([np.zeros((3, 8, 9), np.uint8)])), grid)
    for wrong in (np.zeros((7, 9, 8), np.uint8), np.zeros((7, 8, 9), bool)):
        with pytest.raises(ValueError, match="do not fit a grid"):
            write_labels(tmp_path / f"a{suffix}", LabelStream(grid, iter([wrong])), grid)
    with pytest.raises(ValueError, match="do not fit a grid"):
        write_labels(tmp_path / f"a{suffix}", LabelStream(grid, iter([])), Geometry((9, 8, 6), oblique.affine))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_the_voxels(tmp_path: Path, mount: Callable[[str], Path]) -> None:
    path = tmp_path / "ct.nii.gz"
    ct = np.random.default_rng(0).integers(-99, 99, (90, 80, 70), dtype=np.int16)
    write_image(path, Volume(np.asfortranarray(ct), Geometry(ct.shape, np.eye(4))))
    with pytest.raises(OutputError, match="No space left on device"):
        read_image(path, mount("size=64k"))
