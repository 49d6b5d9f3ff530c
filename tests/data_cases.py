"""Small data sets written in the real formats: CIFAR's python batches, idx files, folders of images."""

import gzip
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from warm import PYTHON

from alignscale.choices import ArchiveConfig
from alignscale.data import load
from alignscale.data.examples import DataError, Examples

ROOT = Path(__file__).parents[1]
Pixels = NDArray[np.uint8]
Split = tuple[Pixels, list[int]]


def examples(count: int, shape: tuple[int, ...], classes: int, seed: int) -> Split:
    """Noisy images, brighter from class to class, so that something can be learned; labels go round."""
    labels = [index % classes for index in range(count)]
    noise = np.random.default_rng(seed).integers(0, 128, (count, *shape))
    step = 127 // max(classes - 1, 1)
    return (noise + step * np.array(labels).reshape(-1, *[1] * len(shape))).astype(np.uint8), labels


def splits(train: int, test: int, shape: tuple[int, ...], classes: int) -> dict[str, Split]:
    return {"train": examples(train, shape, classes, 0), "test": examples(test, shape, classes, 1)}


def pack_digits(folder: Path, *options: str) -> None:
    """Both splits of the digits, by tools/make_shards.py."""
    digits = ["--source", "digits", "--splits", "train,test", "--out", str(folder), "--quiet", *options]
    subprocess.run([PYTHON, "tools/make_shards.py", *digits], cwd=ROOT, check=True, timeout=120)


def digit_shards(folder: Path) -> list[str]:
    """The digits as one tar shard a split; the options that train on them."""
    pack_digits(folder)
    ((train,), (test,)) = (list(folder.glob(f"{split}*.tar")) for split in ("train", "test"))
    options = ["data=webdataset", "data.channels=1", "data.size=8", "data.workers=0"]
    return [*options, f"data.urls={train}", f"data.test_urls={test}"]


def _string(value: bytes) -> bytes:
    return b"U" + bytes([len(value)]) + value


def _integer(value: int) -> bytes:
    return b"K" + bytes([value]) if value < 256 else b"J" + struct.pack("<i", value)


def cifar_batch(rows: Pixels, labels: list[int], key: str = "labels") -> bytes:
    """The pickle of a batch byte by byte as Python 2 and numpy 1 wrote the published ones; rows (N, 3072)."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + _string(b"b") + b"\x87R(K\x01"
        + _integer(rows.shape[0]) + _integer(rows.shape[1]) + b"\x86cnumpy\ndtype\n" + _string(b"u1")
        + b"K\x00K\x01\x87R(K\x03" + _string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + b"T" + struct.pack("<i", rows.size) + rows.tobytes() + b"tb"
    )  # fmt: skip
    numbers = b"](" + b"".join(map(_integer, labels)) + b"e"
    name = _string(b"batch_label") + _string(b"a small batch")
    return b"\x80\x02}(" + name + _string(key.encode()) + numbers + _string(b"data") + array + b"u."


def write_cifar10(root: Path, train: int = 40, test: int = 20) -> dict[str, Split]:
    """``root/cifar-10-batches-py``, the training set in five batches; what is in it, images (N, 3, 32, 32)."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    written = splits(train, test, (3, 32, 32), 10)
    images, labels = written["train"]
    for number, part in enumerate(np.array_split(np.arange(train), 5), 1):
        batch = cifar_batch(images[part].reshape(len(part), 3072), [labels[index] for index in part])
        (folder / f"data_batch_{number}").write_bytes(batch)
    images, labels = written["test"]
    (folder / "test_batch").write_bytes(cifar_batch(images.reshape(test, 3072), labels))
    return written


def write_cifar100(root: Path, train: int = 100, test: int = 100) -> dict[str, Split]:
    """``root/cifar-100-python``; what is in it, images (N, 3, 32, 32)."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    written = splits(train, test, (3, 32, 32), 100)
    for name, (images, labels) in written.items():
        (folder / name).write_bytes(cifar_batch(images.reshape(len(images), 3072), labels, "fine_labels"))
    return written


def idx(values: Pixels) -> bytes:
    """An idx file of bytes."""
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_mnist(
    root: Path, name: str = "MNIST", train: int = 40, test: int = 20, packed: bool = True
) -> dict[str, Split]:
    """``root/<name>/raw``, as published (.gz) or unpacked; what is in it, images (N, 1, 28, 28)."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    written = splits(train, test, (1, 28, 28), 10)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = written[split]
        for kind, values in (("images-idx3", images[:, 0]), ("labels-idx1", np.array(labels, np.uint8))):
            content = idx(values)
            path = folder / f"{prefix}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return written


def write_image_folder(
    root: Path, classes: int = 3, per_class: int = 5, size: tuple[int, int] = (20, 30), names: str = "train test"
) -> dict[str, Split]:
    """``root/train/class0/000.png`` and so on, of ``size`` (height, width); what is in it, images (N, H, W, 3)."""
    written = {}
    for seed, split in enumerate(names.split()):
        images, labels = examples(classes * per_class, (*size, 3), classes, seed)
        order = sorted(range(len(labels)), key=lambda index: (labels[index], index))
        for place, index in enumerate(order):
            path = root / split / f"class{labels[index]}" / f"{place % per_class:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index]).save(path)
        written[split] = images[order], [labels[index] for index in order]
    return written


def image_files(root: Path, split: str) -> Iterator[Path]:
    """The files of a split in the order of its examples."""
    yield from sorted((root / split).rglob("*.png"))


def own(root: Path, name: str = "cifar10", **options: Any) -> dict[str, Examples]:
    return load(ArchiveConfig(name=name, root=str(root), verify=False, **options))


def error_of(read: Callable[[], object], kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        read()
    return str(caught.value)
