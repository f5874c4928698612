"""Help and every wrong use are answered at once: before torch, MONAI or SimpleITK are imported."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ctseg
from ctseg.files import write_json
from ctseg.manifest import read_manifest
from ctseg.recipe import load_recipe
from ctseg.workspace import start_run

COMMANDS = (
    "dicom ls",
    "recipes",
    "convert",
    "labels",
    "download",
    "prepare-dataset",
    "train",
    "validate",
    "infer",
    "slurm",
    "export",
    "serve",
    "doctor",
    "demo",
    "finetune",
    "import-mmar",
    "import-bundle",
)


class Answer(NamedTuple):
    code: int
    out: str
    err: str
    heavy: list[str]


CALLER = """
import contextlib, io, json, sys
from ctseg.cli import main
answers, known = [], set()
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["ctseg", *arguments]
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    heavy = {"torch", "monai", "SimpleITK", "onnxruntime", "matplotlib", "fastapi"} & sys.modules.keys() - known
    known |= heavy
    answers.append([code, out.getvalue(), err.getvalue(), sorted(heavy)])
json.dump(answers, sys.stdout)
"""
"""Reads lists of arguments, runs each in one process, and says what was imported by then."""

HELP = [["--help"], ["-h"], ["--version"], [], *([*name.split(), "--help"] for name in COMMANDS)]
LIGHT = [
    ["download"],
    ["recipes"],
    ["recipes", "--json"],
    ["recipes", "spleen"],
    ["recipes", "spleen", "--set", "training.epochs=3"],
]
WRONG = {
    "nope": "No such command 'nope'",
    "--nope": "No such option: --nope",
    "dicom": "Missing command",
    "dicom ls": "Missing argument",
    "dicom ls nowhere": "cannot read 'nowhere': no such file or folder",
    "dicom ls nowhere --series SliceThick<3": "--series 'SliceThick<3': unknown field 'SliceThick'; did you mean",
    "train": "Missing argument",
    "convert": "Missing argument",
    "convert none.nii.gz a.nrrd": "source 'none.nii.gz': no such file or folder",
    "convert . a.nrrd --format mha": "--format is for a folder of CTs",
    "convert . a --gaps close": "Invalid value for '--gaps'",
    "train spleen more": "Got unexpected extra argument",
    "train spleen --gpu 2": "No such option: --gpu",
    "train splen": "recipe 'splen': no such recipe; known: ",
    "train spleen:big": "recipe 'spleen:big': no variant 'big'; known: ",
    "train none.toml": "recipe 'none.toml': no such recipe",
    "train spleen --set training.epochs": "recipe 'spleen': --set training.epochs: expected section.key=value",
    "train spleen --set training.epoch=3": "recipe 'spleen': training.epoch: unknown key; did you mean 'epochs'?",
    "train spleen --set training.epochs=0": "recipe 'spleen': training.epochs: must be at least 1, got 0",
    "train spleen --gpus 0": "Invalid value for '--gpus'",
    "train spleen --gpus two": "Invalid value for '--gpus'",
    "train spleen --precision half": "Invalid value for '--precision'",
    "train spleen --data nowhere": "data set 'msd_spleen': no image found below 'nowhere/Task09_Spleen'; fetch it with",
    "train spleen --manifest none.json": "manifest 'none.json': cannot be read: No such file",
    "train spleen --manifest nope": "manifest 'nope': not shipped with ctseg; known: ",
    "train spleen --manifest missing.json": "manifest 'missing': file not found: gone.nii.gz",
    "train spleen --manifest test.json": "manifest 'test': split 'training' has no cases; it has test 1",
    "train spleen --output runs/spleen-001": "'runs/spleen-001' already holds a run; continue it with --resume",
    "train spleen --output file": "--output file: must be a folder, got a file",
    "train spleen:v1 --resume": "--resume: no run of recipe 'spleen:v1' in 'runs/'",
    "train spleen --resume --output empty": "'empty' is not a run folder",
    "train spleen --resume --set optimizer.lr=1": "--resume: run 'runs/spleen-001' was started with another recipe; "
    "it differs in optimizer.lr",
    "train spleen --resume --data elsewhere": "--resume: goes on with the data of the run",
    "validate --split trainin": "--split trainin: expected one of training, validation, testing, test",
    "validate --split testing": "manifest 'test': split 'testing' has no cases; it has test 1",
    "validate --model none.pt": "model 'none.pt': no such file or folder",
    "validate --model spleen:v1": "no trained run of recipe 'spleen:v1' in 'runs/'",
    "validate --manifest none.json": "manifest 'none.json': cannot be read",
    "validate --data nowhere": "data set 'msd_spleen': no image found below 'nowhere/Task09_Spleen'",
    "validate --split test --output file": "cannot write 'file': File exists",
    "infer": "Missing ",
    "infer ct.nii.gz": "Missing option '--output'",
    "infer --output masks": "Missing argument",
    "infer none.nii.gz --output masks": "input 'none.nii.gz': no such file or folder",
    "infer empty --output masks --quiet": "no CT in empty; known: DICOM and .nii.gz, .nii, .nrrd, .mha",
    "infer none.txt --output masks": "manifest 'none.txt': cannot be read",
    "infer ct.nii.gz --output file": "cannot write 'file': File exists",
    "infer cts --output cts": "output 'cts': must not be the input folder 'cts' or hold it",
    "infer cts --output .": "output '.': must not be the input folder 'cts' or hold it",
    "infer ct.nii.gz ct_seg.nii.gz --output .": "'ct_seg.nii.gz' is an input and would be the mask of 'ct.nii.gz'",
    "infer ct.nii.gz --output masks --model none.pt": "model 'none.pt': no such file or folder",
    "infer ct.nii.gz --output masks --model empty": "model 'empty': not a run folder, it has no recipe.json",
    "infer ct.nii.gz --output masks --device gpu0": "Invalid value for '--device': expected auto, cpu, cuda or",
    "infer ct.nii.gz --output masks --format dicom-seg": "--format dicom-seg: refers to the DICOM images of the CT",
    "infer ct.nii.gz --output masks --format dcm": "Invalid value for '--format'",
    "infer ct.nii.gz --output masks --gaps close": "Invalid value for '--gaps'",
    "labels": "Missing argument",
    "labels none --list": "source 'none': no such file or folder",
    "labels empty --output masks": "--output and at least one --label are needed; --list shows which names there are",
    "labels empty --output masks --label liver": "--label liver: expected VALUE=PATTERN with a value in 1..255",
    "labels empty --output masks --label 1=liver --quiet": "no SEG or RTSTRUCT in empty",
    "infer ct.nii.gz --output masks --shard 3/2": "--shard 3/2: expected auto or I/N with I from 1 to N",
    "serve": "Missing option '--studies'",
    "serve --studies nowhere": "--studies nowhere: no such folder; name the folder of the images",
    "serve --studies cts --host 0.0.0.0": "--host 0.0.0.0: others could read and write the studies; give a",
    "serve --studies cts --token-file none.txt": "--token-file none.txt: cannot be read: No such file or directory",
    "serve --studies cts --token-file ct.nii.gz": "--token-file ct.nii.gz: ",
    "serve --studies cts --cors example.org": "--cors example.org: expected an origin such as https://viewer.example.org",
    "serve --studies cts --tls-cert a.pem": "--tls-cert and --tls-key: https needs both",
    "serve --studies cts --cache lots": "--cache: expected a size such as 12G or 800M, got 'lots'",
    "serve --studies cts --model none.pt": "model 'none.pt': no such file or folder",
    "serve --studies cts --port 70000": "Invalid value for '--port'",
    "train spleen --prepared ct.nii.gz": "--prepared ct.nii.gz: must be a folder, got a file",
    "export --format tflite": "Invalid value for '--format'",
    "export --model none.pt": "model 'none.pt': no such file or folder",
    "export --model model.ts": "model 'model.ts': already exported",
    "export --format onnx --output model.ts": "--output model.ts: a onnx file must end in .onnx",
    "export --output file/model.ts": "cannot write 'file': File exists",
    "export --format bundle --output empty": "--output empty: exists; a bundle is a folder of its own",
    "finetune spleen": "--from: missing; name a run, a checkpoint, an MMAR, a bundle or a .pt file, or use --resume",
    "finetune spleen --from none.pt": "--from: model 'none.pt': no such file or folder",
    "finetune spleen --from empty": "--from: model 'empty': not a run folder, it has no recipe.json; nor has it",
    "finetune spleen --from model.ts": "--from model.ts: an exported model cannot be trained",
    "finetune spleen --resume --new-head": "--resume: goes on with the weights of the run",
    "finetune spleen --from runs/spleen-001 --data nowhere": "data set 'msd_spleen': no image found below 'nowhere/",
    "import-mmar empty --output new": "'empty' is not an MMAR: it has no config/config_train.json",
    "import-bundle empty --output new": "'empty' is not a MONAI bundle that can be read",
    "recipes splen": "recipe 'splen': no such recipe",
    "recipes spleen --set training.epochs=x": "recipe 'spleen': training.epochs: expected int, got 'x'",
    "recipes --set training.epochs=3": "--copy and --set need the NAME of a recipe",
    "recipes --copy mine.toml": "--copy and --set need the NAME of a recipe",
    "recipes spleen --copy mine.toml --set training.epochs=3": "--copy copies the file as it is",
    "recipes spleen --copy mine.txt": "'mine.txt': a recipe's file must end in .toml",
    "recipes spleen --copy there.toml": "'there.toml' exists; name a new file",
    "recipes spleen:big --copy mine.toml": "recipe 'spleen:big': no variant 'big'",
    "recipes spleen --copy none/mine.toml": "cannot write 'none/mine.toml': No such file or directory",
    "prepare-dataset splen": "recipe 'splen': no such recipe",
    "prepare-dataset --set training.epochs=3": "--set needs the name of the RECIPE that it changes",
    "prepare-dataset spleen --data nowhere --quiet": "data set 'msd_spleen': no image found below 'nowhere/",
    "prepare-dataset spleen --manifest none.json --quiet": "manifest 'none.json': cannot be read",
    "prepare-dataset spleen --manifest test.json --quiet": "manifest 'test': split 'training' has no cases",
    "prepare-dataset spleen --manifest training.json --prepared file --quiet": "cannot write 'file': File exists",
    "prepare-dataset spleen --manifest cts --quiet": "folder 'cts': expected imagesTr and labelsTr or images and",
    "prepare-dataset spleen --manifest list.csv --quiet": "manifest 'list.csv': cannot be read: No such file",
    "prepare-dataset spleen --split 8/1/1": "--split 8/1/1: percentages must sum to 100, got 10",
    "prepare-dataset spleen --split 80/20 --folds 5": "--split and --folds: each deals out the cases, give one",
    "prepare-dataset spleen --folds 5": "--folds and --fold: belong together, as in --folds 5 --fold 1",
    "prepare-dataset spleen --fold 1": "--folds and --fold: belong together, as in --folds 5 --fold 1",
    "prepare-dataset spleen --folds 5 --fold 6": "--fold 6: there are only 5 folds, numbered from 1",
    "prepare-dataset spleen --folds 1 --fold 1": "Invalid value for '--folds'",
    "prepare-dataset spleen --seed 1": "--seed: only with --split or --folds",
    "prepare-dataset spleen --resplit": "--resplit: only with --split or --folds",
    "prepare-dataset spleen --workers 0": "Invalid value for '--workers'",
    "prepare-dataset spleen --fix --write-manifest new.csv": "--write-manifest new.csv: a data list's name must end in",
    "prepare-dataset spleen --manifest training.json --write-manifest training.json": "'training.json' is the list "
    "that is read; name another file",
    "train spleen --manifest cts": "folder 'cts': expected imagesTr and labelsTr or images and labels in it",
    "download nope": "'nope': neither a data set nor a model; known: btcv, covid19_ct_seg, msd_liver, ",
    "download --from ct.nii.gz": "--from, --set and --keep-archive need the NAME of what to download",
    "download msd_spleen --set training.epochs=3": "--set: is for models; 'msd_spleen' is a data set",
    "download msd_spleen --from none.tar --quiet": "--from none.tar: no such file or folder",
    "download covid19_ct_seg --from file --quiet": "--from file: 'covid19_ct_seg' is COVID-19-CT-Seg_20cases.zip (https://zenodo.org/",
    "download spleen_ct_segmentation --data cts": "--data: is for data sets; 'spleen_ct_segmentation' is a model and",
    "doctor now": "Got unexpected extra argument",
    "demo --output file": "cannot write 'file': File exists",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run of `spleen`, whose model nobody may need to open."""
    folder = tmp_path_factory.mktemp("here")
    for name in ("ct.nii.gz", "ct_seg.nii.gz", "file", "there.toml", "model.ts", "cts/ct.nii.gz", "empty/readme"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    write_json(folder / "missing.json", {"training": ["gone.nii.gz"]})
    write_json(folder / "training.json", {"training": ["ct.nii.gz"]})
    write_json(folder / "test.json", {"test": ["ct.nii.gz"]})
    start_run(folder / "runs" / "spleen-001", load_recipe("spleen"), read_manifest(folder / "test.json"))
    (folder / "runs" / "spleen-001" / "best.pt").touch()
    return folder


@pytest.fixture(scope="module")
def answers(here: Path) -> dict[str, Answer]:
    """What one fresh process answers to each of these command lines, and what it had imported by then."""
    calls = [*HELP, *LIGHT, *(line.split() for line in WRONG)]
    done = subprocess.run(
        [sys.executable, "-c", CALLER], input=json.dumps(calls), cwd=here, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    return {" ".join(call): Answer(*answer) for call, answer in zip(calls, found, strict=True)}


@pytest.mark.parametrize("line", [" ".join(call) for call in [*HELP, *LIGHT]])
def test_help_and_lists_are_light(answers: dict[str, Answer], line: str):
    code, out, err, heavy = answers[line]
    assert (code, err, heavy) == (0, "", [])
    assert out.strip()


@pytest.mark.parametrize(("line", "message"), WRONG.items(), ids=list(WRONG))
def test_wrong_use_is_one_line_at_once(answers: dict[str, Answer], line: str, message: str):
    code, out, err, heavy = answers[line]
    assert err.startswith(f"ctseg: {message}")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert (code, out, heavy) == (2, "", [])


def test_wrong_use_leaves_nothing_behind(answers: dict[str, Answer], here: Path):
    assert sorted(path.name for path in here.iterdir()) == [
        "ct.nii.gz", "ct_seg.nii.gz", "cts", "empty", "file", "missing.json", "model.ts", "runs",
        "test.json", "there.toml", "training.json",
    ]  # fmt: skip
    assert not (here / "file").read_bytes()


def test_help_names_every_command_and_the_exit_codes(answers: dict[str, Answer]):
    text = answers["--help"].out
    assert answers[""].out == answers["-h"].out == text
    assert answers["--version"].out == f"ctseg {ctseg.__version__}\n"
    for word in (*COMMANDS, "0 done", "1 some cases failed", "2", "75 stopped"):
        assert word in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_names_its_options(answers: dict[str, Answer], name: str):
    text = answers[f"{name} --help"].out
    assert f"ctseg {name}" in text
    assert "--json" in text


def test_several_problems_stand_on_several_lines(here: Path, run_cli: Callable[..., Any]):
    result = run_cli(here, "train", "spleen", "--set", "training.epochs=0", "--set", "x=1")
    assert result.code == 2
    assert result.err.splitlines()[0] == "ctseg: recipe 'spleen': 2 problems"
    assert len(result.err.splitlines()) == 3


def test_processes_are_given_what_was_typed(
    here: Path, run_cli: Callable[..., Any], tiny_data: Path, monkeypatch: pytest.MonkeyPatch
):
    """The run's folder stands before a --, after which nothing is an option."""
    seen: list[list[str]] = []
    monkeypatch.setattr("ctseg.engine.launch.launch", lambda number, arguments: seen.append([str(number), *arguments]))
    typed = ["--manifest", str(tiny_data), "--device", "cpu", "--gpus", "2", "--", "spleen:small"]
    assert run_cli(here, "train", *typed).code == 0
    (given,) = seen
    assert given[:3] == ["2", "train", "--output"]
    assert given[4:] == typed


def test_more_gpus_than_there_are(here: Path, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    """Whether the data are there or not: no GPU is the first thing to know."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for source in ([], ["--manifest", "test.json"]):
        result = run_cli(here, "train", "spleen", "--gpus", "2", *source)
        expected = "ctseg: --gpus 2: 0 CUDA GPU(s) here; use fewer, or --device cpu\n"
        assert (result.code, result.out, result.err) == (2, "", expected)


@pytest.mark.parametrize("line", ["validate --split testing", "export --format onnx", "prepare-dataset spleen", "demo"])
def test_what_is_one_process_does_not_run_many_times(
    here: Path, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, line: str
):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert "started as" not in run_cli(here, "recipes").err
    monkeypatch.setenv("SLURM_PROCID", "3")
    result = run_cli(here, *line.split())
    expected = f"started as 4 processes, which would all do the same; `ctseg {line.split()[0]}` is one process: start"
    assert (result.code, result.out) == (2, "")
    assert result.message.startswith(expected)
    assert run_cli(here, "recipes").code == 0


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_signal_before_there_is_anything_to_save(
    here: Path, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
):
    """A batch job's last minutes may begin while PyTorch is being imported; whoever imports may expect errors."""

    def be_stopped(*_: object) -> None:
        with suppress(Exception):
            os.kill(os.getpid(), signal.Signals[name])

    monkeypatch.setattr("ctseg.commands.recipes._list", be_stopped)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        result = run_cli(here, "recipes")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (result.code, result.message) == (
        75, f"stopped by {name} before there was anything to save; the same command starts again",
    )  # fmt: skip


def test_control_characters_of_a_name_do_not_reach_the_terminal(here: Path, run_cli: Callable[..., Any]):
    result = run_cli(here, "train", "\x1b[31mred")
    assert result.err.startswith("ctseg: recipe '?[31mred': no such recipe")


def test_a_bug_keeps_its_traceback(here: Path, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("ctseg.commands.recipes._list", broken)
    with pytest.raises(ZeroDivisionError):
        run_cli(here, "recipes")


def test_interrupted(here: Path, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ctseg.commands.recipes._list", interrupt)
    result = run_cli(here, "recipes")
    assert result.code == 130
    assert result.err.endswith("ctseg: interrupted\n")


def ctseg_into(stdout: object, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ctseg", *arguments]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)


def test_a_reader_that_left_is_no_error():
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as reader:
        reader.wait()
        done = ctseg_into(reader.stdin, "recipes", "spleen")
    assert (done.returncode, done.stderr) == (0, "")


def test_stdout_on_a_full_disk():
    with Path("/dev/full").open("w") as full:
        done = ctseg_into(full, "recipes", "--json")
    expected = "ctseg: cannot write the result to stdout: No space left on device; free space\n"
    assert (done.returncode, done.stderr) == (2, expected)


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["--nothing"], 2)])
def test_the_process_ends_with_its_code_and_all_output_and_waits_for_no_thread(arguments: list[str], code: int):
    script = f"""
import atexit, sys, threading, time
from ctseg.cli import program
atexit.register(print, "farewell")
threading.Thread(target=time.sleep, args=(600,)).start()
sys.argv = ["ctseg", *{arguments!r}]
program()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == code
    assert ended.stdout.endswith("farewell\n")
    assert ended.stdout.startswith("ctseg ") or "--nothing" in ended.stderr


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
@pytest.mark.parametrize(("arguments", "code"), [("recipes", 0), ("nothing", 2)])
def test_a_process_without_stdout_or_stderr_ends_with_its_code(closed: str, arguments: str, code: int):
    done = subprocess.run(
        f"{sys.executable} -m ctseg {arguments} {closed}", shell=True, capture_output=True, check=False
    )
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
