"""A real Slurm of two nodes on one machine, for tests: controller, two node daemons and munge in a folder of their own.

By hand: `python tests/slurm/cluster.py` starts one, prints the line that points Slurm's commands at it, and stops it
at Ctrl-C. Needs root, and Debian's packages slurm-wlm and munge.
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel")
NODES = ("n1", "n2")
CPUS_PER_NODE = 2
START_SECONDS = 60.0
STOP_SECONDS = 10.0

# Ends what ignores SIGTERM after 5 s. A requeued job waits two minutes, which no setting shortens; see `release`.
CONF = """
ClusterName=ctseg
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
JobRequeue=1
KillWait=5
MpiDefault=none
ReturnToService=2
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "starting Slurm needs root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge)" if absent else None


class Cluster:
    """A running cluster; `environment` is what its commands need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "PATH": _path(),
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """What a Slurm command prints; RuntimeError with its stderr if it fails."""
        done = subprocess.run(
            command, cwd=cwd, env=self._environ(**variables), capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr}")
        return done.stdout

    def start(self) -> None:
        """Starts the daemons and waits until both nodes are idle; RuntimeError with their logs if they never are."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        _make_key(self.folder / "munge.key")
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._spawn("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged opens no socket")
        controller, *ports = _free_ports(1 + len(NODES))
        conf = CONF.format(
            host=socket.gethostname().partition(".")[0],
            user=getpass.getuser(),
            folder=self.folder,
            controller=controller,
            nodes=",".join(NODES),
            ports=",".join(map(str, ports)),
            cpus=CPUS_PER_NODE,
        )
        (self.folder / "slurm.conf").write_text(conf)
        self._spawn("slurmctld", "-D", "-i", "-f", f"{self.folder}/slurm.conf")
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir(exist_ok=True)
            self._spawn("slurmd", "-D", "-N", node, "-f", f"{self.folder}/slurm.conf")
        self._wait(self._nodes_idle, "the nodes are not idle")

    def stop(self) -> None:
        """Ends every job and every daemon."""
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            self.cancel_all()
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Reason, ExitCode, Restarts, ..."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.partition("=")[::2] for word in words)

    def release(self, job: str) -> None:
        """Lets a requeued job start now."""
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def cancel_all(self) -> None:
        """Cancels every job and waits until the nodes are idle again."""
        self.run("scancel", "--user", getpass.getuser())
        self._wait(self._nodes_idle, "jobs do not end")

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            parts.append(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-40:]))
        return "\n".join(parts)

    def _environ(self, **variables: str) -> dict[str, str]:
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**outside, **self.environment, **variables}

    def _spawn(self, program: str, *arguments: str) -> None:
        output = (self.folder / f"{program}-{len(self._daemons)}.out.log").open("wb")
        with output:
            self._daemons.append(
                subprocess.Popen(
                    [program, *arguments],
                    env=self._environ(),
                    stdout=output,
                    stderr=output,
                    preexec_fn=_end_with_parent,
                )
            )

    def _nodes_idle(self) -> bool:
        try:
            states = self.run("sinfo", "--noheader", "--Node", "--format=%T").split()
        except (RuntimeError, subprocess.TimeoutExpired):
            return False
        return states == ["idle"] * len(NODES)

    def _wait(self, condition: Callable[[], bool], failure: str) -> None:
        end = time.monotonic() + START_SECONDS
        while not condition():
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > end:
                reason = f"{ended[0]} has ended" if ended else failure
                raise RuntimeError(f"Slurm does not run: {reason}\n{self.logs()}")
            time.sleep(0.1)


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster in a temporary folder, whose path is short enough for a socket's name."""
    folder = Path(tempfile.mkdtemp(prefix="ctseg-slurm-", dir="/tmp"))
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # where Debian has the daemons


def _end_with_parent() -> None:
    """Even a test run that is killed leaves no daemon behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _make_key(path: Path) -> None:
    path.write_bytes(os.urandom(128))
    path.chmod(0o400)


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with running_cluster() as started:
        print(f"export SLURM_CONF={started.environment['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)
