"""Claims about the cache of remote shards that the ranks of a machine share."""

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from launches import ROOT
from stream_cases import ALL, batches, cached, config, same, server

from alignscale.data import workers
from alignscale.data.cache import Cache
from alignscale.data.examples import DataError
from alignscale.data.remote import Remote


def make(folder: Path, count: int = 4) -> list[int]:
    """Files of 1000 bytes each."""
    for number in range(count):
        (folder / f"{number}.tar").write_bytes(bytes([number]) * 1000)
    return [1000] * count


def read(cache: Cache, url: str, size: int = 1000) -> bytes:
    handle = cache.opened(url, size)
    content = os.pread(handle, 2000, 0)
    os.close(handle)
    return content


def test_a_cache_keeps_to_its_limit_and_lets_the_longest_unused_go(tmp_path: Path) -> None:
    make(tmp_path)
    with server(tmp_path) as (url, faults):
        cache = Cache(str(tmp_path / "cache"), 2500, Remote(0, 5.0))
        (tmp_path / "cache/a-folder").mkdir(parents=True)  # somebody's own
        (tmp_path / "cache/my-notes.partial").write_bytes(bytes(3000))
        held = cache.opened(f"{url}/0.tar", 1000)
        for number in (1, 0, 2):
            assert read(cache, f"{url}/{number}.tar") == bytes([number]) * 1000
        assert cached(tmp_path / "cache") == ["0.tar", "2.tar"]
        assert len(faults.asked) == 3
        read(cache, f"{url}/3.tar")
        assert cached(tmp_path / "cache") == ["2.tar", "3.tar"]
        assert {"a-folder", "my-notes.partial"} <= {path.name for path in (tmp_path / "cache").iterdir()}
        assert os.pread(held, 2000, 0) == bytes(1000)  # who has it open still reads it
        os.close(held)
        with pytest.raises(DataError, match=r"expected at most data\.cache_gib="):
            cache.opened(f"{url}/0.tar", 2501)


def test_a_download_that_breaks_off_leaves_nothing_and_a_part_of_one_is_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path)
    monkeypatch.setattr("alignscale.data.remote.PIECE", 100)
    with server(tmp_path) as (url, faults):
        cache = Cache(str(tmp_path / "cache"), 2500, Remote(1, 5.0))
        faults.add("dropped", "0.tar")
        with pytest.raises(DataError, match=r"0\.tar: expected bytes from the server, found: .* \(tried 2 times"):
            cache.opened(f"{url}/0.tar", 1000)
        assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")]
        faults.add("dropped", "0.tar", 1)
        assert read(cache, f"{url}/0.tar") == bytes(1000)
        assert faults.asked[-1] == ("/0.tar", "bytes=500-")  # it went on where it was
        half = tmp_path / f"cache/.{cache._path(f'{url}/1.tar').name}.1000.partial"
        half.write_bytes(b"half")  # of a process that was killed
        read(cache, f"{url}/2.tar")
        assert not half.exists()
        (tmp_path / "0.tar").write_bytes(b"x" * 900)  # another version, by its manifest
        assert read(cache, f"{url}/0.tar", 900) == b"x" * 900


def test_what_a_killed_process_left_of_a_shard_takes_no_room_from_others(tmp_path: Path) -> None:
    make(tmp_path)
    with server(tmp_path) as (url, faults):
        cache = Cache(str(tmp_path / "cache"), 2500, Remote(0, 5.0))
        read(cache, f"{url}/0.tar")
        (tmp_path / f"cache/.{cache._path(f'{url}/1.tar').name}.1000.partial").write_bytes(b"half")
        assert [read(cache, f"{url}/{number}.tar")[0] for number in (1, 0)] == [1, 0]
        assert len(faults.asked) == 2


def test_a_cache_on_a_full_disk_is_said_to_be_that(tmp_path: Path) -> None:
    (tmp_path / "big.tar").write_bytes(bytes(2**20))
    (tmp_path / "cache").mkdir()
    with server(tmp_path) as (url, faults):
        fetch = f"Cache({str(tmp_path / 'cache')!r}, 2**21, Remote(3, 5.0)).opened({url + '/big.tar'!r}, 2**20)"
        code = f"from alignscale.data.cache import Cache; from alignscale.data.remote import Remote; {fetch}"
        disk = f'mount -t tmpfs -o size=200k none {tmp_path}/cache; exec {sys.executable} -c "$0"'
        done = subprocess.run(
            ["unshare", "-Urm", "sh", "-c", disk, code], cwd=ROOT, capture_output=True, text=True, check=False
        )
        wanted = (
            f"DataError: data.cache={tmp_path}/cache: expected a folder that can hold {url}/big.tar, found: No space"
        )
        assert wanted in done.stderr, done.stderr
        assert len(faults.asked) == 1  # no other try would have more room


def test_a_file_that_changed_in_the_cache_is_fetched_again(tmp_path: Path) -> None:
    expected = batches(config(tmp_path), **ALL)
    with server(tmp_path) as (url, _):
        data = config(url, cache=str(tmp_path / "cache"), workers=0)
        assert same(batches(data, **ALL), expected)
        for path in (tmp_path / "cache").glob("*.tar"):
            path.write_bytes(bytes(path.stat().st_size))
        assert same(batches(data, **ALL), expected)


def test_processes_share_a_cache_and_download_each_shard_once(tmp_path: Path) -> None:
    make(tmp_path)
    with server(tmp_path) as (url, faults):
        cache = Cache(str(tmp_path / "cache"), 10**6, Remote(0, 5.0))
        jobs = [number for number in range(4) for _ in range(3)]  # the same one for three processes at a time
        found = workers.results(lambda job, _: list(read(cache, f"{url}/{job}.tar")[:3]), jobs, 3, 1, 0)
        assert [content for content, _ in found] == [[job] * 3 for job in jobs]
        assert len(faults.asked) == 4


def test_a_cache_waits_for_the_process_that_downloads(tmp_path: Path) -> None:
    make(tmp_path)
    with server(tmp_path) as (url, faults):
        cache = Cache(str(tmp_path / "cache"), 2500, Remote(0, 5.0))
        path = cache._path(f"{url}/0.tar")
        path.parent.mkdir()
        with (path.parent / f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found: list[bytes] = []
            waiting = threading.Thread(target=lambda: found.append(read(cache, f"{url}/0.tar")))
            waiting.start()
            waiting.join(0.3)
            assert waiting.is_alive()
            assert not faults.asked
            path.write_bytes(b"whole" * 200)
        waiting.join()
        assert found == [b"whole" * 200]


def test_a_cache_that_cannot_be_written_is_an_error_with_the_option(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"data\.cache=.*: expected a folder that can hold http://x/0\.tar, found"):
        Cache(str(tmp_path / "cache"), 2500, Remote(0, 5.0)).opened("http://x/0.tar", 10)
