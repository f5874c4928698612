"""`ctseg slurm`: another command as a Slurm job that survives its time limit."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ctseg.commands.common import JsonFlag, emit, pairs, say
from ctseg.commands.finetune import SUFFIX, check_start
from ctseg.commands.train import check_data, plan_training, train_options
from ctseg.errors import CtsegError
from ctseg.files import make_folder, write_text
from ctseg.jobs import Options, find_jobs
from ctseg.manifest import SPLITS, find_manifest
from ctseg.recipe import Recipe
from ctseg.sbatch import Expand, Resources, Work, check_resources, script
from ctseg.sources.catalogue import is_made
from ctseg.workspace import RECIPE_FILE, reserve_run, resolve_model

CONTEXT_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Whatever `ctseg slurm` does not know itself belongs to the command that the job runs."""
COMMANDS = ("train", "finetune", "validate", "infer")
STARTS_ONLY = ("manifest", "data", "weights", "new_head", "resume", "output")
"""Parameters of a training's first start, which `--resume` refuses or which are set anew."""
Parameters = dict[str, Any]


def slurm(
    context: typer.Context,
    command: Annotated[str, typer.Argument(metavar="COMMAND [ARGUMENTS]...", help=f"One of {', '.join(COMMANDS)}.")],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs on each node, one process each; 0 for CPUs alone.")] = 1,
    tasks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes on each node, with --gpus 0. Default: 1.")
    ] = None,
    cpus_per_task: Annotated[int, typer.Option(min=1, help="CPUs of each process.")] = 4,
    mem: Annotated[str | None, typer.Option(help="Memory of each node, e.g. 64G.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, e.g. 24:00:00 or 2-00.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.")] = None,
    job_name: Annotated[str | None, typer.Option(help="Default: ctseg- and what it does.")] = None,
    logs: Annotated[Path, typer.Option(help="Folder of the logs, made if missing.")] = Path("logs"),
    array: Annotated[
        str | None, typer.Option(metavar="N[%M]", help="infer: deal the CTs out to N array tasks, M at a time.")
    ] = None,
    signal_seconds: Annotated[
        int, typer.Option(min=1, help="Stop so long before the time limit, and queue again.")
    ] = 120,
    extra: Annotated[
        list[str] | None, typer.Option("--sbatch", metavar="OPTION", help="Any other option of sbatch; repeatable.")
    ] = None,
    program: Annotated[
        str | None, typer.Option(help='What runs ctseg in the job, e.g. "apptainer exec --nv ctseg.sif ctseg".')
    ] = None,
    script_file: Annotated[
        Path | None, typer.Option("--script", help="Write the script here. Default: to stdout.")
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit it with sbatch.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write or submit a batch script for train, finetune, validate or infer; options it does not know go there."""
    resources = Resources(
        nodes=nodes,
        gpus_per_node=gpus,
        tasks_per_node=tasks_per_node or max(gpus, 1),
        cpus_per_task=cpus_per_task,
        job_name=job_name or f"ctseg-{command}",
        logs=logs,
        folder=Path.cwd(),
        array=array,
        time=time,
        mem=mem,
        partition=partition,
        account=account,
        qos=qos,
        signal_seconds=None if command == "validate" else signal_seconds,
        extra=tuple(extra or ()),
    )
    words = _program(program)
    planned = _plan(context, command, resources)
    if job_name is None:
        resources = dataclasses.replace(resources, job_name=planned.name, alone=planned.run is not None)
    try:
        text = script(dataclasses.replace(planned.work, program=words), resources)
        make_folder(logs)
        if script_file is not None:
            write_text(script_file, text)
        job = _submit(text) if submit else None
    except CtsegError:
        if planned.reserved and planned.run is not None:
            planned.run.rmdir()
        raise
    if script_file is None and not submit and not as_json:
        say(text.rstrip("\n"))
        return
    result = {"script": script_file or text, "job": job, "run": planned.run, "log": resources.log}
    rows: list[tuple[str, object]] = [(k, v) for k, v in result.items() if v is not None and v is not text]
    emit(result, pairs(rows), as_json)


@dataclass(frozen=True)
class _Planned:
    """What the job is called and does, and the run folder it trains in."""

    name: str
    work: Work
    run: Path | None = None
    reserved: bool = False
    """Whether the folder was made now, and is empty."""


def _program(text: str | None) -> tuple[str, ...]:
    """The words of --program."""
    try:
        words = Work.program if text is None else tuple(shlex.split(text))
    except ValueError as error:
        raise CtsegError(f"--program {text}: cannot be split into words: {error}") from error
    if not words:
        raise CtsegError('--program: must name what runs ctseg, such as "apptainer exec --nv ctseg.sif ctseg"')
    return words


def _plan(context: typer.Context, name: str, resources: Resources) -> _Planned:
    """The job's work, checked as far as it can be without the models and images themselves."""
    if name not in COMMANDS:
        raise CtsegError(f"slurm {name}: expected one of {', '.join(COMMANDS)}")
    check_resources(resources)
    if resources.array is not None and name != "infer":
        raise CtsegError(f"--array: only infer can be dealt out, not {name}")
    command = context.find_root().command.get_command(context, name)  # type: ignore[attr-defined]  # root is a group
    with command.make_context(name, list(context.args), parent=context.parent) as inner:
        given: Parameters = dict(inner.params)
    if resources.gpus_per_node == 0 and given["device"] == "auto":
        given["device"] = "cpu"
    if (resources.gpus_per_node == 0) != (given["device"] == "cpu"):
        raise CtsegError(
            f"--device {given['device']} with --gpus {resources.gpus_per_node}: contradict each other; CPUs alone are "
            f"--gpus 0, without --device"
        )
    if name == "infer":
        return _Planned("ctseg-infer", Work(arguments=_infer(command, given, resources)))
    if name == "validate":
        return _Planned("ctseg-validate", Work(arguments=_validate(command, given, resources)))
    return _training(command, given, resources.num_tasks)


def _training(command: Any, given: Parameters, processes: int) -> _Planned:
    """Training in a run folder that is fixed now, so that every later start finds what the first one left."""
    paths = {name: None if given[name] is None else Path(given[name]) for name in ("output", "data", "prepared")}
    options, suffix = train_options({**given, **paths}), ""
    if "weights" in given:
        check_start(given["recipe"], options, given["weights"], given["new_head"])
        suffix = SUFFIX
    plan = plan_training(given["recipe"], options)
    _check_processes(plan.recipe, processes)
    check_data(plan, options)
    run = plan.run or reserve_run(plan.recipe, suffix)
    if options.resume:
        return _Planned(_job_name(run), Work(arguments=_words(command, {**given, "output": run})), run)
    again = {key: value for key, value in given.items() if key not in STARTS_ONLY}
    work = Work(
        arguments=_words(command, {**given, "output": run}),
        resumed=_words(command, {**again, "resume": True, "output": run}),
        marker=run / RECIPE_FILE,
    )
    return _Planned(_job_name(run), work, run, reserved=plan.run is None)


def _check_processes(recipe: Recipe, processes: int) -> None:
    """Each needs a patch in every step; how many cases the last step of an epoch has is known only in the job."""
    patches = recipe.training.batch_cases * recipe.sampling.patches_per_case
    if processes > patches:
        raise CtsegError(
            f"{processes} processes, but a step of recipe '{recipe.name}' has {patches} patches; use fewer --nodes or "
            f"--gpus, or raise training.batch_cases or sampling.patches_per_case with --set"
        )


def _job_name(run: Path) -> str:
    return "ctseg-" + re.sub(r"[^\w.:-]", "_", run.name, flags=re.ASCII)


def _validate(command: Any, given: Parameters, resources: Resources) -> list[str]:
    if resources.num_tasks > 1:
        raise CtsegError(
            f"validate is one process on one GPU, got {resources.num_tasks} tasks; leave --nodes out, and --gpus at 1"
        )
    if given["split"] not in SPLITS:
        raise CtsegError(f"--split {given['split']}: expected one of {', '.join(SPLITS)}")
    if given["manifest"] is not None and not is_made(given["manifest"]):
        find_manifest(given["manifest"], None if given["data"] is None else Path(given["data"])).split(given["split"])
    return _words(command, {**given, "model": resolve_model(given["model"])})


def _infer(command: Any, given: Parameters, resources: Resources) -> list[str]:
    for name in ("shard", "overwrite"):
        if given[name]:
            why = "--array deals the CTs out" if name == "shard" else "a job that is queued again would start anew"
            raise CtsegError(f"--{name}: not in a job, as {why}")
    options = Options(series=given["series"], format=given["form"])
    find_jobs([Path(path) for path in given["inputs"]], Path(given["output"]), options)
    shard = "1/1" if resources.num_tasks > 1 else None
    if resources.array_size is not None:
        shard = Expand(f"$SLURM_ARRAY_TASK_ID/{resources.array_size}")
    return _words(command, {**given, "model": resolve_model(given["model"]), "shard": shard})


def _words(command: Any, given: Parameters) -> list[str]:
    """The command line that gives a command these parameters."""
    words, positional = [str(command.name)], []
    for parameter in command.params:
        value = given.get(parameter.name)
        if parameter.param_type_name == "argument":
            positional += [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]
        elif value not in (None, False, ()) and str(value) != str(parameter.default):
            name = parameter.opts[0]
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [name] if parameter.is_flag else [w for v in values for w in (name, _word(v))]
    return words[:1] + positional + words[1:]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else str(value)  # an Expand stays one


def _submit(text: str) -> str:
    """Hands the script to sbatch; the number of the job."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"], input=text, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
    except OSError as error:
        raise CtsegError("--submit: there is no sbatch here; write the script with --script and submit it") from error
    if done.returncode != 0:
        raise CtsegError(f"sbatch refused the script: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]
