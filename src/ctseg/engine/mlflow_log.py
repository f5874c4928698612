"""A run's numbers in MLflow, besides TensorBoard: an optional extra, off unless `--mlflow` names a server."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

from ctseg.errors import CtsegError
from ctseg.files import write_text
from ctseg.recipe import Recipe

RUN_ID_FILE = "mlflow.txt"
"""In the run folder: the tracking URI and the run's id there, so that a resumed training goes on in the same run."""
MAX_PARAM_LENGTH = 500


def check_mlflow() -> None:
    """Raises CtsegError if MLflow is not installed; it is not imported."""
    if importlib.util.find_spec("mlflow") is None:
        raise CtsegError("--mlflow: the package is missing; install it with: pip install 'ctseg[mlflow]'")


class MlflowLog:
    """Sends each epoch's numbers to an MLflow server. Nothing of the cases is sent: no names, no paths, no images.

    A server that is not there at the start is an error; one that is away later is warned of, and gets its rows when it
    is back.
    """

    def __init__(self, run: Path, recipe: Recipe, uri: str) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when mlflow is imported
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its own seven take minutes of every epoch
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        check_mlflow()
        from mlflow import MlflowClient

        self.uri = uri
        try:
            self.client = MlflowClient(tracking_uri=uri)
            self.run_id = self._known_run(run) or self._new_run(run, recipe)
            self.sent = {m.step for m in self.client.get_metric_history(self.run_id, "loss")}
            self.client.update_run(self.run_id, status="RUNNING")
        except Exception as error:  # mlflow, requests and the server each have their own
            raise self._refusal(error) from error

    def write(self, history: list[dict[str, Any]]) -> str:
        """Sends the rows that the server does not have yet; returns a warning if it does not take them, or ""."""
        from mlflow.entities import Metric

        now_ms = round(1000 * time.time())
        rows = [row for row in history if row["epoch"] not in self.sent]
        metrics = [
            Metric(key=key, value=float(row[key]), timestamp=now_ms, step=row["epoch"])
            for row in rows
            for key in ("loss", "mean_dice", "lr")
            if row[key] is not None
        ]
        try:
            for first in range(0, len(metrics), 1000):  # the most that a server takes at once
                self.client.log_batch(self.run_id, metrics=metrics[first : first + 1000])
        except Exception as error:
            return f"warning: {self._refusal(error)}"
        self.sent.update(row["epoch"] for row in rows)
        return ""

    def close(self, *, finished: bool) -> str:
        """Marks the run as finished, or as stopped before its end; returns a warning or ""."""
        try:
            self.client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")
        except Exception as error:
            return f"warning: {self._refusal(error)}"
        return ""

    def _known_run(self, run: Path) -> str:
        if not (run / RUN_ID_FILE).is_file():
            return ""
        uri, _, run_id = (run / RUN_ID_FILE).read_text(encoding="utf-8").strip().partition("\n")
        return run_id if uri == self.uri else ""

    def _new_run(self, run: Path, recipe: Recipe) -> str:
        from mlflow.entities import Param

        experiment = self.client.get_experiment_by_name("ctseg")
        experiment_id = self.client.create_experiment("ctseg") if experiment is None else experiment.experiment_id
        run_id = str(self.client.create_run(experiment_id, run_name=run.name).info.run_id)
        params = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in recipe.flat().items()]
        self.client.log_batch(run_id, params=params)
        write_text(run / RUN_ID_FILE, f"{self.uri}\n{run_id}\n")
        return run_id

    def _refusal(self, error: Exception) -> CtsegError:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return CtsegError(f"--mlflow {self.uri}: {reason}; check the server, or leave --mlflow out")
