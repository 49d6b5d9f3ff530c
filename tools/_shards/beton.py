"""An FFCV file of a split's shards: the same examples in the same order, JPEG bytes untouched.

It stands alone because it is a format. FFCV's own writer encodes every image anew, orders the data by which process was
first, and waits for ever for one that failed. What is no JPEG that FFCV can decode (PNG, CMYK) is stored as pixels.
"""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import simplejpeg
from ffcv.fields import IntField, RGBImageField
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type
from tqdm import tqdm

from alignscale.data.decode import JPEG, decode
from alignscale.data.examples import DataError
from alignscale.data.manifest import Manifest
from alignscale.files import sync

PAGE = 1 << 23
"""Bytes; no image crosses the end of a page."""
FIELDS = {"image": (RGBImageField(), 2), "label": (IntField(), 1)}
"""FFCV's fields, with the numbers of their types."""


def pack(manifest: Manifest, folder: Path, path: Path, progress: bool) -> None:
    """Write ``path`` at once. Raises DataError for an image that does not fit, OSError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            _write(file, manifest, folder, tqdm(total=len(manifest), desc=path.name, disable=not progress))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _write(file: BinaryIO, manifest: Manifest, folder: Path, bar: Any) -> None:
    kind = get_metadata_type([field for field, _ in FIELDS.values()])
    metadata = np.zeros(len(manifest), kind)
    allocated = np.zeros(len(manifest), ALLOC_TABLE_TYPE)
    header, descriptions = np.zeros((), HeaderType), np.zeros(len(FIELDS), FieldDescType)
    for description, (name, (field, number)) in zip(descriptions, FIELDS.items(), strict=True):
        description["type_id"] = number
        description["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        description["arguments"][:] = field.to_binary()[0]
    begin = header.nbytes + descriptions.nbytes + metadata.nbytes
    place = first = -(-begin // PAGE) * PAGE
    samples = manifest.samples
    for shard, start in zip(manifest.shards, manifest.starts, strict=False):
        with (folder / shard.file).open("rb") as tar:
            for number in range(start, start + shard.count):
                tar.seek(int(samples.offsets[number]))
                content, mode, (height, width) = stored(
                    tar.read(int(samples.lengths[number])), f"{shard.file}, key {samples.key(number)}"
                )
                if (place - first) % PAGE + len(content) > PAGE:
                    place = first + -(-(place - first) // PAGE) * PAGE
                image, label = kind.names
                metadata[image][number] = (mode, width, height, place)
                metadata[label][number] = samples.labels[number]
                allocated[number] = (number, place, len(content))
                file.seek(place)
                file.write(content)
                place += len(content)
                bar.update()
    place = first + -(-(place - first) // PAGE) * PAGE
    header["version"], header["num_fields"], header["page_size"] = CURRENT_VERSION, len(FIELDS), PAGE
    header["num_samples"], header["alloc_table_ptr"] = len(manifest), place
    file.seek(place)
    file.write(allocated.tobytes())
    file.seek(0)
    file.write(header.tobytes() + descriptions.tobytes() + metadata.tobytes())
    bar.close()


def stored(content: bytes, what: str) -> tuple[bytes, int, tuple[int, int]]:
    """What FFCV finds of an image: bytes, mode (0: JPEG, 1: pixels), height and width."""
    if content.startswith(JPEG):
        height, width, space, _ = simplejpeg.decode_jpeg_header(content)
        if space in ("YCbCr", "RGB", "GRAY", "Gray"):
            return _fits(content, what), 0, (height, width)
    pixels = decode(content, 3)
    return _fits(pixels.tobytes(), what), 1, (pixels.shape[0], pixels.shape[1])


def _fits(content: bytes, what: str) -> bytes:
    if len(content) > PAGE:
        raise DataError(
            f"{what}: expected at most {PAGE / 2**20:g} MiB an image, what a page of an FFCV file holds, found "
            f"{len(content) / 2**20:.1f}; make the shards with --resize"
        )
    return content
