"""A cache as training reads it: opened and checked once, then the rows of each batch, fetched while another is trained.

It stands alone because what is wrong with a cache must be an error here: never wrong training.
"""

import itertools
import resource
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignscale.jacobian.files import CacheError, Mapped
from alignscale.jacobian.form import Form, Layout, Rows, reads_bits
from alignscale.jacobian.identity import MADE, file_of
from alignscale.nets.network import Network
from alignscale.types import Batch

EXPLICIT = ("jacobian", "scale")
INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Wanted = Mapping[str, tuple[Tensor, Tensor]]
"""Shard -> rows and checksums of its examples, (N,) int64 each, in the order of rows."""


def missing(folder: Path, wanted: Wanted, views: int) -> list[tuple[str, int, int]]:
    """Shard, view and number of examples of each file that is not there."""
    every = [(shard, view, len(wanted[shard][0])) for shard in wanted for view in range(views)]
    return [one for one in every if not (folder / file_of(*one[:2])).exists()]


class Store:
    """The rows of a cache by example and view.

    What is in memory is one table of all examples and views; what is on disk stays a table for each file.
    """

    def __init__(
        self, folder: Path, net: Network, form: Form, wanted: Wanted, views: int, tiers: Mapping[str, str],
        device: torch.device, verify: bool, layout: Layout, seal: str, alive: Callable[[], None],
    ) -> None:  # fmt: skip
        """tiers: of each tensor of a row, ``device``, ``host`` or ``disk``. verify: the checksums of all files.

        layout: of a row. seal: of the cache. alive: called for each file.

        Raises CacheError where a file or a row is missing, damaged or of other examples.
        """
        self.net, self.form, self.device = net, form, device
        self.pinned = device.type == "cuda"
        self.copies = torch.cuda.Stream(device, priority=-1) if self.pinned else None
        lacking = missing(folder, wanted, views)
        if lacking:
            shard, view, _ = lacking[0]
            raise CacheError(
                f"{folder}: lacks {len(lacking)} of {views * len(wanted)} files, the first for {shard} in view {view}; "
                f"{MADE}"
            )
        _allow_files(len(wanted) * views)
        self.rows: dict[tuple[str, int], np.ndarray[Any, Any]] = {}
        self.starts: dict[tuple[str, int], int] = {}
        self.inside: dict[tuple[str, int], np.ndarray[Any, Any]] = {}
        self.tables: Rows = {}
        self.files: dict[tuple[str, int], Rows] = {}
        total = views * sum(len(rows) for rows, _ in wanted.values())
        for place in ((shard, view) for shard in wanted for view in range(views)):
            path = folder / file_of(*place)
            alive()
            mapped = Mapped(path, f"delete it, and {MADE}", verify)
            tensors = mapped.tensors
            _check_belongs(mapped, {"cache": seal, "shard": place[0], "view": str(place[1])}, layout)
            at = _matching(path, tensors.pop("rows"), tensors.pop("sums"), wanted[place[0]])
            start = self.starts[place] = sum(len(rows) for rows in self.rows.values())
            self.rows[place] = wanted[place[0]][0].numpy()
            self.files[place] = {name: one for name, one in tensors.items() if tiers[name] == "disk"}
            self.inside[place] = at
            for name in tensors.keys() - self.files[place].keys():
                one = tensors[name]
                if name not in self.tables:
                    where = self.device if tiers[name] == "device" else torch.device("cpu")
                    self.tables[name] = torch.empty(total, *one.shape[1:], dtype=one.dtype, device=where)
                self.tables[name][start : start + len(at)] = _take(one, at)

        tables = [table for name, table in self.tables.items() if name.startswith(EXPLICIT)]
        whole = sum(name.startswith(EXPLICIT) for name in tiers) == len(tables)  # or some are on disk
        self.stays = bool(tables) and whole and all(one.device.type == self.device.type for one in tables)
        kept = [name for name, table in self.tables.items() if name.startswith("gates") and table.is_cuda]
        self.bits = set(kept if kept and reads_bits(net) and len(kept) == form.sites.count("gates") else ())

    def attached(self, steps: Iterator[tuple[int, list[Batch]]]) -> Generator[tuple[int, list[Batch]], None, None]:
        """The same batches with what the cache holds of them, which a thread fetches while another step is made."""
        with ThreadPoolExecutor(1) as pool:
            begun = ((step, parts, pool.submit(self._fetched, parts)) for step, parts in steps)
            for (step, parts, rows), _ in itertools.pairwise(itertools.chain[Any](begun, [None])):
                yield step, self._joined(parts, rows.result())

    def _fetched(self, parts: list[Batch]) -> list[Rows]:
        """Rows of the parts on the device: on a GPU by a stream of their own, which does not wait for the step's."""
        if self.copies is None:
            return [self.fetch(one) for one in parts]
        with torch.cuda.stream(self.copies):
            placed = [{name: self._sent(rows) for name, rows in self.fetch(one).items()} for one in parts]
        self.copies.synchronize()  # in this thread; the rows are there when the step asks for them
        return placed

    def _sent(self, rows: Tensor) -> Tensor:
        return (rows if rows.is_cuda else rows.pin_memory()).to(self.device, non_blocking=True)

    def of(self, batch: Batch) -> Batch:
        """A batch with what the cache holds of it. Raises CacheError if that is nothing."""
        return self._joined([batch], self._fetched([batch]))[0]

    def fetch(self, batch: Batch) -> Rows:
        """A batch's rows; of explicit Jacobians that are where they are used, the whole table and the places in it."""
        keys = [key.rpartition("/") for key in batch.keys]
        shards = np.array([key[0] for key in keys], dtype=object)
        rows = np.array([int(key[2]) for key in keys], dtype=np.int64)
        at = np.zeros(len(keys), dtype=np.int64)
        for shard in dict.fromkeys(shards.tolist()):
            place = (shard, batch.view)
            if place not in self.rows:
                raise CacheError(f"the cache has no examples of {shard} in view {batch.view}; {MADE}")
            known, own = self.rows[place], shards == shard
            found = np.searchsorted(known, rows[own]).clip(max=len(known) - 1)
            if not np.array_equal(known[found], rows[own]):
                raise CacheError(f"the cache lacks examples of {shard} in view {batch.view}; {MADE}")
            at[own] = self.starts[place] + found
        result: Rows = {}
        places = torch.from_numpy(at).to(self.device)  # once for all tables that are there
        for name, table in self.tables.items():
            if (name.startswith(EXPLICIT) and self.stays) or name in self.bits:
                result[name] = table
            elif table.is_cuda:
                result[name] = table.view(INTS[table.dtype.itemsize])[places].view(table.dtype)
            else:
                result[name] = _take(table, at, self.pinned)
        if any(self.files.values()):
            result |= self._from_disk(at)
        return result | ({"at": places} if self.stays else {}) | ({"bits": places} if self.bits else {})

    def _from_disk(self, at: np.ndarray[Any, Any]) -> Rows:
        """The rows ``at`` of what is on disk, file by file."""
        result: Rows = {}
        for place, tensors in self.files.items():
            own = (at >= self.starts[place]) & (at < self.starts[place] + len(self.rows[place]))
            where = self.inside[place][at[own] - self.starts[place]]
            any_own = own.any() or not result
            found = {name: _take(one, where, self.pinned) for name, one in tensors.items()} if any_own else {}
            if own.all():
                return found
            for name, part in found.items():
                whole = result.setdefault(name, torch.empty(len(at), *part.shape[1:], dtype=part.dtype))
                whole.view(INTS[part.dtype.itemsize]).numpy()[own] = part.view(INTS[part.dtype.itemsize]).numpy()
        return result

    def _joined(self, batches: list[Batch], rows: list[Rows]) -> list[Batch]:
        if self.copies is not None:
            for one in (tensor for each in rows for tensor in each.values()):  # whose memory the step still reads
                one.record_stream(torch.cuda.current_stream(self.device))
        pairs = zip(batches, rows, strict=True)
        return [replace(batch, cached=self.form.cached(self.net, each, batch.images)) for batch, each in pairs]


def _allow_files(count: int) -> None:
    """Let this process keep that many files open beside its others, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = count + 512 if hard == resource.RLIM_INFINITY else min(count + 512, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _check_belongs(mapped: Mapped, expected: dict[str, str], layout: Layout) -> None:
    """Raises CacheError unless a file is of this cache, shard and view, and has the rows of its form."""
    found = {name: mapped.about.get(name) for name in expected}
    rows = {name: (one.dtype, tuple(one.shape[1:])) for name, one in mapped.tensors.items()}
    wanted = {name: (dtype, tuple(shape)) for name, (dtype, shape) in layout.items()}
    if found != expected or {name: row for name, row in rows.items() if name not in ("rows", "sums")} != wanted:
        raise CacheError(
            f"{mapped.path}: expected a file of {expected}, found one of another cache, shard, view or form: {found}; "
            f"delete it, and {MADE}"
        )


def _matching(path: Path, rows: Tensor, sums: Tensor, wanted: tuple[Tensor, Tensor]) -> np.ndarray[Any, Any]:
    """Where in a file the wanted rows are: it must have them all, of the same examples."""
    at = torch.searchsorted(rows, wanted[0]).clamp(max=len(rows) - 1)
    lacking = wanted[0][rows[at] != wanted[0]]
    if len(lacking):
        raise CacheError(
            f"{path}: lacks {len(lacking)} of the {len(wanted[0])} training examples, the first in row "
            f"{int(lacking[0])}; delete it, and {MADE}"
        )
    others = wanted[0][sums[at] != wanted[1]]
    if len(others):
        raise CacheError(
            f"{path}: was made of other data: {len(others)} examples differ, the first in row {int(others[0])}; use "
            f"another jacobian.dir, and {MADE}"
        )
    return at.numpy()


def _take(tensor: Tensor, at: np.ndarray[Any, Any], pinned: bool = False) -> Tensor:
    """The rows ``at`` of a tensor on the CPU: numpy's, which takes one thread from the step beside it, not all.

    pinned: a GPU makes the step, so all threads are free, and the rows go to memory that it reads by itself.
    """
    plain = tensor.view(INTS[tensor.dtype.itemsize])
    if pinned:
        rows = torch.empty(len(at), *plain.shape[1:], dtype=plain.dtype, pin_memory=True)
        lanes = torch.int64 if plain[0].nbytes % 8 == 0 else plain.dtype  # short rows are shared out over threads whole
        source, target = (one.flatten(1).view(lanes) for one in (plain, rows))
        torch.index_select(source, 0, torch.from_numpy(at), out=target)
        return rows.view(tensor.dtype)
    return torch.from_numpy(plain.numpy().take(at, axis=0)).view(tensor.dtype)
