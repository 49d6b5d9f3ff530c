"""Width sharding: which rank has which units of a network, and what the ranks of one network tell each other.

It stands alone so that layers, networks and rules ask for an exchange and never for a process group. A hidden layer
keeps its own rows and reads all units of the site below, so an exchange is an all-gather of activations on the way up
and a reduce-scatter of signals on the way down. The readout keeps the columns of its own units: it sums logits (B,
classes) over the ranks, and its signal goes down where it is.
"""

import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alignscale.choices import ConfigError
from alignscale.distributed import ALONE, Made, Ranks

Turns = Generator[None, None, Made]
"""Work that stops where it has begun an exchange, for other work to go on; see ``in_turn``."""
UnderWay = list[Callable[[], Tensor]]
"""What waits for the end of an exchange that has begun, and nothing else."""
UNITS = 1
"""The axis of units in activations (B, units, ...)."""


@dataclass(frozen=True)
class Share:
    """What this rank has of a tensor: ``place`` of the ``units`` along ``axis``."""

    axis: int
    place: slice
    units: int

    def of(self, whole: Tensor) -> Tensor:
        """This rank's part of the whole tensor."""
        return whole.narrow(self.axis, self.place.start, self.place.stop - self.place.start)

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape of this rank's part."""
        return (*whole[: self.axis], self.place.stop - self.place.start, *whole[self.axis + 1 :])

    def whole(self, own: Sequence[int]) -> tuple[int, ...]:
        """The shape of the whole of a tensor of which this rank has a part of shape ``own``."""
        return (*own[: self.axis], self.units, *own[self.axis + 1 :])


@dataclass(frozen=True)
class Width:
    """The ranks over which the ``units`` of every hidden site are shared out; alone, every method returns at once.

    overlap: whether the halves of a batch take turns, so that one computes while the other's exchange is under way.
    """

    ranks: Ranks = ALONE
    units: int = 0
    overlap: bool = False

    def share(self, axis: int) -> Share | None:
        """This rank's part of a tensor whose ``axis`` has the units of a site; None where it has all of them."""
        return Share(axis, self.ranks.part(self.units), self.units) if self.ranks.size > 1 else None

    @property
    def sizes(self) -> list[int]:
        """How many units each rank has: equal within one."""
        places = [replace(self.ranks, rank=rank).part(self.units) for rank in range(self.ranks.size)]
        return [place.stop - place.start for place in places]

    def gather(self, own: Tensor) -> Turns[Tensor]:
        """Each rank's activations (B, own units, ...) -> those of all units (B, units, ...)."""
        if self.ranks.size == 1:
            return own
        under_way: UnderWay = []
        begun = _Begin.apply(own, self, under_way)
        yield
        return _End.apply(begun, self, under_way)

    def scatter(self, partial: Tensor) -> Turns[Tensor]:
        """Each rank's part of a sum (B, units, ...) -> the sum over ranks at this rank's units; no graph."""
        if self.ranks.size == 1:
            return partial
        end = self.begin_scatter(partial)
        yield
        return end()

    def begin_scatter(self, partial: Tensor) -> Callable[[], Tensor]:
        """Start a ``scatter``; what is returned waits for the end of it."""
        own = self.sizes[self.ranks.rank]
        if partial.numel() == 0:
            return lambda: partial.narrow(UNITS, 0, own)
        parts = [_padded(part, max(self.sizes)) for part in partial.split(self.sizes, UNITS)]
        end = self.ranks.begin_scatter(torch.cat(parts))
        return lambda: end().narrow(UNITS, 0, own).contiguous()

    def begin_gather(self, own: Tensor) -> Callable[[], Tensor]:
        """Start a ``gather`` without a graph; what is returned waits for the end of it."""
        if own.numel() == 0:
            return lambda: own.new_empty(_at(own, self.units))
        end = self.ranks.begin_gather(_padded(own, max(self.sizes)).contiguous())

        def whole() -> Tensor:
            parts = end().view(self.ranks.size, len(own), -1, *own.shape[2:])
            return torch.cat([part.narrow(UNITS, 0, size) for part, size in zip(parts, self.sizes, strict=True)], UNITS)

        return whole

    def sum(self, partial: Tensor) -> Tensor:
        """Each rank's part of a sum -> the sum, the same on all; its gradient is each part's."""
        return partial if self.ranks.size == 1 else _Sum.apply(partial, self.ranks)


ALL_UNITS = Width()
"""Of a network that is not shared out."""


def _padded(own: Tensor, most: int, axis: int = UNITS) -> Tensor:
    """Units of 0 added up to ``most``: collectives want equal parts."""
    missing = most - own.shape[axis]
    return torch.cat([own, own.new_zeros(_at(own, missing, axis))], axis) if missing else own


def _at(tensor: Tensor, size: int, axis: int = UNITS) -> tuple[int, ...]:
    """The shape of a tensor with another ``size`` along ``axis``."""
    return (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])


def in_turn(works: Sequence[Turns[Made]]) -> list[Made]:
    """What each of ``works`` returns; each goes on to its next exchange, and then the next one does."""
    made: dict[int, Made] = {}
    while len(made) < len(works):
        for place, work in enumerate(works):
            if place not in made:
                try:
                    next(work)
                except StopIteration as end:
                    made[place] = end.value
    return [made[place] for place in range(len(works))]


class _Begin(torch.autograd.Function):
    """The begin of a gather, which is the end of its gradient's scatter; ``_End`` is the rest of both."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, width: Width, under_way: UnderWay) -> Tensor:
        ctx.under_way = under_way
        under_way.append(width.begin_gather(own))
        return own.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *nothing: Tensor) -> tuple[Tensor, None, None]:
        return ctx.under_way.pop()(), None, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, begun: Tensor, width: Width, under_way: UnderWay) -> Tensor:
        ctx.width, ctx.under_way = width, under_way
        return under_way.pop()()

    @staticmethod
    def backward(ctx: Any, *signal: Tensor) -> tuple[Tensor, None, None]:
        ctx.under_way.append(ctx.width.begin_scatter(signal[0]))
        return signal[0].new_empty(0), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, ranks: Ranks) -> Tensor:
        return ranks.sum(partial.clone()) if partial.numel() else partial.clone()

    @staticmethod
    def backward(ctx: Any, *error: Tensor) -> tuple[Tensor, None]:
        return error[0], None


@dataclass(frozen=True)
class Mesh:
    """All ranks of a run as width x data.

    width: this rank and those that have the other units of its network; neighbours, rank // K alike. data: this rank
    and those that have the same units and other examples, over which ZeRO partitions.
    """

    everyone: Ranks = ALONE
    data: Ranks = ALONE
    width: Width = ALL_UNITS

    @classmethod
    def of(cls, ranks: Ranks, width: int, units: int, overlap: bool = False) -> "Mesh":
        """``width`` ranks to a network of ``units`` in every hidden layer; a collective of all ranks.

        overlap: as ``Width`` has it.

        Raises ConfigError for a mesh that there cannot be.
        """
        check_mesh(ranks.size, width, units)
        if width == 1:
            return cls(ranks, ranks, Width(ALONE, units))
        seconds = None if ranks.heart is None else ranks.heart.timeout
        beside, same = _groups(ranks.size, width, seconds)
        data = replace(ranks, rank=ranks.rank // width, size=ranks.size // width, group=same)
        beside_it = replace(ranks, rank=ranks.rank % width, size=width, group=beside)
        return cls(ranks, data, Width(beside_it, units, overlap))

    def whole(self, own: Tensor, share: Share | None, to: int = 0) -> Tensor:
        """A tensor of this network on rank ``to``, from the ranks that have parts of it; elsewhere the part.

        Of what each has, it is the first one's. A collective of all ranks.
        """
        network, place = divmod(to, self.width.ranks.size)
        if self.data.rank != network or self.width.ranks.size == 1:
            return own
        if share is None:
            return self.width.ranks.broadcast(own.clone())
        sizes, axis = self.width.sizes, share.axis
        padded = _padded(own, max(sizes), axis).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes] if self.width.ranks.rank == place else None
        dist.gather(padded, parts, group=self.width.ranks.group, group_dst=place)
        if parts is None:
            return own
        return torch.cat([part.narrow(axis, 0, size) for part, size in zip(parts, sizes, strict=True)], axis)

    def part(self, whole: Tensor | None, share: Share | None, own: Tensor) -> Tensor:
        """This rank's part, of the shape, dtype and device of ``own``, of a tensor that the first rank has whole.

        Rank by rank, so that none but the first needs memory for the whole. A collective of all ranks.
        """
        if share is None:
            return self.everyone.broadcast(own.new_zeros(own.shape) if whole is None else whole.to(own).contiguous())
        found, low = own, 0
        for place, size in enumerate(self.width.sizes):
            part = own.new_zeros(_at(own, size, share.axis))
            if whole is not None:
                part.copy_(whole.narrow(share.axis, low, size))
            self.everyone.broadcast(part)
            found, low = part if place == self.width.ranks.rank else found, low + size
        return found


@functools.cache
def _groups(size: int, width: int, seconds: float | None) -> tuple[Any, Any]:
    """The process groups of this rank's network and of its units, kept as DeepSpeed keeps its own."""
    limit = None if seconds is None else timedelta(seconds=seconds)
    neighbours = [[*range(first, first + width)] for first in range(0, size, width)]
    alike = [[*range(place, size, width)] for place in range(width)]
    beside, same = (dist.new_subgroups_by_enumeration(ranks, timeout=limit)[0] for ranks in (neighbours, alike))
    return beside, same


def check_mesh(ranks: int, width: int, units: int) -> None:
    """Raise ConfigError, with the valid choices, unless ``ranks`` are some networks' of ``width`` ranks each."""
    if ranks % width == 0 and width <= units:
        return
    valid = ", ".join(str(number) for number in range(1, min(ranks, units) + 1) if ranks % number == 0)
    why = f"{ranks} ranks" if ranks % width else f"net.width={units}, as each rank has a row of every hidden layer"
    raise ConfigError(
        f"parallel.width={width}: expected one of {valid}, found {why}; start as many ranks as it divides, with "
        "torchrun --nproc-per-node, or choose another width"
    )
