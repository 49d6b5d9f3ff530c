"""Copies of what a run reads on each node's own disk. It stands alone so that no loader knows of nodes."""

import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

from alignscale.choices import ConfigError
from alignscale.config import TrainConfig


def sources(config: TrainConfig) -> list[Path]:
    """What the run reads: folders of images, archives or shards, FFCV files, and a cache that is named."""
    data = config.data
    places = [getattr(data, name, "") for name in ("root", "path", "test_path")] + [config.jacobian.dir]
    for option in ("urls", "test_urls"):
        shards = str(getattr(data, option, "")).partition("::")[0].removeprefix("file://")
        places += [str(Path(shards).parent)] if shards and "://" not in shards else []
    found = [Path(place).expanduser().absolute() for place in places if place]
    return [path for path in dict.fromkeys(found) if path.exists()]


def copy_of(source: Path, local: Path) -> Path:
    """Where ``stage`` keeps its copy of a file or folder."""
    return local / "alignscale" / str(source).strip("/").replace("/", "-")


def stage(config: TrainConfig, local: str, job: str) -> None:
    """Copy ``sources`` below ``local``, once on each node, and have this process read them from there.

    local: may hold ~ and variables of the job's environment on the node, such as $SLURM_JOB_ID.

    The run stays the same run: its configuration names the shared folders. A copy that is there is made again where
    a file has another size or time than the one that it was copied from. job: whose ranks compare once on each node.
    Raises ConfigError where there is no room, or no such variable.
    """
    place = Path(os.path.expandvars(local)).expanduser()
    if "$" in str(place):
        raise ConfigError(
            f"cluster.stage={local}: expected variables that the node has, found no value for those left in {place}; "
            "set them in cluster.setup, or give a folder"
        )
    copies = {}
    for source in sources(config):
        copy = copy_of(source, place)
        try:
            copy_once(source, copy, job)
        except OSError as problem:
            raise ConfigError(
                f"cluster.stage={local}: expected a disk with room for {source}, found: {problem}; free some, or "
                "leave cluster.stage out"
            ) from problem
        copies[str(source)] = str(copy)
    os.environ["ALIGNSCALE_STAGED"] = json.dumps(copies)


def copy_once(source: Path, copy: Path, job: str) -> None:
    """Copy a file or folder unless it is there unchanged; whole or not at all, by one process of a job and machine."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with copy.with_name(f"{copy.name}.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first rank of a node copies, the others wait for it
        lock.seek(0)
        if copy.exists() and lock.read() == job:  # one listing of a large folder, not one for each rank
            return
        if not copy.exists() or _files(copy) != _files(source):
            _replace(copy, source)
        lock.truncate(0)
        lock.write(job)


def _replace(copy: Path, source: Path) -> None:
    _remove(copy)  # first, as there may be no room for two
    partial = copy.with_name(f"{copy.name}.partial")
    _remove(partial)
    try:
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, partial)
        partial.rename(copy)
    finally:
        _remove(partial)
    print(f"staged {source} to {copy}", file=sys.stderr, flush=True)


def _files(path: Path) -> dict[str, tuple[int, int]]:
    """Size in bytes and time of change in seconds of every file, which a copy keeps."""
    found = path.rglob("*") if path.is_dir() else [path]
    files = ((one.relative_to(path), one.stat()) for one in found if one.is_file())
    return {str(name): (about.st_size, int(about.st_mtime)) for name, about in files}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
