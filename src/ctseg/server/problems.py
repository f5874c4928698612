"""What a client can do wrong or meet, and the HTTP status that says so; other errors of ctseg have theirs here too."""

from __future__ import annotations

from ctseg.errors import ClickError, CtsegError, DeviceError, ImageError, NotEnoughMemory, OutputError

GONE = 440
"""AIAA's status of a session that has expired."""


class RequestProblem(CtsegError):
    """A request that cannot be answered: the rule, what was got, what to do."""

    status = 400


class NoToken(RequestProblem):
    """The token is missing or wrong."""

    status = 401


class NotHere(RequestProblem):
    """What was asked for is not there."""

    status = 404


class Conflict(RequestProblem):
    """What is there stands against it."""

    status = 409


class TooLarge(RequestProblem):
    """More than the server takes."""

    status = 413


class WrongFile(RequestProblem):
    """A kind of file that is not taken."""

    status = 415


class Invalid(RequestProblem):
    """Readable, but it makes no sense."""

    status = 422


class TooMany(RequestProblem):
    """A limit on how much there may be at once."""

    status = 429


class SessionGone(RequestProblem):
    """The session has expired."""

    status = GONE


class Busy(RequestProblem):
    """Too many wait for the model."""

    status = 503


class ClientGone(Exception):
    """The client has left: nobody is there to answer."""


_STATUS: dict[type[CtsegError], int] = {
    ImageError: 422,
    ClickError: 422,
    NotEnoughMemory: 413,
    OutputError: 507,
    DeviceError: 500,
}


def status_of(error: CtsegError) -> int:
    """The HTTP status that tells of `error`."""
    if isinstance(error, RequestProblem):
        return error.status
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 400)
