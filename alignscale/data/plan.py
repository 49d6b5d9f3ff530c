"""The order of examples.

Pure functions, so that any process can say which examples a step reads, before and after a resume.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alignscale.initial import Stream, permutation


@dataclass(frozen=True)
class Layout:
    """How examples lie that cannot be had in any order at no cost: ``shards`` holds each shard's number of them.

    streams: places that are read from in turn. block: neighbours that are mixed within a stream.
    """

    shards: tuple[int, ...]
    streams: int
    block: int

    def epoch(self, seed: int, epoch: int) -> Tensor:
        """An order of range(sum(shards)), int64, that needs about ``streams`` shards at a time.

        The shards, one after the other in an order of the epoch's own, are cut into ``streams`` equal pieces; each
        piece is mixed block by block; then the pieces give one example each in turn. Nothing else decides it.
        """
        starts = torch.tensor([0, *itertools.accumulate(self.shards)])
        chosen = permutation(seed, Stream.ORDER, 1, len(self.shards), draw=epoch).tolist()
        places = torch.cat([torch.arange(*starts[index : index + 2].tolist()) for index in chosen])
        pieces, total = min(self.streams, len(places)), len(places)
        bounds = torch.tensor([total * index // pieces for index in range(pieces + 1)])
        turn = permutation(seed, Stream.ORDER, 2, total, draw=epoch).argsort()  # a random key of each place
        piece = torch.repeat_interleave(torch.arange(pieces), bounds.diff())
        block = (torch.arange(total) - bounds[piece]) // self.block
        mixed = torch.argsort((piece * (total // self.block + 1) + block) * total + turn)
        within = torch.arange(total) - bounds[piece]
        return places[mixed[torch.argsort(within * pieces + piece)]]


@dataclass(frozen=True)
class Plan:
    """Epochs in batches of ``batch_size``, each epoch in an order of its own; its last batch may be partial.

    layout: None for examples that can be had in any order.
    """

    examples: int
    batch_size: int
    seed: int
    layout: Layout | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch, the partial one counted."""
        return -(-self.examples // self.batch_size)

    def epoch(self, epoch: int) -> Tensor:
        """The order of an epoch, int64 (examples,): each example once."""
        if self.layout is not None:
            return self.layout.epoch(self.seed, epoch)
        return permutation(self.seed, Stream.ORDER, 0, self.examples, draw=epoch)

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Update index and example indices of the steps from ``start`` to before ``stop``."""
        for epoch, steps in itertools.groupby(range(start, stop), lambda step: step // self.steps_per_epoch):
            order = self.epoch(epoch)
            for step in steps:
                place = step % self.steps_per_epoch * self.batch_size
                yield step, order[place : place + self.batch_size]


def even_batches(examples: int, most: int) -> list[slice]:
    """range(examples) in key order as the fewest batches of at most ``most``, whose sizes differ by at most one."""
    count = -(-examples // most)
    bounds = [examples * index // count for index in range(count + 1)]
    return [slice(low, high) for low, high in itertools.pairwise(bounds)]
