"""Folders of image files, one folder a class, decoded once and held in memory.

They stand alone because it is here that pixels are made: how an image is turned, scaled and cropped decides what is
learned from, so it is a function of the file alone, in the same way on every machine and number of threads.
"""

import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from alignscale.choices import ConfigError, ImageFolderConfig
from alignscale.data.examples import DataError, Examples
from alignscale.data.plan import even_batches
from alignscale.data.torchvision import datasets

_PER_TASK = 64  # files of one task of the thread pool
_LAYOUT = "arrange the images as docs/data.md says: train/<class>/* and test/<class>/* (or val/<class>/*)"

Files = list[tuple[str, int]]  # paths and labels, sorted by class, then by path


def image_folder(config: ImageFolderConfig) -> tuple[Examples, Examples]:
    """Training and test examples: images uint8 (N, channels, size, size), sorted by class, then by path.

    Raises ConfigError for a ``size`` whose images cannot fit the memory, DataError for missing folders, classes that
    differ, classes without an image and, unless ``skip_undecodable``, a file that holds no readable image.
    """
    root = Path(config.root).expanduser()
    folders = [_folder(root, "train"), _folder(root, "test", "val")]
    classes = _classes(folders)
    files = [_files(folder, classes) for folder in folders]
    _check_memory(config, sum(map(len, files)))
    train, test = (_decoded(config, *pair, classes) for pair in zip(folders, files, strict=True))
    return train, test


def _folder(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"expected a folder {' or '.join(str(root / name) for name in names)}, found none; {_LAYOUT}")


def _classes(folders: list[Path]) -> list[str]:
    """The class folders, which are the same in both splits, sorted."""
    found = []
    for folder in folders:
        try:
            found.append(datasets().folder.find_classes(folder)[0])
        except FileNotFoundError as error:
            raise DataError(f"{folder}: expected a folder for each class, found none; {_LAYOUT}") from error
    train, test = map(set, found)
    if train != test:
        only = [
            f"only in {folder}: {', '.join(sorted(names))}"
            for folder, names in zip(folders, (train - test, test - train), strict=True)
            if names
        ]
        raise DataError(f"expected the same class folders in both splits, found {'; '.join(only)}; {_LAYOUT}")
    return found[0]


def _files(folder: Path, classes: list[str]) -> Files:
    helpers = datasets().folder
    places = {name: label for label, name in enumerate(classes)}
    found: Files = helpers.make_dataset(str(folder), places, helpers.IMG_EXTENSIONS, allow_empty=True)
    _check_classes(folder, classes, torch.tensor([label for _, label in found], dtype=torch.int64))
    return found


def _check_classes(folder: Path, classes: list[str], labels: Tensor) -> None:
    empty = (torch.bincount(labels, minlength=len(classes)) == 0).nonzero().flatten().tolist()
    if empty:
        raise DataError(
            f"{folder}: expected a readable image in each class folder ({' '.join(datasets().folder.IMG_EXTENSIONS)}), "
            f"found none in {', '.join(classes[label] for label in empty)}; add images, or remove the class from both "
            "splits"
        )


def _check_memory(config: ImageFolderConfig, images: int) -> None:
    need, have = images * config.channels * config.size**2, _available_memory()
    if need > have:
        most = int(config.size * (have / need) ** 0.5)
        raise ConfigError(
            f"data.size={config.size}: expected at most {most}, so that {images} images fit the {have / 2**30:.1f} GiB "
            f"of available memory, found {need / 2**30:.1f} GiB; choose a smaller data.size"
        )


def _available_memory() -> int:
    """Bytes that the kernel can give without swapping, its file cache counted; all of them where it does not say."""
    try:
        found = re.search(r"^MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _decoded(config: ImageFolderConfig, folder: Path, files: Files, classes: list[str]) -> Examples:
    images = torch.empty(len(files), config.channels, config.size, config.size, dtype=torch.uint8)
    labels = torch.tensor([label for _, label in files])
    Image.init()  # its formats, before threads ask for them
    parts = even_batches(len(files), _PER_TASK)
    with ThreadPoolExecutor() as pool:  # in order: of several bad files the first is named
        skipped = [place for bad in pool.map(lambda part: _fill(images, files, part, config), parts) for place in bad]
    shard = f"imagefolder-{folder.name}"
    if not skipped:
        return Examples.whole(images, labels, len(classes), shard)
    kept = torch.ones(len(files), dtype=torch.bool)
    kept[skipped] = False
    rows = kept.nonzero().flatten()
    _check_classes(folder, classes, labels[rows])
    for part in even_batches(len(rows), _PER_TASK):  # in place, towards the front: no second copy of all images
        images[part] = images[rows[part]]
    return Examples(images[: len(rows)], labels[rows], len(classes), shard, rows, len(skipped))


def _fill(images: Tensor, files: Files, part: slice, config: ImageFolderConfig) -> list[int]:
    """Decode the files of ``part`` into their places; the places of those that are left out."""
    pixels, skipped = images.numpy(), []
    for place in range(part.start, part.stop):
        path = files[place][0]
        try:
            content = Path(path).read_bytes()
        except OSError as error:  # of the disk, not of the image: never left out
            raise DataError(f"{path}: expected a readable file, found: {error.strerror}; see to that first") from error
        try:
            pixels[place] = decode(content, config.size, config.channels)
        except MemoryError:
            raise
        except Exception as error:  # a damaged image may raise anything
            if not config.skip_undecodable:
                why = "in no known format" if isinstance(error, UnidentifiedImageError) else error
                raise DataError(
                    f"{path}: expected an image, found a file that cannot be decoded ({why}); replace or remove it, or "
                    "leave all such files out with data.skip_undecodable=true"
                ) from error
            skipped.append(place)
    return skipped


def decode(content: bytes, size: int, channels: int) -> NDArray[np.uint8]:
    """An image file -> (channels, size, size) uint8: upright, shorter side scaled to ``size``, central square.

    As torchvision's Resize (bilinear, antialiased) and CenterCrop. Transparency is dropped. Raises ValueError for more
    than 8 bits a grey pixel, which PIL would cut off, and what PIL raises for a file that it cannot decode.
    """
    with Image.open(io.BytesIO(content)) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode[0] in "IF":
        raise ValueError(f"grey pixels of more than 8 bits, PIL's mode {image.mode}")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns of any other way
    image = image.convert("RGB" if channels == 3 else "L")
    short = min(image.size)
    width, height = (size * side // short for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)
