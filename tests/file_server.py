"""A real HTTP server on loopback that misbehaves on demand."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """A file and how the server treats those who ask for it."""

    content: bytes
    etag: str | None = '"one"'
    ranges: bool = True
    """Whether Range is honoured."""
    checks_if_range: bool = True
    drops: list[int] = field(default_factory=list)
    """For each of the next answers: the connection breaks after so many bytes."""
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """For each of the next requests: an answer without a body."""
    claims: int | None = None
    """Another Content-Length than the true one."""
    says_length: bool = True
    chunked: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    bytes_per_second: int | None = None


@dataclass
class FileServer:
    """What it serves by path, and the requests it got: path and headers."""

    port: int
    files: dict[str, Served] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def serve(self, path: str, content: bytes, **how: object) -> str:
        """Adds a file; returns its address."""
        self.files[path] = Served(content, **how)  # type: ignore[arg-type]
        return self.url(path)

    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.requests]


@contextmanager
def running_server() -> Iterator[FileServer]:
    """A server that runs meanwhile."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.requests.append((self.path, dict(self.headers)))
            served = state.files.get(self.path.partition("?")[0])
            if served is None:
                self._answer(404, {})
            elif served.statuses:
                self._answer(*served.statuses.pop(0))
            else:
                self._send(served)

        def _answer(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": "0", **headers}.items():
                self.send_header(key, value)
            self.end_headers()

        def _send(self, served: Served) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            same = not served.checks_if_range or self.headers.get("If-Range", served.etag) == served.etag
            start = int(asked[1]) if asked and served.ranges and same else 0
            size = len(served.content)
            if start >= size > 0:
                return self._answer(416, {"Content-Range": f"bytes */{size}"})
            body = served.content[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            if served.etag:
                self.send_header("ETag", served.etag)
            for key, value in served.headers.items():
                self.send_header(key, value)
            if served.chunked:
                self.send_header("Transfer-Encoding", "chunked")
            elif served.says_length:
                self.send_header("Content-Length", str(len(body) if served.claims is None else served.claims))
            self.end_headers()
            drop = served.drops.pop(0) if served.drops else None
            self._write(body if drop is None else body[:drop], served)
            if drop is not None or served.claims is not None or not (served.says_length or served.chunked):
                self.close_connection = True
            return None

        def _write(self, body: bytes, served: Served) -> None:
            step = 1 << 16 if served.bytes_per_second is None else max(1, served.bytes_per_second // 100)
            try:
                for at in range(0, len(body), step):
                    block = body[at : at + step]
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block) if served.chunked else block)
                    if served.bytes_per_second is not None and state.stopping.wait(0.01):
                        return
                if served.chunked:
                    self.wfile.write(b"0\r\n\r\n")
            except OSError:  # the client has left
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that was killed is no news."""

    server = Server(("127.0.0.1", 0), Handler)
    state = FileServer(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()
