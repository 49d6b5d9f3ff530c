"""A safetensors file of tensors that come one after the other, so that not all have to be in memory.

It stands alone beside safetensors' own writer, which wants all of them at once.
"""

import errno
import hashlib
import json
import os
import struct
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from io import BufferedWriter
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from alignscale.files import sync


class TensorFile(AbstractContextManager["TensorFile"]):
    """The file at ``path``, which can be read after ``finish`` alone.

    How large tensors are shows when they come, so the header goes into a room that is kept for it. A reader maps the
    file, so no type may come after one of fewer bytes.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        """Of tensors with some of these names; nothing is written yet."""
        self.path = path
        self.room = 8 * (1 + sum(len(json.dumps(name)) // 8 + 25 for name in names))
        self.about: dict[str, dict[str, object]] = {}
        self.end, self.written = 0, hashlib.sha256()
        self.file: BufferedWriter | None = None

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # of what could not be written before, which was said then
            if self.file is not None:
                self.file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next one. Raises OSError."""
        own = tensor.contiguous()
        begin, self.end = self.end, self.end + own.nbytes
        kind = json.loads(save({name: own.flatten()[:0]})[8:])[name]["dtype"]
        self.about[name] = {"dtype": kind, "shape": [*own.shape], "data_offsets": [begin, self.end]}
        content = own.flatten().view(torch.uint8).numpy().data
        self._put(content)
        self.written.update(content)

    def finish(self) -> str:
        """Write the header; the SHA-256 of the file. Raises OSError where the disk gives back other bytes."""
        header = struct.pack("<Q", self.room) + json.dumps(self.about).encode().ljust(self.room)
        self._put(b"").seek(0)
        self._put(header).close()
        sync(self.path)
        with self.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is read comes from the disk
            file.seek(8 + self.room)
            if hashlib.file_digest(file, "sha256").digest() != self.written.digest():
                wrong = "expected to read back the bytes that were written, found others"
                raise OSError(errno.EIO, wrong, str(self.path))
        return checksum(self.path)

    def _put(self, content: bytes | memoryview) -> BufferedWriter:
        if self.file is None:
            self.file = self.path.open("wb")
            self.file.seek(8 + self.room)
        self.file.write(content)
        self.file.flush()
        return self.file


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
