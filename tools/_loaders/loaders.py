"""The loaders that are timed, ours and those of others, each of which gives one epoch of batches of uint8 images.

All crop at random to 224 pixels and mirror half of the images; what is done after that, on the device, is left out.
"""

import gc
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
import webdataset
from torch.utils.data import DataLoader

from alignscale.choices import FFCVConfig, MSEConfig, WebDatasetConfig
from alignscale.data import load
from alignscale.data.examples import Encoding, Split, Wanted
from alignscale.data.plan import Plan
from alignscale.data.torchvision import datasets, transforms
from alignscale.loss import make_loss

SIZE = 224


@dataclass(frozen=True)
class Setting:
    """What all loaders have in common."""

    folder: Path
    images: int
    workers: int
    batch: int

    @property
    def shards(self) -> list[str]:
        """Of training."""
        return [str(path) for path in sorted(self.folder.glob("train-*.tar"))]


class _Bytes(Encoding):
    """Leaves images as they are read."""

    def images(self, images: torch.Tensor) -> torch.Tensor:
        return images


ENCODING = _Bytes(make_loss(MSEConfig()), torch.float32, torch.float32, torch.device("cpu"))


@cache
def _split(setting: Setting, name: str) -> Split:
    if name == "ffcv":
        places = {"path": str(setting.folder / "train.beton"), "test_path": str(setting.folder / "val.beton")}
        return load(FFCVConfig(**places, workers=setting.workers))["train"]  # type: ignore[arg-type]
    urls = {"urls": "::".join(setting.shards), "test_urls": str(setting.folder / "val-000000.tar")}
    urls |= {f"{split}manifest": str(setting.folder / f"{name}.manifest.json") for split, name in _MANIFESTS}
    checksums = "always" if "checksums" in name else "never"
    return load(WebDatasetConfig(**urls, checksums=checksums, workers=setting.workers))["train"]  # type: ignore[arg-type]


_MANIFESTS = (("", "train"), ("test_", "val"))


def _ours(name: str) -> Callable[[Setting, int], Iterator[int]]:
    def epoch(setting: Setting, number: int) -> Iterator[int]:
        split = _split(setting, name)
        plan = Plan(len(split), setting.batch, 0, split.layout)
        steps = plan.batches(number * plan.steps_per_epoch, (number + 1) * plan.steps_per_epoch)
        wanted = (Wanted(places, step, len(places), number + 1) for step, places in steps)
        for batch in split.batches(wanted, ENCODING):
            yield len(batch.images)

    return epoch


def crop(pixels: Any, dice: Any) -> tuple[int, int, int, int]:
    """Torchvision's RandomResizedCrop: top, left, height, width."""
    height, width = pixels.shape[:2]
    for _ in range(10):
        area, ratio = height * width * dice.uniform(0.08, 1), np.exp(dice.uniform(np.log(3 / 4), np.log(4 / 3)))
        wide, tall = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if wide <= width and tall <= height:
            return int(dice.integers(height - tall + 1)), int(dice.integers(width - wide + 1)), tall, wide
    return 0, 0, height, width


def _decoded(sample: Any) -> tuple[Any, int]:
    content, label = sample
    dice = np.random.default_rng()
    pixels = simplejpeg.decode_jpeg(content, "RGB")
    top, left, tall, wide = crop(pixels, dice)
    shrinks = min(tall, wide) > SIZE
    part = pixels[top : top + tall, left : left + wide]
    pixels = cv2.resize(part, (SIZE, SIZE), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    if dice.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), int(label)


def _stacked(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def _one_thread(_: int) -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def _webdataset(setting: Setting, number: int) -> Iterator[int]:
    data = webdataset.WebDataset(setting.shards, shardshuffle=len(setting.shards), seed=number, empty_check=False)
    data = data.shuffle(1000).to_tuple("jpg", "cls").map(_decoded).batched(setting.batch, collation_fn=_stacked)
    workers = min(setting.workers, len(setting.shards))
    for images, _ in DataLoader(data, batch_size=None, num_workers=workers, worker_init_fn=_one_thread):
        yield len(images)


def _image_folder(setting: Setting, number: int) -> Iterator[int]:
    tools = transforms()
    steps = [tools.RandomResizedCrop(SIZE), tools.RandomHorizontalFlip(), tools.PILToTensor()]
    data = datasets().ImageFolder(str(setting.folder / "tree/train"), tools.Compose(steps))
    for images, _ in DataLoader(data, setting.batch, shuffle=True, num_workers=setting.workers):
        yield len(images)


@cache
def _ffcv_loader(setting: Setting) -> Any:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    decoder = RandomResizedCropRGBImageDecoder((SIZE, SIZE))
    image = [decoder, RandomHorizontalFlip(), ToTensor(), ToTorchImage(convert_back_int16=False)]
    return Loader(
        str(setting.folder / "train.beton"), setting.batch, setting.workers, order=OrderOption.RANDOM,
        drop_last=False, pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )  # fmt: skip


def _ffcv(setting: Setting, number: int) -> Iterator[int]:
    for images, _ in _ffcv_loader(setting):
        yield len(images.contiguous())


LOADERS: dict[str, Callable[[Setting, int], Iterator[int]]] = {
    "bare webdataset": _webdataset,
    "webdataset": _ours("webdataset"),
    "webdataset, checksums": _ours("webdataset, checksums"),
    "imagefolder": _image_folder,
    "bare ffcv": _ffcv,
    "ffcv": _ours("ffcv"),
}
BARE = {name: "bare ffcv" if "ffcv" in name else "bare webdataset" for name in LOADERS}
"""Of each loader, the pipeline of the same work without what ours adds."""


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def timed(setting: Setting, name: str, number: int) -> tuple[float, float]:
    """Seconds, and CPU seconds, of one epoch."""
    gc.collect()
    begin, cpu = time.perf_counter(), cpu_seconds()
    count = sum(LOADERS[name](setting, number))
    wall = time.perf_counter() - begin
    if count != setting.images:
        raise RuntimeError(f"{name}: expected {setting.images} images in an epoch, found {count}")
    return wall, cpu_seconds() - cpu


def rounds(setting: Setting, names: list[str], epochs: int) -> dict[str, list[tuple[float, float]]]:
    """Of every loader, the times of every epoch after the first."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(epochs + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            times = timed(setting, name, number)
            if number:
                found[name].append(times)
    return found
