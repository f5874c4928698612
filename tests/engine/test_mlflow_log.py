"""MLflow besides TensorBoard: the same numbers, once for each epoch, in one run however often it was resumed."""

import os
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ctseg.engine.mlflow_log import MlflowLog
from ctseg.errors import CtsegError
from ctseg.recipe import Recipe

ROWS = [
    {"epoch": 1, "loss": 1.25, "mean_dice": None, "lr": 0.002},
    {"epoch": 2, "loss": 0.75, "mean_dice": 0.5, "lr": 0.002},
    {"epoch": 3, "loss": 0.5, "mean_dice": 0.6, "lr": 0.001},
]


@pytest.fixture
def uri(tmp_path: Path, monkeypatch) -> str:
    """MLflow's own store in a folder, in place of a server."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "store").as_uri()


def logged(uri: str) -> tuple[list, MlflowClient]:
    client = MlflowClient(tracking_uri=uri)
    return client.search_runs([client.get_experiment_by_name("ctseg").experiment_id]), client


def test_a_resumed_run_has_every_epoch_once(tmp_path: Path, tiny_recipe: Recipe, uri: str) -> None:
    first = MlflowLog(tmp_path, tiny_recipe, uri)
    for n in (1, 2):
        assert first.write(ROWS[:n]) == ""
    first.close(finished=False)
    assert logged(uri)[0][0].info.status == "KILLED"
    again = MlflowLog(tmp_path, tiny_recipe, uri)  # goes on from a checkpoint of epoch 1
    for n in (2, 3):
        again.write(ROWS[:n])
    again.close(finished=True)
    (run,), client = logged(uri)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == tmp_path.name
    for key in ("loss", "mean_dice", "lr"):
        history = client.get_metric_history(run.info.run_id, key)
        assert [(m.step, m.value) for m in history] == [(r["epoch"], r[key]) for r in ROWS if r[key] is not None]
    assert run.data.params["preprocess.spacing_mm"] == str(list(tiny_recipe.preprocess.spacing_mm))
    assert run.data.params["name"] == tiny_recipe.name


def test_telemetry_is_off(tmp_path: Path, tiny_recipe: Recipe, uri: str) -> None:
    MlflowLog(tmp_path, tiny_recipe, uri)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_server_that_is_not_there_is_an_error_at_the_start(tmp_path: Path, tiny_recipe: Recipe, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(CtsegError, match=r"--mlflow http://127.0.0.1:9: .*check the server"):
        MlflowLog(tmp_path, tiny_recipe, "http://127.0.0.1:9")


def test_a_server_that_goes_away_is_warned_of_and_gets_its_rows_later(
    tmp_path: Path, tiny_recipe: Recipe, uri: str, monkeypatch
) -> None:
    log = MlflowLog(tmp_path, tiny_recipe, uri)
    send = log.client.log_batch

    def away(*_args, **_options) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(log.client, "log_batch", away)
    assert log.write(ROWS[:1]).startswith(f"warning: --mlflow {uri}: no route")
    monkeypatch.setattr(log.client, "log_batch", send)
    assert log.write(ROWS[:2]) == ""
    (run,), client = logged(uri)
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2]


def test_without_the_package_the_error_says_how_to_get_it(tmp_path: Path, tiny_recipe, uri: str, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(CtsegError, match=r"pip install 'ctseg\[mlflow\]'"):
        MlflowLog(tmp_path, tiny_recipe, uri)
