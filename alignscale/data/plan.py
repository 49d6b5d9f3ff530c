"""The order of examples.

Pure functions, so that any process can say which examples a step reads, before and after a resume.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from alignscale.initial import Stream, permutation


@dataclass(frozen=True)
class Plan:
    """Epochs in batches of ``batch_size``, each epoch in an order of its own; its last batch may be partial."""

    examples: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch, the partial one counted."""
        return -(-self.examples // self.batch_size)

    def epoch(self, epoch: int) -> Tensor:
        """The order of an epoch, int64 (examples,): each example once."""
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
