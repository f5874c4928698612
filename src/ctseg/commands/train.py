"""`ctseg train`: a recipe becomes a model."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctseg import slurm
from ctseg.commands.common import (
    DataOption,
    DeviceOption,
    JsonFlag,
    ManifestOption,
    Overrides,
    PrecisionOption,
    PreparedOption,
    QuietFlag,
    emit,
    pairs,
    parse_bytes,
)
from ctseg.errors import CtsegError, RecipeError
from ctseg.manifest import find_manifest
from ctseg.progress import make_progress
from ctseg.recipe import Recipe, load_recipe, recipe_from_dict, recipe_names
from ctseg.sources.catalogue import find_data, is_made
from ctseg.workspace import PREPARED, RECIPE_FILE, new_run, newest_run, reserve_run, run_precision, run_recipe

if TYPE_CHECKING:
    from ctseg.engine.train import TrainResult

GpusOption = Annotated[int | None, typer.Option("--gpus", min=1, help="Train in this many processes, one per GPU.")]
RunOption = Annotated[Path | None, typer.Option("--output", help="Run folder. Default: a new one below runs/.")]
ResumeFlag = Annotated[
    bool, typer.Option("--resume", help="Go on with the newest run of the recipe, or with --output.")
]


MaxGpuMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--max-gpu-memory", metavar="SIZE", help="Such as 12G, per GPU: larger steps are split, their gradients added."
    ),
]
ChangeRecipeFlag = Annotated[
    bool, typer.Option("--change-recipe", help="With --resume: go on with what --set or the recipe's file now say.")
]
MlflowOption = Annotated[
    str | None, typer.Option("--mlflow", metavar="URI", help="Send each epoch's numbers to this MLflow server too.")
]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options that all commands which train have in common."""

    gpus: int | None
    output: Path | None
    resume: bool
    manifest: str | None
    data: Path | None
    prepared: Path
    overrides: list[str]
    device: str
    precision: str
    max_gpu_memory: str | None
    change_recipe: bool
    mlflow: str | None
    as_json: bool
    quiet: bool


@dataclass(frozen=True)
class Plan:
    """A training, as far as it can be checked without PyTorch."""

    recipe: Recipe
    run: Path | None
    """None: a new one."""
    source: str
    """The data list of a training that begins."""
    max_gpu_bytes: int | None


@dataclass(frozen=True)
class Start:
    """Where training starts from other than fresh weights: what the engine takes, and what to tell people."""

    weights: dict[str, Any]
    """Under "model" a state dict, under "report" plain data, which the run keeps as start.json too."""
    summary: list[tuple[str, object]]


def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe (`ctseg recipes`), a variant like spleen:small, or a .toml file.")
    ],
    gpus: GpusOption = None,
    output: RunOption = None,
    resume: ResumeFlag = False,
    manifest: ManifestOption = None,
    data: DataOption = None,
    prepared: PreparedOption = PREPARED,
    overrides: Overrides = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    max_gpu_memory: MaxGpuMemoryOption = None,
    change_recipe: ChangeRecipeFlag = False,
    mlflow: MlflowOption = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Train a recipe; progress and curves go to the run folder."""
    run_training(recipe, train_options(locals()))


def train_options(parameters: Mapping[str, Any]) -> TrainOptions:
    """The options of a command that trains, by its parameters' names; `freeze` joins the changes of the recipe."""
    values = {field.name: parameters[field.name] for field in dataclasses.fields(TrainOptions)}
    prefixes = parameters.get("freeze")
    freeze = [f"training.freeze={json.dumps(prefixes, ensure_ascii=False)}"] if prefixes else []
    values["overrides"] = [*(values["overrides"] or []), *freeze]
    return TrainOptions(**values)


def run_training(
    name: str, options: TrainOptions, make_start: Callable[[Recipe], Start] | None = None, suffix: str = ""
) -> None:
    """Trains the recipe called `name`, from what `make_start` returns if given, and prints the result.

    Args:
        name: As on the command line.
        options: The same.
        make_start: Asked once all that needs no PyTorch is known to be right.
        suffix: Stands in the name of a new run's folder, after the recipe's.
    """
    o = options
    plan = plan_training(name, o, finetuned=bool(suffix))
    wanted = plan.recipe
    tasks = slurm.num_tasks(os.environ)
    if (o.gpus or 1) > 1 and tasks > 1 and "RANK" not in os.environ:
        raise CtsegError(
            f"--gpus {o.gpus}: srun has started {tasks} tasks already, each of them one process on one GPU; leave "
            f"--gpus out, or start one task (srun --ntasks=1)"
        )
    precision = run_precision(plan.run) if o.resume and plan.run and o.precision == "auto" else o.precision
    if o.gpus is not None:
        from ctseg.engine.launch import check_gpus

        check_gpus(o.gpus, o.device)
    check_data(plan, o)
    start = None if o.resume or make_start is None else make_start(wanted)
    with _run_folder(plan, suffix) as run:
        _train(plan, run, o, start, precision)


@contextmanager
def _run_folder(plan: Plan, suffix: str) -> Iterator[Path]:
    """The run's folder: a new one, made now in the main process, goes again if nothing comes of it."""
    if plan.run is not None or slurm.process_index(os.environ):
        yield plan.run or new_run(plan.recipe, suffix)  # other processes are told the main one's
        return
    run = reserve_run(plan.recipe, suffix)
    try:
        yield run
    except BaseException:
        with suppress(OSError):  # it is not empty
            run.rmdir()
        raise


def _train(plan: Plan, run: Path, o: TrainOptions, start: Start | None, precision: str) -> None:
    """Trains in this process, or in several that it starts, and prints the result."""
    from ctseg.engine.launch import is_launched, launch

    wanted = plan.recipe
    if o.gpus is not None and o.gpus > 1 and not is_launched():
        command, *arguments = sys.argv[1:]
        launch(o.gpus, [command, "--output", str(run), *arguments])  # first, as -- may follow
        return
    from ctseg.engine import train as engine
    from ctseg.engine.process import stop_on_signal
    from ctseg.engine.runtime import running

    find = None if o.resume else partial(find_data, plan.source, o.data)
    with running(o.device, precision, amp=wanted.training.amp) as runtime:
        with stop_on_signal() as stop_requested, make_progress(o.quiet or not runtime.is_main) as progress:
            run = runtime.gather(run)[0]  # torchrun's processes look for a free name at different moments
            progress.note(f"run {run} on {runtime.describe()}")
            for what, value in [] if start is None else start.summary:
                progress.note(f"{what} {value}")
            weights = None if start is None else start.weights
            result = engine.train(
                wanted,
                run,
                find,
                runtime,
                progress,
                o.prepared,
                stop_requested,
                start=weights,
                change_recipe=o.change_recipe,
                max_gpu_bytes=plan.max_gpu_bytes,
                mlflow_uri=o.mlflow,
            )
        if runtime.is_main:
            about = {} if start is None else {"start": start.weights["report"]}
            text = _summary(result, [] if start is None else start.summary)
            emit({**dataclasses.asdict(result), **about}, text, o.as_json)


def plan_training(name: str, options: TrainOptions, *, finetuned: bool = False) -> Plan:
    """Checks all of a training's options that need neither PyTorch nor the machine that will train.

    A fine-tuning goes on with a run that was begun by one, unless it is named; a training with any other.

    Raises:
        CtsegError: naming the option and what to do.
    """
    o = options
    if o.resume and (o.manifest or o.data):
        raise CtsegError("--resume: goes on with the data of the run, so --manifest and --data cannot be given")
    if o.change_recipe and not o.resume:
        raise CtsegError("--change-recipe: only a run that is resumed has a recipe to change; add --resume")
    max_gpu_bytes = None if o.max_gpu_memory is None else parse_bytes(o.max_gpu_memory, "--max-gpu-memory")
    for option, folder in (("--output", o.output), ("--prepared", o.prepared)):
        if folder is not None and folder.is_file():
            raise CtsegError(f"{option} {folder}: must be a folder, got a file")
    if o.resume:
        recipe, run = resumed_run(name, o, finetuned=finetuned)
        return Plan(recipe, run, recipe.data.manifest, max_gpu_bytes)
    recipe = load_recipe(name, o.overrides)
    if o.output is not None and (o.output / RECIPE_FILE).exists() and slurm.num_processes(os.environ) == 1:
        raise CtsegError(f"'{o.output}' already holds a run; continue it with --resume or choose another --output")
    return Plan(recipe, o.output, o.manifest or recipe.data.manifest, max_gpu_bytes)


def check_data(plan: Plan, options: TrainOptions) -> None:
    """Raises ManifestError if the cases of a training that begins are not there; made ones are made when needed."""
    if not options.resume and not is_made(plan.source):
        find_manifest(plan.source, options.data).split("training")


def resumed_run(name: str, options: TrainOptions, *, finetuned: bool) -> tuple[Recipe, Path]:
    """The run to go on with and its own recipe; what is given anew, by --set or by a file, must agree with it.

    With --change-recipe it is taken instead: a shipped recipe's name stands for the run's own recipe, to which --set
    applies.
    """
    overrides, change = options.overrides, options.change_recipe
    shipped = name.partition(":")[0] in recipe_names()
    recipe = load_recipe(name, None if change and shipped else overrides)
    run = options.output or newest_run(recipe.name, finetuned=finetuned)
    if run is None:
        command = " by `ctseg finetune`" if finetuned else ""
        raise CtsegError(
            f"--resume: no run of recipe '{recipe.name}'{command} in 'runs/' of this folder; name it with --output"
        )
    own = run_recipe(run)
    a, b = recipe.flat(), own.flat()
    differing = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    given_anew = overrides or recipe.name != own.name or not shipped
    if change and shipped:
        return recipe_from_dict(own.to_dict(), f"recipe of run '{run}'", overrides), run
    if differing and given_anew and not change:
        raise RecipeError(
            f"--resume: run '{run}' was started with another recipe; it differs in {', '.join(differing)}; "
            f"--change-recipe goes on with the new one"
        )
    return (recipe if change else own), run


def _summary(result: TrainResult, about: list[tuple[str, object]]) -> str:
    rows: list[tuple[str, object]] = [("run", result.run), *about, ("epochs", result.epochs)]
    rows.append(("loss", f"{result.loss:.4f}"))
    if result.best_mean_dice is not None:
        rows.append(("best validation Dice", f"{result.best_mean_dice:.4f} (epoch {result.best_epoch})"))
    rows.append(("peak memory", f"{result.peak_memory_gb:.1f} GB"))
    rows += [("model", result.checkpoint), ("curves", result.run / "curves.png")]
    return pairs(rows)
