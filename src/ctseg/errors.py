"""The errors a user can cause or meet, each with the exit code the shell sees.

    CtsegError                    exit 2: wrong use or bad input; the message says what to do
    |- RecipeError                a recipe file or a `--set` is wrong (all problems at once)
    |- ManifestError              a data list is wrong (all problems at once)
    |- ImageError                 a file is not a CT volume ctseg can trust
    |- ClickError                 a click does not lie in the CT
    |- ModelError                 a checkpoint or an exported model cannot be used
    |- DeviceError                the machine lacks what was asked for
    |- DownloadError              a file cannot be fetched, or is not what it should be
    |- OutputError                a result cannot be written (disk full, read-only)
    |- NotEnoughMemory            a case does not fit the device's memory
    |- PeerLost                   exit 1: another process of the same run has ended
    |- LearningError              exit 1: a pipeline ran but missed its own target
    |- CasesFailed                exit 1: some cases failed, the rest are done
    `- Stopped                    exit 75: stopped by a signal, resumable

Anything else that escapes is a bug in ctseg and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CtsegError(Exception):
    """A user's problem, told in one line: the rule, what was got, what to do."""

    exit_code = 2


class RecipeError(CtsegError):
    """A recipe or an override breaks a rule."""


class ManifestError(CtsegError):
    """A data list breaks a rule."""


class ImageError(CtsegError):
    """A file is not a CT volume that can be trusted."""


class ClickError(CtsegError):
    """A click does not lie in the CT, or is not a place."""


class ModelError(CtsegError):
    """A checkpoint or exported model cannot be used."""


class DeviceError(CtsegError):
    """The machine lacks what was asked for."""


class DownloadError(CtsegError):
    """A file cannot be fetched, or is not what it should be."""


class OutputError(CtsegError):
    """A result cannot be written."""


class NotEnoughMemory(CtsegError):
    """A case does not fit the memory of the device."""


class PeerLost(CtsegError):
    """Another process of the same run has ended, or was never met; it tells why."""

    exit_code = 1


class LearningError(CtsegError):
    """A pipeline ran to its end but missed the target it sets itself."""

    exit_code = 1


class CasesFailed(CtsegError):
    """Some cases failed; every other one is done."""

    exit_code = 1


class Stopped(CtsegError):
    """A signal stopped the work at a point it can resume from; without a message, another process tells it."""

    exit_code = 75


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What to say of an unknown word: the known one that it resembles, or all of them."""
    by_lower = {one.lower(): one for one in known}
    match = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f"did you mean '{by_lower[match[0]]}'?" if match else f"known: {', '.join(by_lower.values())}"


def list_problems(subject: str, problems: list[str]) -> str:
    """One message that names every problem of one thing: on one line if single, else one a line."""
    if len(problems) == 1:
        return f"{subject}: {problems[0]}"
    return "\n  ".join([f"{subject}: {len(problems)} problems", *problems])
