"""The command line in this process, and a tiny model with random weights."""

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ctseg.cli import main
from ctseg.engine.checkpoint import save_checkpoint
from ctseg.manifest import Manifest
from ctseg.networks import network_for
from ctseg.recipe import Recipe
from ctseg.workspace import start_run


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """What stderr says after its dated progress lines; it must be ctseg's own, not a traceback."""
        _, mark, message = ("\n" + self.err).rpartition("\nctseg: ")
        assert mark
        assert "Traceback" not in self.err
        return message.rstrip("\n")


def _run_cli(folder: Path, *arguments: object) -> Result:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["ctseg", *map(str, arguments)])
        patch.chdir(folder)
        with pytest.raises(SystemExit) as caught:
            main()
    return Result(caught.value.code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., Result]:
    """A function that runs `ctseg ARGUMENTS` in a folder: (folder, *arguments) -> Result."""
    return _run_cli


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., Result]:
    """A function that runs `ctseg ARGUMENTS` in `tmp_path`."""
    return lambda *arguments: _run_cli(tmp_path, *arguments)


def make_model(run: Path, recipe: Recipe, manifest: Manifest, seed: int) -> Path:
    """A run folder whose best.pt holds random weights."""
    torch.manual_seed(seed)
    start_run(run, recipe, manifest)
    save_checkpoint(run / "best.pt", {"recipe": recipe.to_dict(), "model": network_for(recipe).state_dict()})
    return run / "best.pt"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Recipe, tiny_manifest: Manifest) -> Path:
    """The checkpoint of a run of the tiny recipe on the tiny data."""
    return make_model(tmp_path_factory.mktemp("model") / "run", tiny_recipe, tiny_manifest, seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Recipe, tiny_manifest: Manifest) -> Path:
    """The same with other weights."""
    return make_model(tmp_path_factory.mktemp("other") / "run", tiny_recipe, tiny_manifest, seed=1)
