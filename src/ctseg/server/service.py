"""What every API of the server rests on: models, images, and the work that is done with them."""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from ctseg.clicks import Click
from ctseg.engine.model import Model
from ctseg.engine.predict import predict
from ctseg.engine.session import prepare_for_clicks, segment_prepared, voxel_of
from ctseg.preprocess import Prepared
from ctseg.server.cache import ByteCache
from ctseg.server.datastore import Datastore
from ctseg.server.images import Image
from ctseg.server.problems import Conflict, Invalid, NotHere, TooLarge
from ctseg.server.sessions import Sessions
from ctseg.server.settings import Settings
from ctseg.server.tasks import Tasks
from ctseg.server.worker import ModelWorker
from ctseg.volume import Geometry, Volume

LOG = logging.getLogger("ctseg.server")

MAX_CLICKS = 256
"""In one session; a person gives up long before."""
GRID_BYTES = 1024
"""What a grid in memory counts for."""
BYTES_PER_VOXEL = 6
"""What unpacking may take of memory for each voxel that an image may have: int16 that become float32 take as much."""
MAX_UNPACKING = 2
"""Files of clients, and files for them, that are unpacked at once."""


@dataclass(frozen=True, eq=False)
class Served:
    """A model under the name that clients know it by."""

    name: str
    model: Model

    @property
    def takes_clicks(self) -> bool:
        """True of Deepgrow; others segment by themselves."""
        return self.model.recipe.clicks is not None

    @property
    def labels(self) -> dict[str, int]:
        """Name -> value in the masks of a model that segments by itself; empty for clicks, which name nothing."""
        return {} if self.takes_clicks else {name: int(value) for value, name in self.model.recipe.labels.items()}

    @property
    def names(self) -> dict[int, str]:
        """Value -> name: `labels` the other way round."""
        return {value: name for name, value in self.labels.items()}

    @property
    def dimensions(self) -> int:
        """2 or 3."""
        return 2 if self.model.recipe.is_2d else 3


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A mask, its grid, and how long the model took for it once its turn had come."""

    mask: NDArray[np.uint8]
    geometry: Geometry
    seconds: float

    @property
    def timing(self) -> dict[str, str]:
        """The header that tells it to clients."""
        return {"Server-Timing": f"model;dur={1000 * self.seconds:.1f}"}


@dataclass
class ClickSession:
    """An image that someone clicks on; the mask is that of the last click, as `.nii.gz`."""

    id: str
    image: Image
    version: tuple[Any, ...]
    """Of the image when the session began."""
    model: str
    clicks: tuple[Click, ...] = ()
    mask: bytes = b""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a click is answered: clicks count in the order they came."""

    def check_unchanged(self) -> None:
        """Raises Conflict if another image lies in the file by now, which clicks and mask do not belong to."""
        if self.image.version() != self.version:
            raise Conflict("session: the file of its image has changed; begin a new one")


@dataclass(frozen=True)
class Upload:
    """An image that a client has sent for a session of its own; the folder of its file goes with the session."""

    image: Image
    path: Path


@dataclass(eq=False)
class Service:
    """One server's state; everything in it may be used by several requests at once."""

    settings: Settings
    datastore: Datastore
    models: dict[str, Served]
    worker: ModelWorker
    cache: ByteCache
    scratch: Path
    click_sessions: Sessions[ClickSession] = field(init=False)
    uploads: Sessions[Upload] = field(init=False)
    trainings: Tasks = field(default_factory=lambda: Tasks("a training"))
    unpacking: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(MAX_UNPACKING))
    """Held by who unpacks a file of a client, or makes one, beside the models."""
    batches: Tasks = field(default_factory=lambda: Tasks("the segmenting of many images"))

    def __post_init__(self) -> None:
        limits = (self.settings.session_seconds, self.settings.max_sessions)
        self.click_sessions = Sessions(*limits)
        self.uploads = Sessions(*limits, on_remove=_remove)

    def model(self, name: str, *, takes_clicks: bool | None = None) -> Served:
        """The model of that name.

        Raises:
            NotHere: if there is none.
            Invalid: if it does not do what is asked for.
        """
        served = self.models.get(name)
        if served is None:
            raise NotHere(f"model {name[:80]!r}: not served here; there is {', '.join(self.models)}")
        if takes_clicks is not None and takes_clicks != served.takes_clicks:
            does = "segments by clicks" if served.takes_clicks else "segments without clicks"
            raise Invalid(f"model '{name}': {does}; choose another one")
        return served

    def check_size(self, image: Image) -> Geometry:
        """The grid of an image that is not too large, told by its header alone.

        Raises:
            TooLarge: if it has more voxels than the server takes, or unpacking it takes too much memory.
        """
        extent = self.cache.get(("extent", *image.version()), image.extent, lambda _: GRID_BYTES)
        num_bytes = extent.held_bytes + extent.reading_bytes
        self.check_voxels(math.prod(extent.geometry.size))
        if num_bytes > BYTES_PER_VOXEL * self.settings.max_voxels:
            limit = BYTES_PER_VOXEL * self.settings.max_voxels
            raise TooLarge(f"image: unpacking it takes {num_bytes} bytes, at most {limit}; store it as int16")
        return extent.geometry

    def check_voxels(self, voxels: int) -> None:
        """Raises TooLarge if an image may not have so many."""
        if voxels > self.settings.max_voxels:
            raise TooLarge(f"image: at most {self.settings.max_voxels} voxels, got {voxels}; crop it")

    def volume(self, image: Image) -> Volume:
        """A CT, from memory if it is there and the file has not changed."""
        self.check_size(image)
        return self.cache.get(("image", *image.version()), image.read, lambda v: v.array.nbytes)

    async def segment(self, request: Request | None, served: Served, image: Image) -> Segmentation:
        """The mask of a model that segments by itself, when its turn comes."""
        geometry = await run_in_threadpool(self.check_size, image)

        def work(check: Callable[[], None]) -> NDArray[np.uint8]:
            volume = self.volume(image)  # read only now: those who wait are many
            _check_unchanged(geometry, volume.geometry)
            return predict(
                served.model, volume, lambda *_: check(), note=partial(LOG.warning, "model %s: %s", served.name)
            )

        return await self._run(request, work, geometry)

    async def segment_clicks(
        self, request: Request | None, served: Served, image: Image, clicks: Sequence[Click]
    ) -> Segmentation:
        """The mask of these clicks, in voxels of the image, when its turn comes.

        Raises:
            ClickError: if one lies outside the image.
        """
        geometry = await run_in_threadpool(self.check_size, image)
        for click in clicks:
            voxel_of(click.point, geometry)
        key = ("prepared", served.name, *image.version())

        def prepare() -> Prepared:
            return prepare_for_clicks(served.model, self.volume(image))

        def num_bytes(prepared: Prepared) -> int:
            return int(prepared.image_XYZ.nbytes)

        def work(_: object) -> NDArray[np.uint8]:
            prepared = self.cache.get(key, prepare, num_bytes)
            _check_unchanged(geometry, prepared.source)
            return segment_prepared(served.model, prepared, clicks)

        return await self._run(request, work, geometry)

    async def _run(
        self, request: Request | None, work: Callable[[Callable[[], None]], NDArray[np.uint8]], geometry: Geometry
    ) -> Segmentation:
        def timed(check: Callable[[], None]) -> tuple[NDArray[np.uint8], float]:
            started = time.perf_counter()
            return work(check), time.perf_counter() - started

        mask, seconds = await self.worker.run(request, timed)
        return Segmentation(mask, geometry, seconds)

    def close(self) -> None:
        """Ends all work and removes what was only here for a time."""
        self.trainings.close()
        self.batches.stop()
        self.worker.close()
        self.click_sessions.clear()
        self.uploads.clear()
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.datastore.close()


def open_service(settings: Settings, models: Sequence[tuple[str, Model]]) -> Service:
    """A service with these models, whose names become unique.

    Raises:
        CtsegError: if the studies folder is not to be had.
    """
    served: dict[str, Served] = {}
    for name, model in models:
        candidates = (name, *(f"{name}-{number}" for number in range(2, len(models) + 2)))
        unique = next(free for free in candidates if free not in served)
        served[unique] = Served(unique, model)
    names = {value: name for one in reversed(served.values()) for name, value in one.labels.items()}
    return Service(
        settings=settings,
        datastore=Datastore(settings.studies, names),
        models=served,
        worker=ModelWorker(settings.max_waiting),
        cache=ByteCache(settings.cache_bytes),
        scratch=Path(tempfile.mkdtemp(prefix="ctseg-serve-")),
    )


def _check_unchanged(told: Geometry, read: Geometry) -> None:
    """Raises Conflict if another image lies in the file than when the request came."""
    if not told.agrees_with(read):
        raise Conflict("image: its file has changed meanwhile; begin anew")


def _remove(upload: Upload) -> None:
    shutil.rmtree(upload.path.parent, ignore_errors=True)
