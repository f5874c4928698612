"""Made-up requests over every call of the OpenAPI document: none may break the server."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctseg.server.run import LOG_LINES


def test_every_call_is_described(live: Any) -> None:
    document = live.json("GET", "/api/openapi.json")
    calls = [(m, p, c) for p, methods in document["paths"].items() for m, c in methods.items()]
    assert len(calls) > 40
    for method, path, call in calls:
        assert call.get("summary"), (method, path)
        assert call.get("description"), (method, path)


@pytest.mark.slow
def test_made_up_requests_find_no_error_of_the_server(start: Callable[..., Any], tmp_path: Path) -> None:
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("no schemathesis: pip install schemathesis")
    live = start(max_sessions=10_000)
    LOG_LINES.clear()
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{live.url}/api/openapi.json"]
    options = "--checks not_a_server_error --max-examples 15 --max-time 100 --seed 1 --no-color --continue-on-failure"
    chosen = ["--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all", "--warnings", "off"]
    result = subprocess.run(
        [*command, *options.split(), *chosen, "--generation-database", "none"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    requests = [line for line in LOG_LINES if " request " in line]
    assert len(requests) > 500
    assert not [line for line in requests if " 500 " in line or "failed" in line]
    assert live.json("GET", "/api/models")
