"""What ranks tell each other of themselves: where each one is, that it lives, and why it ended.

It stands alone because it talks to the ranks' store and to nothing else: a rank that hangs answers no collective.
"""

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch.distributed as dist

from alignscale.interrupts import Interrupts

BEAT = 2.0
"""Seconds from one sign of life of a rank to the next."""
LOST = 4
"""The exit status of a rank that has lost another one."""
OURS = str(Path(__file__).with_name("distributed.py"))
"""Whose functions wait for other ranks, or for what they have begun with them."""
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
    """A rank's last sign of life: which it was, how many phases had begun by then, and the one that it was in.

    waits: for other ranks, in a call of torch.distributed's.
    """

    number: int
    phases: int
    waits: bool
    place: str


def of_another(problem: Exception) -> bool:
    """Whether an error is of a collective that another rank broke off, and not of this rank's own."""
    return isinstance(problem, dist.DistError) or (type(problem) is RuntimeError and "gloo" in str(problem))


def waiting() -> bool:
    """Whether the main thread is in a call of torch.distributed's, or in what waits for what one has begun."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    at = frame and frame.f_code
    if at and (at.co_filename == OURS or ("/deepspeed/" in at.co_filename and at.co_name == "wait")):
        return True
    while frame and "/torch/distributed/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


def leave(problem: RankError) -> None:
    """Say why, unless another rank does, and end the process."""
    with suppress(OSError, ValueError):  # whoever read it has ended
        if problem.told and Interrupts.came != signal.SIGTERM:  # by which torchrun has told all to end
            time.sleep(5 * BEAT)  # it does when one has ended, and the other is to speak first
        elif not problem.told:
            print(f"error: {problem}", file=sys.stderr, flush=True)
    os._exit(LOST)


class Heart(threading.Thread):
    """Tells the other ranks every few seconds where this one is, also while it waits for them."""

    end: ClassVar[Callable[[RankError], object]] = staticmethod(leave)
    """Ends the process of a rank that waits too long; a scheduler's job first asks to be started again."""

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        super().__init__(daemon=True)
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.ended, self.counts, self.phases = threading.Event(), itertools.count(1), 0
        self.voice = threading.RLock()
        """Held, and never given back, by the thread that says why this rank ends."""
        self.told = ""
        """What the first rank that failed has told: ``lost`` or ``own``, a space, and its message."""
        self.silent: set[int] = set()
        self.waited = False
        """Whether it has waited for others until it or they broke off."""
        self.works = 0
        """How many pieces of work of its own, one inside of another, the rank is at, and waits for nobody."""
        self.place, self.since = "the start", time.monotonic()
        self.answered = self.since
        """When the store answered last."""

    def at(self, place: str) -> None:
        """Note the phase that the rank begins, as all do in the same order; it has ``timeout`` seconds for it."""
        self.phases += 1
        self.place, self.since = place, time.monotonic()

    def still(self) -> None:
        """Note that the rank has got on where it is."""
        self.since = time.monotonic()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Work of the rank's own inside, which may take any time, unless another rank has failed."""
        self.works += 1
        try:
            yield
        finally:
            self.works -= 1
            self.still()

    def run(self) -> None:
        """Until it is told to end. A process alone needs none.

        A rank that waits too long ends with its process: what it waits in listens to nothing. So does one that waits
        when another has told why it ended.
        """
        if self.size == 1:
            return
        threading.Thread(target=self._watch, daemon=True).start()
        while not self.ended.wait(BEAT):
            self.pulse()
            if self.works and not self.told and not waiting():
                self.still()
            since = self.since
            if time.monotonic() - since > (min(30 * BEAT, self.timeout) if self.told else self.timeout):
                found = f"no progress in {self.timeout:g} s at {self.place} ({self._whereabouts(True)})"
                if self.since == since and not self.ended.is_set():  # it did not get on in the meantime
                    self._end(f"{found}; engine.timeout says how long to wait")

    def _watch(self) -> None:
        """End the process where ``run`` does not: a store in a rank that is frozen answers nothing, and never fails."""
        seen = 0  # in so many beats, as a process that was stopped itself finds all late when it goes on
        while not self.ended.wait(BEAT):
            waits, mute = (time.monotonic() - since for since in (self.since, self.answered))
            seen = seen + 1 if waits > self.timeout + 5 * BEAT and mute > 5 * BEAT else 0
            if seen > 3:
                self.ended.set()
                why = "rank 0, which keeps what the ranks tell each other, does not answer; look at its machine"
                why = f"rank {self.rank} of {self.size}: no progress in {self.timeout:g} s at {self.place}, and {why}"
                Heart.end(RankError(why))

    def _end(self, why: str) -> None:
        """End the process, unless the main thread has begun to say why it ends."""
        if self.voice.acquire(blocking=False):
            self.ended.set()
            Heart.end(self._lost(f"rank {self.rank} of {self.size}: {why}"))

    def _lost(self, why: str) -> RankError:
        """The error of a rank that has lost another one, or of the one that told first."""
        if self.tell("lost", why):
            return RankError(why)
        kind, _, told = self.told.partition(" ")
        return RankError(told, told=True, lost=kind == "lost")

    def pulse(self) -> None:
        """Tell where this rank is, and hear of one that failed."""
        with suppress(RuntimeError):  # the store went with the rank that held it
            beat = f"{next(self.counts)} {self.phases} {self.waited or waiting():d} {self.place}"
            self.store.set(f"beat/{self.rank}", beat)
            if self.store.check(["told"]):
                self.told = self.store.get("told").decode()
                self.store.set(f"heard/{self.rank}", "")
            self.answered = time.monotonic()

    def tell(self, kind: str, message: str) -> bool:
        """Tell all ranks why this one ends; returns whether it is the first to."""
        own = f"{kind} {message}".encode(errors="replace").decode()  # the name of a file may be no text
        with suppress(RuntimeError):  # there is no store any more, so each rank says it
            self.told = self.told or self.store.compare_set("told", "", own).decode()
            self.store.set(f"heard/{self.rank}", "")
            self._let_hear()
        return self.told in ("", own)

    def _let_hear(self) -> None:
        """The first rank's process may hold the store: all others that live are to have heard by its end."""
        until, others = time.monotonic() + 3 * BEAT, {*range(self.size)} - {self.rank} - self.silent
        while self.rank == 0 and not self.store.check([f"heard/{rank}" for rank in sorted(others)]):
            if time.monotonic() > until:
                break
            time.sleep(0.05)

    def explained(self, problem: Exception) -> Exception:
        """The error to raise for one that broke off a step: it tells the other ranks, or it tells of them."""
        self.voice.acquire()  # for good; where the other thread has it, the process is about to end
        if not of_another(problem):
            if not self.tell("own", f"rank {self.rank}: {problem}") and self.told.startswith("own"):
                self.ended.set()
                return self._lost("")  # of all that fail in the same step one speaks
            if isinstance(problem, OSError) and problem.strerror:  # which its text is made of
                problem.strerror = f"rank {self.rank}: {problem.strerror}"
            else:
                problem.args = (f"rank {self.rank}: {problem}",)
            problem.of_one_rank = True  # type: ignore[attr-defined]
            self.ended.set()
            return problem
        self.waited = True
        where = self._whereabouts("Timed out" in str(problem))  # a rank that failed by itself has said so by then
        cause = " ".join(str(problem).split())
        cause = cause if len(cause) < 250 else f"{cause[:80]} ... {cause[-160:]}"  # NCCL's last words tell most
        message = (
            f"rank {self.rank} of {self.size}: another rank ended or did not answer ({where}). See its own message; "
            f"the same command goes on from the last checkpoint. ({cause})"
        )
        found = self._lost(message)
        self.ended.set()
        return found

    def _whereabouts(self, late: bool = False) -> str:
        """Which ranks are silent for some seconds from now on, and which are behind the others; of nobody once told.

        late: all have had their time, so that of ranks in the same phase those are behind that do not wait for others.
        """
        before = self._beats()
        if not before and not self.told:
            return "rank 0 is gone, and with it what the ranks tell each other"
        for wait in (0, BEAT, BEAT):
            time.sleep(wait)
            self.pulse()
            if self.told:
                return ""
        now = self._beats() or before
        self.silent = {rank for rank, beat in now.items() if rank in before and beat.number == before[rank].number}
        furthest = max((beat.phases for rank, beat in now.items() if rank not in self.silent), default=0)
        behind = [rank for rank, beat in now.items() if beat.phases < furthest and rank not in self.silent]
        if late and not behind and any(beat.waits for beat in now.values()):
            behind = [rank for rank, beat in now.items() if not beat.waits and rank not in self.silent]
        found = []
        for what, ranks in (("last heard of", sorted(self.silent)), ("behind the others", behind)):
            names = [f"rank {rank} at {now[rank].place}" for rank in ranks[:NAMED]]
            more = [f"{len(ranks) - NAMED} more"] if len(ranks) > NAMED else []
            found += [f"{what}: {', '.join(names + more)}"] if names else []
        return "; ".join(found) or f"none is silent or behind, this one is at {self.place}"

    def _beats(self) -> dict[int, Beat]:
        """The last sign of life of each rank, in few messages; of none where the store is gone."""
        found = {rank: Beat(0, 0, False, "the start") for rank in range(self.size)}
        with suppress(RuntimeError):
            ranks = [*found]
            if not self.store.check([f"beat/{rank}" for rank in ranks]):
                ranks = [rank for rank in ranks if self.store.check([f"beat/{rank}"])]
            texts = self.store.multi_get([f"beat/{rank}" for rank in ranks]) if ranks else []
            for rank, text in zip(ranks, texts, strict=True):
                number, phases, waits, place = text.decode().split(" ", 3)
                found[rank] = Beat(int(number), int(phases), waits == "1", place)
            return found
        return {}
