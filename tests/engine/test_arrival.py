"""A CT that is segmented while it is read: windows wait for their planes, and a damaged end spoils all."""

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ctseg import preprocess
from ctseg.arrays import HOST
from ctseg.engine.arrival import Arrival, arriving
from ctseg.engine.model import Model
from ctseg.engine.predict import predict, predict_taken
from ctseg.errors import ImageError
from ctseg.preprocess import prepare
from ctseg.specs import Preprocess
from ctseg.volume import Geometry, Volume, orientation_to_ras

SPEC = Preprocess(spacing_mm=(1.0, 1.0, 1.0), hu_window=(-500.0, 500.0), crop_foreground=False)
SIZE = (8, 9, 30)
CODES = {"up": (-1.0, -1.0, 1.0), "down": (-1.0, -1.0, -1.0)}


class Slow:
    """A CT whose planes come one by one, each when it is allowed to."""

    def __init__(self, volume: Volume, error: Exception | None = None) -> None:
        self.geometry = volume.geometry
        self.allowed = 0
        self.more = threading.Condition()
        self.read: list[int] = []
        self._planes, self._error = volume.array.T, error

    def planes(self, first: int, stop: int) -> NDArray[Any]:
        with self.more:
            assert self.more.wait_for(lambda: self.allowed >= stop, timeout=30)
        self.read.append(stop)
        return self._planes[first:stop]

    def finish(self) -> None:
        if self._error is not None:
            raise type(self._error)(*self._error.args)

    def allow(self, planes: int) -> None:
        with self.more:
            self.allowed = planes
            self.more.notify_all()


@pytest.fixture(params=CODES)
def volume(request: pytest.FixtureRequest) -> Volume:
    array = np.random.default_rng(0).integers(-400, 400, SIZE, dtype=np.int16)
    return Volume(np.asfortranarray(array), Geometry(SIZE, np.diag([*CODES[request.param], 1.0])))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one plane each."""
    monkeypatch.setattr(preprocess, "SLAB_VOXELS", 2 * SIZE[0] * SIZE[1])


def test_what_has_been_read_can_be_used_before_the_rest_is(volume: Volume) -> None:
    whole = prepare(volume, SPEC, HOST).image_XYZ
    axis, sign = orientation_to_ras(volume.geometry)[2]
    assert axis == 2
    stream, before = Slow(volume), threading.active_count()
    with arriving(stream, SPEC, HOST, None) as (prepared, arrival):
        stream.allow(12)
        first, stop = (0, 8) if sign > 0 else (22, 30)
        arrival.wait(first, stop)
        np.testing.assert_array_equal(prepared.image_XYZ[:, :, first:stop], whole[:, :, first:stop])
        assert max(stream.read) <= 12
        stream.allow(30)
        arrival.wait_for_end()
        np.testing.assert_array_equal(prepared.image_XYZ, whole)
        assert arrival.seconds > 0
    assert threading.active_count() == before
    assert prepared.source is volume.geometry


@pytest.mark.parametrize("error", [ImageError("the checksum is wrong"), MemoryError("no room")])
def test_what_is_wrong_is_raised_to_whoever_waits(volume: Volume, error: Exception) -> None:
    """And so is, at the end, what shows only there, when every plane has come."""
    stream = Slow(volume, error)
    stream.allow(30)
    with arriving(stream, SPEC, HOST, None) as (_, arrival), pytest.raises(type(error), match=str(error)):
        arrival.wait_for_end()


def test_who_goes_away_leaves_no_thread(volume: Volume) -> None:
    stream, before = Slow(volume), threading.active_count()
    threading.Timer(0.1, stream.allow, (30,)).start()

    def leave() -> None:
        with arriving(stream, SPEC, HOST, None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert threading.active_count() <= before + 1  # the timer may still be there
    assert len(stream.read) < 30


def test_pieces_may_come_in_any_order() -> None:
    arrival = Arrival(10)
    returned: list[str] = []

    def wait(name: str, check: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            check()
            returned.append(name)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    early = wait("early", lambda: arrival.wait(0, 4))
    last = wait("end", arrival.wait_for_end)
    arrival.add(2, 4)
    arrival.add(8, 10)
    time.sleep(0.05)
    assert returned == []
    arrival.add(0, 2)
    early.join(20)
    assert returned == ["early"]
    arrival.add(4, 8)
    time.sleep(0.05)
    assert returned == ["early"]
    arrival.end()
    last.join(20)
    assert returned == ["early", "end"]


def test_torch_sees_the_same_image(volume: Volume) -> None:
    stream = Slow(volume)
    stream.allow(30)
    device = torch.device("cpu")
    with arriving(stream, SPEC, device, None) as (prepared, arrival):
        arrival.wait_for_end()
    assert torch.equal(prepared.image_XYZ, prepare(volume, SPEC, device).image_XYZ)


def test_what_ended_preparing_is_let_go_with_whoever_waited(volume: Volume) -> None:
    """Else a CT's arrays would stay until Python looks for garbage."""
    stream = Slow(volume, ImageError("the checksum is wrong"))
    stream.allow(30)
    kept: list[weakref.ref[Any]] = []

    def use() -> None:
        with suppress(ImageError), arriving(stream, SPEC, HOST, None) as (prepared, arrival):
            kept.append(weakref.ref(prepared))
            arrival.wait_for_end()

    gc.collect()
    gc.disable()
    try:
        use()
        assert kept[0]() is None
    finally:
        gc.enable()


DIRECTIONS = [
    np.diag([-1.0, -1.0, sign])[:, list(order)] for order in itertools.permutations(range(3)) for sign in (1, -1)
]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_windows_run_as_their_planes_come(tiny_model: Model, direction: NDArray[np.float64], fast: bool) -> None:
    """Along any axis of the network's grid, in either direction: more planes come after each window."""
    model = replace(tiny_model, forward=lambda image: torch.cat([0.5 - image, image - 0.5], dim=1))
    size = (16, 14, 60)
    affine = np.eye(4)
    affine[:3, :3] = direction * 8.0  # the tiny recipe's spacing
    array = np.random.default_rng(0).integers(-400, 400, size, dtype=np.int16)
    volume = Volume(np.asfortranarray(array), Geometry(size, affine))
    expected = predict(model, volume, fast=fast)
    stream = Slow(volume)
    stream.allow(20)
    read_before: list[int] = []

    def on_window(done: int, _: int) -> None:
        read_before.append(max(stream.read))
        stream.allow(min(60, 20 + 13 * done))

    found = predict_taken(model, lambda: stream, on_window, fast=fast)
    np.testing.assert_array_equal(found, expected)
    assert 0 < expected.mean() < 1
    assert read_before[0] <= 20
