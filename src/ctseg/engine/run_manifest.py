"""How the masks of a folder were made and from what, kept up to date while they are made: `ctseg_run.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import ctseg
from ctseg.engine.cases import digest_input
from ctseg.engine.model import Model
from ctseg.errors import CtsegError, ImageError, OutputError, Stopped
from ctseg.files import write_text
from ctseg.jobs import RUN_MANIFEST, Job, Options, Shard
from ctseg.privacy import without_uids
from ctseg.provenance import read_object

CASES, EARLIER = "cases", "earlier_runs"


def run_facts(model: Model, options: Options, shard: Shard) -> dict[str, Any]:
    """What decides about the masks of a run, and where it runs; a UID in the rule for series is left out."""
    chosen = dataclasses.asdict(options)
    return {
        **model_facts(model),
        "options": {**chosen, "series": chosen["series"] and without_uids(chosen["series"])},
        "shard": str(shard),
    }


def model_facts(model: Model) -> dict[str, Any]:
    """Which model runs, where, and on which versions."""
    runtime = model.runtime
    libraries = dict.fromkeys(("torch", "numpy", model.backend))
    return {
        "ctseg": ctseg.__version__,
        "python": platform.python_version(),
        "libraries": {name: getattr(sys.modules.get(name), "__version__", None) for name in libraries},
        "device": str(runtime.device),
        "gpu": runtime.gpu,
        "precision": runtime.precision,
        "backend": model.backend,
        "threads": runtime.threads,
        "model": model.path.name,
        "model_sha256": model.sha256,
        "recipe": model.recipe.name,
    }


class RunManifest:
    """The manifest of a run, in a file that is whole after every case.

    Entries of earlier runs stay while their masks are there, or as long as their CTs have failed; `earlier_runs` says
    how those masks were made. Masks of another model have no entry. Entries in `others` are taken over as well.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], others: Iterable[Path] = ()) -> None:
        self._path = path
        self._run = {**facts, "started": _now(), "finished": None, "state": "running", "error": ""}
        self._earlier: list[dict[str, Any]] = []
        self._cases: dict[str, dict[str, Any]] = {}
        self._lines: dict[str, str] = {}
        for before in (*others, path):
            self._take_over(read_object(before) or {})

    def add(self, mask: Path, case: Mapping[str, Any]) -> None:
        """Puts the entry of a CT whose mask is `mask` in the place of its old one, and writes the file."""
        made = {"mask_mtime_ns": _mtime_ns(mask), "run": self._run["started"]}
        self._set({"mask": self._name(mask), **case, **made})
        self.write()

    def is_of_another_ct(self, job: Job) -> bool:
        """Whether the mask of a job is that of another CT, which is called like its own: another file, other bytes."""
        case = self._cases.get(self._name(job.mask), {})
        if job.series is not None or case.get("status") != "done" or case.get("place") in (None, place_of(job)):
            return False
        try:
            return job.num_bytes != case.get("num_bytes") or digest_input(job).sha256 != case.get("sha256")
        except (OSError, ImageError):
            return True

    def is_outdated(self, job: Job) -> bool:
        """Whether a CT has another size than when its mask was made, however old its files say they are."""
        case = self._cases.get(self._name(job.mask), {})
        try:
            return case.get("status") == "done" and case.get("num_bytes") not in (None, job.num_bytes)
        except OSError:
            return False

    def add_skipped(self, mask: Path, image: Path) -> None:
        """Keeps the entry of a mask that was there; one without an entry gets one that knows nothing of it.

        The file is not written: it costs too much for many CTs that cost nothing, and nothing is lost with it.
        """
        name = self._name(mask)
        if self._cases.get(name, {}).get("status") != "done":
            self._set({"mask": name, "image": str(image), "status": "skipped", "run": self._run["started"]})

    def close(self, state: str, error: str = "") -> None:
        """Writes how the run has ended."""
        self._run |= {"finished": _now(), "state": state, "error": error}
        self.write()

    def _take_over(self, before: dict[str, Any]) -> None:
        runs = [
            {key: value for key, value in before.items() if key not in (CASES, EARLIER)},
            *_objects(before, EARLIER),
        ]
        runs = [run for run in runs if isinstance(run.get("started"), str)]
        known = [run["started"] for run in self._earlier]
        self._earlier += [
            run for run in runs if run.get("model_sha256") == self._run["model_sha256"] and run["started"] not in known
        ]
        known = [run["started"] for run in self._earlier]
        for case in _objects(before, CASES):
            mask = case.get("mask")
            if not isinstance(mask, str) or case.get("run") not in known:
                continue
            failed = case.get("status") == "failed"
            if failed and self._cases.get(mask, {}).get("status") == "done":
                continue
            if failed or _is_same(self._path.parent / mask, case.get("mask_mtime_ns")):
                self._set(case)

    def _set(self, case: dict[str, Any]) -> None:
        self._cases[case["mask"]] = case
        self._lines[case["mask"]] = json.dumps(case)  # once, as there may be thousands

    def write(self) -> None:
        """Writes the file: one line for each case, so that it can be searched and compared."""
        told = {case["run"] for case in self._cases.values()}
        earlier = [run for run in self._earlier if run["started"] in told]
        head = json.dumps({**self._run, EARLIER: earlier}, indent=1).removesuffix("\n}")
        lines = ",".join(f"\n  {line}" for line in self._lines.values())
        write_text(self._path, f'{head},\n "{CASES}": [{lines}\n ]\n}}\n')

    def _name(self, mask: Path) -> str:
        return mask.relative_to(self._path.parent).as_posix()


@contextmanager
def open_run_manifest(path: Path, facts: Mapping[str, Any]) -> Iterator[RunManifest]:
    """The manifest of the run inside, which tells how that ended, whatever happens.

    That of a run over all CTs takes over what those of parts told, which go once it is complete.

    Raises:
        OutputError: if it cannot be written.
    """
    parts = sorted(path.parent.glob("ctseg_run-*-of-*.json")) if path.name == RUN_MANIFEST else []
    manifest = RunManifest(path, facts, parts)
    manifest.write()
    try:
        yield manifest
    except BaseException as error:
        state = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
        with suppress(OutputError):  # the disk may be full, and that was told already
            manifest.close(state, str(error) if isinstance(error, CtsegError) else type(error).__name__)
        raise
    manifest.close("complete")
    for part in parts:
        part.unlink(missing_ok=True)


def place_of(job: Job) -> str | None:
    """A number for where a CT's file lies, which tells nobody; a series is called by its own identifier anyway."""
    if job.series is not None:
        return None
    return hashlib.sha256(os.fsencode(job.image.absolute())).hexdigest()[:16]


def _objects(data: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    listed = data.get(key)
    return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []


def _is_same(mask: Path, mtime_ns: object) -> bool:
    """Whether a mask is there and was not made again, by another part of a run say; skipped ones tell no time."""
    now = _mtime_ns(mask)
    return now is not None and mtime_ns in (None, now)


def _mtime_ns(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns if path.is_file() else None
    except (OSError, ValueError):  # or a name that no file can have
        return None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat()
