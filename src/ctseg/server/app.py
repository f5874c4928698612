"""The application: all APIs, the page, and how errors become answers."""

from __future__ import annotations

import asyncio
import html
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.formparsers import MultiPartParser
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

import ctseg
from ctseg.errors import CtsegError
from ctseg.server import aiaa, monai_data, monai_label, monai_work, own_api
from ctseg.server.guard import Guard
from ctseg.server.problems import GONE, Busy, ClientGone, status_of
from ctseg.server.service import Service
from ctseg.server.texts import printable_text, read_json

WEB_FOLDER = Path(__file__).parent / "web"
SPOOL_BYTES = 2**16
"""Of each file of a form that are kept in memory; one request may have a thousand files."""
EXPIRY_SECONDS = 5.0
"""How often expired sessions are looked for."""
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}
    for status, text in {
        400: "Wrong use",
        401: "No token",
        403: "Another server's page",
        404: "Not here",
        408: "Too slow",
        409: "Conflict",
        413: "Too large",
        415: "Wrong kind of file",
        422: "Invalid",
        429: "Too many",
        GONE: "The session has expired",
        503: "Too many wait for the model",
    }.items()
}


def make_app(service: Service) -> FastAPI:
    """The application of a service; it closes the service when it ends."""
    app = FastAPI(
        title="ctseg serve",
        version=ctseg.__version__,
        openapi_url="/api/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan,
        responses=ERRORS,
        dependencies=[Depends(_check_body)],
    )
    app.state.service = service
    MultiPartParser.spool_max_size = SPOOL_BYTES
    app.include_router(own_api.router, tags=["ctseg"])
    for part in (monai_label, monai_data, monai_work):
        app.include_router(part.router, tags=["MONAI Label"])
    app.include_router(aiaa.router, tags=["AIAA v1"])
    app.add_api_route("/api/docs", _docs, response_class=HTMLResponse, include_in_schema=False)
    app.add_exception_handler(CtsegError, _tell)
    app.add_exception_handler(RequestValidationError, _tell_invalid)
    app.add_exception_handler(ClientGone, _tell_gone)
    if (WEB_FOLDER / "index.html").is_file():
        app.mount("/", StaticFiles(directory=WEB_FOLDER, html=True), name="web")
    else:
        app.add_api_route("/", _no_page, response_class=HTMLResponse, include_in_schema=False)
    _add_problem_schema(app)
    app.add_middleware(Guard, settings=service.settings)
    if service.settings.cors_origins:  # outside the guard: a page of another server may read why it was refused
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.cors_origins),
            allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


async def _check_body(request: Request) -> None:
    """Passes if a body of JSON can be written down again.

    Raises:
        Invalid: if not.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if (not kind or kind.endswith("json")) and (body := await request.body()):
        read_json(body, "body")


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service

    async def expire() -> None:
        while True:
            await asyncio.sleep(EXPIRY_SECONDS)
            service.click_sessions.expire()
            await asyncio.to_thread(service.uploads.expire)

    task = asyncio.create_task(expire())
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await asyncio.to_thread(service.close)


async def _tell(request: Request, error: Exception) -> Response:
    assert isinstance(error, CtsegError)
    service: Service = request.app.state.service
    text = str(error).replace(f"{service.datastore.folder}/", "").replace(f"{service.scratch}/", "")
    headers = {"Retry-After": "5"} if isinstance(error, Busy) else None
    return JSONResponse({"detail": printable_text(text)}, status_of(error), headers)


async def _tell_invalid(request: Request, error: Exception) -> Response:
    """One line; what was got is not sent back, it may be large or no JSON."""
    assert isinstance(error, RequestValidationError)
    problems = [".".join(map(str, one["loc"][1:] or one["loc"])) + f": {one['msg']}" for one in error.errors()]
    return JSONResponse({"detail": printable_text("; ".join(problems[:10]))}, 422)


async def _tell_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


def _no_page() -> HTMLResponse:
    return HTMLResponse("<!doctype html><title>ctseg</title><p>The page is not installed. <a href='api/docs'>API</a>")


def _add_problem_schema(app: FastAPI) -> None:
    """Says in the OpenAPI document what every error looks like."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        known = app.openapi_schema is not None
        document = original()
        if not known:
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas["Problem"] = {
                "type": "object",
                "required": ["detail"],
                "properties": {"detail": {"type": "string", "title": "The rule, what was got, what to do"}},
            }
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation does


def _docs(request: Request) -> str:
    """All calls on one page, without anything from elsewhere."""
    rows = []
    for path, methods in request.app.openapi()["paths"].items():
        for method, call in methods.items():
            given = [f"{p['name']} ({p['in']})" for p in call.get("parameters", [])]
            given += [f"body {kind}" for kind in call.get("requestBody", {}).get("content", {})]
            cells = (f"{method.upper()} {path}", call.get("summary", ""), ", ".join(given), call.get("description", ""))
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    style = "body{font:15px sans-serif;margin:2em}td,th{text-align:left;vertical-align:top;padding:.3em 1em .3em 0}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>ctseg serve: API</title><style>{style}</style>"
        "<h1>ctseg serve: API</h1><p><a href='openapi.json'>OpenAPI document</a></p>"
        f"<table><tr><th>Call<th>What it does<th>Takes<th>About</tr>{''.join(rows)}</table></html>"
    )
