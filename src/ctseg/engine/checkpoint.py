"""Checkpoints: plain data, written whole or not at all, read without pickle.

Two files in a run folder: `last.pt` holds all that training needs to go on, `best.pt` the weights with the highest
validation score. Both carry their recipe. `torch.load(weights_only=True)` reads them: tensors, numbers, strings, lists
and dictionaries, no code.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

import ctseg
from ctseg.errors import ModelError
from ctseg.files import atomic_path

FORMAT = "ctseg-checkpoint"
VERSION = 1
BEST, LAST = "best.pt", "last.pt"


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` (plain data and tensors) under the format's name and version, atomically."""
    buffer = io.BytesIO()  # torch's own file writer hides a full disk behind a RuntimeError
    torch.save({"format": FORMAT, "version": VERSION, "ctseg": ctseg.__version__, **content}, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_checkpoint(path: Path, device: torch.device | None = None) -> dict[str, Any]:
    """What `save_checkpoint` wrote.

    Raises:
        ModelError: if the file is missing, damaged, holds anything but plain data, or is not from ctseg.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which are refused anyway
            content = torch.load(path, map_location=device or "cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelError(f"checkpoint '{path}': no such file") from error
    except pickle.UnpicklingError as error:
        raise ModelError(f"checkpoint '{path}': holds more than plain data (or is damaged); refused") from error
    except Exception as error:  # damaged bytes make the unpickler fail in any way: IndexError, struct.error, ...
        raise ModelError(f"checkpoint '{path}': damaged or not a checkpoint ({_first_line(error)})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelError(f"checkpoint '{path}': not written by ctseg; expected format '{FORMAT}'")
    if content.get("version") != VERSION:
        raise ModelError(f"checkpoint '{path}': format version {content.get('version')}, this ctseg reads {VERSION}")
    return content


def file_sha256(path: Path) -> str:
    """The file's SHA-256 as hexadecimal digits.

    Raises:
        ModelError: if it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ModelError(f"model '{path}': cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
