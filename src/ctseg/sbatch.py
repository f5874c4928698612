"""The batch script of a Slurm job that survives its time limit: what was stopped is queued again and goes on.

What the script rests on:

- `--signal=USR1@N` reaches what srun has started, and not the batch shell: the training saves and exits with 75, and
  the shell lives on to say `scontrol requeue`.
- srun ends all tasks as soon as one fails (`--kill-on-bad-exit`) and returns the highest exit code. It is 75 only if
  all processes have agreed to stop.
- `scancel` makes the training save and exit with 75 too. The job is then no longer RUNNING and must not come back.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import ctseg
from ctseg.errors import CtsegError, Stopped

NUMBER = "([0-9]{1,9})"
FORMATS = f"(?:{NUMBER}-)?{NUMBER}(?::{NUMBER})?(?::{NUMBER})?"
MAX_SIGNAL_SECONDS = 65535


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What is asked of Slurm."""

    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int
    job_name: str
    logs: Path
    folder: Path
    """Where the job runs."""
    array: str | None = None
    """"4" for four tasks, "100%10" for a hundred of which ten run at a time."""
    time: str | None = None
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    signal_seconds: int | None = None
    """How long before the time limit to stop; None for work that knows no stop."""
    alone: bool = False
    """Whether no other job of this name may run at the same time."""
    extra: tuple[str, ...] = ()
    """Further options of sbatch, as they are."""

    @property
    def num_tasks(self) -> int:
        """Processes that one srun starts."""
        return self.nodes * self.tasks_per_node

    @property
    def array_size(self) -> int | None:
        """Tasks of the job array, None without one."""
        return None if self.array is None else int(self.array.partition("%")[0])

    @property
    def log(self) -> str:
        """The log's path in sbatch's own grammar: %x job name, %j job, %A and %a array and its task."""
        number = "%j" if self.array is None else "%A_%a"
        return f"{str(self.logs.absolute()).replace('%', '%%')}/%x-{number}.log"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the job runs: `ctseg ARGUMENTS`."""

    arguments: list[str]
    """Shell words that stand in double quotes as they are come as `Expand`."""
    resumed: list[str] | None = None
    """The arguments from the second start on, as soon as `marker` exists."""
    marker: Path | None = None
    program: tuple[str, ...] = (sys.executable, "-m", "ctseg")


class Expand(str):
    """A word in which the shell of the job shall expand variables."""


def script(work: Work, resources: Resources) -> str:
    """The text of the batch script.

    Raises:
        CtsegError: if a value cannot stand in it.
    """
    directives = [f"#SBATCH {line}" for line in _directives(resources)]
    srun = f'srun --kill-on-bad-exit=1 --cpus-per-task={resources.cpus_per_task} "${{program[@]}}" "${{arguments[@]}}"'
    lines = [
        "#!/bin/bash",
        *directives,
        f"# Written by ctseg {ctseg.__version__}. Submit it again to go on where a job was killed.",
        "set -u",
        "",
        f"program=({_words(work.program)})",
        f"arguments=({_words(work.arguments)})",
        *_resuming(work),
        "",
        srun,
        "code=$?",
        *(_requeue() if resources.signal_seconds else []),
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def check_resources(resources: Resources) -> None:
    """Raises CtsegError for what Slurm would refuse, or accept and do otherwise than meant."""
    if resources.array is not None and not re.fullmatch(r"[1-9][0-9]{0,8}(%[1-9][0-9]{0,8})?", resources.array):
        raise CtsegError(f"--array {resources.array}: expected N, or N%M to run M at a time")
    if not re.fullmatch(r"[\w.:-]+", resources.job_name, re.ASCII):
        raise CtsegError(f"--job-name {resources.job_name!r}: expected letters, digits, '_', '-', '.' and ':'")
    if resources.gpus_per_node and resources.tasks_per_node != resources.gpus_per_node:
        raise CtsegError(
            f"--tasks-per-node {resources.tasks_per_node} with --gpus {resources.gpus_per_node}: each task takes one "
            f"GPU; leave --tasks-per-node out, or give --gpus 0 for CPUs alone"
        )
    wrong = [option for option in resources.extra if not option.startswith("-") or not option.isprintable()]
    if wrong:
        raise CtsegError(f"--sbatch {wrong[0]!r}: expected an option of sbatch, such as --sbatch=--constraint=a100")
    seconds = time_seconds(resources.time)
    early = resources.signal_seconds or 0
    if not 0 <= early <= MAX_SIGNAL_SECONDS or (seconds is not None and early >= seconds):
        raise CtsegError(
            f"--signal-seconds {early}: must be less than --time and at most {MAX_SIGNAL_SECONDS}, or the job would "
            f"be stopped as soon as it starts"
        )
    _directives(resources)


def time_seconds(text: str | None) -> int | None:
    """Seconds of a time limit in Slurm's grammar; None for none.

    Raises:
        CtsegError: if it is not in that grammar.
    """
    if text is None or text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = re.fullmatch(FORMATS, text)
    if not match:
        raise CtsegError(f"--time {text}: expected minutes, hours:minutes:seconds, or days-hours[:minutes[:seconds]]")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:  # M, M:S or H:M:S
        hours, minutes, seconds = ([0, *numbers, 0] if len(numbers) < 3 else numbers)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _directives(r: Resources) -> list[str]:
    values: list[tuple[str, object | None]] = [
        ("job-name", r.job_name),
        ("chdir", r.folder.absolute()),
        ("output", r.log),
        ("open-mode", "append"),
        ("array", None if r.array_size is None else f"1-{r.array}"),
        ("nodes", r.nodes),
        ("ntasks-per-node", r.tasks_per_node),
        ("cpus-per-task", r.cpus_per_task),
        ("gres", f"gpu:{r.gpus_per_node}" if r.gpus_per_node else None),
        ("mem", r.mem),
        ("time", r.time),
        ("partition", r.partition),
        ("account", r.account),
        ("qos", r.qos),
        ("signal", f"USR1@{r.signal_seconds}" if r.signal_seconds else None),
        ("dependency", "singleton" if r.alone else None),
    ]
    named = [f"--{name}={_quoted(name, str(value))}" for name, value in values if value is not None]
    return [*named, "--requeue", *r.extra]


def _quoted(name: str, value: str) -> str:
    """A value as sbatch reads it from a script: in double quotes unless it is plain."""
    if not value or not value.isprintable():
        raise CtsegError(f"--{name} {value!r}: must be printable and not empty")
    if re.fullmatch(r"[\w./:,%+=@-]+", value, re.ASCII):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _words(words: list[str] | tuple[str, ...]) -> str:
    return " ".join(f'"{word}"' if isinstance(word, Expand) else _shell_word(word) for word in words)


def _shell_word(word: str) -> str:
    """One line of valid text whatever the word holds: names of files may be line breaks, or bytes that are no text."""
    if word.isprintable():
        return shlex.quote(word)
    coded = re.sub(rb"[^ -&(-\[\]-~]", lambda found: b"\\x%02x" % found[0][0], os.fsencode(word))  # also ' and \
    return f"$'{coded.decode()}'"


def _resuming(work: Work) -> list[str]:
    if work.resumed is None or work.marker is None:
        return []
    return [
        f"if [ -e {_shell_word(str(work.marker))} ]; then  # a start before this one got so far",
        f"  arguments=({_words(work.resumed)})",
        "fi",
    ]


def _requeue() -> list[str]:
    return [
        f'if [ "$code" -eq {Stopped.exit_code} ]; then  # stopped, everything saved',
        "  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "  job=${job:-$SLURM_JOB_ID}",
        "  # A cancelled job, or one beyond its time limit, is no longer RUNNING.",
        '  if [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then',
        '    scontrol requeue "$job"',
        "  fi",
        "fi",
    ]
