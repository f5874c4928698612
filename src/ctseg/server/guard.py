"""What stands before every request: who may ask, how much and how slowly, and one line of log with an id.

Plain ASGI: a disconnect must reach those who wait for the model.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import time
import traceback
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ctseg.server.settings import Settings

LOG = logging.getLogger("ctseg.server")
SILENCE_SECONDS = 30.0
"""Between two parts of a request's body."""
BODY_SECONDS = 600.0
"""For the whole body."""
MAX_PLAIN_BYTES = 2**20
"""Of a body that is no form with files: JSON, which is held in memory."""
MAX_OPEN_BYTES = 2**13
"""Of a body from someone who showed no token."""
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
"""What is written into the log; a stranger chooses the word."""
OPEN_PATHS = ("/", "/auth/", "/auth/token")
"""What may be had without a token: the page itself and how to get one; files of the page are recognised by suffix."""
PAGE_SUFFIXES = (".html", ".js", ".css", ".svg", ".txt", ".ico", ".png", ".woff2")
API_PREFIXES = (
    "/api", "/v1", "/info", "/infer", "/session", "/datastore", "/activelearning", "/train", "/batch", "/model", "/logs"
)  # fmt: skip
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
)


class _Refused(Exception):
    """The request is at its end; `_Body.problem` says why."""


class Guard:
    """Checks a request, then lets `app` answer it."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; anything but HTTP is passed on or closed."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id, started, status = secrets.token_hex(6), time.perf_counter(), 0
        limit = _max_bytes(self._settings, scope)
        body = _Body(limit, receive)
        scope.setdefault("state", {})["request_id"] = request_id

        async def told(message: Message) -> None:
            nonlocal status
            if body.problem is not None:
                return  # whatever made an answer of it: the one below is the only one
            if message["type"] == "http.response.start":
                status = message["status"]
                given = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                present = {name.lower() for name, _ in given}
                message = {**message, "headers": given + [pair for pair in HEADERS if pair[0] not in present]}
            await send(message)

        problem = _problem(self._settings, scope, limit)
        try:
            if problem is not None:
                await _refuse(told, *problem, close=_has_much(scope))
            else:
                await self._app(scope, body, told)
        except Exception as error:
            if body.problem is not None:
                return
            LOG.error("request %s: failed\n%s", request_id, _told_of(error))
            if status:
                raise  # too late for an answer: the connection is closed
            await _refuse(told, 500, f"an error in the server; its log tells of request {request_id}")
        finally:
            if body.problem is not None and not status:
                problem, body.problem = body.problem, None
                await _refuse(told, *problem, close=True)
            route = getattr(scope.get("route"), "path", "-")  # the path itself may hold a patient's name
            seconds = time.perf_counter() - started
            method = scope["method"] if scope["method"] in METHODS else "-"
            LOG.info("request %s: %s %s %s %.3f s", request_id, method, route, status or "gone", seconds)


class _Body:
    """`receive`, with limits on the size and the slowness of what comes; `problem` says which one was passed."""

    def __init__(self, limit: int, receive: Receive) -> None:
        self.problem: tuple[int, str] | None = None
        self._limit = limit
        self._receive = receive
        self._num_bytes = 0
        self._whole = False
        self._deadline = time.monotonic() + BODY_SECONDS

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        seconds = min(SILENCE_SECONDS, self._deadline - time.monotonic())
        try:
            message = await asyncio.wait_for(self._receive(), max(seconds, 0.001))
        except asyncio.TimeoutError as error:  # not the built-in one before Python 3.11
            self.problem = 408, "the body of the request came too slowly; send it again"
            raise _Refused from error
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._num_bytes > self._limit:
                self.problem = 413, _too_large(self._limit)
                raise _Refused
        else:
            self._whole = True
        return message


def _told_of(error: BaseException) -> str:
    """Where errors came from and of which kind; their texts may name patients."""
    cause = error.__cause__ or error.__context__
    before = "" if cause is None else f"{_told_of(cause)}\nand then\n"
    return f"{before}{''.join(traceback.format_tb(error.__traceback__))}{type(error).__name__}"


def _max_bytes(settings: Settings, scope: Scope) -> int:
    """The most bytes of this request's body."""
    if _is_open(scope["path"]):
        return min(MAX_OPEN_BYTES, settings.max_upload_bytes)
    is_form = Headers(scope=scope).get("content-type", "").strip().lower().startswith("multipart/form-data")
    return settings.max_upload_bytes if is_form else min(MAX_PLAIN_BYTES, settings.max_upload_bytes)


def _has_much(scope: Scope) -> bool:
    """True if a body comes that nobody will read: the connection is closed on it."""
    headers = Headers(scope=scope)
    length = headers.get("content-length", "0")
    return "transfer-encoding" in headers or not length.isdecimal() or len(length) > 9 or int(length) > MAX_OPEN_BYTES


def _problem(settings: Settings, scope: Scope, limit: int) -> tuple[int, str] | None:
    """Why the request is refused before its body is read: a status and a reason."""
    headers = Headers(scope=scope)
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdecimal() and len(length) <= 18):
        return 400, "content-length: expected a number"
    if settings.token is None and not settings.goes_by(_host_name(headers.get("host", ""))):
        return 400, "host: this server does not go by this name; --allow-host NAME adds one"
    if _is_foreign(settings, scope, headers):
        return 403, "origin: web pages of other servers may not use this one; --cors ORIGIN allows one"
    if settings.token is not None and scope["method"] != "OPTIONS" and not _is_open(scope["path"]):
        given = headers.get("authorization", "")
        scheme, _, token = given.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), settings.token.encode()):
            return 401, "this server asks for a token: send the header 'Authorization: Bearer TOKEN'"
    if int(length) > limit:
        return 413, _too_large(limit)
    return None


def _too_large(limit: int) -> str:
    return f"the request is larger than {limit} bytes, the most that is taken"


def _host_name(host: str) -> str:
    return urlsplit(f"//{host}").hostname or "" if _is_host(host) else ""


def _is_host(host: str) -> bool:
    try:
        return urlsplit(f"//{host}").netloc == host
    except ValueError:
        return False


def _is_foreign(settings: Settings, scope: Scope, headers: Headers) -> bool:
    """True of a request that a web page of another server makes; who follows a link to the page itself may do so."""
    origin = headers.get("origin")
    if origin is not None:
        own = origin.partition("://")[2]
        return (not own or own != headers.get("host")) and origin not in settings.cors_origins
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return False
    is_link = headers.get("sec-fetch-mode") == "navigate" and scope["method"] == "GET"
    return not (is_link and scope["path"] == "/")


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or (path.endswith(PAGE_SUFFIXES) and not path.startswith(API_PREFIXES))


async def _refuse(send: Send, status: int, reason: str, *, close: bool = False) -> None:
    content = json.dumps({"detail": reason}).encode()
    headers: list[Any] = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
