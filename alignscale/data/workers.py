"""Processes that do jobs for this one, whose results come in the order of the jobs.

They stand alone because they must not outlive or disturb the process that they work for: a worker is forked, closes all
that it inherited (locks, sockets of other ranks), ignores the signals that the loop answers, ends with its parent, and
is started again where it was killed. Jobs and answers are JSON; an array goes through memory that both share.
"""

import ctypes
import itertools
import json
import mmap
import os
import signal
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alignscale.data.examples import DataError

AHEAD = 3
"""Jobs that each worker is given before the first of their results is asked for."""
PR_SET_PDEATHSIG = 1
Work = Callable[[Any, NDArray[np.uint8]], Any]
"""A job and where to write bytes -> an answer; both JSON."""


class _Worker:
    """A process, the jobs that it has been given, and a slot of shared memory for each."""

    def __init__(self, work: Work, size: int) -> None:
        self.work, self.size = work, max(size, 1)
        self.slots = mmap.mmap(-1, AHEAD * self.size)
        self.jobs: deque[tuple[int, Any]] = deque()
        self.start()

    def slot(self, place: int) -> NDArray[np.uint8]:
        return np.frombuffer(self.slots, np.uint8, self.size, place * self.size)

    def start(self) -> None:
        """Fork, and give it what the one before it has left undone."""
        self.pipe, other = Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which share nothing with it
            self.pid = os.fork()
        if self.pid == 0:
            try:
                _serve(self, other)
            finally:
                os._exit(0)
        other.close()
        for job in self.jobs:
            self._send(job)

    def give(self, place: int, job: Any) -> None:
        self.jobs.append((place, job))
        self._send((place, job))

    def _send(self, job: tuple[int, Any]) -> None:
        with suppress(OSError):  # it was killed, which its answer will tell
            self.pipe.send_bytes(json.dumps(job).encode())

    def answer(self) -> Any:
        """Of the oldest job. Raises EOFError if the process is gone."""
        try:
            found = json.loads(self.pipe.recv_bytes())
        except OSError as problem:
            raise EOFError from problem
        self.jobs.popleft()
        return found

    def end(self) -> int:
        """Kill it; the signal that had killed it before, or SIGKILL."""
        self.pipe.close()
        pid, self.pid = self.pid, 0
        if pid == 0:  # ended before, and its number may be another's
            return 0
        os.kill(pid, signal.SIGKILL)
        return os.WTERMSIG(os.waitpid(pid, 0)[1])


def _serve(worker: _Worker, pipe: Connection) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.closerange(3, pipe.fileno())
    os.closerange(pipe.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    with suppress(EOFError, OSError):  # the parent wants no more
        while True:
            place, job = json.loads(pipe.recv_bytes())
            try:
                answer = {"done": worker.work(job, worker.slot(place))}
            except DataError as problem:
                answer = {"data": str(problem)}
            except Exception:
                answer = {"error": traceback.format_exc()}
            pipe.send_bytes(json.dumps(answer).encode())


def results(
    work: Work, jobs: Iterable[Any], workers: int, size: int, restarts: int
) -> Generator[tuple[Any, NDArray[np.uint8]], None, None]:
    """Of each job, the answer and the ``size`` bytes that it wrote, which are valid until the next is asked for.

    workers: 0 does all in this process. restarts: how many killed workers are started again. Raises the DataError of a
    job in its turn; DataError for one killed worker too many.
    """
    if workers == 0:
        slot = np.empty(size, np.uint8)
        for job in jobs:
            yield work(job, slot), slot
        return
    source = iter(jobs)
    crew: list[_Worker] = []
    try:
        turns: deque[tuple[_Worker, int]] = deque()
        for number, job in enumerate(itertools.islice(source, workers * AHEAD)):
            if number < workers:
                crew.append(_Worker(work, size))
            worker, place = crew[number % workers], number // workers
            worker.give(place, job)
            turns.append((worker, place))
        while turns:
            worker, place = turns.popleft()
            answer, restarts = _awaited(worker, restarts)
            yield answer, worker.slot(place)
            for job in itertools.islice(source, 1):
                worker.give(place, job)
                turns.append((worker, place))
    finally:
        for worker in crew:
            worker.end()


def _awaited(worker: _Worker, restarts: int) -> tuple[Any, int]:
    """The answer to a worker's oldest job, and how many restarts are left."""
    while True:
        try:
            answer = worker.answer()
        except EOFError:
            signum = worker.end()
            how = f"a worker process (data.workers) was killed by signal {signum}"
            if restarts == 0:
                raise DataError(
                    f"{how} once more than data.worker_restarts allows: expected one that works on, found that the "
                    "machine, perhaps for lack of memory, ends it; choose fewer data.workers, or free memory"
                ) from None
            warnings.warn(f"{how}, and is started again", RuntimeWarning, stacklevel=2)
            restarts -= 1
            worker.start()
            continue
        if "data" in answer:
            raise DataError(answer["data"])
        if "error" in answer:
            raise RuntimeError(f"in a worker process: {answer['error']}")
        return answer["done"], restarts
