"""CIFAR-10, CIFAR-100, MNIST and KMNIST, in the files that their authors publish.

They stand alone because the files are foreign: each is read once, compared with its published checksum, and taken
apart without running anything that it holds. Names and checksums are torchvision's. Nothing is ever downloaded.
"""

import gzip
import hashlib
import io
import math
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alignscale.choices import ArchiveConfig
from alignscale.data.examples import DataError, Examples
from alignscale.data.torchvision import datasets
from alignscale.files import staged

Pixels = NDArray[np.uint8]
PIXELS = 3 * 32 * 32
"""Of a CIFAR image: a row holds its red, green and blue plane one after the other."""

_REMEDY = "get the published file again, or write your own as docs/data.md says"


def _damaged(path: Path, expected_and_found: str) -> DataError:
    return DataError(f"{path}: expected {expected_and_found}; {_REMEDY}")


def archive(config: ArchiveConfig) -> tuple[Examples, Examples]:
    """Training and test examples: images uint8 (N, 3, 32, 32) or (N, 1, 28, 28), in the order of the files.

    Raises DataError for a file that is missing, not the published one (with ``verify``), damaged or in another format.
    """
    published = getattr(datasets(), config.name.upper())
    read = _cifar if config.name.startswith("cifar") else _mnist
    train, test = (_examples(config, split, *read(config, published, split)) for split in ("train", "test"))
    return train, test


def _examples(config: ArchiveConfig, split: str, images: Pixels, labels: list[int], classes: int) -> Examples:
    if not labels:
        raise DataError(f"{config.root}: expected at least one {split} example of {config.name}, found none; {_REMEDY}")
    return Examples.whole(torch.from_numpy(images), torch.tensor(labels), classes, f"{config.name}-{split}")


def _cifar(config: ArchiveConfig, published: Any, split: str) -> tuple[Pixels, list[int], int]:
    key, classes = ("fine_labels", 100) if config.name == "cifar100" else ("labels", 10)
    images, labels = [], []
    for name, checksum in getattr(published, f"{split}_list"):
        path, content = _read(config, published.base_folder, name, checksum, published.filename)
        batch = _unpickled(path, content)
        rows, numbers = batch.get("data"), batch.get(key)
        if not isinstance(rows, Array) or not isinstance(numbers, list):
            found = ", ".join(f"{name}: {type(value).__name__}" for name, value in batch.items()) or "nothing"
            raise _damaged(path, f"data: Array and {key}: list in its dict, found {found}")
        images.append(rows.pixels(path))
        labels += _checked(path, numbers, len(images[-1]), classes)
    return np.concatenate(images).reshape(-1, 3, 32, 32), labels, classes


def _mnist(config: ArchiveConfig, published: Any, split: str) -> tuple[Pixels, list[int], int]:
    files = published.resources[:2] if split == "train" else published.resources[2:]
    folder = f"{published.__name__}/raw"
    (path, pixels), (label_path, numbers) = (_read(config, folder, *file) for file in files)
    images = _idx(path, pixels, 3)
    if images.shape[1:] != (28, 28):
        raise _damaged(path, f"images of (28, 28), found {images.shape[1:]}")
    labels = _checked(label_path, _idx(label_path, numbers, 1).tolist(), len(images), 10)
    return images[:, None].copy(), labels, 10


def _checked(path: Path, labels: list[Any], images: int, classes: int) -> list[int]:
    if len(labels) != images:
        raise _damaged(path, f"{images} labels, one for each image, found {len(labels)}")
    for index, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < classes:
            found = f"{label!r:.40} at index {index}"
            raise _damaged(path, f"labels that are whole numbers from 0 to {classes - 1}, found {found}")
    return labels


def _read(
    config: ArchiveConfig, folder: str, name: str, checksum: str, packed: str | None = None
) -> tuple[Path, bytes]:
    """Path and content of a file in ``root/folder``, or in ``root`` where there is no such folder."""
    root = staged(config.root)
    place = root / folder if (root / folder).is_dir() else root
    path = place / name
    plain = path.with_suffix("")  # an idx file as torchvision leaves it, unpacked beside the published one
    if not config.verify and not path.exists() and plain.exists():
        path = plain
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        looked = " or ".join(str(one) for one in dict.fromkeys((root / folder / name, path)))
        remedy = f"docs/data.md says where to get it, and data.root={config.root} where it is looked for"
        if packed and (root / packed).exists():
            remedy = f"unpack {root / packed}: tar -xzf {root / packed} -C {root}"
        if path != plain and plain.exists():
            remedy = f"get it (docs/data.md): {plain.name} has no published checksum, and wants data.verify=false"
        raise DataError(f"{config.name}: expected {looked}, found no such file; {remedy}") from error
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, found: {error.strerror}; see to that first") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if config.verify and found != checksum:
        raise DataError(
            f"{path}: expected the published file, MD5 {checksum}, found MD5 {found}; get it again (docs/data.md), or "
            "set data.verify=false for files of your own in this format"
        )
    return path, content


def _idx(path: Path, content: bytes, dimensions: int) -> Pixels:
    """The bytes of an idx file in its shape, read-only: a magic number, the lengths, then the values."""
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise _damaged(path, f"a whole gzip file, found a damaged one ({error})") from error
    magic, begin = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    if content[:4] != magic or len(content) < begin:
        found = f"{len(content)} bytes that begin with {content[:4].hex() or 'nothing'}"
        wanted = f"an idx file of bytes with {dimensions} dimension(s), which begins with {magic.hex()}"
        raise _damaged(path, f"{wanted}, found {found}")
    shape = struct.unpack(f">{dimensions}I", content[4:begin])
    size, found_size = math.prod(shape), len(content) - begin
    if found_size != size:
        raise _damaged(path, f"{size} bytes after the header, which says {shape}, found {found_size}")
    return np.frombuffer(content[begin:], np.uint8).reshape(shape)


class Array:
    """What a pickle says of an array, or of its dtype, not looked into: numpy is not run on the contents of a file."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def pixels(self, path: Path) -> Pixels:
        """(N, 3072), read-only. Raises DataError, which names ``path``, for any other array."""
        try:
            _, (count, width), dtype, fortran, raw = self.state
            kind = _text(dtype.arguments[0])
            if kind == "u1" and width == PIXELS and len(raw) == count * width:
                return np.frombuffer(raw, np.uint8).reshape((count, width), order="F" if fortran else "C")
            found = f"{len(raw)} bytes as rows of {width} {kind}"
        except (AttributeError, IndexError, TypeError, ValueError):
            found = "an array of another shape"
        raise _damaged(path, f"rows of {PIXELS} uint8 as 'data', found {found}")


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> Array:
    array = Array()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


def _encode(text: Any, _: Any) -> bytes:
    return text.encode("latin1")


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): Array,
    ("numpy.core.multiarray", "_reconstruct"): Array,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}
"""All that an array of bytes names in a pickle (protocols 0 to 5), and what stands in for it."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        known = (module.replace("numpy._core.", "numpy.core."), name)  # numpy 2's name for numpy 1's
        if known not in _GLOBALS:
            raise DataError(f"{module}.{name}, which was not run")
        return _GLOBALS[known]


def _unpickled(path: Path, content: bytes) -> dict[str, Any]:
    try:
        found = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except DataError as error:
        raise _damaged(path, f"numbers and arrays alone, found {error}") from None
    except Exception as error:  # a damaged pickle may raise anything
        cause = f"{type(error).__name__}: {error}"
        raise _damaged(path, f"a whole pickle, found a damaged or other file ({cause})") from error
    if not isinstance(found, dict):
        raise _damaged(path, f"a dict, found {type(found).__name__}")
    return {_text(key): value for key, value in found.items()}
