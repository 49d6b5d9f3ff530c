"""What the Hydra entry points share. It is the first import of each, so that Ctrl-C is quiet from then on."""

import errno
import functools
import importlib.util
import os
import re
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _early import mark_of_launch, note_final

if not all(map(importlib.util.find_spec, ("hydra", "torch"))):
    sys.stderr.write(
        f"error: expected the packages of alignscale, found none in {sys.executable}; make setup, and then "
        f".venv/bin/python {' '.join(sys.argv)}\n"
    )
    sys.exit(2)

import hydra
from _mistakes import check
from _options import CONFIGS, apart, register, typed
from _outcome import outcome
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from safetensors import SafetensorError

from alignscale.choices import ConfigError
from alignscale.distributed import Ranks, launched, note_said, outlive_first
from alignscale.interrupts import Interrupted, Interrupts
from alignscale.liveness import RankError, leave
from alignscale.run import Diverged

INTERRUPTED = "interrupted; the same command, without resume=never, goes on from the last checkpoint"
FIRST = (launched() or Ranks()).first
"""Whether this process speaks for all ranks, to which every error that is not a rank's own comes."""
FINAL = (2, 3, 140)
"""Statuses of all ranks that another start would not mend, or was not asked for: a mistake, a divergence, SIGUSR2.

SIGTERM is not one: torchrun sends it to the ranks that it is about to start again.
"""
PATIENCE = 60.0
"""Seconds that the others wait for the first to end, which is to speak: torchrun ends them all when one has ended."""


def entry(name: str, trains: bool = False) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Make a command of a function of a configuration, the one that ``configs/<name>.yaml`` composes.

    The whole command line is checked before Hydra starts, so a mistake in it ends with one line and status 2. trains:
    each configuration is a run, which wants a folder of its own.
    """

    def decorate(work: Callable[[Any], None]) -> Callable[[], None]:
        lost: list[str] = []

        def one(config: Any) -> None:
            try:
                work(config)
            except Diverged as problem:
                here = HydraConfig.get().launcher._target_.endswith("BasicLauncher")
                if HydraConfig.get().mode is not RunMode.MULTIRUN or not here:
                    raise
                lost.append(str(problem))  # and the others of the sweep go on
                if FIRST:
                    print(f"diverged: {problem}", file=sys.stderr)

        @functools.wraps(work)  # Hydra names the command after the file of the function
        def job(options: DictConfig) -> None:
            with _interruptible():
                guarded(lambda: one(typed(options)))

        command = hydra.main(version_base="1.3", config_path=CONFIGS, config_name=name)(job)

        def main() -> None:
            status: object = 0
            try:
                not_again()
                register()
                for_jobs()
                sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]
                guarded(lambda: _checked(name, trains))
                guarded(command)
                if lost:
                    sys.exit(_say(f"{len(lost)} of the runs diverged, as was said above", 3))
            except SystemExit as ended:
                if launched() is None:
                    raise
                status = ended.code or 0
            if launched() is not None:  # the threads of several native libraries do not always survive Python's own end
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status if isinstance(status, int) else 1)

        return main

    return decorate


def _checked(name: str, trains: bool) -> None:
    configs = check(name, sys.argv[1:])
    if trains:
        apart(configs, "--multirun")


def not_again() -> None:
    """End as the ranks did before torchrun started them again, if it should not have (``FINAL``)."""
    own = mark_of_launch()  # which a rank of this start may have made already, and waits for the first to speak
    for mark in own.parents[1].glob("attempt_*/final") if own else ():
        if mark != own:
            sys.exit(int(mark.read_text()))


def for_jobs() -> None:
    """Let the jobs that this process submits, which inherit its environment, import the modules of this folder."""
    paths = [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def quoted(argument: str) -> str:
    """An option that takes a pattern of URLs, with the quotes that Hydra wants around braces and all else in it."""
    pattern = re.fullmatch(r"(data\.(?:test_)?urls=)([^'\"]+)", argument)
    return f"{pattern[1]}'{pattern[2]}'" if pattern else argument


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is Python's again inside, and what it breaks in an import that swallows it ends in one line as well."""
    received: list[int] = []

    def interrupt(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        signal.default_int_handler(signum, frame)

    held = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    if held:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception:
        if not received:
            raise
        sys.exit(_say(INTERRUPTED, 130))
    finally:
        if held:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def command_line(script: str) -> str:
    """The command as it was given, for reports."""
    return shlex.join(["python", script, *sys.argv[1:]])


def guarded(work: Callable[[], object]) -> None:
    """Do the work of an entry point; a user's mistake ends with one line and status 2, a divergence with 3.

    Called inside Hydra's main as well, which would print a stack trace for any exception that reached it.
    """
    try:
        work()
    except BrokenPipeError:  # whatever read the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except RankError as problem:
        sys.stdout.flush()
        leave(problem)
    except KeyboardInterrupt:
        sys.exit(_say(INTERRUPTED, 130))
    except (ConfigError, OSError, SafetensorError, MemoryError, RuntimeError) as problem:
        found = outcome(problem)
        if found is None:
            raise
        sys.exit(_say(problem, *found))


def _say(problem: object, status: int, before: str = "error", after: str = "") -> int:
    """Print the one line of a command's end and return its status; of an error that all ranks have, on the first."""
    ranks, own = launched(), getattr(problem, "of_one_rank", False)
    full = getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if (full or status in FINAL) and not own:
        note_final(status)
    if ranks is not None and not FIRST and not own:
        if isinstance(problem, Interrupted):  # the first has saved with this one, and says so
            outlive_first(PATIENCE)
            return status
        if Interrupts.came == signal.SIGTERM:  # torchrun's, as the first has spoken
            return status
        time.sleep(PATIENCE)
        before = f"{before}: rank {ranks.rank} of {ranks.size}, on {socket.gethostname()}"  # the first has not ended
    with suppress(OSError):
        print(f"{before}: {problem}{after}", file=sys.stderr, flush=True)
    note_said()
    return status
