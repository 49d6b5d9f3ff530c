"""Ctrl-C, SIGTERM and SIGUSR2 (SLURM's warning) end a run at its next step, after a checkpoint.

It stands alone because only the loop knows when a run is whole, and only a signal handler knows that it has to end.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any, ClassVar

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Interrupted(RuntimeError):
    """A signal ended the run after a checkpoint; ``signum`` is the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum

    def __reduce__(self) -> tuple[Any, ...]:
        """How ranks send it to each other."""
        return type(self), (str(self), self.signum)


REPEAT = 5.0
"""Seconds in which SIGTERM or SIGUSR2 again is the same one: SLURM tells a rank and torchrun, which tells the rank."""


class Interrupts(ExitStack):
    """Until the end of the block, the first signal is kept in ``signum``; a second one acts as it would have outside.

    In a thread other than the main one, where Python allows no handlers, it does nothing.
    """

    came: ClassVar[int] = 0
    """The last signal that was kept in this process."""
    now: ClassVar[int] = 0
    """The signal that the block keeps which is open in the main thread; 0 for none."""
    at_once: ClassVar[bool] = False
    """Whether a signal raises Interrupted where it comes, as there is nothing to save."""

    def __init__(self, speaks: bool = True) -> None:
        """speaks: tell the user, as the first rank does."""
        super().__init__()
        self.signum, self.speaks, self.since = 0, speaks, 0.0
        if threading.current_thread() is threading.main_thread():
            self.callback(setattr, Interrupts, "now", 0)
            for number in SIGNALS:
                self.callback(signal.signal, number, signal.signal(number, self._keep))

    @property
    def flags(self) -> list[int]:
        """Of each of SIGNALS, whether it came: to be summed over ranks."""
        return [int(self.signum == number) for number in SIGNALS]

    def _keep(self, signum: int, frame: FrameType | None) -> None:
        if self.signum == signum != signal.SIGINT and time.monotonic() - self.since < REPEAT:
            return
        if self.signum:
            self.close()
            signal.raise_signal(signum)
            return
        self.signum, self.since, Interrupts.came, Interrupts.now = signum, time.monotonic(), signum, signum
        if Interrupts.at_once:
            end_if_asked()
        with suppress(OSError, RuntimeError, ValueError):  # whoever read it, or what was being written, is none of ours
            if self.speaks:
                print("\nstopping at the next step; once more to stop at once", file=sys.stderr)


@contextmanager
def ended_at_once() -> Iterator[None]:
    """A run's long work before its first step: a signal breaks it off where it is, and has come before it or in it.

    What is raised in the middle of it may be taken for a damaged file there, so it is raised again at the end.
    """
    Interrupts.at_once = True
    try:
        end_if_asked()
        yield
    finally:
        Interrupts.at_once = False
        end_if_asked()


def end_if_asked() -> None:
    """Raise Interrupted if a signal was kept."""
    if Interrupts.now:
        raise Interrupted(
            f"stopped by signal {Interrupts.now:d} before its first step; the same command goes on", Interrupts.now
        )


def first_signal(flags: Sequence[float]) -> int:
    """The number of the first of SIGNALS that came to some rank; 0 for none. flags: their sums over ranks."""
    return next((int(number) for number, came in zip(SIGNALS, flags, strict=True) if came), 0)
