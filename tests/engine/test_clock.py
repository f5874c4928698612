"""Stages are timed inside, and what lies between them is waiting."""

import itertools

import pytest

from ctseg.engine import clock as module
from ctseg.engine.clock import Clock


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the time is one second later."""
    monkeypatch.setattr(module.time, "perf_counter", itertools.count().__next__)


def test_stages_add_up_and_the_rest_is_waiting(ticks: None) -> None:
    clock = Clock()  # 0
    for _ in range(2):
        with clock.stage("read"):  # 1 to 2, 3 to 4
            pass
    with clock.stage("write"):  # 5 to 7
        module.time.perf_counter()
    assert clock.with_waiting() == {"read": 2, "write": 2, "waiting": 4}  # 8


def test_what_one_stage_did_for_another_counts_there(ticks: None) -> None:
    clock = Clock()
    with clock.stage("prepare"):  # 1 to 4
        for _ in range(2):
            module.time.perf_counter()
    clock.move(2, "prepare", "read")
    assert clock.seconds == {"prepare": 1, "read": 2}


def test_a_stage_that_fails_has_taken_its_time(ticks: None) -> None:
    clock = Clock()
    with pytest.raises(ZeroDivisionError), clock.stage("network"):
        raise ZeroDivisionError
    assert clock.seconds == {"network": 1}
