"""Small volumes with odd sizes, anisotropic spacing and an oblique, left-handed grid; and the files they make."""

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Header
from numpy.typing import NDArray

from ctseg.volume import Geometry

SIZE = (7, 11, 5)


@pytest.fixture
def ct() -> NDArray[np.int16]:
    """An `[x, y, z]` array in which every voxel has its own value."""
    return np.arange(np.prod(SIZE), dtype=np.int16).reshape(SIZE, order="F") - np.int16(200)


@pytest.fixture
def labels() -> NDArray[np.uint8]:
    return np.asfortranarray(np.random.default_rng(0).integers(0, 9, SIZE, dtype=np.uint8))


@pytest.fixture
def oblique() -> Geometry:
    """No axis along the patient, x towards the left front, left-handed."""
    a, b = np.radians([20.0, 35.0])
    turn_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    direction = (turn_z @ turn_x)[:, [1, 0, 2]]
    return Geometry.from_parts(SIZE, (0.7, 1.3, 2.5), (-12.5, 33.3, 401.7), direction)


@pytest.fixture
def nifti(oblique: Geometry) -> Callable[..., bytes]:
    """A maker of NIfTI files: `nifti(array, endian="<", kind=Nifti1Header, **fields)`; fields go in unchecked."""

    def make(array: NDArray[Any], endian: str = "<", kind: Any = Nifti1Header, **fields: Any) -> bytes:
        header = kind(endianness=endian)
        header.set_data_shape(array.shape)
        header.set_data_dtype(array.dtype)
        header.set_sform(oblique.affine_ras, code=1)
        header.set_qform(oblique.affine_ras, code=1)
        header.set_xyzt_units("mm")
        header["vox_offset"], header["magic"] = header.single_vox_offset, header.single_magic
        for name, value in fields.items():
            header[name] = value
        return bytes(header.binaryblock) + bytes(4) + array.astype(array.dtype.newbyteorder(endian)).tobytes(order="F")

    return make


@pytest.fixture
def at_most() -> Callable[[int], AbstractContextManager[None]]:
    """`with at_most(n):` fails if more than n bytes are allocated inside."""

    @contextmanager
    def limit(num_bytes: int) -> Iterator[None]:
        tracemalloc.start()
        try:
            yield
            assert tracemalloc.get_traced_memory()[1] <= num_bytes
        finally:
            tracemalloc.stop()

    return limit


@pytest.fixture
def small_disk(mount: Callable[[str], Path]) -> Path:
    """A folder on a disk of 64 KiB."""
    return mount("size=64k")
