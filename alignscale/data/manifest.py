"""The manifest of a split in shards: what is in which tar, where in it, and what its checksum is.

It stands alone because it is a format: written by tools/make_shards.py, read by every loader. Two files beside the
shards: ``<split>.manifest.json`` for people and programs, and ``<split>.manifest.safetensors`` with one entry of each
array an example, shard after shard, in the order of the tar. A row is an example's place within its shard.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from alignscale.choices import ConfigError
from alignscale.data.examples import DataError
from alignscale.files import write_atomic

FORMAT = 1
ARRAYS = {"labels": np.int32, "offsets": np.int64, "lengths": np.int32, "crcs": np.uint32, "key_ends": np.int64}
REMEDY = "make it again with tools/make_shards.py --index"


@dataclass(frozen=True)
class Shard:
    """A tar file, by its name without a folder; its size in bytes; how many examples are in it."""

    file: str
    bytes: int
    count: int


@dataclass(frozen=True)
class Samples:
    """Arrays (N,): of each example its label; the place, number and CRC-32 of the image's bytes in the tar; its key.

    A key is the members' name without the ending: ``keys[key_ends[n - 1] : key_ends[n]]`` in UTF-8.
    """

    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int32]
    crcs: NDArray[np.uint32]
    key_ends: NDArray[np.int64]
    keys: NDArray[np.uint8]

    @classmethod
    def of(cls, rows: Sequence[tuple[str, int, int, int, int]]) -> "Samples":
        """From (key, label, offset, length, crc) of each example."""
        names = [row[0].encode() for row in rows]
        columns = list(zip(*(row[1:] for row in rows), strict=True)) or [()] * 4
        arrays: dict[str, Any] = {
            name: np.array(column, ARRAYS[name]) for name, column in zip(ARRAYS, columns, strict=False)
        }
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return cls(**arrays, key_ends=ends, keys=np.frombuffer(b"".join(names), np.uint8))

    @classmethod
    def joined(cls, parts: Sequence["Samples"]) -> "Samples":
        """Those of several shards, one after the other."""
        starts = np.cumsum([0, *(len(part.keys) for part in parts)], dtype=np.int64)
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in (*ARRAYS, "keys")}
        ends = np.concatenate([part.key_ends + start for part, start in zip(parts, starts, strict=False)])
        return cls(**{**columns, "key_ends": ends})

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, place: int) -> str:
        """The key of the example at ``place``."""
        begin = self.key_ends[place - 1] if place else 0
        return self.keys[begin : self.key_ends[place]].tobytes().decode(errors="replace")

    def part(self, low: int, high: int) -> "Samples":
        """Those from ``low`` to before ``high``."""
        begin = self.key_ends[low - 1] if low else 0
        columns = {name: getattr(self, name)[low:high] for name in ARRAYS}
        keys = self.keys[begin : self.key_ends[high - 1] if high else 0]
        return Samples(**{**columns, "key_ends": columns["key_ends"] - begin, "keys": keys})


@dataclass(frozen=True)
class Manifest:
    """A split: its name, its classes' names by label, its shards, and all of their samples in that order."""

    split: str
    classes: Sequence[str]
    shards: Sequence[Shard]
    samples: Samples

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def starts(self) -> list[int]:
        """The place of each shard's first example, and at last the number of all."""
        return np.cumsum([0, *(shard.count for shard in self.shards)]).tolist()

    def only(self, files: Sequence[str], where: str) -> "Manifest":
        """Of the shards ``files`` alone, in that order. Raises DataError for one that is not in it."""
        known = {shard.file: index for index, shard in enumerate(self.shards)}
        strange = [file for file in files if file not in known]
        if strange:
            raise DataError(
                f"{where}: expected the shard {strange[0]} in it, found {len(known)} shards, "
                f"{min(known)} to {max(known)}; name shards that are in the manifest, or {REMEDY}"
            )
        chosen, starts = [known[file] for file in files], self.starts
        parts = [self.samples.part(starts[index], starts[index + 1]) for index in chosen]
        return Manifest(self.split, self.classes, [self.shards[index] for index in chosen], Samples.joined(parts))

    def write(self, path: Path) -> None:
        """Write ``path``, which ends in ``.manifest.json``, and the file of arrays beside it."""
        columns = {name: np.ascontiguousarray(getattr(self.samples, name)) for name in (*ARRAYS, "keys")}
        arrays = save(columns)
        beside = Path(_beside(str(path)))
        head = {
            "format": FORMAT, "split": self.split, "count": len(self), "samples": beside.name,
            "sha256": hashlib.sha256(arrays).hexdigest(), "classes": list(self.classes),
            "shards": [asdict(shard) for shard in self.shards],
        }  # fmt: skip
        write_atomic(beside, arrays)
        write_atomic(path, (json.dumps(head, indent=1) + "\n").encode())

    @classmethod
    def read(cls, place: str, fetch: Callable[[str], bytes] = lambda place: Path(place).read_bytes()) -> "Manifest":
        """The manifest at ``place``, a path or what ``fetch`` takes. Raises DataError if it is not a whole one."""
        try:
            head, arrays = fetch(place), fetch(_beside(place))
        except OSError as problem:
            raise DataError(
                f"{place}: expected the shards' manifest and its file of arrays, found: {problem.strerror or problem}; "
                "data.manifest and data.test_manifest say where they are, tools/make_shards.py --index makes them"
            ) from problem
        try:
            made = cls._parsed(json.loads(head), arrays)
        except (ValueError, KeyError, TypeError, SafetensorError) as problem:
            found = f"no {problem}" if isinstance(problem, KeyError) else " ".join(str(problem).split())
            raise DataError(f"{place}: expected a whole manifest, found: {found}; {REMEDY}") from problem
        made._check_labels(place)
        return made

    @classmethod
    def _parsed(cls, head: dict[str, Any], arrays: bytes) -> "Manifest":
        """Raises ValueError for what does not fit together."""
        if head["format"] != FORMAT:
            raise ValueError(f"format {head['format']}, not {FORMAT}")
        if hashlib.sha256(arrays).hexdigest() != head["sha256"]:
            raise ValueError(f"another {head['samples']} than it was written with")
        shards, found = [Shard(**shard) for shard in head["shards"]], load(arrays)
        wrong = [
            name for name, kind in ARRAYS.items() if found[name].dtype != kind or len(found[name]) != head["count"]
        ]
        if wrong or sum(shard.count for shard in shards) != head["count"]:
            raise ValueError(f"{', '.join(wrong) or 'shards'} of other than {head['count']} examples")
        names = [shard.file for shard in shards]
        strange = [name for name in names if not re.fullmatch(r"[^/\\\0]+", name) or name in (".", "..")]
        if strange or len(set(names)) < len(names):
            raise ValueError(f"shards that are no names of files, each once ({', '.join((strange or names)[:3])})")
        samples = Samples(**{name: found[name] for name in (*ARRAYS, "keys")})
        sizes = np.repeat([shard.bytes for shard in shards], [shard.count for shard in shards])
        if not np.all((samples.offsets >= 0) & (samples.lengths > 0) & (samples.offsets + samples.lengths <= sizes)):
            raise ValueError("an example that is not inside of its shard")
        return cls(str(head["split"]), [str(name) for name in head["classes"]], shards, samples)

    def _check_labels(self, place: str) -> None:
        labels = self.samples.labels
        outside = np.flatnonzero((labels < 0) | (labels >= len(self.classes)))
        if len(outside):
            first = int(outside[0])
            shard = self.shards[int(np.searchsorted(self.starts, first, side="right")) - 1].file
            raise DataError(
                f"{place}: expected labels from 0 to {len(self.classes) - 1}, found {labels[first]} in {shard}, key "
                f"{self.samples.key(first)} ({len(outside)} such in all); correct classes or labels, then {REMEDY}"
            )


def _beside(place: str) -> str:
    """Where the arrays of the manifest at ``place`` are."""
    split = urlsplit(place)
    if split.scheme not in ("http", "https"):  # a path, in which # and ? are letters
        return place.removesuffix(".json") + ".safetensors"
    return split._replace(path=split.path.removesuffix(".json") + ".safetensors").geturl()


def place_of(urls: str) -> str:
    """Where the manifest of shards named ``a/train-{000..146}.tar`` or ``a/train.tar`` is: a/train.manifest.json.

    Raises ConfigError where the pattern does not say it.
    """
    folder, slash, name = urls.partition("::")[0].partition("?")[0].rpartition("/")
    stem = name.partition("{")[0].removesuffix(".tar").rstrip("0123456789").rstrip("-_.")
    if "{" in folder or not stem:
        raise ConfigError(f"data.urls={urls}: expected data.manifest beside it, as its manifest is not clear from it")
    return f"{folder}{slash}{stem}.manifest.json"
