"""Fetching over HTTP from a server that drops, lies, changes, corrupts and forgets."""

import errno
import gzip
import hashlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from ctseg.errors import DownloadError, OutputError
from ctseg.progress import PlainProgress, Silent
from ctseg.sources import fetch as module
from ctseg.sources.answers import check_answer
from ctseg.sources.fetch import MAX_TRIES, Remote, fetch, locked
from file_server import FileServer, running_server

CONTENT = random.Random(0).randbytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()
OTHER = random.Random(1).randbytes(3_000_000)


@pytest.fixture(scope="module")
def one_server() -> Iterator[FileServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def server(one_server: FileServer) -> FileServer:
    one_server.files.clear()
    one_server.requests.clear()
    return one_server


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each pause would have been."""
    made: list[float] = []
    monkeypatch.setattr(module.time, "sleep", made.append)
    return made


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def remote(*urls: str, digests: dict[str, str] | None = None, max_bytes: int = 10**7) -> Remote:
    known = {"sha256": SHA256} if digests is None else digests
    return Remote(name="a.tar", urls=urls, digests=known, max_bytes=max_bytes, by_hand="get it by hand")


def assert_only(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_a_file_arrives_whole_with_its_checksums(server: FileServer, tmp_path: Path):
    url = server.serve("/a", CONTENT)
    found = fetch(remote(url, digests={"md5": MD5}), tmp_path, Silent())
    assert found.path.read_bytes() == CONTENT
    assert (found.url, found.num_bytes, found.verified) == (url, len(CONTENT), True)
    assert found.digests == {"md5": MD5, "sha256": SHA256}
    assert_only(tmp_path, "a.tar")
    assert server.requests[0][1]["Accept-Encoding"] == "identity"


def test_what_is_there_is_verified_and_not_fetched_again(server: FileServer, tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    found = fetch(remote(server.url("/a")), tmp_path, Silent())
    assert (found.url, found.digests["sha256"], server.requests) == (None, SHA256, [])
    (tmp_path / "a.tar").write_bytes(OTHER)
    with pytest.raises(DownloadError, match=rf"a\.tar': wrong checksum: sha256 expected {SHA256}, got .*; delete it"):
        fetch(remote(server.url("/a")), tmp_path, Silent())
    assert (tmp_path / "a.tar").read_bytes() == OTHER, "it may be the user's own"


@pytest.mark.parametrize("known", [True, False], ids=["checksum", "no-checksum"])
def test_dropped_connections_are_resumed_where_they_ended(
    server: FileServer, tmp_path: Path, pauses: list[float], known: bool
):
    url = server.serve("/a", CONTENT, drops=[1_000_000, 500_000, 0])
    found = fetch(remote(url, digests=None if known else {}), tmp_path, Silent())
    assert found.path.read_bytes() == CONTENT
    assert found.verified is known
    assert len(pauses) == 3
    asked = [int(text[6:-1]) for text in server.ranges()[1:] if text]
    assert asked == sorted(asked)
    assert len(asked) == 3
    assert 800_000 < asked[0] <= 1_000_000
    assert asked[1] > 1_200_000
    assert server.requests[1][1]["If-Range"] == '"one"'


def test_a_later_process_goes_on_where_the_first_was_killed(server: FileServer, tmp_path: Path, pauses: list[float]):
    url = server.serve("/a", CONTENT, drops=[2_000_000])
    monkey = pytest.MonkeyPatch()
    monkey.setattr(module, "MAX_TRIES", 1)
    with pytest.raises(DownloadError, match=r"the connection (broke|ended)"):
        fetch(remote(url, digests={}), tmp_path, Silent())
    monkey.undo()
    assert_only(tmp_path, "a.tar.part", "a.tar.part.json")
    size = (tmp_path / "a.tar.part").stat().st_size
    assert fetch(remote(url, digests={}), tmp_path, Silent()).path.read_bytes() == CONTENT
    assert server.ranges() == [None, f"bytes={size}-"]


@pytest.mark.parametrize("checks_if_range", [True, False])
def test_a_file_that_changed_between_requests_is_fetched_anew(
    server: FileServer, tmp_path: Path, pauses: list[float], checks_if_range: bool
):
    """Also from a server that honours Range but not If-Range."""
    url = server.serve("/a", OTHER, drops=[2_000_000], checks_if_range=checks_if_range)

    def change(_: float) -> None:
        server.files["/a"].content, server.files["/a"].etag = CONTENT, '"two"'

    monkey = pytest.MonkeyPatch()
    monkey.setattr(module.time, "sleep", change)
    found = fetch(remote(url, digests={}), tmp_path, Silent())
    monkey.undo()
    assert found.path.read_bytes() == CONTENT, "no mixture of both"


def test_nothing_is_resumed_without_a_validator_or_a_checksum(server: FileServer, tmp_path: Path, pauses: list[float]):
    url = server.serve("/a", CONTENT, etag=None, drops=[2_000_000])
    assert fetch(remote(url, digests={}), tmp_path, Silent()).path.read_bytes() == CONTENT
    assert server.ranges() == [None, None]


def test_a_mixture_of_versions_is_noticed_by_its_checksum(server: FileServer, tmp_path: Path, pauses: list[float]):
    url = server.serve("/a", CONTENT, etag=None)
    (tmp_path / "a.tar.part").write_bytes(OTHER[:1_000_000])
    assert fetch(remote(url), tmp_path, Silent()).path.read_bytes() == CONTENT
    assert server.ranges() == ["bytes=1000000-", None]


def test_a_server_without_range_starts_over(server: FileServer, tmp_path: Path, pauses: list[float]):
    url = server.serve("/a", CONTENT, ranges=False, drops=[2_000_000])
    assert fetch(remote(url), tmp_path, Silent()).path.read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_part_that_is_whole_already_needs_no_bytes(server: FileServer, tmp_path: Path):
    """Killed between the last byte and the new name."""
    url = server.serve("/a", CONTENT)
    (tmp_path / "a.tar.part").write_bytes(CONTENT)
    assert fetch(remote(url), tmp_path, Silent()).path.read_bytes() == CONTENT
    assert_only(tmp_path, "a.tar")


def test_a_part_that_is_too_long_starts_over(server: FileServer, tmp_path: Path, pauses: list[float]):
    url = server.serve("/a", CONTENT)
    (tmp_path / "a.tar.part").write_bytes(CONTENT + b"more")
    assert fetch(remote(url), tmp_path, Silent()).path.read_bytes() == CONTENT


@pytest.mark.parametrize("wrong", [len(CONTENT) + 1000, len(CONTENT) - 1000])
def test_a_lie_about_the_length_is_an_error(server: FileServer, tmp_path: Path, pauses: list[float], wrong: int):
    url = server.serve("/a", CONTENT, claims=wrong, ranges=False)
    with pytest.raises(DownloadError, match=r"the connection (broke|ended)|wrong checksum"):
        fetch(remote(url), tmp_path, Silent())
    assert not (tmp_path / "a.tar").exists()


def test_fewer_bytes_than_the_whole_file_are_not_the_end(server: FileServer, tmp_path: Path, pauses: list[float]):
    """An answer that is complete in itself but ends before the size that it told."""
    url = server.serve("/a", CONTENT, headers={"Content-Range": "bytes 1000-3999999/4000000"})
    (tmp_path / "a.tar.part").write_bytes(CONTENT[:1000])
    assert fetch(remote(url), tmp_path, Silent()).path.read_bytes() == CONTENT
    assert len(pauses) == 1


def test_a_wrong_file_is_removed_and_told_with_both_checksums(server: FileServer, tmp_path: Path, pauses: list[float]):
    url = server.serve("/a", OTHER)
    got = hashlib.sha256(OTHER).hexdigest()
    with pytest.raises(DownloadError) as caught:
        fetch(remote(url), tmp_path, Silent())
    assert f"wrong checksum: sha256 expected {SHA256}, got {got}" in str(caught.value)
    assert str(caught.value).endswith("; get it by hand")
    assert len(server.requests) == 2, "once more, as it may have been the way"
    assert_only(tmp_path)


def test_a_mirror_is_asked_when_the_first_is_wrong(server: FileServer, tmp_path: Path, pauses: list[float]):
    wrong, right = server.serve("/wrong", OTHER), server.serve("/right", CONTENT)
    found = fetch(remote(wrong, right), tmp_path, Silent())
    assert (found.url, found.path.read_bytes()) == (right, CONTENT)
    assert [path for path, _ in server.requests] == ["/wrong", "/right"]


def test_a_mirror_goes_on_with_what_the_first_gave(server: FileServer, tmp_path: Path, pauses: list[float]):
    first = server.serve("/first", CONTENT, drops=[1_000_000])
    second = server.serve("/second", CONTENT)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(module.time, "sleep", lambda _: server.files.pop("/first", None))
    found = fetch(remote(first, second), tmp_path, Silent())
    monkey.undo()
    assert found.path.read_bytes() == CONTENT
    assert [path for path, _ in server.requests] == ["/first", "/first", "/second"]
    assert server.ranges()[2] is not None


def test_without_a_checksum_mirrors_are_not_mixed(server: FileServer, tmp_path: Path, pauses: list[float]):
    first, second = server.serve("/first", OTHER, drops=[1_000_000]), server.serve("/second", CONTENT)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(module.time, "sleep", lambda _: server.files.pop("/first", None))
    assert fetch(remote(first, second, digests={}), tmp_path, Silent()).path.read_bytes() == CONTENT
    monkey.undo()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_what_will_not_pass_is_not_retried(server: FileServer, tmp_path: Path, pauses: list[float], status: int):
    url = server.serve("/a", CONTENT, statuses=[(status, {})] * 9)
    with pytest.raises(DownloadError, match=rf"127\.0\.0\.1:\d+/a: HTTP status {status}"):
        fetch(remote(url), tmp_path, Silent())
    assert (len(server.requests), pauses) == (1, [])


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
def test_what_may_pass_is_retried(server: FileServer, tmp_path: Path, pauses: list[float], status: int):
    url = server.serve("/a", CONTENT, statuses=[(status, {})] * 2)
    assert fetch(remote(url), tmp_path, Silent()).path.read_bytes() == CONTENT
    assert len(pauses) == 2


def test_tries_are_bounded_and_pauses_grow(server: FileServer, tmp_path: Path, pauses: list[float]):
    url = server.serve("/a", CONTENT, statuses=[(503, {})] * 99)
    with pytest.raises(DownloadError, match=rf"HTTP status 503 \(tried {MAX_TRIES} times\)"):
        fetch(remote(url), tmp_path, Silent())
    assert len(server.requests) == MAX_TRIES
    assert all(2**n / 2 <= pause <= 2**n for n, pause in enumerate(pauses, start=1))


@pytest.mark.parametrize(("after", "expected"), [("7", 7.0), ("999999", 60.0)])
def test_retry_after_is_honoured_within_bounds(
    server: FileServer, tmp_path: Path, pauses: list[float], after: str, expected: float
):
    url = server.serve("/a", CONTENT, statuses=[(429, {"Retry-After": after})])
    fetch(remote(url), tmp_path, Silent())
    assert pauses == [expected]


def test_many_drops_are_survived_while_the_file_grows(
    server: FileServer, tmp_path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "GAIN_BYTES", 1000)
    url = server.serve("/a", CONTENT, drops=[150_000] * 40)
    assert fetch(remote(url), tmp_path, Silent()).path.read_bytes() == CONTENT
    assert len(pauses) > 2 * MAX_TRIES


def test_more_bytes_than_expected_are_refused_before_they_are_written(server: FileServer, tmp_path: Path):
    url = server.serve("/a", CONTENT)
    with pytest.raises(DownloadError, match=r"the server has 0\.0 GB, at most 0\.0 are expected"):
        fetch(remote(url, max_bytes=1000), tmp_path, Silent())
    url = server.serve("/b", CONTENT, chunked=True)
    with pytest.raises(DownloadError, match="the server sends more than 500000 bytes"):
        fetch(remote(url, max_bytes=500_000), tmp_path, Silent())
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1000


def test_a_chunked_answer_is_whole_or_not(server: FileServer, tmp_path: Path, pauses: list[float]):
    url = server.serve("/a", CONTENT, chunked=True)
    assert fetch(remote(url, digests={}), tmp_path, Silent()).path.read_bytes() == CONTENT


def test_an_answer_of_unknown_length_needs_a_checksum(server: FileServer, tmp_path: Path):
    url = server.serve("/a", CONTENT, says_length=False)
    with pytest.raises(DownloadError, match="does not say how large it is, and there is no checksum"):
        fetch(remote(url, digests={}), tmp_path, Silent())
    assert fetch(remote(url), tmp_path, Silent()).path.read_bytes() == CONTENT


def test_a_compressed_answer_is_refused(server: FileServer, tmp_path: Path):
    url = server.serve("/a", gzip.compress(CONTENT), headers={"Content-Encoding": "gzip"})
    with pytest.raises(DownloadError, match="the server sends it compressed"):
        fetch(remote(url), tmp_path, Silent())


@pytest.mark.parametrize("where", ["file:///etc/passwd", "ftp://127.0.0.1/a", "http://[bad", "http://a..b:x/"])
def test_redirects_lead_to_http_only(server: FileServer, tmp_path: Path, where: str):
    url = server.serve("/a", CONTENT, statuses=[(302, {"Location": where})])
    with pytest.raises(DownloadError, match=r"leads to what is no http or https address|no network here"):
        fetch(remote(url), tmp_path, Silent())
    assert_only(tmp_path)


@pytest.mark.parametrize("status", [206, 416])
def test_an_answer_to_what_was_not_asked(server: FileServer, tmp_path: Path, pauses: list[float], status: int):
    url = server.serve("/a", CONTENT, statuses=[(status, {})])
    assert fetch(remote(url), tmp_path / "new", Silent()).path.read_bytes() == CONTENT
    assert len(pauses) == 1


def test_redirects_are_followed_but_not_for_ever(server: FileServer, tmp_path: Path):
    there = server.serve("/there", CONTENT)
    url = server.serve("/a", b"", statuses=[(302, {"Location": there})])
    assert fetch(remote(url), tmp_path, Silent()).path.read_bytes() == CONTENT
    url = server.serve("/loop", b"", statuses=[(302, {"Location": "/loop"})] * 99)
    with pytest.raises(DownloadError, match="redirects more than 10 times"):
        fetch(remote(url), tmp_path / "new", Silent())


def test_a_secure_address_may_not_lead_to_an_open_one_without_a_checksum(tmp_path: Path):
    answer, hop = requests.Response(), requests.Response()
    answer.status_code, answer.url, hop.url = 200, "http://host/a", "https://host/a"
    answer.history = [hop]
    with pytest.raises(Exception, match="redirects from https to http, and there is no checksum"):
        check_answer(answer, "https://host/a", has_checksum=False)
    check_answer(answer, "https://host/a", has_checksum=True)


def test_no_network_is_told_at_once(tmp_path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch):
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(DownloadError) as caught:
        fetch(remote("https://me:secret@host.invalid:8443/a?token=secret"), tmp_path, Silent())
    assert str(caught.value) == (
        "a.tar: cannot be fetched: https://host.invalid:8443/a: no network here: its name cannot be resolved; "
        "get it by hand"
    )
    assert pauses == []


def test_a_refused_connection_is_told_at_once(tmp_path: Path, pauses: list[float]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(DownloadError, match="no network here, or not to there: no connection"):
            fetch(remote(f"http://127.0.0.1:{taken.getsockname()[1]}/a"), tmp_path, Silent())
    assert pauses == []


def test_proxies_of_the_environment_are_used(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server.serve("http://host.invalid/a", CONTENT)
    monkeypatch.setenv("http_proxy", server.url(""))
    assert fetch(remote("http://host.invalid/a"), tmp_path, Silent()).path.read_bytes() == CONTENT
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="the proxy named in HTTPS_PROXY or HTTP_PROXY does not let it through"):
        fetch(remote("http://host.invalid/a"), tmp_path / "new", Silent())


def test_too_little_space_is_known_before_the_first_byte(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url = server.serve("/a", CONTENT)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match=r"a\.tar\.part': needs 0\.0 GB, 0\.0 are free; free space"):
        fetch(remote(url), tmp_path, Silent())


def test_a_disk_that_fills_up_is_told(server: FileServer, mount: Callable[[str], Path], monkeypatch):
    folder = mount("size=1m")
    url = server.serve("/a", CONTENT)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    with pytest.raises(OutputError, match="No space left on device"):
        fetch(remote(url), folder, Silent())


def test_a_link_in_the_way_is_not_written_through(server: FileServer, tmp_path: Path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "a.tar.part").symlink_to(precious)
    with pytest.raises(DownloadError, match="is a link"):
        fetch(remote(server.serve("/a", CONTENT)), tmp_path, Silent())
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("state", ["", "[1]", '{"url": 3}', '{"url": "x", "validator": "y"}'])
def test_a_broken_note_about_the_part_costs_nothing_but_time(server: FileServer, tmp_path: Path, state: str):
    url = server.serve("/a", CONTENT)
    (tmp_path / "a.tar.part").write_bytes(CONTENT[:1000])
    (tmp_path / "a.tar.part.json").write_text(state)
    assert fetch(remote(url, digests={}), tmp_path, Silent()).path.read_bytes() == CONTENT


def test_no_secret_of_an_address_is_kept(server: FileServer, tmp_path: Path, pauses: list[float]):
    url = server.serve("/a", CONTENT, drops=[1_000_000]) + "?token=secret"
    notes: list[str] = []
    monkey = pytest.MonkeyPatch()
    monkey.setattr(module.time, "sleep", lambda _: notes.append((tmp_path / "a.tar.part.json").read_text()))
    found = fetch(remote(url), tmp_path, Silent())
    monkey.undo()
    assert found.url == server.url("/a")
    assert len(notes) == 1
    assert "secret" not in notes[0]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("ctseg.sources.fetch.fcntl.flock", no_locks)
    expected = r"this file system has no locks \(No locks available\); work in a folder on another one, .* --data"
    with pytest.raises(DownloadError, match=expected), locked(tmp_path / "a"):
        pytest.fail("it went on without")
    assert_only(tmp_path)


def test_one_process_at_a_time(tmp_path: Path):
    refused = pytest.raises(DownloadError, match="another ctseg is making it; wait")
    with locked(tmp_path / "a"), refused, locked(tmp_path / "a"):
        pass
    with locked(tmp_path / "a"):
        pass
    assert_only(tmp_path)


def test_progress_tells_pace_and_retries(server: FileServer, tmp_path: Path, pauses: list[float], capsys):
    url = server.serve("/a", CONTENT, drops=[2_000_000])
    fetch(remote(url), tmp_path, PlainProgress(sys.stderr, interval_seconds=0))
    told = capsys.readouterr().err
    assert "fetching a.tar, MB 0/3" in told
    assert "trying again in" in told
    assert "fetching a.tar from 2, MB" in told
    assert "MB/s" in told
    assert "checking a.tar" in told


KILLED = """
import sys
from pathlib import Path
from ctseg.progress import Silent
from ctseg.sources.fetch import Remote, fetch
url, digest, folder = sys.argv[1:]
digests = {"sha256": digest} if digest else {}
fetch(Remote(name="a.tar", urls=(url,), digests=digests, max_bytes=10**7), Path(folder), Silent())
"""


@pytest.mark.parametrize("known", [True, False], ids=["checksum", "no-checksum"])
def test_killed_again_and_again_it_ends_complete(server: FileServer, tmp_path: Path, known: bool):
    url = server.serve("/a", CONTENT, bytes_per_second=6_000_000)
    command = [sys.executable, "-c", KILLED, url, SHA256 if known else "", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    part, sizes = tmp_path / "a.tar.part", [0]
    for more in (400_000, 500_000, 600_000):
        process = subprocess.Popen(command, env=environment)
        deadline = time.monotonic() + 20
        while (part.stat().st_size if part.exists() else 0) < sizes[-1] + more and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        process.wait()
        sizes.append(part.stat().st_size)
    assert sizes == sorted(sizes)
    subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "a.tar").read_bytes() == CONTENT
    assert_only(tmp_path, "a.tar")
    asked = [int(text[6:-1]) for text in server.ranges()[1:] if text]
    assert asked == sizes[1:], "each went on where the one before was killed"
