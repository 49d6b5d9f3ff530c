"""The bytes of single examples out of tar shards, by the places that a manifest gives.

It stands alone because here a wrong byte must be noticed: shards are local files, remote ones, or remote ones in a
cache, and what is read from them is whole and has its checksum, or is an error that names shard and key. Nothing is
ever unpacked from a tar, so that no path in it is followed.
"""

import os
import threading
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from alignscale.choices import WebDatasetConfig
from alignscale.data.cache import Cache
from alignscale.data.examples import DataError
from alignscale.data.manifest import REMEDY, Manifest
from alignscale.data.remote import Remote, is_remote

OPEN = 64
"""Files that a process keeps open."""
AT_ONCE = 8
"""Remote reads that a process has under way."""


class Damaged(DataError):
    """One example cannot be used; those around it may be whole."""


class Shards:
    """Reads the examples of ``manifest``, whose shards are at ``urls``, one each."""

    def __init__(self, urls: Sequence[str], manifest: Manifest, config: WebDatasetConfig) -> None:
        self.urls, self.manifest, self.starts = list(urls), manifest, manifest.starts
        self.names = [shard.file.removesuffix(".tar") for shard in manifest.shards]
        self.remote = Remote(config.retries, config.timeout)
        self.cache = Cache(config.cache, int(config.cache_gib * 2**30), self.remote) if config.cache else None
        self.checked = config.checksums == "always" or (config.checksums == "remote" and any(map(is_remote, urls)))
        self.files: dict[str, int] = {}
        self.owner = os.getpid()
        self.pool: ThreadPoolExecutor | None = None
        self.lock = threading.Lock()

    def shard(self, place: int) -> int:
        """The index of the shard that the example at ``place`` is in."""
        return bisect_right(self.starts, place) - 1

    def what(self, place: int) -> str:
        """Shard and key of an example, for messages."""
        return f"{self.urls[self.shard(place)]}, key {self.manifest.samples.key(place)}"

    def read(self, places: Sequence[int]) -> Iterator["bytes | Damaged"]:
        """Of each place the file's bytes, or why it cannot be used. Raises DataError where a shard cannot be read."""
        if self.owner != os.getpid():  # a fork, whose descriptors and threads are its parent's
            self.files, self.owner, self.pool, self.lock = {}, os.getpid(), None, threading.Lock()
        if not any(is_remote(self.urls[self.shard(place)]) for place in places):
            return map(self._read, places)
        if self.cache:
            for shard in sorted({self.shard(place) for place in places}, key=lambda shard: hash((shard, self.owner))):
                self._file(shard)  # each process in an order of its own, so that they do not wait for one another
            return map(self._read, places)
        self.pool = self.pool or ThreadPoolExecutor(AT_ONCE)
        return self.pool.map(self._read, places)

    def _read(self, place: int) -> "bytes | Damaged":
        shard, samples = self.shard(place), self.manifest.samples
        url, start, length = self.urls[shard], int(samples.offsets[place]), int(samples.lengths[place])
        for attempt in range(self.remote.retries + 1 if is_remote(url) else 1):
            if is_remote(url) and not self.cache:
                content = self.remote.span(url, start, start + length, self.what(place))
            else:
                if attempt and self.cache:  # a flaw in the copy is none of the shard's
                    self.cache.forget(url)
                    os.close(self.files.pop(url))
                with self.lock:  # a thread of the pool may open more files than stay open
                    content = os.pread(self._file(shard), length, start)
                if len(content) < length:
                    raise DataError(
                        f"{self.what(place)}: expected {length} bytes from byte {start} on, found {len(content)}: the "
                        f"shard is cut short; copy it again, or {REMEDY}"
                    )
            found = zlib.crc32(content) if self.checked else None
            if found in (None, samples.crcs[place]):
                return content
        return Damaged(
            f"{self.what(place)}: expected the CRC-32 {samples.crcs[place]:08x} of its manifest, found {found:08x}; "
            f"copy the shard again, or {REMEDY}, or leave out up to N such images of each shard with data.skip=N"
        )

    def _file(self, shard: int) -> int:
        url = self.urls[shard]
        if url not in self.files:
            while len(self.files) >= OPEN:
                os.close(self.files.pop(next(iter(self.files))))
            try:
                size = self.manifest.shards[shard].bytes
                if self.cache and is_remote(url):
                    self.files[url] = self.cache.opened(url, size)
                else:
                    self.files[url] = os.open(url, os.O_RDONLY)
            except OSError as problem:
                raise DataError(
                    f"{url}: expected a readable shard, found: {problem.strerror}; put it back, or correct data.urls"
                ) from problem
        return self.files[url]

    def check(self) -> bool:
        """Whether all servers answer Range; every shard is there and as long as the manifest says, or DataError."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            sizes = list(pool.map(self._size, self.urls))
        for url, (size, _), shard in zip(self.urls, sizes, self.manifest.shards, strict=True):
            if size not in (None, shard.bytes):
                raise DataError(
                    f"{url}: expected {shard.bytes} bytes, as its manifest says, found {size}: the shard is cut short "
                    f"or another one; copy it again, or {REMEDY}"
                )
        return all(ranges for _, ranges in sizes)

    def _size(self, url: str) -> tuple[int | None, bool]:
        if is_remote(url):
            return self.remote.probe(url)
        try:
            return Path(url).stat().st_size, True
        except OSError as problem:
            raise DataError(
                f"{url}: expected a shard, found: {problem.strerror}; put it there, or correct data.urls"
            ) from problem
