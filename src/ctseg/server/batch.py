"""Segmenting many of the studies' images, one after another, between what others ask for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ctseg.errors import CtsegError
from ctseg.server.problems import Busy
from ctseg.server.service import Served, Service
from ctseg.server.tasks import Task

LOG = logging.getLogger("ctseg.server")
BUSY_SECONDS = 1.0
"""After it was told that too many wait, it asks again."""


def start_batch(service: Service, served: Served, images: list[str], tag: str) -> Callable[[Task], Callable[[], None]]:
    """What `Tasks.begin` takes to segment images one by one and save the masks with a tag; others go in between."""
    loop = asyncio.get_running_loop()

    async def run(task: Task) -> None:
        failed = 0
        for number, image_id in enumerate(images, start=1):
            if task.status == "STOPPED":
                break
            try:
                await _segment_and_save(service, served, image_id, tag)
            except CtsegError:
                failed += 1
            except Exception as error:  # of one image: the others can still be done; its text may name a patient
                LOG.error("segmenting many images: one failed: %s", type(error).__name__)
                failed += 1
            task.details.append(f"{number} of {len(images)} images, {failed} failed")
        task.result = {"total": len(images), "failed": failed}
        task.finish("STOPPED" if task.status == "STOPPED" else "ERROR" if failed else "DONE")

    def start(task: Task) -> Callable[[], None]:
        future = asyncio.run_coroutine_threadsafe(run(task), loop)
        future.add_done_callback(lambda done: None if task.end is not None else task.finish("ERROR"))
        return lambda: None

    return start


async def _segment_and_save(service: Service, served: Served, image_id: str, tag: str) -> None:
    store = service.datastore
    image = await asyncio.to_thread(store.image, image_id)
    while True:
        try:
            found = await service.segment(None, served, image)
            break
        except Busy:
            await asyncio.sleep(BUSY_SECONDS)
    notes = {"params": {"label_names": served.labels}}  # Slicer names what it loads by them
    await asyncio.to_thread(store.save_label, image_id, tag, found.mask, found.geometry, names=served.names, info=notes)
