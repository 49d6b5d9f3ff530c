"""Ctrl-C and SIGTERM end a run at its next step, after a checkpoint.

It stands alone because only the loop knows when a run is whole, and only a signal handler knows that it has to end.
"""

import signal
import sys
import threading
from contextlib import ExitStack
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(RuntimeError):
    """A signal ended the run after a checkpoint; ``signum`` is the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class Interrupts(ExitStack):
    """Until the end of the block, the first signal is kept in ``signum``; a second one acts as it would have outside.

    In a thread other than the main one, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.signum = 0
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self.callback(signal.signal, number, signal.signal(number, self._keep))

    def _keep(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        print("\nstopping at the next step; once more to stop at once", file=sys.stderr)
        self.close()
