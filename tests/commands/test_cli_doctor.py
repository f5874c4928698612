"""`ctseg doctor`: a list for scripts, an exit code for what is broken."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from ctseg.engine.doctor import Check


def test_json(cli: Callable[..., Any]):
    result = cli("doctor", "--json")
    assert (result.code, result.err) == (0, "")
    checks = json.loads(result.out)
    assert all(set(check) == {"name", "level", "value", "advice"} for check in checks)
    names = {check["name"] for check in checks}
    assert names >= {"system", "torch", "monai", "SimpleITK", "memory", "CPUs"}
    assert all(check["advice"] for check in checks if check["level"] != "ok")


def test_something_broken(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    checks = [Check("system", "ok", "fine"), Check("isal", "error", "not installed", "pip install isal")]
    monkeypatch.setattr("ctseg.engine.doctor.examine", lambda: checks)
    result = cli("doctor")
    assert (result.code, result.err) == (2, "ctseg: ctseg cannot work here: isal\n")
    assert [line.split() for line in result.out.splitlines()[2:]] == [
        ["ok", "system", "fine"],
        ["error", "isal", "not", "installed", "pip", "install", "isal"],
    ]


def test_a_warning_is_no_failure(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ctseg.engine.doctor.examine", lambda: [Check("memory", "warning", "2 GB", "get more")])
    assert cli("doctor").code == 0
