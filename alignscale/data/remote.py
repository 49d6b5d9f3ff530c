"""Bytes of files behind http and https: the whole of one, or a part of it by Range.

It stands alone because a network fails in ways that a disk does not: what is cut short, late or refused is tried again,
so many times, and then it is an error that says what was expected and what came.
"""

import errno
import os
import time
from collections.abc import Callable
from typing import BinaryIO, TypeVar
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

from alignscale.data.examples import DataError

Made = TypeVar("Made")
PIECE = 1 << 20
AGAIN = (408, 425, 429)
"""The statuses of 400 to 499 that may be others the next time."""


class _Refused(Exception):
    """An answer that will be the same the next time."""


def is_remote(place: str) -> bool:
    """Whether a place is a URL that ``Remote`` reads."""
    return urlsplit(place).scheme in ("http", "https")


class Remote:
    """Reads by HTTP, through one pool of connections a process; a proxy is taken from the environment."""

    def __init__(self, retries: int, timeout: float) -> None:
        """retries: after the first try. timeout: seconds without a byte after which a try has failed."""
        self.retries, self.timeout = retries, timeout
        self.pools: dict[tuple[int, str | None], urllib3.PoolManager] = {}

    def whole(self, url: str) -> bytes:
        """All of a file. Raises DataError."""
        return self.tried(url, lambda: self._get(url).read())

    def span(self, url: str, start: int, stop: int, what: str) -> bytes:
        """The bytes from ``start`` to before ``stop``; a server without Range is read, and skipped, from the beginning.

        what: names them in the message. Raises DataError.
        """

        def once() -> bytes:
            response = self._get(url, f"bytes={start}-{stop - 1}")
            try:
                skip = start if response.status == 200 else 0
                while skip > 0 and (piece := response.read(min(PIECE, skip))):
                    skip -= len(piece)
                content = response.read(stop - start)
            finally:
                response.close() if response.status == 200 else response.release_conn()
            if len(content) < stop - start:
                raise OSError(f"{len(content)} bytes of {stop - start}, from byte {start} on")
            return content

        return self.tried(what, once)

    def probe(self, url: str) -> tuple[int | None, bool]:
        """A file's size, if the server tells, and whether it answers Range. Raises DataError where there is none."""

        def once() -> tuple[int | None, bool]:
            response = self._get(url, "bytes=0-0")
            response.close()
            ranges = response.status == 206
            size = response.headers.get("Content-Range" if ranges else "Content-Length", "").rpartition("/")[2]
            return int(size) if size.isdecimal() else None, ranges

        return self.tried(url, once)

    def download(self, url: str, file: BinaryIO, size: int) -> None:
        """All of a file of ``size`` bytes; what was broken off goes on where it was. Raises DataError."""

        def once() -> None:
            done = file.seek(0, os.SEEK_END)
            response = self._get(url, f"bytes={done}-" if done else None)
            try:
                if response.status == 200:
                    file.truncate(done := file.seek(0))
                for piece in response.stream(PIECE):
                    file.write(piece)
                    done += len(piece)
            finally:
                response.close()
            if done != size:
                file.truncate(file.seek(0) if done > size else done)
                raise OSError(f"{done} bytes of {size}")

        self.tried(url, once)

    def tried(self, what: str, once: Callable[[], Made]) -> Made:
        """What ``once`` returns, called until it does or has failed ``retries`` + 1 times."""
        for attempt in range(self.retries + 1):
            try:
                return once()
            except _Refused as refused:
                problem: Exception = refused
                break
            except (HTTPError, OSError) as failed:
                if getattr(failed, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # of this machine, not the server
                    raise
                reason = getattr(failed, "reason", None)
                problem = reason if isinstance(reason, Exception) else failed  # without what wraps it
                if attempt < self.retries:
                    time.sleep(min(0.1 * 2 ** min(attempt, 6), 5.0))
        found = " ".join(str(problem).split()) or type(problem).__name__
        tries = f" (tried {attempt + 1} times; data.timeout={self.timeout:g} s without a byte ends one)"
        raise DataError(
            f"{what}: expected bytes from the server, found: {found}{tries * (attempt > 0)}; see that it is there and "
            "whole, and give the same command"
        )

    def _get(self, url: str, span: str | None = None, moves: int = 5) -> BaseHTTPResponse:
        """What the server answers, or who it sends on to, each by its own proxy."""
        split = urlsplit(url)
        proxy = None if proxy_bypass(split.hostname or "") else getproxies().get(split.scheme)
        pool = self.pools.get((os.getpid(), proxy))
        if pool is None:  # connections are not shared with the process that this one was forked from
            made = urllib3.ProxyManager(proxy, maxsize=16) if proxy else urllib3.PoolManager(maxsize=16)
            pool = self.pools.setdefault((os.getpid(), proxy), made)
        response = pool.request(
            "GET", url, headers={"Accept-Encoding": "identity"} | ({"Range": span} if span else {}),
            preload_content=False, timeout=self.timeout, retries=0, redirect=False,
        )  # fmt: skip
        moved = response.get_redirect_location()
        if moved and moves:
            response.close()
            return self._get(urljoin(url, moved), span, moves - 1)
        if response.status not in (200, 206):
            response.close()
            words = f"status {response.status} {response.reason or ''}".rstrip()
            raise (_Refused if 400 <= response.status < 500 and response.status not in AGAIN else OSError)(words)
        return response
