"""Remote shards kept in a local folder of limited size, which all processes of a machine share.

It stands alone because files here come and go while others read them: a shard is downloaded under another name by one
process, which holds its lock, and renamed when it is whole; the one that was not used for longest goes first, and who
has it open still reads it.
"""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from alignscale.data.examples import DataError
from alignscale.data.remote import Remote


class Cache:
    """At most ``limit`` bytes of shards in ``folder``."""

    def __init__(self, folder: str, limit: int, remote: Remote) -> None:
        self.folder, self.limit, self.remote = Path(folder).expanduser(), limit, remote

    def opened(self, url: str, size: int) -> int:
        """A descriptor of the shard's file, which is downloaded first if it is not there. Raises DataError."""
        path = self._path(url)
        if size > self.limit:
            raise DataError(
                f"{url}: expected at most data.cache_gib={self.limit / 2**30:g}, found {size / 2**30:.3g} GiB; raise it"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                return self._used(path, size)
            with self._lock(f"{path.name}.lock"):
                with suppress(FileNotFoundError):  # whoever had the lock has made it
                    return self._used(path, size)
                self._download(url, path, size)
                return self._used(path, size)
        except OSError as problem:
            full = ", so data.cache_gib is more than it has" if problem.errno == errno.ENOSPC else ""
            raise DataError(
                f"data.cache={self.folder}: expected a folder that can hold {url}, found: {problem.strerror or problem}"
                f"{full}; free space, or choose another"
            ) from problem

    def forget(self, url: str) -> None:
        """Remove a shard whose bytes are wrong."""
        self._path(url).unlink(missing_ok=True)

    def _path(self, url: str) -> Path:
        name = Path(urlsplit(url).path).name
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"

    def _used(self, path: Path, size: int) -> int:
        handle = os.open(path, os.O_RDONLY)
        if os.fstat(handle).st_size != size:  # of an older version of the shard
            os.close(handle)
            path.unlink(missing_ok=True)
            raise FileNotFoundError(path)
        with suppress(FileNotFoundError):
            os.utime(path, ns=(time.time_ns(),) * 2)  # finer than the kernel's own clock
        return handle

    def _download(self, url: str, path: Path, size: int) -> None:
        partial = path.with_name(f".{path.name}.{size}.partial")  # the size is taken from the limit from now on
        with self._lock(".lock"):
            partial.unlink(missing_ok=True)  # a killed run's, which would count
            self._make_room(size)
            file = partial.open("w+b")
        try:
            with file:
                self.remote.download(url, file, size)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove what killed processes have left, and shards, the longest unused first, until ``size`` more fit."""
        found, total, ours = [], size, "[0-9a-f]" * 12 + "-*"  # whatever else is in the folder is somebody's own
        for path in [*self.folder.glob(ours), *self.folder.glob(f".{ours}.partial")]:
            with suppress(FileNotFoundError):
                if path.suffix == ".partial":
                    total += 0 if self._abandoned(path) else int(path.suffixes[-2][1:])
                elif path.suffix != ".lock":
                    found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total += sum(length for _, length, _ in found)
        for _, length, path in sorted(found):
            if total > self.limit:
                path.unlink(missing_ok=True)
                total -= length

    def _abandoned(self, partial: Path) -> bool:
        """Whether nobody downloads this file any more, which is then removed."""
        name = partial.name.rsplit(".", 2)[0].removeprefix(".")
        try:
            with (self.folder / f"{name}.lock").open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink(missing_ok=True)
                return True
        except BlockingIOError:
            return False

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Held by one process at a time, and given up when it ends, however that happens."""
        with (self.folder / name).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
