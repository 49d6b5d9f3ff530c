"""Splits in FFCV files, decoded by FFCV's own threads, in the order and the views of the plan.

It stands alone because FFCV compiles what it runs, for some 9 s at each first use: one loader serves all batches of a
process that are of one file and one size. FFCV is told rows, and draws its crops from a generator of its own; here a
row comes with a view, and the crop is a function of both, the same one as for shards. Normalisation is left to the
device, as with all bytes.
"""

import itertools
import os
import zlib
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from queue import Empty
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

THREADS = torch.get_num_threads()

from ffcv.fields.rgb_image import IMAGE_MODES, ResizedCropRGBImageDecoder  # noqa: E402
from ffcv.libffcv import imdecode, resize_crop  # noqa: E402
from ffcv.loader import Loader  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.pipeline import compiler  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.reader import Reader  # noqa: E402

from alignscale.choices import ConfigError, FFCVConfig  # noqa: E402
from alignscale.data.examples import DataError, Encoding, Wanted  # noqa: E402
from alignscale.data.streamed import Streamed  # noqa: E402
from alignscale.data.views import ATTEMPTS  # noqa: E402
from alignscale.files import staged  # noqa: E402
from alignscale.initial import Stream  # noqa: E402
from alignscale.types import Batch  # noqa: E402

torch.set_num_threads(THREADS)
compiler.ch = SimpleNamespace(set_num_threads=lambda count: None)  # which it would set for torch too

VIEW = 1 << 32
"""An index that FFCV is given is row + VIEW * view."""
AT_ONCE = 4096
"""Batches that FFCV is told of at a time; between two such times it does not read ahead."""
REMEDY = "make it again with tools/make_shards.py --ffcv"
_STREAM = int(Stream.VIEW)
_WORD = np.uint64(0xFFFFFFFF)


@numba.njit
def _philox(c0: Any, c1: Any, c2: Any, c3: Any) -> Any:
    """``initial.philox`` with seed 0, of numbers: four numbers in [0, 1)."""
    c0, c1, c2, c3 = np.uint64(c0), np.uint64(c1), np.uint64(c2), np.uint64(c3)
    k0, k1, shift = np.uint64(0), np.uint64(0), np.uint64(32)
    for _ in range(10):
        one, two = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (two >> shift) ^ c1 ^ k0, two & _WORD, (one >> shift) ^ c3 ^ k1, one & _WORD
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _WORD, (k1 + np.uint64(0xBB67AE85)) & _WORD
    return c0 / 2.0**32, c1 / 2.0**32, c2 / 2.0**32, c3 / 2.0**32


@numba.njit
def box(row: int, view: int, height: int, width: int, low: float, high: float, centre: float) -> Any:
    """``views.Crops.of`` and ``box`` compiled: top, left, height, width, and a number in [0, 1) to mirror by."""
    if view == 0:
        side = max(round(min(height, width) * centre), 1)
        return (height - side) // 2, (width - side) // 2, side, side, 1.0
    coin = _philox(row * 16 + ATTEMPTS, view, 1, _STREAM)[0]
    for attempt in range(ATTEMPTS):
        area, ratio, down, right = _philox(row * 16 + attempt, view, 1, _STREAM)
        area = height * width * (low + (high - low) * area)
        ratio = (3 / 4) ** (1 - 2 * ratio)
        wide, tall = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < wide <= width and 0 < tall <= height:
            return int(down * (height - tall + 1)), int(right * (width - wide + 1)), tall, wide, coin
    tall, wide = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - tall) // 2, (width - wide) // 2, tall, wide, coin


@numba.njit
def _planes(pixels: Any, mirrored: bool, planes: Any) -> None:
    """Pixels (size, size, 3) -> planes (3, size, size), in loops that a compiler turns into moves of many bytes."""
    size = len(pixels)
    rows, line = pixels.reshape(size, 3 * size), np.empty(size, np.uint8)
    for y in range(size):
        for channel in range(3):
            for x in range(size):
                line[x] = rows[y, 3 * x + channel]
            for x in range(size):
                planes[channel, y, x] = line[size - 1 - x] if mirrored else line[x]


class _Decoder(ResizedCropRGBImageDecoder):  # type: ignore[misc]
    """FFCV's decoder with a crop that follows from row and view, and channels first."""

    def __init__(self, size: int, centre: float, low: float, high: float, flip: bool) -> None:
        super().__init__((size, size))
        self.crop = low, high, centre
        self.mirror = 0.5 if flip else 0.0

    def declare_state_and_memory(self, previous_state: Any) -> Any:
        """FFCV's, and the channels of each image."""
        state, memory = super().declare_state_and_memory(previous_state)
        shape = (3, *self.output_size)
        return replace(state, shape=shape), (AllocationQuery(shape, state.dtype), *memory)

    get_crop_generator = None  # FFCV's own draw is not asked

    def generate_code(self) -> Callable[..., Any]:
        """What FFCV compiles."""
        read, numbers = self.memory_read, compiler.Compiler.get_iterator()
        decoded, resized = compiler.Compiler.compile(imdecode), compiler.Compiler.compile(resize_crop)
        low, high, centre, mirror, jpeg = *self.crop, self.mirror, IMAGE_MODES["jpg"]

        def decode(batch_indices: Any, storage: Any, metadata: Any, state: Any) -> Any:
            destination, squares, buffers = storage
            for place in numbers(len(batch_indices)):
                row, view = batch_indices[place] % VIEW, batch_indices[place] // VIEW
                field = metadata[row]
                content = read(field["data_ptr"], state)
                height, width = np.int64(field["height"]), np.int64(field["width"])
                if field["mode"] == jpeg:
                    decoded(content, buffers[place], height, width, height, width, 0, 0, 1, 1, False, False)
                    pixels = buffers[place].reshape(-1)[: 3 * height * width].reshape(height, width, 3)
                else:
                    pixels = content.reshape(height, width, 3)
                top, left, tall, wide, coin = box(row, view, height, width, low, high, centre)
                resized(pixels, top, top + tall, left, left + wide, squares[place])
                _planes(squares[place], coin < mirror, destination[place])
            return destination[: len(batch_indices)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode


class _Order:
    """Batches of any sizes, which FFCV takes for one list that it cuts at every ``step``."""

    def __init__(self, batches: list[Any], step: int) -> None:
        self.batches, self.step = batches, step

    def __len__(self) -> int:
        return len(self.batches) * self.step

    def __getitem__(self, part: slice) -> Any:
        return self.batches[part.start // self.step]


class _Ahead(EpochIterator):  # type: ignore[misc]
    """FFCV's thread that decodes ahead, which says what stopped it and ends when it is told to."""

    problem: BaseException | None = None

    def run(self) -> None:
        try:
            super().run()
        except BaseException as problem:
            self.problem = problem
            self.output_queue.put(None)

    def stop(self) -> None:
        """Wait until the thread has ended."""
        self.close()
        self.iter_ixes = iter(())  # FFCV looks whether it is closed only where its queue is full
        while self.is_alive():
            with suppress(Empty):
                self.output_queue.get(timeout=0.05)


@lru_cache(4)
def _loader(path: str, size: int, centre: float, low: float, high: float, flip: bool, threads: int) -> Any:
    """One for each file and kind of crop."""
    return Loader(
        path, batch_size=1, num_workers=threads, os_cache=True, drop_last=False,
        pipelines={"image": [_Decoder(size, centre, low, high, flip)], "label": None},
    )  # fmt: skip


@dataclass(frozen=True)
class FFCV(Streamed):
    """The examples in ``rows`` (N,) of the file at ``path``."""

    config: FFCVConfig
    path: str
    labels: Tensor
    classes: int
    rows: Tensor
    sums: Any

    @property
    def digest(self) -> str:
        """Of the file's table of images: sizes, places and labels, not their pixels."""
        return f"{len(self)}-{zlib.crc32(np.ascontiguousarray(self.sums[self.rows.numpy()]).view(np.uint8).data):08x}"

    @property
    def checksums(self) -> Tensor:
        """Of each image's entry in the file's table."""
        entries = np.ascontiguousarray(self.sums[self.rows.numpy()]).view(np.uint8)
        return torch.tensor([zlib.crc32(entry.data) for entry in entries], dtype=torch.int64)

    @property
    def shards(self) -> list[tuple[str, int]]:
        """The file."""
        return [(Path(self.path).stem, len(self))]

    def keys(self, places: Tensor) -> list[str]:
        """The file's name and the row in it."""
        return [f"{Path(self.path).stem}/{row}" for row in self.rows[places].tolist()]

    def part(self, places: Tensor, counted: bool = True) -> "FFCV":
        """The examples at ``places``, which keep their keys."""
        return replace(self, labels=self.labels[places], rows=self.rows[places])

    def batches(self, wanted: Iterable[Wanted], encoding: Encoding) -> Generator[Batch, None, None]:
        """Decoded ahead by FFCV's threads."""
        for shape, some in itertools.groupby(wanted, lambda one: self.shape_in(one.view)):
            while asked := list(itertools.islice(some, AT_ONCE)):
                yield from self._decoded(asked, encoding, shape)

    def _decoded(self, asked: list[Wanted], encoding: Encoding, shape: tuple[int, ...]) -> Generator[Batch, None, None]:
        options, most = self.config, getattr(numba.config, "NUMBA_NUM_THREADS", 1)
        threads = max(min(options.workers, len(os.sched_getaffinity(0)), most), 1)
        loader = _loader(self.path, shape[-1], options.size / options.resize, *options.scale, options.flip, threads)
        indices = [(self.rows[one.places] + VIEW * one.view).numpy() for one in asked]
        full = [index for index in indices if len(index)]  # a rank may have none of a small batch
        loader.batch_size = max(map(len, full), default=1)
        found = _Ahead(loader, _Order(full, loader.batch_size))
        try:
            for one in asked:
                images = torch.empty(0, *shape, dtype=torch.uint8)
                if len(one.places):  # a buffer that is written to again: the encoding makes numbers of it
                    images = torch.as_tensor(next(found)[0])
                yield encoding.encoded(self, images, one)
        except StopIteration:
            raise RuntimeError(f"{self.path}: FFCV stopped decoding: {found.problem!r}") from found.problem
        finally:
            found.stop()


def ffcv(config: FFCVConfig) -> tuple[FFCV, FFCV]:
    """Training and test examples. Raises ConfigError for options, DataError for files, that are wrong."""
    if config.transform:
        raise ConfigError(f"data.transform={config.transform}: expected none with data=ffcv; data=webdataset has them")
    if config.channels != 3:
        raise ConfigError(f"data.channels={config.channels}: expected 3 with data=ffcv, which decodes to colour")
    train, test = (_split(config, option, getattr(config, option)) for option in ("path", "test_path"))
    classes = int(train.labels.max()) + 1
    if int(test.labels.max()) >= classes:
        raise DataError(
            f"{config.test_path}: expected labels from 0 to {classes - 1}, those of {config.path}, found "
            f"{int(test.labels.max())}; make both from the same classes"
        )
    return replace(train, classes=classes), replace(test, classes=classes)


def _split(config: FFCVConfig, option: str, place: str) -> FFCV:
    path = staged(place)
    try:
        size = path.stat().st_size
        reader = Reader(str(path))
        ends = reader.alloc_table["ptr"] + reader.alloc_table["size"]
        whole = len(reader.metadata) == reader.num_samples <= len(reader.alloc_table) and int(ends.max()) <= size
        fields = reader.field_names
    except OSError as problem:
        raise DataError(
            f"data.{option}={place}: expected an FFCV file, found: {problem.strerror}; correct data.{option}, or "
            "make it with tools/make_shards.py --ffcv"
        ) from problem
    except Exception as problem:  # whatever bytes that are no header lead to
        raise DataError(f"{path}: expected an FFCV file, found another, or damage ({problem}); {REMEDY}") from problem
    if fields != ["image", "label"]:
        raise DataError(f"{path}: expected the fields image and label, in this order, found {fields}; {REMEDY}")
    if not whole:
        raise DataError(f"{path}: expected a whole FFCV file, found one that is cut short at {size} bytes; {REMEDY}")
    image, label = reader.metadata.dtype.names
    labels = torch.from_numpy(reader.metadata[label].astype(np.int64))
    if int(labels.min()) < 0 or not reader.metadata[image]["height"].all():
        raise DataError(f"{path}: expected labels from 0 on and images of some height, found others; {REMEDY}")
    columns = [reader.metadata[image][name].astype(np.int64) for name in ("width", "height", "data_ptr")]
    return FFCV(config, str(path), labels, 0, torch.arange(len(labels)), np.stack([*columns, labels.numpy()], 1))
