"""`--gpus N` of infer: the CTs are dealt out to N processes, and the answer is that of one."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctseg.engine import parts
from ctseg.engine.infer import infer
from ctseg.engine.model import Model
from ctseg.engine.parts import run_parts
from ctseg.errors import CtsegError, Stopped
from ctseg.jobs import find_jobs
from ctseg.manifest import Manifest
from ctseg.progress import Silent

SECONDS = 120


def test_two_processes_answer_as_one(
    tiny_manifest: Manifest, tiny_model: Model, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Five CTs, one of them bad, which ends nobody else's work; the same masks, outcomes and order."""
    cts, masks = tmp_path / "cts", tmp_path / "two" / "masks"
    cts.mkdir()
    for case in tiny_manifest.cases[:4]:
        (cts / case.image.name).write_bytes(case.image.read_bytes())
    (cts / "a_bad.nii").write_bytes(b"")
    one = infer(tiny_model, find_jobs([cts], tmp_path / "one"), tmp_path / "one", Silent())
    command = ["infer", cts, "--model", tiny_checkpoint, "--output", masks, "--device", "cpu", "--gpus", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "ctseg", *map(str, command)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "a_bad.nii': the file is empty" in done.stderr
    assert done.stderr.count("files failed, listed in") == 1, "told by its own process alone"
    assert "failures-1-of-2.csv" in done.stderr
    two = json.loads(done.stdout)
    assert [(o["image"], o["status"]) for o in two] == [(str(o.image), o.status) for o in one]
    assert [o["volumes_ml"] for o in two] == [o.volumes_ml for o in one]
    assert [o.status for o in one] == ["failed", "done", "done", "done", "done"]
    for outcome in one[1:]:
        assert (masks / outcome.mask.name).read_bytes() == outcome.mask.read_bytes()
    runs = [json.loads((masks / f"ctseg_run-{n}-of-2.json").read_text()) for n in (1, 2)]
    assert [len(run["cases"]) for run in runs] == [3, 2]


FAKE = """
import json, os, signal, sys, time
rank = int(os.environ["RANK"])
assert os.environ["LOCAL_RANK"] == str(rank) and os.environ["WORLD_SIZE"] == os.environ["LOCAL_WORLD_SIZE"] == "3"
{body}
print(json.dumps([{{"case": n}} for n in range(rank, 7, 3)]))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that makes the command a program of its own: `fake("sys.exit(2)")`."""

    def make(body: str) -> None:
        (tmp_path / "fake.py").write_text(FAKE.format(body=body))

        def start(command: list[str], **options):
            return real([sys.executable, str(tmp_path / "fake.py"), *command[3:]], **options)

        monkeypatch.setattr(parts.subprocess, "Popen", start)

    real = subprocess.Popen
    return make


def test_answers_are_put_together_in_order(fake) -> None:
    fake("sys.exit  # nothing")
    answers = run_parts(3, ["infer"])
    assert [row["case"] for row in answers.rows] == list(range(7))
    assert not answers.failed


def test_only_the_first_shows_progress(fake) -> None:
    fake('assert sys.argv[1:] == ["infer"] + ["--quiet"] * (rank > 0), sys.argv')
    run_parts(3, ["infer"])


@pytest.mark.parametrize(
    "body", ["rank == 1 and sys.exit(2)", "assert rank != 1", "rank == 1 and os.kill(os.getpid(), 9)"]
)
def test_one_that_fails_is_named(fake, body: str) -> None:
    fake(body)
    with pytest.raises(CtsegError, match=r"process 2 of 3 failed with exit code (2|1|-9); its error is above"):
        run_parts(3, ["infer"])


def test_a_stop_signal_is_handed_on(fake, tmp_path: Path) -> None:
    """And those that go on nevertheless are waited for."""
    fake(
        f"""
def stop(*_):
    open(r'{tmp_path}/stopped%d' % rank, 'w').close()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
open(r'{tmp_path}/started%d' % rank, 'w').close()
while len([n for n in os.listdir(r'{tmp_path}') if n.startswith('started')]) < 3: time.sleep(0.01)
if rank == 0: os.kill(os.getppid(), signal.SIGUSR1)
time.sleep(60)
"""
    )
    previous = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    started = time.monotonic()
    try:
        with pytest.raises(Stopped, match="the same command goes on"):
            run_parts(3, ["infer"])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    assert time.monotonic() - started < 30
    assert len(list(tmp_path.glob("stopped*"))) == 3
