"""The batch script: what Slurm is asked for, and what bash does with it, shown by a stub of srun and scontrol."""

import dataclasses
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from ctseg.errors import CtsegError
from ctseg.sbatch import Expand, Resources, Work, check_resources, script, time_seconds

ODD = "a\nb'\\\t$HOME\udcff\x7f\u2028!"
HOSTILE = 'it\'s $(touch hacked) `x` "y" $HOME \\ ; & é'


@pytest.fixture
def resources(tmp_path: Path) -> Resources:
    return Resources(
        nodes=2,
        gpus_per_node=4,
        tasks_per_node=4,
        cpus_per_task=8,
        job_name="lung",
        logs=tmp_path / "logs",
        folder=tmp_path,
        time="24:00:00",
        signal_seconds=120,
    )


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_directives(resources: Resources, tmp_path: Path) -> None:
    full = dataclasses.replace(
        resources, mem="64G", partition="gpu", account="radiology", qos="high", alone=True, extra=("--constraint=a100",)
    )
    assert directives(script(Work(arguments=["train", "lung"]), full)) == [
        "--job-name=lung", f"--chdir={tmp_path}", f"--output={tmp_path}/logs/%x-%j.log", "--open-mode=append",
        "--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=8", "--gres=gpu:4", "--mem=64G", "--time=24:00:00",
        "--partition=gpu", "--account=radiology", "--qos=high", "--signal=USR1@120", "--dependency=singleton",
        "--requeue", "--constraint=a100",
    ]  # fmt: skip


def test_work_that_knows_no_stop_is_not_signalled(resources: Resources) -> None:
    text = script(Work(arguments=["validate"]), dataclasses.replace(resources, signal_seconds=None, time=None))
    assert "--signal" not in text
    assert "requeue " not in text
    assert "--time" not in text


def test_an_array_logs_each_task(resources: Resources, tmp_path: Path) -> None:
    lines = directives(script(Work(arguments=["infer"]), dataclasses.replace(resources, array="100%10")))
    assert "--array=1-100%10" in lines
    assert f"--output={tmp_path}/logs/%x-%A_%a.log" in lines


def test_odd_folders_are_quoted_as_sbatch_reads_them(resources: Resources) -> None:
    odd = dataclasses.replace(resources, folder=Path('/a b/"q"\\'), logs=Path("/100%"))
    lines = directives(script(Work(arguments=[]), odd))
    assert '--chdir="/a b/\\"q\\"\\\\"' in lines
    assert "--output=/100%%/%x-%j.log" in lines


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"array": "0"}, "--array 0: expected N, or N%M"),
        ({"array": "1-4"}, "--array 1-4: expected N"),
        ({"job_name": "a b"}, "--job-name 'a b': expected letters"),
        ({"tasks_per_node": 2}, "--tasks-per-node 2 with --gpus 4: each task takes one GPU"),
        ({"extra": ("constraint=a100",)}, "--sbatch 'constraint=a100': expected an option of sbatch"),
        ({"extra": ("--x\nrm -rf",)}, "expected an option of sbatch"),
        ({"extra": ("--x\r",)}, "expected an option of sbatch"),
        ({"array": "9" * 10}, "expected N, or N%M"),
        ({"time": "１"}, "--time １: expected minutes"),
        ({"signal_seconds": 86400}, "--signal-seconds 86400: must be less than --time and at most 65535"),
        ({"signal_seconds": 60, "time": "1"}, "--signal-seconds 60: must be less than --time"),
        ({"time": "soon"}, "--time soon: expected minutes, hours:minutes:seconds"),
        ({"time": "1:2:3:4"}, "--time 1:2:3:4: expected"),
        ({"partition": "gpu\n#SBATCH --x"}, "--partition .*: must be printable and not empty"),
        ({"account": ""}, "--account '': must be printable and not empty"),
    ],
)
def test_refusals(resources: Resources, changes: dict, message: str) -> None:
    with pytest.raises(CtsegError, match=message):
        check_resources(dataclasses.replace(resources, **changes))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("24:00:00", 86400), ("2-0", 172800), ("1-12:30", 131400), ("1-1:1:1", 90061),
     ("UNLIMITED", None), ("infinite", None), (None, None)],
)  # fmt: skip
def test_times(text: str | None, seconds: int | None) -> None:
    assert time_seconds(text) == seconds


class Stub:
    """Runs scripts where srun, squeue and scontrol write down how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        bodies = {
            "srun": 'printf "%s\\0" "$@" > srun.called\nexit "$SRUN_CODE"',
            "squeue": f'echo squeue "$@" >> {self.calls}\necho "$STATE"',
            "scontrol": f'echo scontrol "$@" >> {self.calls}',
        }
        (folder / "bin").mkdir()
        for name, body in bodies.items():
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / "bin" / name).chmod(0o755)

    def run(self, text: str, code: int = 0, state: str = "RUNNING", **variables: str) -> tuple[int, list[str]]:
        """The script's exit code, and srun's arguments after its own."""
        (self.folder / "job.sh").write_text(text)
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        environ = {"PATH": path, "SRUN_CODE": str(code), "STATE": state, "SLURM_JOB_ID": "7", **variables}
        done = subprocess.run(
            ["bash", "job.sh"], cwd=self.folder, env=environ, capture_output=True, text=True, check=False
        )
        assert done.stderr == ""
        words = os.fsdecode((self.folder / "srun.called").read_bytes()).split("\0")[:-1]
        assert words[:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=8"]
        return done.returncode, words[2:]

    def said(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def stub(tmp_path: Path) -> Stub:
    return Stub(tmp_path)


def test_words_reach_the_command_as_they_are(resources: Resources, stub: Stub, tmp_path: Path) -> None:
    work = Work(
        arguments=["train", HOSTILE, ODD, "", "--set", "a=[1, 2]"], program=("apptainer", "exec", "my image.sif")
    )
    code, words = stub.run(script(work, resources))
    assert (code, words) == (0, ["apptainer", "exec", "my image.sif", *work.arguments])
    assert stub.said() == []
    assert not (tmp_path / "hacked").exists()


def test_the_first_start_and_the_next(resources: Resources, stub: Stub, tmp_path: Path) -> None:
    marker = Path("runs/a b/recipe.json")
    text = script(Work(arguments=["first"], resumed=["next", "--resume"], marker=marker, program=("x",)), resources)
    assert stub.run(text)[1] == ["x", "first"]
    (tmp_path / marker).parent.mkdir(parents=True)
    (tmp_path / marker).touch()
    assert stub.run(text)[1] == ["x", "next", "--resume"]


def test_the_place_in_an_array_is_known_only_in_the_job(resources: Resources, stub: Stub) -> None:
    work = Work(arguments=["infer", "--shard", Expand("$SLURM_ARRAY_TASK_ID/4")], program=("x",))
    assert stub.run(script(work, resources), SLURM_ARRAY_TASK_ID="3")[1] == ["x", "infer", "--shard", "3/4"]


@pytest.mark.parametrize("code", [0, 1, 2, 137, 143])
def test_an_end_is_the_end(resources: Resources, stub: Stub, code: int) -> None:
    assert stub.run(script(Work(arguments=[]), resources), code)[0] == code
    assert stub.said() == []


def test_a_stopped_job_is_queued_again(resources: Resources, stub: Stub) -> None:
    assert stub.run(script(Work(arguments=[]), resources), 75)[0] == 75
    assert stub.said() == ["squeue --noheader --jobs=7 --format=%T", "scontrol requeue 7"]


def test_of_an_array_only_the_stopped_task_is_queued_again(resources: Resources, stub: Stub) -> None:
    """The number of one task is that of the whole array."""
    text = script(Work(arguments=[]), resources)
    stub.run(text, 75, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="4")
    assert stub.said() == ["squeue --noheader --jobs=7_4 --format=%T", "scontrol requeue 7_4"]


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "TIMEOUT", ""])
def test_a_cancelled_job_is_not(resources: Resources, stub: Stub, state: str) -> None:
    assert stub.run(script(Work(arguments=[]), resources), 75, state)[0] == 75
    assert len(stub.said()) == 1


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(resources: Resources, tmp_path: Path) -> None:
    works = [
        Work(arguments=["train", "it's a b"], resumed=["train", "--resume"], marker=tmp_path / "a b"),
        Work(arguments=["infer", "--shard", Expand("$SLURM_ARRAY_TASK_ID/4")]),
    ]
    for work in works:
        (tmp_path / "job.sh").write_text(script(work, resources))
        done = subprocess.run(["shellcheck", "job.sh"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.stdout == ""


def test_the_default_program_is_this_python() -> None:
    import sys

    assert shlex.join(Work.program) == shlex.join([sys.executable, "-m", "ctseg"])
