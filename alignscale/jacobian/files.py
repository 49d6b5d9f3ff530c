"""Cache files: one safetensors file for each shard and view, written whole or not at all, read through a memory map.

They stand alone because the safetensors library writes tensors that are in memory at once, and a shard's Jacobians
need not fit there. The header holds a CRC-32 for each tensor.
"""

import json
import mmap
import os
import socket
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignscale.files import sync

CODES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8",
}  # fmt: skip
NO_RESERVE = 0x4000
"""Linux's MAP_NORESERVE: a private map of a file is read, and needs no memory of its own size set aside."""
NAMED = {code: dtype for dtype, code in CODES.items()}
Layout = Mapping[str, tuple[torch.dtype, Any]]
"""Name -> dtype and shape of an example's row."""


class CacheError(RuntimeError):
    """A cache of Jacobians cannot be used; the message says why and what to do."""


class Writer:
    """A file of ``rows`` examples that is filled part by part and has its name from ``close`` on.

    Raises OSError (a full disk, say), after which ``discard`` leaves nothing behind.
    """

    def __init__(self, path: Path, layout: Layout, rows: int, about: Mapping[str, str]) -> None:
        """about: goes into the header."""
        self.path, self.about = path, about
        self.partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
        self.header: dict[str, Any] = {}
        self.sums = dict.fromkeys(layout, 0)
        end = 0
        for name, (dtype, shape) in sorted(layout.items(), key=lambda item: -item[1][0].itemsize):  # keeps all aligned
            start, end = end, end + rows * dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            self.header[name] = {"dtype": CODES[dtype], "shape": [rows, *shape], "data_offsets": [start, end]}
        self.begin = len(self._head())
        self.file = self.partial.open("w+b")
        self.places = {name: self.begin + place["data_offsets"][0] for name, place in self.header.items()}

    def _head(self) -> bytes:
        sums = {f"crc32.{name}": f"{value:08x}" for name, value in self.sums.items()}
        text = json.dumps({"__metadata__": {**self.about, **sums}, **self.header}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def write(self, parts: Mapping[str, Tensor]) -> None:
        """The next examples' rows."""
        for name, part in parts.items():
            content = memoryview(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            self.sums[name] = zlib.crc32(content, self.sums[name])
            while content:
                written = os.pwrite(self.file.fileno(), content, self.places[name])
                self.places[name] += written
                content = content[written:]

    def close(self) -> None:
        """Make the file whole and give it its name. Raises CacheError where rows are missing."""
        ends = {name: self.begin + place["data_offsets"][1] for name, place in self.header.items()}
        if self.places != ends:
            raise CacheError(f"{self.path}: expected a row for each example, found fewer; mend the data, and try again")
        os.pwrite(self.file.fileno(), self._head(), 0)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.partial.replace(self.path)
        sync(self.path.parent)

    def discard(self) -> None:
        """Forget the file."""
        self.file.close()
        self.partial.unlink(missing_ok=True)


class Mapped:
    """A cache file as tensors that share memory with it: ``tensors`` and ``about``."""

    def __init__(self, path: Path, remedy: str, verify: bool) -> None:
        """Raises CacheError, which ends with ``remedy``, for a file that is missing, cut short or damaged."""
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, size)))
                raw = np.frombuffer(mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | NO_RESERVE), dtype=np.uint8)
            self.about: dict[str, str] = header.pop("__metadata__")
            end = 8 + length + max(place["data_offsets"][1] for place in header.values())
            if size != end:
                raise ValueError(f"{size} bytes in place of {end}")
            self.tensors = {name: self._tensor(raw[8 + length :], place) for name, place in header.items()}
            for name in header if verify else ():
                self._check(name)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as problem:
            found = "no file" if isinstance(problem, FileNotFoundError) else problem
            raise CacheError(f"{path}: expected a whole cache file, found: {found}; {remedy}") from problem

    @staticmethod
    def _tensor(raw: Any, place: dict[str, Any]) -> Tensor:
        start, end = place["data_offsets"]
        return torch.from_numpy(raw[start:end]).view(NAMED[place["dtype"]]).view(place["shape"])

    def _check(self, name: str) -> None:
        expected, found = self.about[f"crc32.{name}"], 0
        for part in self.tensors[name].view(torch.uint8).flatten().split(2**24):
            found = zlib.crc32(part.numpy().data, found)
        if f"{found:08x}" != expected:
            raise ValueError(f"checksum {found:08x} in place of {expected} for {name}")
