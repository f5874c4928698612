"""Names that tell cases apart without telling who the patient is."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from ctseg.errors import CtsegError
from ctseg.files import make_folder, output_errors

KEY_VARIABLE = "CTSEG_PSEUDONYM_KEY"
_UID = re.compile(r"\d+(?:\.\d+){4,}")


def pseudonym(identifier: str, key: bytes, prefix: str = "") -> str:
    """Ten letters and digits that stand for `identifier`: the same under the same key, not to be undone without it.

    HMAC-SHA256, cut to 50 bits: among a million identifiers two share a name with a probability of 4e-4.
    """
    digest = hmac.new(key, identifier.encode("utf-8", "surrogateescape"), hashlib.sha256).digest()
    return prefix + base64.b32encode(digest)[:10].decode("ascii").lower()


def pseudonym_key() -> bytes:
    """The secret of this user: `$CTSEG_PSEUDONYM_KEY`, else a file that is made once, readable by its owner only.

    Raises:
        CtsegError: if the file cannot be read or is not a key.
        OutputError: if it cannot be made.
    """
    given = os.environ.get(KEY_VARIABLE)
    if given:
        return given.encode("utf-8", "surrogateescape")
    path = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "ctseg" / "pseudonym.key"
    if not path.exists():
        make_folder(path.parent)
        _make_key(path)
    return _read_key(path)


def _make_key(path: Path) -> None:
    """Writes a key of 256 random bits, whole, unless another process has been faster."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with output_errors(path):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32) + "\n")
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            temporary.unlink()


def _read_key(path: Path) -> bytes:
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CtsegError(f"key '{path}': cannot be read ({error}); set {KEY_VARIABLE} or mend the file") from error
    if len(key) < 32:
        raise CtsegError(f"key '{path}': expected at least 32 characters, got {len(key)}; delete it to make a new one")
    return key.encode("ascii")


def without_uids(text: str) -> str:
    """`text` with every DICOM UID in it replaced by `<uid>`: archives name folders and files by UID."""
    return _UID.sub("<uid>", text)
