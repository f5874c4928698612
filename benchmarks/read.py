"""Reading CT: ctseg against nibabel, SimpleITK and pydicom, each in a fresh process, to the same array in memory.

    python benchmarks/read.py [--volume CT.nii.gz ...] [--series FOLDER_OR_ZIP ...] [--repetitions 7]

Without arguments a made CT of 512 x 512 x 200 is read, as `.nii.gz` and as an uncompressed DICOM series of 200 files.
What every reader must deliver is the whole array of Hounsfield units and the affine; a reader that maps the file or
delays its work is made to do it. Each process reads twice and the second counts, from the call to the array: imports
are not in it. Printed: median seconds with their spread, ratios to ctseg pair by pair, seconds of all CPUs together
(which other work on the machine disturbs least), peak memory, and whether arrays and affines are equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from timing import Run, in_turn, machine, ratios, spread

MADE_SIZE = (512, 512, 200)
Read = tuple[NDArray[Any], NDArray[np.float64]]
"""Hounsfield units `[x, y, z]` and the affine in LPS."""


def ctseg_image(path: Path) -> Callable[[], Read]:
    """What `ctseg infer` calls."""
    from ctseg.io.images import read_image

    def read() -> Read:
        volume = read_image(path)
        return volume.array, volume.geometry.affine

    return read


def nibabel_image(path: Path) -> Callable[[], Read]:
    """As nibabel gives it; `get_fdata` would make it float64."""
    import nibabel

    def read() -> Read:
        image = nibabel.load(path)
        return np.asanyarray(image.dataobj), np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine

    return read


def simpleitk_image(path: Path) -> Callable[[], Read]:
    """SimpleITK's reader for the format."""
    import SimpleITK

    return lambda: _of_simpleitk(SimpleITK, SimpleITK.ReadImage(str(path)))


def ctseg_series(path: Path) -> Callable[[], Read]:
    """The way of `ctseg infer` and `ctseg convert`: every file's header, every check, then the pixels."""
    from ctseg.io.dicom.read import find_series, read_series, select_series

    def read() -> Read:
        volume = read_series(select_series(find_series([path]), None)).volume
        return volume.array, volume.geometry.affine

    return read


def simpleitk_series(path: Path) -> Callable[[], Read]:
    """GDCM finds and sorts the files of the first series, SimpleITK reads them."""
    import SimpleITK

    def read() -> Read:
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path), recursive=True))
        return _of_simpleitk(SimpleITK, reader.Execute())

    return read


def pydicom_series(path: Path) -> Callable[[], Read]:
    """What scripts do: read all, sort by position along the normal, stack, rescale; no check of anything."""
    import pydicom

    def read() -> Read:
        slices = [pydicom.dcmread(file) for file in path.rglob("*") if file.is_file()]
        first = np.array(slices[0].ImageOrientationPatient, float).reshape(2, 3)
        normal = np.cross(*first)
        slices.sort(key=lambda item: float(normal @ np.array(item.ImagePositionPatient, float)))
        stack = np.stack([item.pixel_array * item.RescaleSlope + item.RescaleIntercept for item in slices], axis=-1)
        places = [np.array(item.ImagePositionPatient, float) for item in (slices[0], slices[1])]
        affine = np.eye(4)
        rows_mm, columns_mm = map(float, slices[0].PixelSpacing)
        affine[:3, 0], affine[:3, 1] = first[0] * columns_mm, first[1] * rows_mm
        affine[:3, 2], affine[:3, 3] = places[1] - places[0], places[0]
        return stack.transpose(1, 0, 2), affine

    return read


READERS: dict[str, dict[str, Callable[[Path], Callable[[], Read]]]] = {
    "image": {"ctseg": ctseg_image, "nibabel": nibabel_image, "SimpleITK": simpleitk_image},
    "series": {"ctseg": ctseg_series, "SimpleITK": simpleitk_series, "pydicom": pydicom_series},
}


def _of_simpleitk(simpleitk: Any, image: Any) -> Read:
    direction = np.array(image.GetDirection()).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return simpleitk.GetArrayFromImage(image).T, affine


def work(kind: str, name: str, path: Path) -> dict[str, Any]:
    """The second reading in this process: seconds, and what tells two arrays apart."""
    read = READERS[kind][name](path)
    read()
    started, cpu_started = time.perf_counter(), time.process_time()
    array, affine = read()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    whole = np.asfortranarray(array, dtype=np.int32)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "checksum": zlib.crc32(memoryview(whole.T).cast("B")),
        "affine": affine.round(3).tolist(),
        "dtype": str(array.dtype),
    }


def compare(kind: str, path: Path, repetitions: int) -> None:
    """Reads one CT by every reader in turn and prints the table."""
    commands = {
        name: [sys.executable, __file__, "--worker", f"{kind}:{name}", "--path", str(path)] for name in READERS[kind]
    }
    _print_table(path, in_turn(commands, repetitions))


def _print_table(path: Path, results: dict[str, list[Run]]) -> None:
    ours = results["ctseg"]
    print(f"\n{path.name}")
    print(
        f"{'':12}{'seconds':>24}{'times ctseg':>24}{'CPU s':>8}{'peak MB':>10}  "
        f"type      same voxels, same affine as ctseg"
    )
    for name, runs in results.items():
        seconds = [r.printed["seconds"] for r in runs]
        times = ratios(seconds, [r.printed["seconds"] for r in ours])
        same = [runs[0].printed[key] == ours[0].printed[key] for key in ("checksum", "affine")]
        told = ", ".join("yes" if value else "NO" for value in same)
        cpu = statistics.median(r.printed["cpu_seconds"] for r in runs)
        peak = statistics.median(r.peak_mb for r in runs)
        print(
            f"{name:12}{spread(seconds, 3):>24}{spread(times):>24}{cpu:>8.3f}{peak:>10.0f}  "
            f"{runs[0].printed['dtype']:8}  {told}"
        )


def _made(folder: Path) -> tuple[Path, Path]:
    """A made CT as `.nii.gz` and as a DICOM series."""
    from ctseg.io.dicom.write import write_series
    from ctseg.io.images import write_image
    from ctseg.sources.phantom import ADULT, centered_grid, make_phantom

    grid = centered_grid(MADE_SIZE, (0.75, 0.75, 1.5))
    image = make_phantom(0, 0, size=ADULT, grid=grid).image
    write_image(folder / "made_512x512x200.nii.gz", image)
    write_series(folder / "made_512x512x200_dicom", image)
    return folder / "made_512x512x200.nii.gz", folder / "made_512x512x200_dicom"


def _unpacked(path: Path, folder: Path) -> Path:
    """A series of the user's own (their own archive is trusted), as files: the others do not read archives."""
    if path.is_dir():
        return path
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / path.stem)
    return folder / path.stem


def main() -> None:
    """Parses the command line; a worker prints its result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volume", type=Path, nargs="*", default=[])
    parser.add_argument("--series", type=Path, nargs="*", default=[])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, name = options.worker.split(":")
        print(json.dumps(work(kind, name, options.path)))
        return
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        volumes, series = options.volume, [_unpacked(path, Path(folder)) for path in options.series]
        if not volumes and not series:
            volume, folder_of_series = _made(Path(folder))
            volumes, series = [volume], [folder_of_series]
        for path in volumes:
            compare("image", path, options.repetitions)
        for path in series:
            compare("series", path, options.repetitions)


if __name__ == "__main__":
    main()
