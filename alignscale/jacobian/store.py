"""A cache as training reads it: opened and checked once, then the rows of each batch, fetched while another is trained.

It stands alone because what is wrong with a cache must be an error here: never wrong training.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignscale.jacobian.files import CacheError, Mapped
from alignscale.jacobian.form import Form, Rows
from alignscale.jacobian.identity import file_of, made
from alignscale.nets.network import Network
from alignscale.types import Batch

INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Wanted = Mapping[str, tuple[Tensor, Tensor]]
"""Shard -> rows and checksums of its examples, (N,) int64 each, in the order of rows."""


def missing(folder: Path, wanted: Wanted, views: int) -> list[tuple[str, int, int]]:
    """Shard, view and number of examples of each file that is not there."""
    every = [(shard, view, len(wanted[shard][0])) for shard in wanted for view in range(views)]
    return [one for one in every if not (folder / file_of(*one[:2])).exists()]


class Store:
    """The rows of a cache by example and view."""

    def __init__(
        self, folder: Path, net: Network, form: Form, wanted: Wanted, views: int, tiers: Mapping[str, str],
        device: torch.device, verify: bool,
    ) -> None:  # fmt: skip
        """tiers: of each tensor of a row, ``device``, ``host`` or ``disk``. verify: the checksums of all files.

        Raises CacheError where a file or a row is missing, damaged or of other examples.
        """
        self.net, self.form, self.device = net, form, device
        lacking = missing(folder, wanted, views)
        if lacking:
            shard, view, _ = lacking[0]
            raise CacheError(
                f"{folder}: lacks {len(lacking)} of {views * len(wanted)} files, the first for {shard} in view {view}; "
                f"{made()}"
            )
        self.files: dict[tuple[str, int], tuple[np.ndarray[Any, Any], Rows]] = {}
        for shard in wanted:
            for view in range(views):
                path = folder / file_of(shard, view)
                tensors = Mapped(path, f"delete it, and {made()}", verify).tensors
                rows = _matching(path, tensors.pop("rows"), tensors.pop("sums"), wanted[shard])
                self.files[shard, view] = rows, {name: self._kept(one, tiers[name]) for name, one in tensors.items()}

    def _kept(self, tensor: Tensor, tier: str) -> Tensor:
        if tier == "device":
            return tensor.to(self.device, copy=True)
        if tier == "host":
            return tensor.pin_memory() if self.device.type == "cuda" else tensor.clone()
        return tensor

    def attached(self, steps: Iterator[tuple[int, list[Batch]]]) -> Iterator[tuple[int, list[Batch]]]:
        """The same batches with what the cache holds of them, which a thread fetches while another step is made."""
        with ThreadPoolExecutor(1) as pool:
            waiting: tuple[int, list[Batch], Future[list[Rows]]] | None = None
            for step, parts in steps:
                now, waiting = waiting, (step, parts, pool.submit(self._fetched, parts))
                if now:
                    yield now[0], self._joined(now[1], now[2].result())
            if waiting:
                yield waiting[0], self._joined(waiting[1], waiting[2].result())

    def _fetched(self, parts: list[Batch]) -> list[Rows]:
        return [self.fetch(one) for one in parts]

    def of(self, batch: Batch) -> Batch:
        """A batch with what the cache holds of it. Raises CacheError if that is nothing."""
        return self._joined([batch], [self.fetch(batch)])[0]

    def fetch(self, batch: Batch) -> Rows:
        """A batch's rows, as they are kept."""
        if not batch.keys:  # as a rank without examples has it
            return {name: one[:0] for name, one in next(iter(self.files.values()))[1].items()}
        keys = [key.rpartition("/") for key in batch.keys]
        shards = np.array([key[0] for key in keys])
        rows = np.array([int(key[2]) for key in keys], dtype=np.int64)
        found: list[tuple[np.ndarray[Any, Any], Rows]] = []
        for shard in dict.fromkeys(shards.tolist()):
            if (shard, batch.view) not in self.files:
                raise CacheError(f"the cache has no examples of {shard} in view {batch.view}; {made()}")
            places = np.flatnonzero(shards == shard)
            known, tensors = self.files[shard, batch.view]
            at = np.searchsorted(known, rows[places]).clip(max=len(known) - 1)
            if not np.array_equal(known[at], rows[places]):
                raise CacheError(f"the cache lacks examples of {shard} in view {batch.view}; {made()}")
            found.append((places, {name: _take(one, at) for name, one in tensors.items()}))
        if len(found) == 1:
            return found[0][1]
        order = np.argsort(np.concatenate([places for places, _ in found]))
        return {name: _take(_joint([one[name] for _, one in found]), order) for name in found[0][1]}

    def _joined(self, batches: list[Batch], rows: list[Rows]) -> list[Batch]:
        placed = [{name: one.to(self.device, non_blocking=True) for name, one in each.items()} for each in rows]
        pairs = zip(batches, placed, strict=True)
        return [replace(batch, cached=self.form.cached(self.net, each, batch.images)) for batch, each in pairs]


def _matching(path: Path, rows: Tensor, sums: Tensor, wanted: tuple[Tensor, Tensor]) -> np.ndarray[Any, Any]:
    """The rows of a file, which must have all that are wanted, of the same examples."""
    at = torch.searchsorted(rows, wanted[0]).clamp(max=len(rows) - 1)
    lacking = wanted[0][rows[at] != wanted[0]]
    if len(lacking):
        raise CacheError(
            f"{path}: lacks {len(lacking)} of the {len(wanted[0])} training examples, the first in row "
            f"{int(lacking[0])}; delete it, and {made()}"
        )
    others = wanted[0][sums[at] != wanted[1]]
    if len(others):
        raise CacheError(
            f"{path}: was made of other data: {len(others)} examples differ, the first in row {int(others[0])}; use "
            f"another jacobian.dir, and {made()}"
        )
    return rows.numpy()


def _take(tensor: Tensor, at: np.ndarray[Any, Any]) -> Tensor:
    """The rows ``at`` of a tensor. On the CPU numpy's, which takes one thread from the step beside it, not all."""
    plain = tensor.view(INTS[tensor.dtype.itemsize])
    if tensor.device.type != "cpu":
        return plain[torch.from_numpy(at).to(tensor.device)].view(tensor.dtype)
    return torch.from_numpy(plain.numpy().take(at, axis=0)).view(tensor.dtype)


def _joint(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.view(INTS[part.dtype.itemsize]) for part in parts]).view(parts[0].dtype)
