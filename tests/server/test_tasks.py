"""Long work: one piece of a kind at a time, and nobody who asks about it waits for it to begin."""

import threading

import pytest

from ctseg.server.problems import Conflict, TooMany
from ctseg.server.tasks import Task, Tasks


def test_others_are_told_of_tasks_while_one_begins_and_can_stop_it() -> None:
    tasks, may_go_on, stopped = Tasks("a training"), threading.Event(), threading.Event()

    def start(_task: Task):
        assert may_go_on.wait(20)
        return stopped.set

    thread = threading.Thread(target=lambda: tasks.begin({}, start))
    thread.start()
    while tasks.running is None:
        assert thread.is_alive()
    assert [task.status for task in tasks.all] == ["SUBMITTED"]
    with pytest.raises(TooMany, match="a training is running already"):
        tasks.begin({}, start)
    task = tasks.stop()
    assert not stopped.is_set()
    may_go_on.set()
    thread.join(20)
    assert stopped.is_set()
    assert task is not None
    assert task.status == "STOPPED"


def test_a_task_that_cannot_begin_was_never_there() -> None:
    tasks = Tasks("a training")

    def refuse(_task: Task):
        raise Conflict("nothing is labelled")

    with pytest.raises(Conflict):
        tasks.begin({}, refuse)
    assert tasks.all == []
    begun = tasks.begin({}, lambda _task: lambda: None)
    assert (begun.status, tasks.running) == ("RUNNING", begun)


def test_one_that_ends_at_once_keeps_how_it_ended() -> None:
    def start(task: Task):
        task.finish("DONE")
        return lambda: None

    assert Tasks("a training").begin({}, start).status == "DONE"
