"""`ctseg demo`: its exit code says whether the model learned anything. The journey itself is tested in the engine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctseg.engine.demo import DemoResult
from ctseg.engine.evaluate import CaseScore, Evaluation, summarise
from ctseg.engine.export import ExportReport


def result_with(dice: float | None) -> DemoResult:
    score = CaseScore("case_1", "spleen", dice, 12.5, 13.0, 0.5)
    evaluation = Evaluation((score,), (summarise("spleen", [score]),))
    report = ExportReport(Path("demo/run/model.ts"), "torchscript", None, (1, 1, 64, 64, 64), 2, 9.0, 2e-6, 1.0)
    return DemoResult(Path("demo"), evaluation, (report,), ("demo/masks: masks",), 60.0)


@pytest.mark.parametrize(
    ("dice", "code", "error"),
    [
        (0.9, 0, ""),
        (0.899, 1, "ctseg: mean Dice on the testing split is 0.899, below 0.9\n"),
        (None, 1, "ctseg: mean Dice on the testing split is None, below 0.9\n"),
    ],
)
def test_exit_code(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, dice: float | None, code: int, error: str):
    monkeypatch.setattr("ctseg.engine.demo.run_demo", lambda *_: result_with(dice))
    result = cli("demo", "--quiet")
    assert (result.code, result.err) == (code, error)
    assert "demo/run/model.ts: largest difference 2.0e-06, labels agree in 1.000000 of voxels" in result.out
    assert "all of it in demo after 60 s:\n  demo/masks: masks" in result.out


def test_json(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ctseg.engine.demo.run_demo", lambda *_: result_with(0.95))
    answer = json.loads(cli("demo", "--json", "--quiet").out)
    assert answer["mean_dice"] == answer["evaluation"]["scores"][0]["dice"] == 0.95
    assert answer["exports"][0]["path"] == "demo/run/model.ts"
