"""Ctrl-C and SIGTERM end a run at its next step, after a checkpoint.

It stands alone because only the loop knows when a run is whole, and only a signal handler knows that it has to end.
"""

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(RuntimeError):
    """A signal ended the run after a checkpoint; ``signum`` is the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class Interrupts:
    """Inside the block, the first signal is kept in ``signum``; a second one acts as it would have outside of it."""

    def __init__(self) -> None:
        self.signum = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        """Listen; in a thread other than the main one, where Python allows no handlers, do nothing."""
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._keep) for number in SIGNALS}
        return self

    def _keep(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()
