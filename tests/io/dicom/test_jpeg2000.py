"""JPEG 2000 by imagecodecs: the pixels that pylibjpeg makes of it, and no damage let through that pylibjpeg refuses."""

import io
import random
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import JPEG2000Lossless

from codestreams import damaged, dataset, decoded, outcome
from ctseg.errors import ImageError
from ctseg.io.dicom import jpeg2000
from ctseg.io.dicom.read import find_series, read_series

Maker = Callable[..., Path]


@pytest.fixture
def imagecodecs() -> Any:
    return pytest.importorskip("imagecodecs")


def noise(bits: int, signed: bool, shape: tuple[int, int] = (48, 64)) -> NDArray[Any]:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    kind = f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}"
    return np.random.default_rng(bits).integers(low, high, shape).astype(kind)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("container", ["j2k", "jp2"])
@pytest.mark.parametrize("header_signed", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_the_pixels_of_pylibjpeg(imagecodecs: Any, bits: int, signed: bool, header_signed: bool, container: str):
    array = noise(bits, signed)
    frame = imagecodecs.jpeg2k_encode(array, level=0, codecformat=container, bitspersample=bits, reversible=True)
    made = dataset(frame, JPEG2000Lossless, array.shape, bits, header_signed)
    ours, theirs = (decoded(made, plugin) for plugin in (jpeg2000.NAME, "pylibjpeg"))
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)
    if signed == header_signed:
        np.testing.assert_array_equal(ours, array)


def test_a_series_is_the_same_without_imagecodecs(
    imagecodecs: Any, series_plan, make_series: Maker, monkeypatch: pytest.MonkeyPatch
):
    folder = make_series(series_plan(size=(64, 48, 3), syntax=JPEG2000Lossless))
    calls: list[bytes] = []
    decode = imagecodecs.jpeg2k_decode
    monkeypatch.setattr(
        imagecodecs, "jpeg2k_decode", lambda *args, **kw: (calls.append(args[0]), decode(*args, **kw))[1]
    )
    first = read_series(find_series([folder]).series[0]).volume.array
    assert len(calls) == 3
    monkeypatch.setattr(jpeg2000, "is_available", lambda uid: False)
    np.testing.assert_array_equal(read_series(find_series([folder]).series[0]).volume.array, first)
    assert len(calls) == 3


def test_a_real_series_is_the_same_without_imagecodecs(
    imagecodecs: Any, real_data: Path, monkeypatch: pytest.MonkeyPatch
):
    archive = real_data / "totalsegmentator_example/example_ct_dicom.zip"
    first = read_series(find_series([archive]).series[0]).volume.array
    monkeypatch.setattr(jpeg2000, "is_available", lambda uid: False)
    np.testing.assert_array_equal(read_series(find_series([archive]).series[0]).volume.array, first)


def real_frame(real_data: Path) -> bytes:
    with zipfile.ZipFile(real_data / "totalsegmentator_example/example_ct_dicom.zip") as archive:
        name = next(one for one in archive.namelist() if not one.endswith("/"))
        return get_frame(pydicom.dcmread(io.BytesIO(archive.read(name))).PixelData, 0, number_of_frames=1)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("real", [False, True])
def test_it_refuses_what_pylibjpeg_refuses(imagecodecs: Any, request: pytest.FixtureRequest, real: bool):
    if real:
        frame, shape, bits, count = real_frame(request.getfixturevalue("real_data")), (512, 512), 12, 60
    else:
        array = noise(16, True)
        frame, shape, bits, count = imagecodecs.jpeg2k_encode(array, level=0), array.shape, 16, 600
    chance, code = random.Random(int(real)), frame.index(b"\xff\x90") + 14
    refused = taken = 0
    for _ in range(count):
        made = dataset(damaged(frame, code, 512, chance), JPEG2000Lossless, shape, bits, not real)
        ours, theirs = (outcome(made, plugin) for plugin in (jpeg2000.NAME, "pylibjpeg"))
        assert theirs is not None or ours is None
        if ours is not None:
            taken += 1
            np.testing.assert_array_equal(ours, theirs)
        refused += ours is None
    assert refused > count // 4
    assert taken > count // 10


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_codestream_cut_short_is_refused(series_plan, make_series: Maker, share: float):
    folder = make_series(series_plan(size=(64, 48, 3), syntax=JPEG2000Lossless))
    path = folder / "slice001.dcm"
    whole = pydicom.dcmread(path)
    frame = get_frame(whole.PixelData, 0, number_of_frames=1)
    whole.PixelData = encapsulate([frame[: int(200 + share * (len(frame) - 204))]])
    whole.save_as(path)
    with pytest.raises(ImageError, match=r"file #2': its pixels are damaged .*; copy it again"):
        read_series(find_series([folder]).series[0])


def test_other_threads_go_on_while_it_unpacks(imagecodecs: Any):
    """Else files would be unpacked one after the other."""
    array = noise(16, False, (512, 512))
    made = dataset(imagecodecs.jpeg2k_encode(array, level=0), JPEG2000Lossless, array.shape, 16, False)
    decoded(made, jpeg2000.NAME)
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            time.sleep(0.0005)
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    counts = []
    for _ in range(5):
        before = ticks
        decoded(made, jpeg2000.NAME)
        counts.append(ticks - before)
    done.set()
    thread.join()
    assert max(counts) > 5
