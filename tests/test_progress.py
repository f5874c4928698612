import io
import subprocess
import sys
from datetime import datetime, timedelta

import pytest
from rich.console import Console

from ctseg.progress import PlainProgress, Progress, RichProgress, Silent, make_progress


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return datetime(2026, 11, 21, 15, 4, 5) + timedelta(seconds=self.seconds - 1000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def plain(stream: io.StringIO, clock: Clock) -> PlainProgress:
    return PlainProgress(stream, clock=clock, now=clock.now)


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, height=20, _environ={"TERM": "xterm"})


def fail_inside(progress: PlainProgress | RichProgress) -> None:
    def work() -> None:
        with progress:
            progress.start("training", 4)
            progress.start("validating", 2)
            raise KeyError

    with pytest.raises(KeyError):
        work()


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_plain_lines_are_dated_and_tell_the_time_left(plain: PlainProgress, stream: io.StringIO, clock: Clock) -> None:
    plain.start("training", 40)
    for _ in range(40):
        clock.seconds += 2.5
        plain.advance("loss 0.412")
    plain.finish()
    assert lines(stream)[:2] == [
        "2026-11-21 15:04:05 training 0/40 (0%)",
        "2026-11-21 15:04:15 training 4/40 (10%) ETA 0:01:30 loss 0.412",
    ]
    assert lines(stream)[-1] == "2026-11-21 15:05:45 training 40/40 took 0:01:40 loss 0.412"
    assert len(lines(stream)) == 1 + 9 + 1, "first, one per interval, last"


def test_plain_writes_first_and_last_line_of_short_work(plain: PlainProgress, stream: io.StringIO) -> None:
    plain.start("validating", 3)
    for _ in range(3):
        plain.advance()
    plain.finish()
    assert [line[20:] for line in lines(stream)] == ["validating 0/3 (0%)", "validating 3/3 took 0:00:00"]


def test_plain_parts_of_a_task_are_told_only_when_they_take_long(
    plain: PlainProgress, stream: io.StringIO, clock: Clock
) -> None:
    plain.start("training", 2)
    for seconds_per_case in (1, 6):
        plain.start("validating", 3)
        for n in range(3):
            clock.seconds += seconds_per_case
            plain.advance(f"case {n}")
        plain.finish()
        plain.advance()
    plain.finish()
    assert [line[20:] for line in lines(stream)] == [
        "training 0/2 (0%)",
        "training 1/2 (50%) ETA 0:00:15; validating 2/3 (66%) ETA 0:00:06 case 1",
        "training 2/2 took 0:00:21",
    ]


def test_plain_notes_are_always_written(plain: PlainProgress, stream: io.StringIO) -> None:
    plain.note("epoch 5: mean Dice 0.912")
    assert lines(stream) == ["2026-11-21 15:04:05 epoch 5: mean Dice 0.912"]


def test_plain_work_that_stops_early_says_how_far_it_came(plain: PlainProgress, stream: io.StringIO) -> None:
    plain.start("training", 40)
    plain.advance()
    plain.finish()
    assert lines(stream)[-1].endswith("training 1/40 took 0:00:00")


def test_plain_empty_work_is_complete(plain: PlainProgress, stream: io.StringIO) -> None:
    plain.start("preparing", 0)
    plain.finish()
    assert lines(stream)[0].endswith("preparing 0/0 (100%)")


def test_names_from_outside_cannot_add_lines_or_control_characters(
    plain: PlainProgress, stream: io.StringIO, clock: Clock
) -> None:
    plain.start("a\nb", 2)
    clock.seconds += 60
    plain.advance("\x1b[2Jcase\r")
    plain.note("c\td")
    assert [line[20:] for line in lines(stream)] == ["a?b 0/2 (0%)", "a?b 1/2 (50%) ETA 0:01:00 ?[2Jcase?", "c?d"]


def test_progress_can_be_used_again_after_an_error(plain: PlainProgress, stream: io.StringIO) -> None:
    fail_inside(plain)
    plain.start("validating", 1)
    assert lines(stream)[-1].endswith("validating 0/1 (0%)"), "outermost again"


def test_bar_shows_eta_and_detail_and_leaves_one_line(terminal: Console, clock: Clock) -> None:
    progress = RichProgress(terminal, clock)
    with progress:
        progress.start("training", 4)
        clock.seconds += 5
        progress.advance("loss [0.4]")
        progress._bars.refresh()
        progress.note("epoch 1: [bold] stays as it is")
        progress.finish()
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    for text in ("1/4", "ETA 0:00:15", "loss [0.4]", "epoch 1: [bold] stays as it is\n"):
        assert text in shown
    assert shown.endswith("training 1/4 took 0:00:05 loss [0.4]\n")


def test_bar_is_taken_away_and_the_cursor_given_back_after_an_error(terminal: Console) -> None:
    progress = RichProgress(terminal)
    fail_inside(progress)
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert shown.rindex("\x1b[2K") > shown.rindex("validating"), "the bars are erased"


def test_results_printed_beside_a_bar_stay_on_stdout(terminal: Console, capsys: pytest.CaptureFixture[str]) -> None:
    with RichProgress(terminal) as progress:
        progress.start("training", 4)
        print("result")
    assert capsys.readouterr().out == "result\n"


def test_silent_takes_everything() -> None:
    with Silent() as progress:
        progress.start("training", 1)
        progress.advance("loss")
        progress.note("text")
        progress.finish()


def test_choice_follows_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_progress(quiet=True), Silent)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(make_progress(quiet=False), PlainProgress)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    chosen: Progress = make_progress(quiet=False)
    assert isinstance(chosen, RichProgress)


def test_import_is_light() -> None:
    program = "import sys, ctseg.progress; assert 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
