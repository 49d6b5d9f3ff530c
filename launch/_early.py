"""What signals do to a command until its work begins, while it imports for seconds. Imported before all else."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType


def mark_of_launch() -> Path | None:
    """Where ranks say how they ended, in torchrun's folder of this start on this machine; None without torchrun."""
    error = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return Path(error).parents[1] / "final" if error and error != os.devnull else None


def note_final(status: int) -> None:
    """Have ranks that torchrun starts again end at once with ``status``."""
    if mark := mark_of_launch():
        with suppress(OSError):  # torchrun then starts the ranks again, as it would have
            partial = mark.with_name(f".final-{os.getpid()}")
            partial.write_text(str(status))
            partial.rename(mark)


def end_for_good(signum: int, frame: FrameType | None) -> None:
    """End a rank by SIGUSR2 as it ends one that trains: as it is, torchrun takes it for one that was lost."""
    note_final(140)
    if os.environ.get("RANK") == "0":
        with suppress(OSError):  # whoever read it has ended
            os.write(2, b"stopped by signal 12 before training\n")
    os._exit(140)


if (
    Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent  # a command, not a test that imports this
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no stack trace out of an import, until the work begins
if mark_of_launch() and signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL:  # else whoever started it shields it
    signal.signal(signal.SIGUSR2, end_for_good)
