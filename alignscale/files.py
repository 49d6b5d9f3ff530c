"""Files that are whole or not there: everything that a run leaves is written through these."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Replace ``path`` with ``content`` at once: readers, and a crash, see the old file or the new one.

    Raises OSError with the old file untouched and nothing left beside it; for a folder or a device too.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "expected a file or a new name, found a folder or device", str(path))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        sync(partial)
        partial.replace(path)
    except OSError as problem:
        raise OSError(problem.errno, problem.strerror, str(path)) from problem
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder by its ``.lock`` until the block ends, or the process. Raises BlockingIOError, naming a holder."""
    with (folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            lock.seek(0)
            raise BlockingIOError(problem.errno, lock.read().strip() or "one of an unknown process") from problem
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def sync(path: Path) -> None:
    """Make a file's content, or the renames inside a folder, survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def staged(place: str | Path) -> Path:
    """Where to read a file or folder: its copy on this machine's own disk, if the job of this process has made one."""
    path = Path(place).expanduser()
    copies: dict[str, str] = json.loads(os.environ.get("ALIGNSCALE_STAGED", "{}"))
    whole = path.absolute()
    return next((Path(copies[old], whole.relative_to(old)) for old in copies if whole.is_relative_to(old)), path)
