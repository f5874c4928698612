"""`ctseg slurm`: wrong arguments are found before a night in the queue, and the script goes on where a job stopped."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctseg.manifest import Manifest
from ctseg.recipe import Recipe, load_recipe
from ctseg.workspace import start_run


def arguments(script: str) -> list[list[str]]:
    """The words of each `arguments=(...)` of a script, as bash reads them."""
    found = []
    for line in script.splitlines():
        if line.strip().startswith("arguments="):
            shell = f"SLURM_ARRAY_TASK_ID=3\n{line}\nprintf '%s\\n' \"${{arguments[@]}}\""
            done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
            found.append(done.stdout.splitlines())
    return found


def test_train_goes_on_in_one_fixed_run(cli: Callable[..., Any], tiny_data: Path, tmp_path: Path):
    result = cli("slurm", "train", "spleen:small", "--nodes", 2, "--gpus", 4, "--time", "24:00:00",
                 "--manifest", tiny_data, "--set", "title=it's $HOME", "--quiet")  # fmt: skip
    assert (result.code, result.err) == (0, "")
    first, later = arguments(result.out)
    run = "runs/spleen-small-001"
    changes = ["--set", "title=it's $HOME"]
    assert first == ["train", "spleen:small", "--output", run, "--manifest", str(tiny_data), *changes, "--quiet"]
    assert later == ["train", "spleen:small", "--output", run, "--resume", *changes, "--quiet"]
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gres=gpu:4", "--signal=USR1@120", "--dependency=singleton",
                 "--job-name=ctseg-spleen-small-001", f"--chdir={tmp_path}"):  # fmt: skip
        assert f"#SBATCH {line}\n" in result.out
    assert (tmp_path / "logs").is_dir(), "Slurm does not make it, and a job without a log fails silently"


def test_two_scripts_have_two_runs(cli: Callable[..., Any], tmp_path: Path):
    for _ in range(2):
        assert cli("slurm", "train", "spleen:small").code == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["spleen-small-001", "spleen-small-002"]


def test_a_named_job_may_run_beside_others_of_its_name(cli: Callable[..., Any]):
    result = cli("slurm", "train", "spleen:small", "--job-name", "mine", "--output", "a")
    assert "--job-name=mine\n" in result.out
    assert "singleton" not in result.out


def test_cpus_alone(cli: Callable[..., Any]):
    result = cli("slurm", "train", "spleen:small", "--gpus", 0, "--tasks-per-node", 2)
    assert all(words[-2:] == ["--device", "cpu"] for words in arguments(result.out))
    assert "--ntasks-per-node=2\n" in result.out
    assert "gres" not in result.out


def test_resume(cli: Callable[..., Any], tiny_recipe: Recipe, tiny_manifest: Manifest, tmp_path: Path):
    start_run(tmp_path / "runs" / "mine", tiny_recipe, tiny_manifest)
    result = cli("slurm", "train", "spleen:small", "--resume")
    assert arguments(result.out) == [["train", "spleen:small", "--output", "runs/mine", "--resume"]]
    refused = cli("slurm", "train", "spleen:small", "--output", "runs/mine")
    assert refused.message.startswith("'runs/mine' already holds a run; continue it with --resume or choose another")


def test_finetune(cli: Callable[..., Any], tiny_model: Path, tiny_data: Path):
    given = ("--from", tiny_model, "--freeze", "model.0", "--manifest", tiny_data)
    first, later = arguments(cli("slurm", "finetune", "spleen:small", *given).out)
    run = "runs/spleen-small-finetuned-001"
    assert sorted(first) == sorted(map(str, ("finetune", "spleen:small", "--output", run, *given)))
    assert sorted(later) == sorted(("finetune", "spleen:small", "--output", run, "--resume", "--freeze", "model.0"))


def test_an_array_shares_the_cts_out(cli: Callable[..., Any], tiny_model: Path, tiny_data: Path):
    """By a number that the script keeps, so that one failed task can be submitted again alone."""
    result = cli("slurm", "infer", tiny_data, "--output", "masks", "--model", tiny_model, "--array", "4%2")
    assert arguments(result.out) == [
        ["infer", str(tiny_data), "--output", "masks", "--model", str(tiny_model), "--shard", "3/4"]
    ]
    assert "#SBATCH --array=1-4%2\n" in result.out


def test_processes_of_one_job_share_the_cts_out(cli: Callable[..., Any], tiny_model: Path, tiny_data: Path):
    given = ("slurm", "infer", tiny_data, "--output", "masks", "--model", tiny_model)
    assert arguments(cli(*given, "--gpus", 2).out)[0][-2:] == ["--shard", "1/1"]
    assert "--shard" not in arguments(cli(*given).out)[0]


def test_the_model_is_chosen_now(cli: Callable[..., Any], tiny_recipe: Recipe, tiny_manifest: Manifest, tmp_path: Path):
    """And not when the job starts, when another run may be the newest."""
    start_run(tmp_path / "runs" / "mine", tiny_recipe, tiny_manifest)
    (tmp_path / "runs" / "mine" / "best.pt").touch()
    result = cli("slurm", "validate", "--split", "validation")
    assert arguments(result.out) == [["validate", "--split", "validation", "--model", "runs/mine/best.pt"]]
    assert "signal" not in result.out


def test_a_script_in_a_file_and_json(cli: Callable[..., Any], tmp_path: Path):
    result = cli("slurm", "train", "spleen:small", "--script", "job.sh", "--json")
    answer = json.loads(result.out)
    assert answer == {
        "script": "job.sh", "job": None, "run": "runs/spleen-small-001", "log": f"{tmp_path}/logs/%x-%j.log",
    }  # fmt: skip
    assert (tmp_path / "job.sh").read_text().startswith("#!/bin/bash\n#SBATCH")


@pytest.fixture
def fake_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that sets what sbatch does."""

    def write(body: str) -> None:
        path = tmp_path / "bin" / "sbatch"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")

    return write


def test_submit(cli: Callable[..., Any], fake_sbatch: Callable[[str], None], tmp_path: Path):
    fake_sbatch('cat > submitted.sh; echo "$@" > options; echo "12;cluster"')
    result = cli("slurm", "train", "spleen:small", "--submit")
    assert result.code == 0
    rows = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    assert rows == {"job": "12", "run": "runs/spleen-small-001", "log": f"{tmp_path}/logs/%x-%j.log"}
    assert (tmp_path / "options").read_text() == "--parsable\n"
    assert "train spleen:small" in (tmp_path / "submitted.sh").read_text()


def test_what_sbatch_refuses_is_told(cli: Callable[..., Any], fake_sbatch: Callable[[str], None]):
    fake_sbatch('echo "sbatch: error: invalid partition specified: nope" >&2; exit 1')
    result = cli("slurm", "train", "spleen:small", "--partition", "nope", "--submit")
    assert (result.code, result.out) == (2, "")
    assert result.message == "sbatch refused the script: sbatch: error: invalid partition specified: nope"


def test_without_slurm_here(cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    result = cli("slurm", "train", "spleen:small", "--submit")
    assert result.message == "--submit: there is no sbatch here; write the script with --script and submit it"
    assert not list((tmp_path / "runs").iterdir()), "no run is kept for a job that there is not"


def test_a_script_that_cannot_be_written_leaves_no_run(cli: Callable[..., Any], tmp_path: Path):
    result = cli("slurm", "train", "spleen:small", "--script", "nowhere/job.sh")
    assert (result.code, result.out) == (2, "")
    assert not list((tmp_path / "runs").iterdir())
    (tmp_path / "mine").mkdir()
    assert cli("slurm", "train", "spleen:small", "--output", "mine", "--script", "nowhere/job.sh").code == 2
    assert (tmp_path / "mine").is_dir(), "a folder of the user's stays"


def test_only_a_finetuned_run_is_resumed_by_finetune(
    cli: Callable[..., Any], tiny_recipe: Recipe, tiny_manifest: Manifest, tmp_path: Path
):
    start_run(tmp_path / "runs" / "mine", tiny_recipe, tiny_manifest)
    refused = cli("slurm", "finetune", "spleen:small", "--resume", "--output", "runs/mine")
    assert refused.message.startswith("--resume: run 'runs/mine' was not started by finetune")


def test_names_of_files_that_are_no_text(cli: Callable[..., Any], tiny_model: Path, tmp_path: Path):
    """A line break, or a name in Latin-1 on a disk from elsewhere."""
    for name in ("a\nb.nii", os.fsdecode(b"M\xfcller.nii")):
        (tmp_path / name).touch()
        result = cli("slurm", "infer", name, "--output", "masks", "--model", tiny_model, "--script", "job.sh")
        assert (result.code, result.err) == (0, "")
        line = next(line for line in (tmp_path / "job.sh").read_text().splitlines() if line.startswith("arguments="))
        shell = f"{line}\nprintf '%s' \"${{arguments[1]}}\""
        done = subprocess.run(["bash", "-uc", shell], capture_output=True, check=True)
        assert done.stdout == os.fsencode(name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "Missing argument"),
        ("doctor", "slurm doctor: expected one of train, finetune, validate, infer"),
        ("train splen", "recipe 'splen': no such recipe"),
        ("train spleen:small --set training.epoch=3", "recipe 'spleen:small': training.epoch: unknown key"),
        ("train spleen:small --nope", "No such option: --nope"),
        ("train spleen:small --manifest none.json", "manifest 'none.json': cannot be read"),
        ("train spleen:small --device gpu", "Invalid value for '--device'"),
        ("train spleen:small --time 60 --signal-seconds 3600", "--signal-seconds 3600: must be less than --time"),
        ("train spleen:small --time " + "9" * 5000, "--time 999"),
        ("train spleen:small --max-gpu-memory " + "9" * 400, "--max-gpu-memory: expected a size such as 12G"),
        ("train spleen:small --program it's", "--program it's: cannot be split into words: No closing quotation"),
        ("train spleen:small --program=", "--program: must name what runs ctseg"),
        ("train spleen:small --nodes 3 --gpus 8", "24 processes, but a step of recipe 'spleen:small' has 8 patches"),
        ("train spleen:small --device cpu", "--device cpu with --gpus 1: contradict each other"),
        ("train spleen:small --device cuda --gpus 0", "--device cuda with --gpus 0: contradict each other"),
        ("train spleen:small --resume --manifest x.json", "--resume: goes on with the data of the run"),
        ("train spleen:small --change-recipe", "--change-recipe: only a run that is resumed"),
        ("finetune spleen:small --resume --new-head", "--resume: goes on with the weights of the run"),
        ("infer nothing --output masks --array " + "9" * 5000, "--array 999"),
        ("train spleen:small --array 4", "--array: only infer can be dealt out, not train"),
        ("train spleen:small --resume", "--resume: no run of recipe 'spleen:small'"),
        ("finetune spleen:small", "--from: missing"),
        ("finetune spleen:small --from none.pt", "--from: model 'none.pt': no such file"),
        ("validate --split tests", "--split tests: expected one of"),
        ("validate", "no trained run in 'runs/'"),
        ("validate --nodes 2", "validate is one process on one GPU, got 2 tasks"),
        ("infer nothing --output masks", "input 'nothing': no such file or folder"),
        ("infer nothing --output masks --shard 1/2", "--shard: not in a job, as --array deals the CTs out"),
        ("infer nothing --output masks --overwrite", "--overwrite: not in a job"),
    ],
)
def test_wrong_use_leaves_nothing_behind(cli: Callable[..., Any], tmp_path: Path, line: str, message: str):
    result = cli("slurm", *line.split())
    assert (result.code, result.out) == (2, "")
    assert result.message.startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_every_shipped_recipe_that_makes_its_data_can_be_queued(cli: Callable[..., Any]):
    assert load_recipe("spleen:small").data.manifest == "phantom"
    assert cli("slurm", "train", "spleen:small", "--quiet").code == 0
