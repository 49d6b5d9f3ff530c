"""Ranks: which process of how many this is, and what they do together. The only reader of torchrun's environment.

It stands alone so that all else works on one rank or on many without asking which launcher started it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Made = TypeVar("Made")


class RankError(RuntimeError):
    """Another rank ended or did not answer in time; the message says where each rank was. told: by that rank."""

    def __init__(self, message: str, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one network together; alone, every method returns at once."""

    rank: int = 0
    size: int = 1
    local: int = 0
    store: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and speaks to the user."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This rank's places of ``count``: as many as any other's within one, and none where there are too few."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor's sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def totals(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Sums over all ranks in float64: the same on each."""
        return (
            self.sum(torch.tensor(values, dtype=torch.float64, device=device)).tolist() if self.size > 1 else [*values]
        )

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor on all, in place."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def gather(self, part: Tensor) -> Tensor:
        """The equal, flat parts of all ranks, one after the other."""
        if self.size == 1:
            return part
        whole = part.new_empty(self.size * len(part))
        dist.all_gather_into_tensor(whole, part)
        return whole

    def objects(self, own: Made) -> list[Made]:
        """An object of each rank."""
        found = [own] * self.size
        if self.size > 1:
            dist.all_gather_object(found, own)
        return found

    def together(self, work: Callable[[], Made]) -> Made:
        """What ``work`` returns, on each rank its own; where it fails on one rank, its error is raised on all."""
        made, problem = None, None
        try:
            made = work()
        except Exception as error:
            if self.size == 1:
                raise
            problem = error
        for found in self.objects(problem):
            if found is not None:
                found.of_all_ranks = True  # type: ignore[attr-defined]
                raise found
        return made  # type: ignore[return-value]

    def of_first(self, work: Callable[[], Made]) -> Made:
        """What ``work`` returns on the first rank, which alone does it, on all; its error is raised on all."""
        made = self.together(lambda: work() if self.first else None)
        box = [made]
        if self.size > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]  # type: ignore[return-value]

    def beat(self, step: int, phase: str) -> None:
        """Tell the others where this rank is: for the message of the one that waits in vain."""
        if self.store is not None:
            self.store.set(f"beat/{self.rank}", f"{step} {phase}")

    def explained(self, problem: Exception) -> Exception:
        """The error to raise for one that broke off a step: it tells the other ranks, or it tells of them."""
        if self.size == 1 or getattr(problem, "of_all_ranks", False):
            return problem
        if not isinstance(problem, dist.DistError) and type(problem) is not RuntimeError:
            self.store.set("failed", f"rank {self.rank}: {problem}")
            problem.args = (f"rank {self.rank}: {problem}",)
            return problem
        places: dict[str, list[str]] = {}
        failed = None
        for rank in range(self.size):
            try:
                failed = failed or (self.store.get("failed").decode() if self.store.check(["failed"]) else None)
                seen = self.store.get(f"beat/{rank}").decode() if self.store.check([f"beat/{rank}"]) else "0 start"
            except RuntimeError:  # the store went with the rank that held it
                seen = "? unknown"
            places.setdefault(seen, []).append(str(rank))
        where = "; ".join(f"rank {', '.join(ranks)} last seen at step {place}" for place, ranks in places.items())
        cause = " ".join(str(problem).split())[:200]
        return RankError(
            failed
            or f"rank {self.rank} of {self.size} has lost another one, which ended or was too slow: {where}. Look for "
            f"its own message; the same command goes on from the last checkpoint ({cause})",
            told=failed is not None,
        )


def launched() -> Ranks | None:
    """The ranks that torchrun, or whoever set its variables, started; None for a process that was started alone."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return Ranks(*(int(os.environ[name]) for name in names[:3])) if all(name in os.environ for name in names) else None


@contextmanager
def joined(device: torch.device, timeout: float) -> Iterator[Ranks]:
    """The process group of all ranks, or of this process alone; collectives fail after ``timeout`` seconds."""
    ranks, limit = launched(), timedelta(seconds=timeout)
    if ranks is None:
        ranks, store = Ranks(), dist.HashStore()  # type: ignore[attr-defined]
    else:
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))  # type: ignore[attr-defined]
    backend = "nccl" if device.type == "cuda" else "gloo"
    group, beats = (dist.PrefixStore(name, store) for name in ("group", "alignscale"))  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=group, rank=ranks.rank, world_size=ranks.size, timeout=limit)
    yield Ranks(ranks.rank, ranks.size, ranks.local, beats)
    dist.destroy_process_group()  # not after an error, where other ranks may be gone
