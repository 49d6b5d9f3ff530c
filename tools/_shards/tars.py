"""Tar shards of a source's images, and the manifest of a split.

It stands alone because of what may happen on the way: a shard is written under another name and renamed when it is
whole, with a record beside it by which a later run knows that it is; the bytes follow from the source and the settings
alone, so that what was killed and run again ends with the same files.
"""

import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import zlib
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from _shards.sources import Item, Source, ending_of, key_of, prepared
from alignscale.choices import ConfigError
from alignscale.config import difference
from alignscale.data import workers
from alignscale.data.examples import DataError
from alignscale.data.manifest import Manifest, Samples, Shard
from alignscale.data.plan import even_batches
from alignscale.files import sync, write_atomic
from alignscale.initial import Stream, permutation

RESTARTS = 3


@dataclass(frozen=True)
class Settings:
    """What the bytes of a split's shards follow from, besides the source."""

    seed: int = 0
    shard_size: int = 8716
    resize: int = 0
    quality: int = 0
    skip: bool = False


@dataclass(frozen=True)
class Job:
    """A worker's task, for ``workers.results``: shard by number."""

    source: Source
    settings: Settings
    out: Path
    split: str
    parts: Sequence[slice]
    order: Any
    done: Any

    def path(self, number: int) -> Path:
        """Of a shard."""
        return self.out / f"{self.split}-{number:06}.tar"

    def record(self, number: int) -> Path:
        """What is known of a shard that is whole."""
        return self.out / ".make_shards" / f"{self.split}-{number:06}.json"

    def __call__(self, number: int, slot: NDArray[np.uint8]) -> dict[str, Any]:
        """The record of a shard, which is made if it is not there already."""
        items = [self.source.items[place] for place in self.order[self.parts[number]].tolist()]
        kept = self._kept(number)
        if kept is None:
            try:
                kept = self._made(number, items)
            except OSError as problem:
                raise DataError(
                    f"{self.path(number)}: expected to read the source and write the shard, found: {problem.strerror} "
                    f"({problem.filename}); nothing half written is left: mend it or free space, then give the same "
                    "command, which keeps the shards that are whole"
                ) from problem
        _count(self.done, len(items) - kept.pop("counted", 0))
        return kept

    def _kept(self, number: int) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(self.record(number).read_bytes())
            if found["sha256"] == digest(self.path(number)):
                return found
        except (OSError, ValueError, KeyError):
            pass
        return None

    def _made(self, number: int, items: Sequence[Item]) -> dict[str, Any]:
        path, rows, skipped = self.path(number), [], []
        partial = path.with_name(f".{path.name}.partial")
        counted = 0
        try:
            with partial.open("wb") as file:
                with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                    for index, item in enumerate(items):
                        content = self.source.content(item)
                        try:
                            content = prepared(content, self.settings.resize, self.settings.quality)
                        except ValueError as problem:
                            skipped.append(item.name)
                            if not self.settings.skip:
                                raise DataError(
                                    f"{self.source.root or ''}/{item.name}: expected an image, found: {problem}; "
                                    "--skip leaves all such files out, and keeps what is made; or replace it, and "
                                    "choose another --out"
                                ) from problem
                            continue
                        key = key_of(self.parts[number].start + index, item.name)
                        _add(tar, f"{key}.cls", str(item.label).encode())
                        place = tar.offset + tarfile.BLOCKSIZE
                        _add(tar, f"{key}.{ending_of(content)}", content)
                        rows.append((key, item.label, place, len(content), zlib.crc32(content)))
                        if index % 16 == 15:
                            _count(self.done, 16)
                            counted += 16
                file.flush()
                os.fsync(file.fileno())
            found = {"sha256": digest(partial), "bytes": partial.stat().st_size, "rows": rows, "skipped": skipped}
            partial.replace(path)
            sync(path.parent)
            write_atomic(self.record(number), json.dumps(found).encode())
        finally:
            partial.unlink(missing_ok=True)
        return {**found, "counted": counted}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # time 0, no owner: the same bytes on every run
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _count(done: "Synchronized[int]", more: int) -> None:
    with done.get_lock():
        done.value += more


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make(source: Source, settings: Settings, out: Path, split: str, processes: int, progress: bool) -> Manifest:
    """All shards of a split and its manifest. Raises ConfigError for output of other settings, DataError."""
    order = permutation(settings.seed, Stream.SUBSET, 1, len(source.items))
    parts = even_batches(len(source.items), settings.shard_size)
    job = Job(source, settings, out, split, parts, order, multiprocessing.Value("Q", 0))
    _claim(job)
    with (
        ExitStack() as held,
        _Bar(f"{split}: {len(parts)} shards", len(source.items), job.done, progress),
        closing(workers.results(job, range(len(parts)), processes, 1, RESTARTS)) as found,
    ):
        held.callback(_sweep, job)  # when the workers have ended
        records = [record for record, _ in found]
    shards = [Shard(job.path(n).name, record["bytes"], len(record["rows"])) for n, record in enumerate(records)]
    empty = [shard.file for shard in shards if not shard.count]
    if empty:
        raise DataError(f"{out}: expected images in each shard, found none in {empty[0]}; choose a larger --shard-size")
    samples = Samples.joined([Samples.of(record["rows"]) for record in records])
    lost = set(range(len(source.classes))) - set(samples.labels.tolist())
    if lost and split == "train":
        raise DataError(
            f"{source.root}: expected an image in each class, found none that is whole in {source.classes[min(lost)]}; "
            "add some, or remove the class"
        )
    manifest = Manifest(split, source.classes, shards, samples)
    manifest.write(out / f"{split}.manifest.json")
    for name in (name for record in records for name in record["skipped"]):
        print(f"left out: {name}")
    if not settings.skip:
        return manifest
    print(f"{split}: {sum(len(record['skipped']) for record in records)} files left out, {len(manifest)} images")
    return manifest


def _claim(job: Job) -> None:
    """Raise ConfigError if the folder holds this split of another source or with other settings."""
    path = job.out / ".make_shards" / f"{job.split}.settings.json"
    new = {"source": job.source.stamp, "settings": vars(job.settings), "classes": list(job.source.classes)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        old = json.loads(path.read_bytes()) if path.exists() else None
        if old is None and list(job.out.glob(f"{job.split}-*.tar")):
            raise ConfigError(
                f"--out {job.out}: expected a folder without {job.split} shards of other origin, found some; choose "
                "another one"
            )
        if old is not None and job.settings.skip:
            old["settings"]["skip"] = True  # what was made without it has left nothing out
        if old is not None and difference(old, new):
            raise ConfigError(
                f"--out {job.out}: the {job.split} shards there were made otherwise: "
                f"{'; '.join(difference(old, new))}. Use the old settings, or another folder"
            )
        write_atomic(path, json.dumps(new).encode())
        _sweep(job)  # after a run that was killed
    except OSError as problem:
        raise DataError(
            f"--out {job.out}: expected a folder to write to, found: {problem.strerror}; choose another one"
        ) from problem


def _sweep(job: Job) -> None:
    """Remove what workers that were killed have left."""
    for left in job.out.glob(f".{job.split}-*.partial"):
        left.unlink()


class _Bar:
    """A progress bar that follows a number which other processes raise."""

    def __init__(self, text: str, total: int, done: "Synchronized[int]", shown: bool) -> None:
        self.bar, self.done, self.ended = tqdm(total=total, desc=text, unit=" images", disable=not shown), done, Event()
        self.thread = Thread(target=self._follow, daemon=True)

    def _follow(self) -> None:
        while not self.ended.wait(0.2):
            self.bar.update(self.done.value - self.bar.n)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.bar.update(self.done.value - self.bar.n)
        with suppress(OSError):
            self.bar.close()
