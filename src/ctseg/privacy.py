"""Names that tell cases apart without telling who the patient is."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from ctseg.errors import CtsegError
from ctseg.files import make_folder, output_errors

KEY_VARIABLE = "CTSEG_PSEUDONYM_KEY"
MIN_KEY_CHARACTERS = 32
"""A shorter secret can be guessed, and with it every identifier behind a pseudonym."""
_UID = re.compile(r"\d+(?:\.\d+){4,}")


def pseudonym(identifier: str, key: bytes, prefix: str = "") -> str:
    """Ten letters and digits that stand for `identifier`: the same under the same key, not to be undone without it.

    HMAC-SHA256, cut to 50 bits: among a million identifiers two share a name with a probability of 4e-4.
    """
    digest = hmac.new(key, identifier.encode("utf-8", "surrogateescape"), hashlib.sha256).digest()
    return prefix + base64.b32encode(digest)[:10].decode("ascii").lower()


def configuration_folder() -> Path | None:
    """Where this user's settings for ctseg are; None for a user without a home folder."""
    given = os.environ.get("XDG_CONFIG_HOME")
    try:
        return (Path(given) if given and Path(given).is_absolute() else Path.home() / ".config") / "ctseg"
    except RuntimeError:
        return None


def pseudonym_key() -> bytes:
    """The secret of this user: `$CTSEG_PSEUDONYM_KEY`, else a file that is made once, readable by its owner only.

    Raises:
        CtsegError: if it is too short, or the file cannot be read or is not a key, or there is no place for one.
        OutputError: if it cannot be made.
    """
    given = os.environ.get(KEY_VARIABLE)
    if given:
        _check_length(given, KEY_VARIABLE, "set a longer one, e.g. of `openssl rand -hex 32`")
        return given.encode("utf-8", "surrogateescape")
    folder = configuration_folder()
    if folder is None:
        raise CtsegError(f"no key for pseudonyms: this user has no home folder; set {KEY_VARIABLE} or XDG_CONFIG_HOME")
    path = folder / "pseudonym.key"
    if not os.path.exists(path):  # Path.exists raises where the folder cannot be looked into  # noqa: PTH110
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
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                if not path.exists():
                    temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)


def _read_key(path: Path) -> bytes:
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CtsegError(f"key '{path}': cannot be read ({error}); set {KEY_VARIABLE} or mend the file") from error
    _check_length(key, f"key '{path}'", "delete it to make a new one")
    return key.encode("ascii")


def _check_length(key: str, what: str, remedy: str) -> None:
    if len(key) < MIN_KEY_CHARACTERS:
        raise CtsegError(f"{what}: expected at least {MIN_KEY_CHARACTERS} characters, got {len(key)}; {remedy}")


def without_uids(text: str) -> str:
    """`text` with every DICOM UID in it replaced by `<uid>`: archives name folders and files by UID."""
    return _UID.sub("<uid>", text)
