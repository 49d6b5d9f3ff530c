"""Folders of image files, one folder a class, decoded once and held in memory.

They stand alone because it is here that pixels are made: how an image is turned, scaled and cropped decides what is
learned from, so it is a function of the file alone, in the same way on every machine and number of threads.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from alignscale.choices import ConfigError, ImageFolderConfig
from alignscale.data.examples import DataError, Examples
from alignscale.data.torchvision import datasets
from alignscale.environment import available_memory
from alignscale.files import staged

_LAYOUT = "arrange the images as docs/data.md says: train/<class>/* and test/<class>/* (or val/<class>/*)"

Files = list[tuple[str, int]]  # paths and labels, sorted by class, then by path


def image_folder(config: ImageFolderConfig) -> tuple[Examples, Examples]:
    """Training and test examples: images uint8 (N, channels, size, size), sorted by class, then by path.

    Raises ConfigError for a ``size`` whose images cannot fit the memory, DataError for missing folders, classes that
    differ, classes without an image and, unless ``skip_undecodable``, a file that holds no readable image.
    """
    root = staged(config.root)
    folders = [_folder(root, "train"), _folder(root, "test", "val")]
    classes = _common_classes(folders)
    files = [_files(folder, classes) for folder in folders]
    _check_memory(config, sum(map(len, files)))
    train, test = (_decoded(config, *pair, classes) for pair in zip(folders, files, strict=True))
    return train, test


def _folder(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"expected a folder {' or '.join(str(root / name) for name in names)}, found none; {_LAYOUT}")


def _classes(folder: Path) -> list[str]:
    try:
        return datasets().folder.find_classes(folder)[0]
    except FileNotFoundError as error:
        raise DataError(f"{folder}: expected a folder for each class, found none; {_LAYOUT}") from error


def _common_classes(folders: list[Path]) -> list[str]:
    """The class folders, which are the same in both splits, sorted."""
    train, test = map(_classes, folders)
    extra = [sorted(set(train) - set(test)), sorted(set(test) - set(train))]
    only = [f"only in {folder}: {', '.join(names)}" for folder, names in zip(folders, extra, strict=True) if names]
    if only:
        raise DataError(f"expected the same class folders in both splits, found {'; '.join(only)}; {_LAYOUT}")
    if len(train) < 2:
        raise DataError(f"{folders[0]}: expected at least two class folders, found {train[0]} alone; {_LAYOUT}")
    return train


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
    have = available_memory(torch.device("cpu"))
    need = images * config.channels * config.size**2
    if need > have:
        most = int(config.size * (have / need) ** 0.5)
        raise ConfigError(
            f"data.size={config.size}: expected at most {most}, so that {images} images fit the {have / 2**30:.1f} GiB "
            f"of available memory, found {need / 2**30:.1f} GiB; choose a smaller data.size"
        )


def _decoded(config: ImageFolderConfig, folder: Path, files: Files, classes: list[str]) -> Examples:
    images = torch.empty(len(files), config.channels, config.size, config.size, dtype=torch.uint8)
    labels = torch.tensor([label for _, label in files])
    Image.init()  # its formats, before threads ask for them
    with ThreadPoolExecutor() as pool:  # in order: of several bad files the first is named
        kept = torch.tensor(list(pool.map(partial(_fill, config), images.numpy(), [path for path, _ in files])))
    rows = kept.nonzero().flatten()
    if len(rows) < len(files):
        images, labels = images[rows], labels[rows]
        _check_classes(folder, classes, labels)
    return Examples(images, labels, len(classes), f"imagefolder-{folder.name}", rows, len(files) - len(rows))


def _fill(config: ImageFolderConfig, pixels: NDArray[np.uint8], path: str) -> bool:
    """Decode a file into its place; False where it is left out."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:  # of the disk, not of the image: never left out
        raise DataError(f"{path}: expected a readable file, found: {error.strerror}; see to that first") from error
    try:
        pixels[:] = decode(content, config.size, config.channels)
    except MemoryError:
        raise
    except Exception as error:  # a damaged image may raise anything
        if config.skip_undecodable:
            return False
        why = "in no known format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"{path}: expected an image, found a file that cannot be decoded ({why}); replace or remove it, or "
            "leave all such files out with data.skip_undecodable=true"
        ) from error
    return True


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
