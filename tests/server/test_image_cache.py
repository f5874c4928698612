"""The image cache: bounded by bytes, each value made once."""

import threading
import time

from ctseg.server.cache import ByteCache


def test_the_longest_unused_goes_first() -> None:
    cache = ByteCache(100)
    for key in "abc":
        cache.get(key, lambda key=key: key, lambda _: 30)
    cache.get("a", lambda: "again", lambda _: 30)
    cache.get("d", lambda: "d", lambda _: 30)
    assert [key in cache for key in "abcd"] == [True, False, True, True]
    assert cache.num_bytes == 90
    assert cache.get("a", lambda: "again", lambda _: 30) == "a"


def test_what_is_larger_than_the_cache_is_handed_out_but_not_kept() -> None:
    cache = ByteCache(100)
    cache.get("small", lambda: 1, lambda _: 50)
    assert cache.get("large", lambda: 2, lambda _: 101) == 2
    assert "large" not in cache
    assert "small" in cache


def test_of_many_who_ask_at_once_one_makes_it_and_a_failure_is_not_kept() -> None:
    cache, made = ByteCache(100), []

    def make() -> int:
        made.append(1)
        time.sleep(0.05)
        if len(made) == 1:
            raise ValueError
        return 7

    results: list[object] = []

    def ask() -> None:
        try:
            results.append(cache.get("key", make, lambda _: 1))
        except ValueError:
            results.append("failed")

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, results)) == ["7"] * 7 + ["failed"]
    assert len(made) <= 3
