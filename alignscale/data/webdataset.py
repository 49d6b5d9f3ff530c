"""Splits in WebDataset shards, read and decoded by worker processes while training goes on.

It stands alone because order is the plan's and not the shards': any example is read by its place, so that a batch is
the same whoever reads it, and a run goes on at any step. The library says what a pattern of shards means; its own
reading is sequential and cannot begin in the middle.
"""

import itertools
import math
import warnings
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from webdataset.shardlists import expand_urls

from alignscale.choices import ConfigError, WebDatasetConfig
from alignscale.data import decode, workers
from alignscale.data.examples import DataError, Encoding, Wanted
from alignscale.data.manifest import Manifest, place_of
from alignscale.data.plan import even_batches
from alignscale.data.remote import Remote, is_remote
from alignscale.data.shards import Damaged, Shards
from alignscale.data.streamed import Streamed
from alignscale.data.views import Crops
from alignscale.files import staged
from alignscale.initial import Stream, philox
from alignscale.types import Batch

CHUNK = 32
"""Examples that a worker is given at once."""


@dataclass(frozen=True)
class WebDataset(Streamed):
    """The examples at ``places`` (N,) of those in ``shards``, in key order."""

    config: WebDatasetConfig
    files: Shards
    labels: Tensor
    classes: int
    places: Tensor
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of the manifest's checksums and labels."""
        samples, chosen = self.files.manifest.samples, self.places.numpy()
        columns = (samples.crcs[chosen], samples.labels[chosen], chosen)
        return f"{len(self)}-" + "".join(f"{zlib.crc32(np.ascontiguousarray(one).data):08x}" for one in columns)

    @property
    def checksums(self) -> Tensor:
        """The manifest's, with the place in the data set where views depend on it."""
        sums = torch.from_numpy(self.files.manifest.samples.crcs[self.places.numpy()].astype(np.int64))
        return sums if self.config.views == 1 else sums + (self.places << 32)

    @property
    def shards(self) -> list[tuple[str, int]]:
        """By the files' names without the ending."""
        counts = np.histogram(self.places.numpy(), self.files.starts)[0].tolist() if len(self) else []
        return [(name, count) for name, count in zip(self.files.names, counts, strict=True) if count]

    def keys(self, places: Tensor) -> list[str]:
        """The shard's name and the place in its tar."""
        found = ((self.files.shard(place), place) for place in self.places[places].tolist())
        return [f"{self.files.names[shard]}/{place - self.files.starts[shard]}" for shard, place in found]

    def part(self, places: Tensor, counted: bool = True) -> "WebDataset":
        """The examples at ``places``, which keep their keys."""
        return replace(self, labels=self.labels[places], places=self.places[places], missing={})

    def batches(self, wanted: Iterable[Wanted], encoding: Encoding) -> Generator[Batch, None, None]:
        """Read ahead by the workers, chunk by chunk."""
        asked: deque[tuple[Wanted, int]] = deque()  # with the number of chunks

        def jobs() -> Iterable[tuple[list[int], int]]:
            for one in wanted:
                chunks = even_batches(max(len(one.places), 1), CHUNK)  # equal ones keep all workers busy
                asked.append((one, len(chunks)))
                yield from ((self.places[one.places[chunk]].tolist(), one.view) for chunk in chunks)

        size, restarts = CHUNK * math.prod(self.shape), self.config.worker_restarts
        with closing(workers.results(_Reader(self), jobs(), self.config.workers, size, restarts)) as found:
            for first in found:
                one, chunks = asked.popleft()
                shape = self.shape_in(one.view)
                images = torch.empty(len(one.places), *shape, dtype=torch.uint8)
                kept: list[int] = []
                start = 0
                for (count, damaged), slot in itertools.chain([first], itertools.islice(found, chunks - 1)):
                    read = torch.from_numpy(slot[: count * math.prod(shape)]).view(count, *shape)
                    images[start : start + count] = read  # the slot is written to again
                    kept += [start + place for place in range(count) if str(place) not in damaged]
                    self._note(one, start, damaged)
                    start += count
                if len(kept) < start:
                    images, one = images[kept], one._replace(places=one.places[kept])
                yield encoding.encoded(self, images, one)

    def _note(self, one: Wanted, start: int, damaged: dict[str, str]) -> None:
        """Count what is left out. Raises DataError where it is too much of a shard."""
        for place, why in damaged.items():
            (key,) = self.keys(one.places[start + int(place)][None])
            if key not in self.missing:
                self.missing[key] = why
                warnings.warn(f"left out: {why}", RuntimeWarning, stacklevel=3)
            shard = key.rpartition("/")[0]
            same = sum(other.rpartition("/")[0] == shard for other in self.missing)
            if same > self.config.skip:
                raise DataError(f"{why}; found {same} such in {shard}, of which data.skip={self.config.skip} may be")


class _Reader:
    """What a worker does: the pixels of (places, view), each (C, H, W), and which of them are damaged."""

    def __init__(self, split: WebDataset) -> None:
        self.split, options = split, split.config
        least, largest = options.scale
        self.crops = Crops((least, largest), options.flip, options.size / options.resize)
        self.transform = decode.transform_called(options.transform) if options.transform else None

    def __call__(self, job: tuple[list[int], int], slot: NDArray[np.uint8]) -> tuple[int, dict[str, str]]:
        """How many there were, and why those by number that are damaged are."""
        cv2.setNumThreads(1)  # the workers are the threads
        places, view = job
        options, files = self.split.config, self.split.files
        rows = torch.tensor(places, dtype=torch.int64)
        draws = self.crops.of(rows, view).tolist() if view else [[]] * len(places)
        damaged = {}
        shape = self.split.shape_in(view)
        images = slot[: len(places) * math.prod(shape)].reshape(len(places), *shape)
        for index, (place, content) in enumerate(zip(places, files.read(places), strict=True)):
            try:
                if isinstance(content, Damaged):
                    raise content
                pixels = self._decoded(content, place)
                top, left, high, wide, mirrored = self.crops.box(
                    draws[index], *(pixels.shape[0], pixels.shape[1]), view
                )
                pixels = decode.scaled(pixels[top : top + high, left : left + wide], shape[-1])
                pixels = pixels[:, ::-1] if mirrored else pixels
                if view and self.transform:
                    seed = int(philox((place, view, 2, int(Stream.VIEW)), 0)[0])
                    pixels = self.transform(np.ascontiguousarray(pixels), seed)
                images[index] = pixels.transpose(2, 0, 1)
            except Damaged as problem:
                if not options.skip:
                    raise
                damaged[str(index)] = str(problem)
        return len(places), damaged

    def _decoded(self, content: bytes, place: int) -> decode.Pixels:
        try:
            return decode.decode(content, self.split.config.channels)
        except ValueError as problem:
            raise Damaged(
                f"{self.split.files.what(place)}: expected a whole image, found: {problem}; replace it and make the "
                "shard again, or leave out up to N such images of each shard with data.skip=N"
            ) from problem


def webdataset(config: WebDatasetConfig) -> tuple[WebDataset, WebDataset]:
    """Training and test examples. Raises ConfigError for options, DataError for manifests and shards, that are wrong.

    Warns where a server does not answer Range, so that each read begins at the start of its shard.
    """
    if config.transform:
        decode.transform_called(config.transform)
    train = _split(config, "urls", config.urls, config.manifest)
    test = _split(config, "test_urls", config.test_urls, config.test_manifest)
    first, second = train.files.manifest.classes, test.files.manifest.classes
    if list(first) != list(second):
        raise DataError(
            f"{config.test_urls}: expected the {len(first)} classes of the training shards, found {len(second)}, "
            "or others; make both with the same classes"
        )
    return train, test


def _split(config: WebDatasetConfig, option: str, pattern: str, manifest: str) -> WebDataset:
    urls = [url.removeprefix("file://") for url in shard_urls(f"data.{option}", pattern)]
    place = manifest or place_of(pattern.removeprefix("file://"))
    remote = Remote(config.retries, config.timeout)
    read = Manifest.read(place, remote.whole) if is_remote(place) else Manifest.read(str(staged(place)))
    found = read.only([urlsplit(url).path.rpartition("/")[2] for url in urls], place)
    if not len(found):
        raise DataError(f"{place}: expected at least one example in {pattern}, found none; name other shards")
    files = Shards([url if is_remote(url) else str(staged(url)) for url in urls], found, config)
    if not files.check() and not files.cache:
        warnings.warn(
            f"data.{option}={pattern}: the server does not answer Range requests, so each image is read from its "
            "shard's beginning and what comes before it is skipped; data.cache=FOLDER reads each shard once",
            RuntimeWarning, stacklevel=2,
        )  # fmt: skip
    labels = torch.from_numpy(found.samples.labels.astype(np.int64))
    return WebDataset(config, files, labels, len(found.classes), torch.arange(len(found)))


def shard_urls(option: str, pattern: str) -> Sequence[str]:
    """The shards of a pattern, as the library expands it: braces, :: and ${WDS_...}. Raises ConfigError."""
    try:
        urls: list[Any] = expand_urls(pattern)
    except Exception as problem:
        raise ConfigError(
            f"{option}={pattern}: expected a pattern as 'a/train-{{000..146}}.tar', found: {problem}"
        ) from None
    for url in urls:
        scheme = urlsplit(url).scheme
        if scheme not in ("", "file", "http", "https") or url.startswith("pipe:"):
            raise ConfigError(f"{option}={url}: expected a file, or a URL of http or https, found {scheme}")
        if not urlsplit(url).path.endswith(".tar"):
            raise ConfigError(f"{option}={url}: expected names that end in .tar, without compression")
    names = {urlsplit(url).path.rpartition("/")[2] for url in urls}
    if len(names) < len(urls):
        raise ConfigError(f"{option}={pattern}: expected each shard's file name once, found one again")
    return urls
