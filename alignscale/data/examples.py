"""Examples held in memory, and the stream of batches from them."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignscale.choices import DataConfig
from alignscale.data.plan import Plan, even_batches
from alignscale.data.views import Moves, moved
from alignscale.loss import Loss
from alignscale.types import Batch


@dataclass(frozen=True)
class Examples:
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

    def part(self, places: Tensor) -> "Examples":
        """The examples at ``places``, which keep their keys."""
        return replace(self, images=self.images[places], labels=self.labels[places], rows=self.rows[places])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example: (C, H, W)."""
        return tuple(self.images.shape[1:])

    @property
    def sums(self) -> Tensor:
        """CRC-32 of each example's image, as it is stored, (N,) int64."""
        images = self.images.contiguous().numpy()
        return torch.tensor([zlib.crc32(image.data) for image in images], dtype=torch.int64)

    @property
    def digest(self) -> str:
        """Number and CRC-32 of the examples: equal when two runs saw the same data."""
        sums = [zlib.crc32(part.contiguous().numpy().data) for part in (self.images, self.labels, self.rows)]
        return f"{len(self)}-" + "".join(f"{one:08x}" for one in sums)


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

    def of(self, data: DataConfig, train: Examples) -> "Encoding":
        """As ``data`` asks, with the moments of the training examples."""
        channels, scale = train.images.shape[1], pixel_scale(train.images)
        mean, std = moments(train.images) if data.normalisation == "channel" else (torch.zeros(channels), 1.0)
        affine = None
        if scale != 1.0 or data.normalisation == "channel":
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

    def batch(self, examples: Examples, places: Tensor, step: int, size: int = 0, view: int = 0) -> Batch:
        """The examples at ``places`` as a batch, or as a part of one of ``size`` examples, in ``view``."""
        images, rows = examples.images[places], examples.rows[places].tolist()
        if view and self.moves:
            images = moved(images, *self.moves.of(examples.rows, view, places))
        labels = examples.labels[places].to(self.device)
        known = labels.is_floating_point()
        targets = labels.to(self.master) if known else self.loss.targets(labels, examples.classes, self.master)
        keys = [f"{examples.shard}/{row}" for row in rows]
        return Batch(self.images(images), targets, keys, size or len(places), step, view)


def pixel_scale(images: Tensor) -> float:
    """What stored pixels are divided by to be in [0, 1]."""
    return 255.0 if images.dtype == torch.uint8 else 1.0


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of (N, C, H, W), pixels in [0, 1]: (C,) float64; 1 for a deviation of 0."""
    scale = pixel_scale(images)
    origin = images[0, :, :1, :1].double() / scale  # seen from it a constant channel is all 0, and its deviation too
    total = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for part in images.split(1000):
        x = part.double() / scale - origin
        total += torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
    mean, square = total / (images.numel() / images.shape[1])
    std = (square - mean.square()).clamp(min=0).sqrt()
    return origin.flatten() + mean, torch.where(std > 0, std, 1.0)


def stream(
    examples: Examples, plan: Plan, encoding: Encoding, start: int, stop: int, parts: int = 1, views: int = 1,
    share: Callable[[int], slice] = slice,
) -> Iterator[tuple[int, list[Batch]]]:  # fmt: skip
    """Updates from ``start`` to before ``stop`` in the plan's order, each with its batch in ``parts`` or fewer.

    share: of so many examples of a part, those that are this rank's; by default all.
    """
    for step, places in plan.batches(start, stop):
        view = step // plan.steps_per_epoch % views
        bounds = even_batches(len(places), -(-len(places) // parts))
        own = [places[part] for part in bounds]
        yield step, [encoding.batch(examples, one[share(len(one))], step, len(places), view) for one in own]
