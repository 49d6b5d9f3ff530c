"""Examples held in memory, and the stream of batches from them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alignscale.data.plan import Plan, even_batches
from alignscale.types import Batch


@dataclass(frozen=True)
class Examples:
    """A split of a data set: images (N, C, H, W) float32 in [0, 1] or standardised, labels (N,) int64, by key order."""

    images: Tensor
    labels: Tensor
    classes: int
    shard: str

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example: (C, H, W)."""
        return tuple(self.images.shape[1:])


@dataclass(frozen=True)
class Encoding:
    """How examples become batches: one-hot labels minus ``offset``, in ``dtype`` on ``device``."""

    offset: float
    dtype: torch.dtype
    device: torch.device

    def targets(self, labels: Tensor, classes: int) -> Tensor:
        """Labels (B,) -> targets (B, classes)."""
        one_hot = torch.nn.functional.one_hot(labels, classes)
        return one_hot.to(self.device, self.dtype) - self.offset

    def batch(self, examples: Examples, rows: Tensor, step: int) -> Batch:
        """The examples at ``rows`` as one global batch."""
        images = examples.images[rows].to(self.device, self.dtype)
        keys = [f"{examples.shard}/{row}" for row in rows.tolist()]
        return Batch(images, self.targets(examples.labels[rows], examples.classes), keys, len(rows), step)


def stream(examples: Examples, plan: Plan, encoding: Encoding, start: int, stop: int) -> Iterator[Batch]:
    """Training batches from update ``start`` to before ``stop``, in the plan's order."""
    for step, rows in plan.batches(start, stop):
        yield encoding.batch(examples, rows, step)


def evaluation_batches(examples: Examples, encoding: Encoding, most: int) -> Iterator[tuple[Batch, Tensor]]:
    """Fixed batches in key order with their labels: the same on any number of ranks."""
    for part in even_batches(len(examples), most):
        rows = torch.arange(part.start, part.stop)
        yield encoding.batch(examples, rows, 0), examples.labels[rows]
