"""How a command, or a job of a scheduler, ends for what broke it off."""

from safetensors import SafetensorError

from alignscale.checkpoint import CheckpointError
from alignscale.choices import ConfigError
from alignscale.data.examples import DataError
from alignscale.environment import out_of_memory
from alignscale.interrupts import Interrupted
from alignscale.jacobian.files import CacheError
from alignscale.run import Diverged

MEND = "; free space or mend it, then give the same command"
SMALLER = (
    "; a smaller batch_size, evaluation.batch_size or net.width, more accumulation, or on a GPU engine=local "
    "engine.cuda_graph=false, needs less"
)


def outcome(problem: BaseException) -> tuple[int, str, str] | None:
    """The exit status, and what to say before and after the problem; None for a defect, which wants a stack trace."""
    if isinstance(problem, (ConfigError, DataError, CheckpointError, CacheError)):
        return 2, "error", ""
    if isinstance(problem, Diverged):
        return 3, "error", ""
    if isinstance(problem, Interrupted):
        return 128 + problem.signum, "stopped", ""
    if isinstance(problem, (OSError, SafetensorError)):
        return 1, "error: a file could not be read or written", MEND
    return (1, "error: expected more memory, found", SMALLER) if out_of_memory(problem) else None
