"""Arrays on disk: ordinary arrays, small in memory, gone without a trace."""

import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from ctseg.errors import OutputError
from ctseg.scratch import SLAB_VOXELS, count_values, extremes, in_slabs, new_array, release

SIZE = (300, 200, 100)
"""6 million voxels: several slabs."""


def resident_kb(array: np.ndarray) -> int:
    """What the kernel says is in memory of the mapping that holds the array."""
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    for block in blocks[1:]:
        start, stop = (int(end, 16) for end in block.split(" ", 1)[0].split("-"))
        if start <= array.ctypes.data < stop:
            return int(re.search(r"^Rss:\s+(\d+) kB", block, re.MULTILINE)[1])
    raise AssertionError("no such mapping")


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("shape", [SIZE, (1, 1, 1)])
def test_zeros_that_keep_what_is_written(tmp_path: Path, shape: tuple[int, ...], on_disk: bool) -> None:
    array = new_array(shape, ">i2", tmp_path if on_disk else None)
    assert (array.shape, array.dtype, array.flags.c_contiguous) == (shape, np.dtype(">i2"), True)
    assert not array.any()
    values = np.random.default_rng(0).integers(-1000, 1000, shape)
    array[...] = values
    release(array)
    np.testing.assert_array_equal(array, values)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_slabs_of_an_array_on_disk_cover_it_and_leave_memory(tmp_path: Path, axes: tuple[int, ...]) -> None:
    array = new_array(SIZE, np.int16, tmp_path).transpose(axes)[::-1, :, ::-1]
    for number, slab in enumerate(in_slabs(array), start=1):
        assert slab.size <= SLAB_VOXELS
        assert resident_kb(array.base) < 2 * SLAB_VOXELS * 2 // 1024
        slab += number
    assert resident_kb(array.base) < 500  # the kernel maps some pages around each one that is touched
    assert (array > 0).all()
    assert number == len(np.unique(array)) == -(-100 * 200 * 300 // SLAB_VOXELS)


def test_a_part_is_released_without_its_neighbours(tmp_path: Path) -> None:
    array = new_array(SIZE, np.int16, tmp_path)
    array[...] = 7
    whole = resident_kb(array)
    assert whole == pytest.approx(array.nbytes / 1024, abs=8)
    release(array[100:200, 50:60, ::3])
    assert resident_kb(array) == pytest.approx(whole * 2 / 3, abs=500)
    release(array[:100])
    release(array[200:])
    assert resident_kb(array) < 500
    assert (array == 7).all()


def test_memory_is_not_released(tmp_path: Path) -> None:
    """The kernel would forget the values."""
    array, on_disk = new_array(SIZE, np.int16), new_array(SIZE, np.int16, tmp_path)
    array[...] = 7
    release(array)
    assert (array == 7).all()
    del on_disk


def test_the_kernel_has_both_kinds_back(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def free() -> int:
        return os.statvfs(tmp_path).f_bfree * os.statvfs(tmp_path).f_frsize

    before, size = resident(), 64 * 2**20
    for folder in (None, tmp_path):
        array = new_array((size,), np.uint8, folder)
        array[...] = 1
        assert resident() > before + size // 2
        del array
        assert resident() < before + size // 4
    assert not [link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in os.path.realpath(link)]


def test_a_full_disk_is_an_error_and_not_a_signal(mount: Callable[[str], Path]) -> None:
    disk = mount("size=1m")
    with pytest.raises(OutputError, match=r"cannot write '.*disk': No space left on device; free space or choose"):
        new_array(SIZE, np.int16, disk)
    assert os.statvfs(disk).f_bfree == os.statvfs(disk).f_blocks
    array = new_array((100, 1000), np.int16, disk)
    array[...] = 1
    assert array.all()


def test_where_the_system_cannot_take_room_zeros_do(
    mount: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS."""
    monkeypatch.delattr(os, "posix_fallocate")
    disk = mount("size=3m")
    array = new_array((3, 2**19 + 1), np.int8, disk)
    assert not array.any()
    assert (os.statvfs(disk).f_blocks - os.statvfs(disk).f_bfree) * os.statvfs(disk).f_bsize >= array.size
    with pytest.raises(OutputError, match="No space left on device"):
        new_array((2**22,), np.int8, disk)


def test_a_read_only_disk_is_an_error(mount: Callable[[str], Path]) -> None:
    with pytest.raises(OutputError, match="Read-only file system"):
        new_array(SIZE, np.int16, mount("ro"))


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from ctseg.scratch import new_array\n"
        "array = new_array((1000, 1000), 'f4', Path(sys.argv[1])); array[...] = 1\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["i2", "u1", "f4", "u8"])
def test_extremes_and_counts_are_numpys(tmp_path: Path, dtype: str) -> None:
    array = new_array(SIZE, dtype, tmp_path).T
    array[...] = np.random.default_rng(0).integers(0, 9, array.shape)
    array[7, 90, 250], array[99, 3, 2] = 99, 2
    assert extremes(array) == (array.min(), array.max()) == (0, 99)
    labels = array.astype(np.uint8, order="A")
    np.testing.assert_array_equal(count_values(labels, 3), np.bincount(labels.ravel()))
    np.testing.assert_array_equal(count_values(labels, 120), np.bincount(labels.ravel(), minlength=120))


@pytest.mark.parametrize("order", ["C", "F"])
def test_counts_where_slabs_have_nothing_one_structure_or_more(order: Literal["C", "F"]) -> None:
    labels = np.zeros(SIZE, np.uint8, order=order)
    slowest = labels if order == "C" else labels.T
    third = len(slowest) // 3  # about two slabs
    slowest[third : 2 * third] = 1
    slowest[-3:, 7:9] = 1
    slowest[-1, 3, 5:8] = (1, 2, 200)
    np.testing.assert_array_equal(count_values(labels, 2), np.bincount(labels.ravel()))
    np.testing.assert_array_equal(count_values(labels[::2, 1:, ::3], 2), np.bincount(labels[::2, 1:, ::3].ravel()))
    np.testing.assert_array_equal(count_values(labels * 0, 2), [labels.size, 0])


def test_extremes_tell_of_nan_wherever_it_is() -> None:
    array = np.ones(SIZE, np.float32)
    for place in ((0, 0, 0), (150, 3, 4), (299, 199, 99)):
        spoilt = array.copy()
        spoilt[place] = np.nan
        assert np.isnan(extremes(spoilt)).all()
