"""Files that are whole or not there: everything that a run leaves is written through these."""

import errno
import json
import os
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Replace ``path`` with ``content`` at once: readers, and a crash, see the old file or the new one.

    Raises OSError with the old file untouched and nothing left beside it; for a folder or a device too.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "expected a file or a new name, found a folder or device", str(path))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as problem:
        raise OSError(problem.errno, problem.strerror, str(path)) from problem
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


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
