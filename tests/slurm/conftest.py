"""A Slurm of two nodes for all tests of this folder, and jobs on it."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster import Cluster, missing, running_cluster

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
JOB_SECONDS = 150
"""A job takes ten seconds; two wait for a time limit of a minute, which Slurm looks at every half minute."""


QUIET_SECONDS = 4
"""A node does not start a job again in the second in which it was told to end it."""


@dataclasses.dataclass
class Job:
    """A job of the cluster."""

    cluster: Cluster
    number: str
    log_file: Path

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def wait(self, until: Callable[[], Any], what: str, seconds: float = JOB_SECONDS) -> Any:
        """What `until` returns once it is true; a requeued job is let go at once."""
        end, queued = time.monotonic() + seconds, None
        while not (found := until()):
            shown = self.cluster.show(self.number)
            if shown["Reason"] != "BeginTime":
                queued = None
            elif queued is None:
                queued = time.monotonic()
            elif time.monotonic() > queued + QUIET_SECONDS:
                self.cluster.release(self.number)
            if time.monotonic() > end:
                pytest.fail(f"job {self.number}: no {what} in {seconds} s\n{shown}\n{self.log}\n{self.cluster.logs()}")
            time.sleep(0.2)
        return found

    def end(self, seconds: float = JOB_SECONDS) -> dict[str, str]:
        """What Slurm says of the ended job."""

        def ended() -> dict[str, str] | None:
            shown = self.cluster.show(self.number)
            return shown if shown["JobState"] in ENDED else None

        return self.wait(ended, "end", seconds)

    def processes(self) -> dict[int, psutil.Process]:
        """The Python processes that srun has started for it, by their place."""
        found = {}
        for process in psutil.process_iter():
            try:
                environ, words = process.environ(), process.cmdline()
            except psutil.Error:
                continue
            if environ.get("SLURM_JOB_ID") == self.number and "SLURM_STEP_ID" in environ and "python" in words[0]:
                found[int(environ["SLURM_PROCID"])] = process
        return found


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Slurm with the nodes n1 and n2."""
    reason = missing()
    if reason:
        pytest.skip(f"no Slurm to test on: {reason}")
    with running_cluster() as started:
        yield started


@pytest.fixture
def ctseg_slurm(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """A function that submits what `ctseg slurm ARGUMENTS` writes, for CPUs; its jobs end with the test."""

    def submit(*arguments: object) -> Job:
        command = [sys.executable, "-m", "ctseg", "slurm", *map(str, arguments)]
        options = ["--gpus", "0", "--cpus-per-task", "1", "--submit", "--json"]
        environ = {**os.environ, **cluster.environment, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *options], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        name, _, number = Path(answer["log"]).name.partition("-%")
        shown = cluster.show(answer["job"])
        assert (name, number) in (("%x", "j.log"), ("%x", "A_%a.log"))
        return Job(cluster, answer["job"], tmp_path / "logs" / f"{shown['JobName']}-{answer['job']}.log")

    yield submit
    cluster.cancel_all()


@pytest.fixture
def sbatch(cluster: Cluster, tmp_path: Path) -> Callable[..., Job]:
    """A function that submits a script of one's own: `sbatch("srun ...", "--nodes=2")`."""

    def submit(line: str, *options: str) -> Job:
        log = tmp_path / "own.log"
        script = f"#!/bin/bash\n{line}\n"
        (tmp_path / "own.sh").write_text(script)
        number = cluster.run("sbatch", "--parsable", f"--output={log}", *options, "own.sh", cwd=tmp_path).strip()
        return Job(cluster, number, log)

    return submit
