"""`ctseg serve`: an annotation server for a folder of CTs, with a web page."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Annotated

import typer

from ctseg.commands.common import BackendOption, DeviceOption, JsonFlag, PrecisionOption, QuietFlag, emit, parse_bytes
from ctseg.errors import CtsegError
from ctseg.progress import make_progress
from ctseg.server.settings import Settings, check_exposure, check_host_name, check_origin, find_token
from ctseg.workspace import resolve_model

NEEDED = ("fastapi", "uvicorn", "python_multipart")


def serve(
    studies: Annotated[
        Path, typer.Option(help="Folder of the CTs (NIfTI, NRRD, MHA, DICOM); labels go to labels/ in it.")
    ],
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="Run, checkpoint, exported file or recipe; may be repeated. Default: newest run."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token that clients must send. Default: $CTSEG_SERVE_TOKEN.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let everyone in who reaches --host.")] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Another name of this server; needed without a token only.")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Let a page of another server in, such as OHIF's.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate (PEM), for https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    max_upload: Annotated[str, typer.Option(metavar="SIZE", help="Of one request.")] = "1G",
    max_voxels: Annotated[int, typer.Option(min=1, help="Of one image.")] = 2**29,
    cache: Annotated[str, typer.Option(metavar="SIZE", help="Memory for images.")] = "2G",
    session_minutes: Annotated[
        float, typer.Option(min=0.01, max=525600, help="An unused session ends after so long.")
    ] = 60.0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    backend: BackendOption = "auto",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Annotate CTs over HTTP: a web page, the MONAI Label and AIAA v1 APIs for 3D Slicer and OHIF, and an own one."""
    token = find_token(token_file)
    check_exposure(host, token, insecure)
    settings = Settings(
        studies=studies,
        host=host,
        token=token,
        host_names=tuple(check_host_name(name) for name in allow_host or ()),
        cors_origins=tuple(check_origin(origin) for origin in cors or ()),
        max_upload_bytes=parse_bytes(max_upload, "--max-upload"),
        max_voxels=max_voxels,
        cache_bytes=parse_bytes(cache, "--cache"),
        session_seconds=session_minutes * 60,
    )
    if (tls_cert is None) != (tls_key is None):
        raise CtsegError("--tls-cert and --tls-key: https needs both")
    if not studies.is_dir():
        raise CtsegError(f"--studies {studies}: no such folder; name the folder of the images")
    paths = [resolve_model(name) for name in model] if model else [resolve_model(None)]
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CtsegError(f"ctseg serve needs {', '.join(missing)}: pip install 'ctseg[serve]'")
    from ctseg.engine.model import load_model
    from ctseg.engine.process import stop_on_signal
    from ctseg.engine.runtime import running
    from ctseg.server.app import make_app
    from ctseg.server.run import Tls, check_tls, open_socket, run, start_log, url_of
    from ctseg.server.service import open_service

    tls = None if tls_cert is None or tls_key is None else Tls(tls_cert, tls_key)
    if tls is not None:
        check_tls(tls)
    bound = open_socket(host, port)
    start_log(quiet)
    with (
        running(device, precision, amp=True, alone=True) as runtime,
        stop_on_signal() as stop_requested,
        make_progress(quiet) as progress,
    ):
        models = []
        for path in paths:
            loaded = load_model(path, runtime, backend, progress.note, exact=True)
            models.append((loaded.recipe.slug, loaded))
            progress.note(f"model {path} on {runtime.describe()}, {loaded.backend}")
        service = open_service(settings, models)
        try:
            app = make_app(service)
            url, images = url_of(bound, tls), len(service.datastore.images())
            text = f"{images} images, models {', '.join(service.models)}: {url}"
            emit({"url": url, "images": images, "models": list(service.models)}, text, as_json)
            run(app, bound, tls, stop_requested)
        finally:
            shutil.rmtree(service.scratch, ignore_errors=True)  # of a start that failed: no application closed it
