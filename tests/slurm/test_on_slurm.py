"""Jobs on a real Slurm: processes that find each other, jobs that survive their time limit, and none that hangs."""

import csv
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster import Cluster

from ctseg.engine.checkpoint import read_checkpoint, save_checkpoint
from ctseg.manifest import Manifest
from ctseg.networks import network_for
from ctseg.recipe import Recipe, recipe_from_dict

pytestmark = pytest.mark.slurm
SOON = 45
"""Seconds within which a job with a dead process ends; waiting for the dead one would take a day."""


@pytest.fixture
def recipe(tiny_recipe: Recipe, tiny_data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """A function that writes the tiny recipe with changes: the arguments of `ctseg train` that train it."""

    def write(name: str = "tiny", **tables: dict[str, Any]) -> list[str]:
        data = tiny_recipe.to_dict()
        for table, values in tables.items():
            data[table] = {**data[table], **values}
        recipe_from_dict(data, "test")
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
        return [f"{name}.json", "--manifest", str(tiny_data), "--quiet"]

    return write


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "last.pt")["model"]


def assert_same(run: Path, other: Path) -> None:
    """Bit for bit: the weights, and every row of the log."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (run / "log.csv").read_text() == (other / "log.csv").read_text()


def test_two_nodes_train_as_one_process(ctseg_slurm, recipe, tmp_path: Path) -> None:
    """One task on each node. Only the first writes, and nothing it writes tells that there were two.

    Left out is what a normalisation takes away again: the bias before it, whose gradient is rounding noise of which the
    optimizer makes full steps, and its mean. Adam would do so for every small gradient, NovoGrad does not.
    """
    arguments = recipe(optimizer={"kind": "novograd"})
    two = ctseg_slurm("train", *arguments[:-1], "--nodes", 2, "--output", "two")
    one = ctseg_slurm("train", *arguments, "--output", "one")
    assert two.end()["JobState"] == "COMPLETED", two.log
    assert one.end()["JobState"] == "COMPLETED", one.log
    assert "process 1 of 2" in two.log
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    logs = [list(csv.DictReader((tmp_path / run / "log.csv").read_text().splitlines())) for run in ("two", "one")]
    assert [row["epoch"] for row in logs[0]] == ["1", "2"]
    for ours, theirs in zip(*logs, strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-4)
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    compared = [
        name
        for name in ours
        if not name.endswith("running_mean") and name.replace("conv.bias", "adn.N.bias") not in ours.keys() - {name}
    ]
    assert len(compared) > 0.6 * len(ours)
    for name in compared:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_job_is_queued_again_before_its_time_is_up_and_goes_on(ctseg_slurm, sbatch, recipe, tmp_path: Path) -> None:
    """And one without a warning ends with its time; submitted once more it goes on too. Both to the same bits.

    The training would be over in seconds, so it is held; Slurm wakes what it signals.
    """
    arguments = recipe(training={"epochs": 30})
    limit = ("--time", 1)
    warned = ctseg_slurm("train", *arguments, "--output", "warned", *limit, "--signal-seconds", 5)
    line = f"srun {sys.executable} -m ctseg train {' '.join(arguments)} --device cpu --output ended"
    ended = sbatch(line, "--time=1")
    for job, run in ((warned, "warned"), (ended, "ended")):
        job.wait((tmp_path / run / "last.pt").exists, "checkpoint")
        if "stopped by a signal" not in job.log:  # a slow machine may come to its first checkpoint so late
            job.processes()[0].suspend()
    whole = ctseg_slurm("train", *arguments, "--output", "whole")
    assert whole.end()["JobState"] == "COMPLETED", whole.log
    shown = warned.end()
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), warned.log
    assert "stopped by a signal in epoch" in warned.log
    assert_same(tmp_path / "warned", tmp_path / "whole")
    assert ended.end()["JobState"] == "TIMEOUT", ended.log
    assert ended.cluster.show(ended.number)["Restarts"] == "0"
    assert len(weights(tmp_path / "ended")) == len(weights(tmp_path / "whole"))
    again = ctseg_slurm("train", "tiny.json", "--quiet", "--output", "ended", "--resume")
    assert again.end()["JobState"] == "COMPLETED", again.log
    assert_same(tmp_path / "ended", tmp_path / "whole")


def test_a_cancelled_job_does_not_come_back(ctseg_slurm, recipe, tmp_path: Path, cluster: Cluster) -> None:
    """It saves and exits with 75 like one whose time is up."""
    job = ctseg_slurm("train", *recipe(training={"epochs": 10_000}), "--output", "run", "--nodes", 2)
    job.wait((tmp_path / "run" / "last.pt").exists, "checkpoint")
    cluster.run("scancel", job.number)
    assert job.end(SOON)["JobState"] == "CANCELLED", job.log
    time.sleep(3)
    assert cluster.show(job.number)["JobState"] == "CANCELLED"
    assert "stopped by a signal in epoch" in job.log


def test_two_processes_stop_queue_again_and_go_on_after_a_kill(ctseg_slurm, recipe, tmp_path: Path) -> None:
    """Slurm's signal to both; then SIGKILL to one, which ends the job with an error; the same bits in the end."""
    arguments = recipe(training={"epochs": 60})
    train = ("train", *arguments, "--nodes", 2)
    whole = ctseg_slurm(*train, "--output", "whole")
    job = ctseg_slurm(*train, "--output", "run")
    checkpoint = tmp_path / "run" / "last.pt"
    job.wait(checkpoint.exists, "checkpoint")
    job.cluster.run("scancel", "--signal=USR1", job.number)
    job.wait(lambda: job.cluster.show(job.number)["Restarts"] == "1", "requeue")
    job.wait(lambda: job.cluster.show(job.number)["JobState"] == "RUNNING", "restart")
    before = checkpoint.stat().st_mtime_ns
    job.wait(lambda: checkpoint.stat().st_mtime_ns > before, "further checkpoint")
    job.processes()[1].send_signal(signal.SIGKILL)
    shown = job.end(SOON)
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", "137:0"), job.log
    assert "task 1: Killed" in job.log
    again = ctseg_slurm("train", "tiny.json", "--quiet", "--nodes", 2, "--output", "run", "--resume")
    assert again.end()["JobState"] == "COMPLETED", again.log
    assert whole.end()["JobState"] == "COMPLETED", whole.log
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_task_that_cannot_start_ends_all(ctseg_slurm, recipe, tmp_path: Path) -> None:
    """The second node lacks a GPU; the first process waits for it to join."""
    program = tmp_path / "program.sh"
    program.write_text(f'#!/bin/bash\n[ "$SLURM_PROCID" = 1 ] && extra=(--device cuda)\n'
                       f'exec {sys.executable} -m ctseg "$@" "${{extra[@]}}"\n')  # fmt: skip
    job = ctseg_slurm("train", *recipe(), "--nodes", 2, "--output", "run", "--program", f"bash {program}")
    shown = job.end(SOON)
    assert shown["JobState"] == "FAILED"
    assert shown["ExitCode"] != "0:0"
    assert "0 CUDA GPU(s) here; use --device cpu" in job.log
    assert "Traceback" not in job.log


def test_a_process_whose_peer_was_killed_says_so(sbatch, recipe, tmp_path: Path) -> None:
    """Without srun's help: plain `srun` lets the others run on."""
    arguments = " ".join(recipe(training={"epochs": 10_000}))
    line = f"srun --kill-on-bad-exit=0 {sys.executable} -m ctseg train {arguments} --device cpu --output run"
    job = sbatch(line, "--nodes=2", "--ntasks-per-node=1")
    job.wait((tmp_path / "run" / "last.pt").exists, "checkpoint")
    job.processes()[1].send_signal(signal.SIGKILL)
    assert job.end(SOON)["JobState"] == "FAILED"
    assert "ctseg: another process of this run has ended; its error is above or in its own log" in job.log
    assert "Traceback" not in job.log


def test_torchrun_on_two_nodes(sbatch, recipe, tmp_path: Path) -> None:
    torchrun = Path(sys.executable).with_name("torchrun")
    meeting = "--nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=localhost:29517 --rdzv-id=1"
    line = f"srun {torchrun} {meeting} -m ctseg train {' '.join(recipe()[:-1])} --device cpu --output run"
    job = sbatch(line, "--nodes=2", "--ntasks-per-node=1")
    assert job.end()["JobState"] == "COMPLETED", job.log
    assert "process 1 of 2" in job.log
    assert read_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 2


def test_an_array_does_every_ct_once(
    ctseg_slurm, tiny_recipe: Recipe, tiny_manifest: Manifest, tmp_path: Path, cluster: Cluster
) -> None:
    """Two array tasks of two processes each; a bad CT fails alone, in a list of its own."""
    torch.manual_seed(0)
    content = {"recipe": tiny_recipe.to_dict(), "model": network_for(tiny_recipe).state_dict()}
    save_checkpoint(tmp_path / "m.pt", content)
    cts = tmp_path / "the cts"
    cts.mkdir()
    for case in tiny_manifest.cases:
        shutil.copy(case.image, cts)
    (cts / "broken.nii.gz").write_bytes(b"")
    job = ctseg_slurm("infer", cts, "--model", "m.pt", "--output", "masks", "--array", 2, "--tasks-per-node", 2)
    tasks = [f"{job.number}_{task}" for task in (1, 2)]
    job.wait(lambda: all(cluster.show(t)["JobState"] in ("COMPLETED", "FAILED") for t in tasks), "end of the array")
    logs = "".join(path.read_text() for path in sorted((tmp_path / "logs").iterdir()))
    assert sorted(cluster.show(task)["JobState"] for task in tasks) == ["COMPLETED", "FAILED"], logs
    done = [line.split()[-3] for line in logs.splitlines() if " done " in line and "_seg" in line]
    masks = sorted(path.name for path in (tmp_path / "masks").glob("*_seg.nii.gz"))
    assert masks == sorted(f"{case.name}_seg.nii.gz" for case in tiny_manifest.cases)
    assert len(done) == len(masks)
    (failures,) = (tmp_path / "masks").glob("failures*")
    assert failures.name in {f"failures-{part}-of-4.csv" for part in (1, 2, 3, 4)}
    assert "broken.nii.gz" in failures.read_text()
