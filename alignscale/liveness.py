"""What ranks tell each other of themselves: where each one is, that it lives, and why it ended.

It stands alone because it talks to the ranks' store and to nothing else: a rank that hangs answers no collective.
"""

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple

import torch.distributed as dist

BEAT = 2.0
"""Seconds from one sign of life of a rank to the next."""
LOST = 4
"""The exit status of a rank that has lost another one."""
NAMED = 8
"""How many ranks a message names."""


class RankError(RuntimeError):
    """Another rank ended or did not answer in time; the message says where each rank was.

    told: by a rank that says it. lost: it was, and did not end by an error of its own, so another start may mend it.
    """

    def __init__(self, message: str, told: bool = False, lost: bool = True) -> None:
        super().__init__(message)
        self.told, self.lost = told, lost


class Beat(NamedTuple):
    """A rank's last sign of life: which it was, how many phases had begun by then, and the one that it was in."""

    number: int
    phases: int
    place: str


def of_another(problem: Exception) -> bool:
    """Whether an error is of a collective that another rank broke off, and not of this rank's own."""
    return isinstance(problem, dist.DistError) or (type(problem) is RuntimeError and "gloo" in str(problem))


class Heart(threading.Thread):
    """Tells the other ranks every few seconds where this one is, also while it waits for them."""

    end: ClassVar[Callable[[int], object]] = staticmethod(os._exit)
    """Ends the process of a rank that waits too long; a scheduler's job first asks to be started again."""

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        super().__init__(daemon=True)
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.ended, self.counts, self.phases = threading.Event(), itertools.count(1), 0
        self.told = ""
        """What the first rank that failed has told: ``lost`` or ``own``, a space, and its message."""
        self.silent: set[int] = set()
        self.place, self.since = "the start", time.monotonic()

    def at(self, place: str) -> None:
        """Note the phase that the rank begins, as all do in the same order; it has ``timeout`` seconds for it."""
        self.phases += 1
        self.place, self.since = place, time.monotonic()

    def still(self) -> None:
        """Note that the rank has got on where it is."""
        self.since = time.monotonic()

    def run(self) -> None:
        """Until it is told to end.

        A rank that waits too long ends with its process: what it waits in listens to nothing.
        """
        threading.Thread(target=self._watch, daemon=True).start()
        while not self.ended.wait(BEAT):
            self.pulse()
            if time.monotonic() - self.since > self.timeout:
                message = f"no progress in {self.timeout:g} s at {self.place} ({self._whereabouts(self._beats())})"
                message = f"rank {self.rank} of {self.size}: {message}; engine.timeout says how long to wait"
                if self.tell("lost", message):
                    print(f"error: {message}", file=sys.stderr, flush=True)
                Heart.end(LOST)

    def _watch(self) -> None:
        """End the process where ``run`` does not: a store in a rank that is frozen answers nothing, and never fails."""
        while not self.ended.wait(BEAT):
            if time.monotonic() - self.since > self.timeout + 5 * BEAT:
                message = f"error: rank {self.rank} of {self.size}: no progress in {self.timeout:g} s at {self.place}"
                why = "rank 0, which keeps what the ranks tell each other, does not answer"
                print(f"{message}, and {why}; look at its machine", file=sys.stderr, flush=True)
                Heart.end(LOST)

    def pulse(self) -> None:
        """Tell where this rank is, and hear of one that failed."""
        with suppress(RuntimeError):  # the store went with the rank that held it
            self.store.set(f"beat/{self.rank}", f"{next(self.counts)} {self.phases} {self.place}")
            self.told = self.told or self._stored("told")
            if self.told:
                self.store.set(f"heard/{self.rank}", "")

    def tell(self, kind: str, message: str) -> bool:
        """Tell all ranks why this one ends; returns whether it is the first to."""
        own = f"{kind} {message}"
        with suppress(RuntimeError):  # there is no store any more, so each rank says it
            self.told = self.told or self.store.compare_set("told", "", own).decode()
            self._let_hear()
        return self.told in ("", own)

    def _let_hear(self) -> None:
        """The first rank's process may hold the store: all others that live are to have heard by its end."""
        until, others = time.monotonic() + 3 * BEAT, {*range(self.size)} - {self.rank} - self.silent
        while self.rank == 0 and any(not self.store.check([f"heard/{rank}"]) for rank in others):
            if time.monotonic() > until:
                break
            time.sleep(0.05)

    def explained(self, problem: Exception) -> Exception:
        """The error to raise for one that broke off a step: it tells the other ranks, or it tells of them."""
        if not of_another(problem):
            self.tell("own", f"rank {self.rank}: {problem}")
            self.pulse()
            if isinstance(problem, OSError) and problem.strerror:  # which its text is made of
                problem.strerror = f"rank {self.rank}: {problem.strerror}"
            else:
                problem.args = (f"rank {self.rank}: {problem}",)
            problem.of_one_rank = True  # type: ignore[attr-defined]
            return problem
        where = self._whereabouts(self._beats())  # a rank that failed by itself has said so by then
        cause = " ".join(str(problem).split())[:160]
        message = (
            f"rank {self.rank} of {self.size}: another rank ended ({where}). See its own message; the same command "
            f"goes on from the last checkpoint. ({cause})"
        )
        if self.tell("lost", message):
            return RankError(message)
        kind, _, told = self.told.partition(" ")
        return RankError(told, told=True, lost=kind == "lost")

    def _whereabouts(self, before: dict[int, Beat]) -> str:
        """Which ranks are silent, and which are behind the others, some seconds after ``before``."""
        for wait in (0, BEAT, BEAT):
            time.sleep(wait)
            self.pulse()
            if self.told:
                return ""  # nobody is to be told
        now = self._beats()
        if not now:
            return "rank 0 is gone, and with it what the ranks tell each other"
        furthest = max(beat.phases for beat in now.values())
        self.silent = {rank for rank, beat in now.items() if rank in before and beat.number == before[rank].number}
        behind = [rank for rank, beat in now.items() if beat.phases < furthest and rank not in self.silent]
        found = []
        for what, ranks in (("last heard of", sorted(self.silent)), ("behind the others", behind)):
            names = [f"rank {rank} at {now[rank].place}" for rank in ranks[:NAMED]]
            more = [f"{len(ranks) - NAMED} more"] if len(ranks) > NAMED else []
            found += [f"{what}: {', '.join(names + more)}"] if names else []
        return "; ".join(found) or f"none is silent or behind, this one is at {self.place}"

    def _beats(self) -> dict[int, Beat]:
        """The last sign of life of each rank; of none where the store is gone."""
        found = {}
        try:
            for rank in range(self.size):
                number, phases, place = (self._stored(f"beat/{rank}") or "0 0 the start").split(" ", 2)
                found[rank] = Beat(int(number), int(phases), place)
        except RuntimeError:
            return {}
        return found

    def _stored(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""
