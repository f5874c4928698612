"""Pseudonyms: stable under one key, different under another, and never the identifier itself."""

import hashlib
import hmac
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ctseg.errors import CtsegError
from ctseg.privacy import KEY_VARIABLE, pseudonym, pseudonym_key, without_uids

UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001.298806137288633453246975630178"


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user without a key: where their configuration lies."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "ctseg"


def test_it_is_the_keyed_hash_of_rfc_2104() -> None:
    digest = hmac.digest(b"k" * 32, UID.encode(), hashlib.sha256)
    bits = int.from_bytes(digest, "big") >> (256 - 50)
    letters = "abcdefghijklmnopqrstuvwxyz234567"
    expected = "".join(letters[bits >> (45 - 5 * n) & 31] for n in range(10))
    assert pseudonym(UID, b"k" * 32, "ct-") == f"ct-{expected}"


def test_equal_for_equal_identifiers_and_different_under_another_key() -> None:
    assert pseudonym("Doe^Jane", b"a" * 32) == pseudonym("Doe^Jane", b"a" * 32)
    assert pseudonym("Doe^Jane", b"a" * 32) != pseudonym("Doe^Jane", b"b" * 32)
    assert len({pseudonym(f"patient {n}", b"a" * 32) for n in range(2000)}) == 2000


@pytest.mark.parametrize("identifier", ["", "Müller^Ünal", "\udcff broken bytes", "x" * 10_000])
def test_any_text_has_one(identifier: str) -> None:
    name = pseudonym(identifier, b"a" * 32)
    assert name.isalnum()
    assert len(name) == 10


def test_the_key_is_made_once_and_only_its_owner_reads_it(config: Path) -> None:
    first = pseudonym_key()
    assert pseudonym_key() == first
    assert len(first) == 64
    assert stat.S_IMODE((config / "pseudonym.key").stat().st_mode) == 0o600


def test_processes_that_start_together_agree_on_one_key(config: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(lambda _: pseudonym_key(), range(64)))) == 1
    assert [path.name for path in config.iterdir()] == ["pseudonym.key"]


def test_a_key_is_made_where_the_file_system_has_no_hard_links(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first = pseudonym_key()
    assert pseudonym_key() == first
    assert [path.name for path in config.iterdir()] == ["pseudonym.key"]


def test_two_users_have_different_keys(config: Path) -> None:
    first = pseudonym_key()
    (config / "pseudonym.key").unlink()
    assert pseudonym_key() != first


def test_a_key_from_the_surroundings_comes_first(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "shared by the whole department: " + "k" * 20)
    assert pseudonym_key() == b"shared by the whole department: kkkkkkkkkkkkkkkkkkkk"
    assert not config.exists()


@pytest.mark.parametrize("length", [1, 31])
def test_a_key_that_could_be_guessed_is_refused_wherever_it_stands(
    config: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    config.mkdir(parents=True)
    (config / "pseudonym.key").write_text("k" * length)
    with pytest.raises(CtsegError, match=f"expected at least 32 characters, got {length};"):
        pseudonym_key()
    monkeypatch.setenv(KEY_VARIABLE, "k" * length)
    with pytest.raises(CtsegError, match=f"^{KEY_VARIABLE}: expected at least 32 characters, got {length};"):
        pseudonym_key()
    monkeypatch.setenv(KEY_VARIABLE, "k" * 32)
    assert pseudonym_key() == b"k" * 32


def test_a_user_without_a_home_is_told_what_to_set(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(CtsegError, match=f"no home folder; set {KEY_VARIABLE} or XDG_CONFIG_HOME"):
        pseudonym_key()


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64])
def test_a_damaged_key_is_refused_and_not_replaced(config: Path, content: bytes) -> None:
    """A new one would give every case another name."""
    config.mkdir(parents=True)
    (config / "pseudonym.key").write_bytes(content)
    with pytest.raises(CtsegError, match=r"pseudonym\.key"):
        pseudonym_key()
    assert (config / "pseudonym.key").read_bytes() == content


def test_uids_leave_a_text_and_other_numbers_stay() -> None:
    assert without_uids(f"/data/{UID}/1.dcm at 1.5 mm, version 1.2.3") == "/data/<uid>/1.dcm at 1.5 mm, version 1.2.3"
