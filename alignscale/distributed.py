"""Ranks: which process of how many this is, and what they do together. The only reader of torchrun's environment.

It stands alone so that all else works on one rank or on many without asking which launcher started it.
"""

import atexit
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from alignscale.address import interface, own_address
from alignscale.choices import ConfigError
from alignscale.config import difference
from alignscale.liveness import BEAT, Heart, RankError, of_another

Made = TypeVar("Made")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one network together; alone, every method returns at once."""

    rank: int = 0
    size: int = 1
    local: int = 0
    heart: Heart | None = None
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks to the user, and writes all files but its share of a checkpoint."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This rank's places of ``count``: as many as any other's within one, and none where there are too few."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor's sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def least(self, tensor: Tensor) -> Tensor:
        """The least of each number over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self.group)
        return tensor

    def totals(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Sums over all ranks in float64: the same on each."""
        return (
            self.sum(torch.tensor(values, dtype=torch.float64, device=device)).tolist() if self.size > 1 else [*values]
        )

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor on all, in place."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def gather(self, part: Tensor) -> Tensor:
        """The equal parts of all ranks, one after the other along axis 0."""
        return part if self.size == 1 else self.begin_gather(part)()

    def begin_gather(self, part: Tensor) -> Callable[[], Tensor]:
        """Start a ``gather``; what is returned waits for the end of it."""
        whole = part.new_empty(self.size * len(part), *part.shape[1:])
        work = dist.all_gather_into_tensor(whole, part, group=self.group, async_op=True)
        return lambda: (work.wait(), whole)[1]

    def begin_scatter(self, parts: Tensor) -> Callable[[], Tensor]:
        """Start to give each rank its of the equal parts, along axis 0, of the sum over ranks; as ``begin_gather``."""
        own = parts.new_empty(len(parts) // self.size, *parts.shape[1:])
        work = dist.reduce_scatter_tensor(own, parts, group=self.group, async_op=True)
        return lambda: (work.wait(), own)[1]

    def objects(self, own: Made) -> list[Made]:
        """An object of each rank."""
        found = [own] * self.size
        if self.size > 1:
            dist.all_gather_object(found, own, group=self.group)
        return found

    def together(self, work: Callable[[], Made]) -> Made:
        """What ``work`` returns, on each rank its own; where it fails on one rank, its error is raised on all.

        A rank that is at it is not taken for one that hangs, however long it takes; others wait for it, as for all.
        """
        made, problem = None, None
        try:
            with self.busy():
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

    def alike(self, what: str, own: dict[str, Any]) -> None:
        """Raise ConfigError on all ranks where ``own`` is not the same on each, as by commands of their own."""
        first, *others = self.objects(own)
        for rank, other in enumerate(others, 1):
            if found := difference(first, other):
                raise ConfigError(
                    f"expected the same {what} on all ranks, found on rank 0 -> on rank {rank}: {'; '.join(found)}; "
                    "give the same command, and the same files, on each machine"
                )

    def beat(self, step: int, phase: str) -> None:
        """Note where this rank is, for the message of one that waits for it in vain."""
        if self.heart is not None:
            self.heart.at(f"step {step} ({phase})")

    def busy(self) -> AbstractContextManager[None]:
        """Work of this rank's own inside, which may take any time."""
        return self.heart.busy() if self.heart else nullcontext()

    def still(self) -> None:
        """Note that this rank has got on where it is."""
        if self.heart is not None:
            self.heart.still()

    def explained(self, problem: Exception) -> Exception:
        """The error to raise for one that broke off a step: it tells the other ranks, or it tells of them."""
        if self.heart is None or self.size == 1 or getattr(problem, "of_all_ranks", False):
            return problem
        return self.heart.explained(problem)


ALONE = Ranks()
"""One process."""


LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun sets."""


def launched() -> Ranks | None:
    """The ranks that torchrun, or whoever set its variables, started; None for a process that was started alone."""
    rank, size, local, *where = (os.environ.get(name, "") for name in LAUNCHED)
    if not (all(where) and all(number.isdecimal() for number in (rank, size, local)) and int(rank) < int(size)):
        return None
    return Ranks(int(rank), int(size), int(local))


def check_launched() -> None:
    """Raise ConfigError for a part of torchrun's variables, with which each of many ranks would train alone."""
    found = {name: os.environ[name] for name in LAUNCHED if name in os.environ}
    if launched() is None and "RANK" in found and found.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"the environment: expected {', '.join(LAUNCHED)} with RANK below WORLD_SIZE, found "
            f"{', '.join('='.join(one) for one in found.items())}; start with torchrun, which sets them, or unset RANK"
        )


def alone_beside() -> str:
    """What to say to one of the tasks of srun or mpirun that know nothing of each other."""
    names = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    found = next((name for name in names if os.environ.get(name, "1") != "1"), None)
    if launched() is not None or found is None:
        return ""
    return f"; {found}={os.environ[found]}: tasks that shall train together want torchrun, or launch/submit.py"


def beside() -> int:
    """How many ranks this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def restarts() -> int:
    """How often torchrun may start this process again, or SLURM has."""
    return max(int(os.environ.get(name, "0")) for name in ("TORCHELASTIC_MAX_RESTARTS", "SLURM_RESTART_COUNT"))


_JOINED: list[tuple[Ranks, Any]] = []
"""The one group of this process, which the runs of a grid share: DeepSpeed keeps groups of its own within it."""
_RUNS = itertools.count()
"""Each run tells other ranks under a name of its own: what failed in one is over in the next."""


def _missing(ranks: Ranks, timeout: float, problem: Exception) -> RankError:
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if "EADDRINUSE" in str(problem):
        return RankError(f"rank {ranks.rank}: expected a free port at {where}, found it in use; choose another one")
    return RankError(
        f"rank {ranks.rank}: expected all {ranks.size} ranks at {where} within engine.timeout={timeout:g} s, "
        f"found: {' '.join(str(problem).split())[:160]}; start them all, or wait longer"
    )


def _group(backend: str, timeout: float) -> tuple[Ranks, Any]:
    """The ranks, and a store that they share."""
    if _JOINED:
        return _JOINED[0]
    ranks, limit = launched(), timedelta(seconds=timeout)
    if ranks is None:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        ranks, store = Ranks(), dist.HashStore()  # type: ignore[attr-defined]
    else:
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=limit))  # type: ignore[attr-defined]
        except (RuntimeError, ValueError) as problem:
            raise _missing(ranks, timeout, problem) from problem
        store = _of_this_start(store)
        if ranks.size > beside():
            _find_interface()
    beats = dist.PrefixStore("alignscale", store.clone())  # type: ignore[attr-defined] # a client is for one at a time
    group = dist.PrefixStore("group", store)  # type: ignore[attr-defined]
    try:
        dist.init_process_group(backend, store=group, rank=ranks.rank, world_size=ranks.size, timeout=limit)
    except RuntimeError as problem:
        if ranks.size == 1 or not of_another(problem):
            raise
        raise _missing(ranks, timeout, problem) from problem
    atexit.register(dist.destroy_process_group)
    _JOINED.append((ranks, beats))
    return ranks, beats


def _of_this_start(store: Any) -> Any:
    """The store without what ranks have left there that torchrun has started before: it may keep one for all starts."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise ConfigError(
            "--max-restarts: expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --rdzv-backend=c10d on several "
            "machines, or ranks would read what those before them left; launch/torchrun.sh has both, or give "
            "--max-restarts=0"
        )
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]


def _find_interface() -> None:
    """Have gloo use the network that leads to the first rank, not that which this machine's own name stands for."""
    with suppress(OSError):  # of a name that nobody knows, which the group will say
        own = own_address(os.environ["MASTER_ADDR"])
        if name := interface(own) if own else "":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def note_said() -> None:
    """Let the other ranks know that the first has spoken."""
    with suppress(RuntimeError):  # the store is gone
        if _JOINED:
            _JOINED[0][1].set("said", "")


def outlive_first(seconds: float) -> None:
    """Wait until the first rank has spoken, and its process has ended, as torchrun shows that which ends first."""
    if not _JOINED:
        time.sleep(seconds)
        return
    with suppress(RuntimeError):  # the store has ended with the first rank's process, or the time is over
        _JOINED[0][1].wait(["said"], timedelta(seconds=seconds))
        time.sleep(1.0)


@contextmanager
def joined(device: torch.device, timeout: float) -> Iterator[Ranks]:
    """The process group of all ranks, or of this process alone; collectives fail after ``timeout`` seconds."""
    ranks, store = _group("nccl" if device.type == "cuda" else "gloo", timeout)
    store = dist.PrefixStore(f"run {next(_RUNS)}", store)  # type: ignore[attr-defined]
    heart = Heart(store, ranks.rank, ranks.size, timeout)
    ranks = replace(ranks, heart=heart)
    heart.start()
    try:
        yield ranks
    except Exception as problem:
        if not of_another(problem):
            raise
        raise ranks.explained(problem) from problem
    finally:
        heart.ended.set()
        heart.join(3 * BEAT)  # a thread inside of the store when Python ends takes the process down with an abort
