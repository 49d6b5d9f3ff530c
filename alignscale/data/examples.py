"""Splits of a data set, in memory or not, and the stream of batches from them."""

import itertools
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from alignscale.choices import DataConfig
from alignscale.data.plan import Layout, Plan, even_batches
from alignscale.data.views import Moves, moved
from alignscale.loss import Loss
from alignscale.types import Batch

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of the red, green and blue of ImageNet's images, as everyone rounds them."""


class Wanted(NamedTuple):
    """A batch that is asked for, or this rank's part of one: the places of its examples, and what it is told.

    size: examples in the whole batch, on all ranks.
    """

    places: Tensor
    step: int
    size: int
    view: int = 0


class Split(ABC):
    """A split of a data set: its examples in key order, held in memory or read when a batch is asked for.

    labels: (N,) int64. skipped: files that were left out when the data set was made. missing: why, by the keys of the
    examples that this process had to leave out of its batches so far: none, as a rule. An example's place is that in
    the split; its key is ``shard/row``.
    """

    labels: Tensor
    classes: int
    skipped: int = 0
    missing: Mapping[str, str] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of one example: (C, H, W)."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Number and checksum of the examples: equal when two runs saw the same data."""

    @property
    @abstractmethod
    def checksums(self) -> Tensor:
        """Of each example, (N,) int64: equal when it is the same."""

    @property
    def layout(self) -> Layout | None:
        """How the examples lie, for the plan: None where they can be had in any order."""
        return None

    @property
    @abstractmethod
    def scale(self) -> float:
        """What pixels are divided by to be in [0, 1]."""

    @property
    @abstractmethod
    def shards(self) -> list[tuple[str, int]]:
        """Name of each shard, and how many examples of the split are in it, in key order."""

    @abstractmethod
    def keys(self, places: Tensor) -> list[str]:
        """``shard/row`` of the examples at ``places``."""

    @abstractmethod
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel, pixels in [0, 1]: (C,) float64; 1 for a deviation of 0."""

    @abstractmethod
    def part(self, places: Tensor, counted: bool = True) -> "Split":
        """The examples at ``places``, which keep their keys; counted: with those that were skipped."""

    @abstractmethod
    def batches(self, wanted: Iterable[Wanted], encoding: "Encoding") -> Generator[Batch, None, None]:
        """The batches that are asked for, in their order; ``wanted`` may be read ahead.

        An example that is damaged, and may be, is missing from its batch. Raises DataError for any other. What is
        broken off has to be closed, which ends what reads ahead.
        """

    def of_shard(self, name: str, encoding: "Encoding", view: int = 0, most: int = 120) -> Generator[Batch, None, None]:
        """All examples of a shard in row order, in ``view``, in batches of at most ``most``."""
        names = [shard for shard, _ in self.shards]
        bounds = [0, *itertools.accumulate(count for _, count in self.shards)]
        first, last = bounds[names.index(name) :][:2]
        parts = [torch.arange(first + part.start, first + part.stop) for part in even_batches(last - first, most)]
        return self.batches((Wanted(places, 0, len(places), view) for places in parts), encoding)


@dataclass(frozen=True)
class Examples(Split):
    """A split of a data set, in key order.

    images: (N, C, H, W), uint8, or float32 in [0, 1] or standardised. labels: (N,) int64, or targets
    (N, T, outputs). shard, rows: the file or
    part of the data set that an example is in, and its place (N,) there; with them its key is ``shard/row``.
    skipped: files that were left out.
    """

    images: Tensor
    labels: Tensor
    classes: int
    shard: str
    rows: Tensor
    skipped: int = 0

    @classmethod
    def whole(cls, images: Tensor, labels: Tensor, classes: int, shard: str) -> "Examples":
        """All examples of a shard, in its order."""
        return cls(images, labels, classes, shard, torch.arange(len(labels)))

    def part(self, places: Tensor, counted: bool = True) -> "Examples":
        """The examples at ``places``, which keep their keys."""
        images, labels, rows = (values[places] for values in (self.images, self.labels, self.rows))
        return replace(self, images=images, labels=labels, rows=rows, skipped=self.skipped if counted else 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example: (C, H, W)."""
        return tuple(self.images.shape[1:])

    @property
    def checksums(self) -> Tensor:
        """CRC-32 of each image, as it is stored."""
        images = self.images.contiguous().numpy()
        return torch.tensor([zlib.crc32(image.data) for image in images], dtype=torch.int64)

    @cached_property
    def digest(self) -> str:
        """Number and CRC-32 of the examples: equal when two runs saw the same data."""
        sums = [zlib.crc32(part.contiguous().numpy().data) for part in (self.images, self.labels, self.rows)]
        return f"{len(self)}-" + "".join(f"{one:08x}" for one in sums)

    @property
    def scale(self) -> float:
        """255 for bytes."""
        return 255.0 if self.images.dtype == torch.uint8 else 1.0

    @property
    def shards(self) -> list[tuple[str, int]]:
        """The one."""
        return [(self.shard, len(self))]

    def keys(self, places: Tensor) -> list[str]:
        """``shard/row``."""
        return [f"{self.shard}/{row}" for row in self.rows[places].tolist()]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Of all examples."""
        images, scale = self.images, self.scale
        origin = images[0, :, :1, :1].double() / scale  # seen from it a constant channel is 0, and its deviation too
        total = torch.zeros(2, images.shape[1], dtype=torch.float64)
        for part in images.split(1000):
            x = part.double() / scale - origin
            total += torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
        mean, square = total / (images.numel() / images.shape[1])
        std = (square - mean.square()).clamp(min=0).sqrt()
        return origin.flatten() + mean, torch.where(std > 0, std, 1.0)

    def batches(self, wanted: Iterable[Wanted], encoding: "Encoding") -> Generator[Batch, None, None]:
        """One by one, when they are asked for."""
        for one in wanted:
            images = self.images[one.places]
            if one.view and encoding.moves:
                images = moved(images, *encoding.moves.of(self.rows, one.view, one.places))
            yield encoding.encoded(self, images, one)


class DataError(RuntimeError):
    """A data file is missing, damaged or not what it should be; the message names it and says what to do."""


@dataclass(frozen=True)
class Encoding:
    """How examples become batches on ``device``: images in ``dtype``, targets in the weights' precision ``master``.

    affine: per channel, (C, 1, 1), what images are multiplied by and what is then added; None leaves them as they are.
    """

    loss: Loss
    dtype: torch.dtype
    master: torch.dtype
    device: torch.device
    affine: tuple[Tensor, Tensor] | None = None
    moves: Moves | None = None

    def of(self, data: DataConfig, train: Split) -> "Encoding":
        """As ``data`` asks, with the moments of the training examples."""
        channels, scale = train.shape[0], train.scale
        mean, std = torch.zeros(channels), torch.ones((), dtype=torch.float64)
        if data.normalisation == "channel":
            mean, std = train.moments()
        elif data.normalisation == "imagenet":
            usual = torch.tensor(IMAGENET, dtype=torch.double)
            mean, std = usual if channels == 3 else usual.mean(1)
        affine = None
        if scale != 1.0 or data.normalisation != "none":
            gain = torch.ones(channels, dtype=torch.float64) / std
            first, second = (x.view(-1, 1, 1).to(self.device, self.master) for x in (gain / scale, -mean * gain))
            affine = (first, second)
        return replace(self, affine=affine, moves=Moves(data.shift, data.flip) if data.views > 1 else None)

    def images(self, images: Tensor) -> Tensor:
        """Stored images (B, C, H, W) -> what the network reads."""
        images = images.to(self.device).to(self.master)
        if self.affine is not None:
            gain, offset = self.affine
            images = torch.addcmul(offset, images, gain)
        return images.to(self.dtype)

    def batch(self, split: Split, places: Tensor, step: int, size: int = 0, view: int = 0) -> Batch:
        """The examples at ``places`` as a batch, or as a part of one of ``size`` examples, in ``view``."""
        (batch,) = split.batches([Wanted(places, step, size or len(places), view)], self)
        return batch

    def encoded(self, split: Split, images: Tensor, wanted: Wanted) -> Batch:
        """Stored images (B, C, H, W) of the examples that are wanted, as the network reads them."""
        labels = split.labels[wanted.places].to(self.device)
        known = labels.is_floating_point()
        targets = labels.to(self.master) if known else self.loss.targets(labels, split.classes, self.master)
        keys = split.keys(wanted.places)
        return Batch(self.images(images), targets, keys, wanted.size, wanted.step, wanted.view)


def stream(
    split: Split, plan: Plan, encoding: Encoding, start: int, stop: int, parts: int = 1, views: int = 1,
    share: Callable[[int], slice] = slice,
) -> Generator[tuple[int, list[Batch]], None, None]:  # fmt: skip
    """Updates from ``start`` to before ``stop`` in the plan's order, each with its batch in ``parts`` or fewer.

    views: epoch t has view t mod ``views``; 0: t + 1. share: of so many examples of a part, those that are this rank's;
    by default all.
    """
    counts: deque[int] = deque()  # of parts, of the steps that are asked for and not given yet

    def wanted() -> Iterator[Wanted]:
        for step, places in plan.batches(start, stop):
            epoch = step // plan.steps_per_epoch
            bounds = even_batches(len(places), -(-len(places) // parts))
            counts.append(len(bounds))
            for part in bounds:
                own = places[part][share(part.stop - part.start)]
                yield Wanted(own, step, len(places), epoch % views if views else epoch + 1)

    with closing(split.batches(wanted(), encoding)) as found:
        for batch in found:
            more = itertools.islice(found, counts.popleft() - 1)
            yield batch.step, [batch, *more]
