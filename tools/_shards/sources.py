"""Where images come from: folders in ImageNet's layout, and data sets that are held in memory.

It stands alone because an item must be cheap to list and the same in every process: a name, a label, and how to get
the bytes, which are a file's own or a PNG of the pixels.
"""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from alignscale.choices import DATA, ArchiveConfig, ConfigError
from alignscale.data import load
from alignscale.data.decode import decode
from alignscale.data.examples import DataError, Examples

SOURCES = ("imagefolder", "cifar10", "kmnist", "digits")
SPLITS = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}
"""Of each split, the folders that it may be in."""
_SIGNS = {
    b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"RIFF": "webp", b"II*\0": "tif",
    b"MM\0*": "tif",
}  # fmt: skip


class Item(NamedTuple):
    """An image: what it is called in messages, its label, its place in the source."""

    name: str
    label: int
    place: int


@dataclass(frozen=True)
class Source:
    """A split of a data set. stamp: what its items follow from, for comparison with those of an earlier run."""

    classes: Sequence[str]
    items: Sequence[Item]
    stamp: dict[str, Any]
    root: Path | None = None
    examples: Examples | None = None

    def content(self, item: Item) -> bytes:
        """The bytes of an image file. Raises OSError."""
        if self.root is not None:
            return (self.root / item.name).read_bytes()
        assert self.examples is not None
        image = self.examples.images[item.place]
        pixels = image.numpy() if image.dtype.itemsize == 1 else np.rint(image.numpy() * 255).astype(np.uint8)
        return encoded(pixels.transpose(1, 2, 0), "PNG")


def source(kind: str, root: str, split: str, verify: bool = True) -> Source:
    """The images of a split. Raises ConfigError or DataError for what is not there or not as expected.

    verify: CIFAR's and KMNIST's files must have the published checksums.
    """
    if kind == "imagefolder":
        return _folder(Path(root).expanduser(), split)
    options = DATA["digits"] if kind == "digits" else ArchiveConfig(name=kind, root=root, verify=verify)
    try:
        examples = load(options)["train" if split == "train" else "test"]
    except DataError as problem:
        raise DataError(str(problem).replace("data.verify=false", "--no-verify")) from problem
    assert isinstance(examples, Examples)
    items = [Item(f"{kind} {split} {row}", int(label), row) for row, label in enumerate(examples.labels)]
    names = [str(label) for label in range(examples.classes)]
    return Source(names, items, {"kind": kind, "examples": examples.digest}, examples=examples)


def _folder(root: Path, split: str) -> Source:
    tried = [root / name for name in SPLITS[split]]
    folder = next((path for path in tried if path.is_dir()), None)
    if folder is None:
        raise DataError(
            f"expected a folder {' or '.join(map(str, tried))}, found none; --root is the folder above train/<class>/* "
            "and val/<class>/*, ImageNet's own layout"
        )
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(classes) < 2:
        only = f"{classes[0]} alone" if classes else "none"
        raise DataError(
            f"{folder}: expected a folder for each of two classes or more, found {only}; arrange it as "
            f"{folder}/<class>/*"
        )
    items: list[Item] = []
    for label, name in enumerate(classes):
        found = sorted(path.relative_to(folder) for path in (folder / name).rglob("*") if path.is_file())
        if not found:
            raise DataError(f"{folder / name}: expected an image in each class, found none; add some, or remove it")
        items += [Item(str(path), label, len(items) + index) for index, path in enumerate(found)]
    listed = [(item.name, item.label, (folder / item.name).stat().st_size) for item in items]
    stamp = {"kind": "imagefolder", "folder": folder.name, "files": len(items), "bytes": sum(one[2] for one in listed)}
    stamp["names_labels_sizes"] = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
    return Source(classes, items, stamp, root=folder)


def key_of(number: int, name: str) -> str:
    """A key that is a plain name in a tar: the example's number, and what is readable of its file's name."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(name).stem)[:60]
    return f"{number:08}-{stem}"


def ending_of(content: bytes) -> str:
    """What a file of these bytes is called, whatever it was called before."""
    return next((ending for sign, ending in _SIGNS.items() if content.startswith(sign)), "img")


def prepared(content: bytes, resize: int, quality: int) -> bytes:
    """The bytes to store: untouched if nothing is asked for, else a JPEG whose shorter side has ``resize`` pixels.

    Raises ValueError for what is no whole image. An image is never made larger. Pixels are taken as the file has them.
    """
    try:
        pixels = decode(content, 3)
    except ValueError as problem:
        raise ValueError(str(problem) or "no known format") from problem
    if not resize and not quality:
        return content
    image = Image.fromarray(pixels)
    short = min(image.size)
    if resize and short > resize:
        width, height = (max(round(side * resize / short), 1) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX if short > 4 * resize else Image.Resampling.LANCZOS)
    return encoded(np.asarray(image), "JPEG", quality=quality or 90)


def encoded(pixels: Any, kind: str, **options: Any) -> bytes:
    """Pixels (H, W, 1 or 3) as the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, kind, **options)
    return file.getvalue()


def check_split(split: str) -> str:
    """Raises ConfigError for the name of a split that is not known."""
    if split not in SPLITS:
        raise ConfigError(f"--splits {split}: expected some of {', '.join(SPLITS)}")
    return split
