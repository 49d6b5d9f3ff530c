"""The manifest of tar shards that someone else wrote, on disk or behind HTTP.

It stands alone because it only reads: headers are followed, nothing is unpacked, and a member's name is a key and never
a path.
"""

import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from alignscale.choices import ConfigError
from alignscale.data import workers
from alignscale.data.examples import DataError
from alignscale.data.manifest import Manifest, Samples, Shard, place_of
from alignscale.data.remote import Remote, is_remote
from alignscale.data.webdataset import shard_urls

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "tif", "tiff", "img")
RETRIES, TIMEOUT = 3, 30.0
END = 512  # bytes; the last block of a tar is empty


@dataclass(frozen=True)
class _Index:
    """A worker's task: the rows of the shard with that number."""

    urls: Sequence[str]

    def __call__(self, number: int, slot: NDArray[np.uint8]) -> dict[str, Any]:
        url = self.urls[number]
        with _local(url) as path:
            rows = rows_of(path, url)
            return {"bytes": path.stat().st_size, "rows": rows}


@contextmanager
def _local(url: str) -> Iterator[Path]:
    """The shard as a file: itself, or a copy that is removed again."""
    if not is_remote(url):
        yield Path(url).expanduser()
        return
    remote = Remote(RETRIES, TIMEOUT)
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        size, _ = remote.probe(url)
        if size is None:
            file.write(remote.whole(url))
        else:
            remote.download(url, file, size)  # type: ignore[arg-type]
        file.flush()
        yield Path(file.name)


def rows_of(path: Path, url: str) -> list[tuple[str, int, int, int, int]]:
    """(key, label, offset, length, crc) of each example. Raises DataError, which names shard and key."""
    images: dict[str, tuple[int, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        size = path.stat().st_size
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                key, ending = _split(member.name)
                if ending not in (*IMAGES, "cls"):
                    continue
                if not member.isreg():
                    raise _wrong(url, key, "a regular file", f"a link or device called {member.name}")
                place, length = member.offset_data, member.size
                if place + length > size:
                    raise _cut(url, size)
                content = _at(file, place, length)
                if ending == "cls":
                    labels[key] = _label(url, key, content)
                elif key in images:
                    raise _wrong(url, key, "one image", "another one under the same key")
                elif not length:
                    raise _wrong(url, key, "an image", "an empty file")
                else:
                    images[key] = (place, length, zlib.crc32(content))
            if size < END or any(_at(file, size - END, END)):
                raise _cut(url, size)
    except tarfile.TarError as problem:
        raise DataError(
            f"{url}: expected a whole tar without compression, found: {problem}; copy it again"
        ) from problem
    except OSError as problem:
        raise DataError(f"{url}: expected a readable shard, found: {problem.strerror}; correct --index") from problem
    for key in images.keys() ^ labels.keys():
        lacks = "label (.cls)" if key in images else f"image ({', '.join(IMAGES)})"
        raise _wrong(url, key, "an image and a label (.cls)", f"no {lacks}")
    if not images:
        raise DataError(f"{url}: expected images and labels (.cls) in it, found none; name shards of WebDataset's form")
    return [(key, labels[key], *found) for key, found in images.items()]


def _at(file: Any, place: int, length: int) -> bytes:
    file.seek(place)
    content: bytes = file.read(length)
    return content


def _split(name: str) -> tuple[str, str]:
    """Key and ending, as WebDataset has them: the ending begins at the first dot of the last part of the name."""
    found = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]*)", name)
    return (found[1], found[2].lower()) if found else (name, "")


def _label(url: str, key: str, content: bytes) -> int:
    text = content.decode("ascii", "replace").strip()
    if not re.fullmatch(r"\d{1,9}", text):
        raise _wrong(url, key, "a whole number from 0 on as its label (.cls)", repr(text[:40]))
    return int(text)


def _wrong(url: str, key: str, expected: str, found: str) -> DataError:
    return DataError(f"{url}, key {key}: expected {expected}, found {found}; correct the shard")


def _cut(url: str, size: int) -> DataError:
    return DataError(f"{url}: expected a whole tar, found one that is cut short at {size} bytes; copy it again")


def index(pattern: str, out: Path | None, classes: Path | None, processes: int, progress: bool) -> Path:
    """Write the manifest of the shards that ``pattern`` names. Returns where it is.

    Raises ConfigError for the pattern, DataError for a shard or the list of classes.
    """
    urls = [url.removeprefix("file://") for url in shard_urls("--index", pattern)]
    place = place_of(pattern.removeprefix("file://"))
    if out is None and is_remote(place):
        raise ConfigError(f"--index {pattern}: expected --out, a folder for the manifest of shards that are elsewhere")
    path = Path(place).expanduser() if out is None else out / urlsplit(place).path.rpartition("/")[2]
    with closing(workers.results(_Index(urls), range(len(urls)), processes, 1, 3)) as results:
        bar = tqdm(results, "index", len(urls), unit=" shards", disable=not progress)
        found = [answer for answer, _ in bar]
    shards = [
        Shard(urlsplit(url).path.rpartition("/")[2], answer["bytes"], len(answer["rows"]))
        for url, answer in zip(urls, found, strict=True)
    ]
    samples = Samples.joined([Samples.of(answer["rows"]) for answer in found])
    names = _names(classes, int(samples.labels.max()))
    path.parent.mkdir(parents=True, exist_ok=True)
    Manifest(path.name.removesuffix(".manifest.json"), names, shards, samples).write(path)
    return path


def _names(path: Path | None, largest: int) -> list[str]:
    if path is None:
        return [str(label) for label in range(largest + 1)]
    try:
        names = path.read_text().splitlines()
    except (OSError, ValueError) as problem:
        raise ConfigError(f"--classes {path}: expected a readable file of UTF-8, found: {problem}") from problem
    if len(names) <= largest:
        raise DataError(f"--classes {path}: expected at least {largest + 1} names, one a line, found {len(names)}")
    return names
