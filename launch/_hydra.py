"""What the Hydra entry points share: the options registered by type, and errors shown as one clear line."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError

from alignscale.checkpoint import CheckpointError
from alignscale.choices import DATA, NETS, OPTIMS, ConfigError
from alignscale.config import GridConfig, TrainConfig
from alignscale.data.examples import DataError
from alignscale.interrupts import Interrupted
from alignscale.rules import RULES
from alignscale.run import Diverged

CONFIGS = str(Path(__file__).resolve().parents[1] / "configs")


def register() -> None:
    """Make the options of alignscale/config.py and of every rule known to Hydra."""
    store = ConfigStore.instance()
    store.store(name="schema", node=TrainConfig)
    store.store(name="grid_schema", node=GridConfig)
    for name, rule in RULES.items():
        store.store(group="rule", name=name, node=rule.options(name=name))
    for group, choices in (("net", NETS), ("data", DATA), ("optim", OPTIMS)):
        for name, node in choices.items():
            store.store(group=group, name=name, node=node)


def typed(config: DictConfig) -> Any:
    """Hydra's configuration as the dataclasses of alignscale/config.py."""
    return OmegaConf.to_object(config)


def command_line(script: str) -> str:
    """The command as it was given, for reports."""
    return shlex.join(["python", script, *sys.argv[1:]])


def guarded(work: Callable[[], None]) -> None:
    """Do the work of an entry point; a user's mistake ends with one line and status 2, a divergence with 3.

    Called inside Hydra's main, which would print a stack trace for any exception that reached it.
    """
    try:
        work()
    except (ConfigError, DataError, CheckpointError) as problem:
        sys.exit(_say(problem, 2))
    except (OSError, SafetensorError) as problem:
        sys.exit(
            _say(
                f"a file could not be read or written: {problem}; free space or mend it, then give the same command", 1
            )
        )
    except Diverged as problem:
        sys.exit(_say(problem, 3))
    except Interrupted as problem:
        print(problem, file=sys.stderr)
        sys.exit(128 + problem.signum)
    except KeyboardInterrupt:
        sys.exit(_say("interrupted; the same command goes on from the last checkpoint", 130))


def _say(problem: object, status: int) -> int:
    print(f"error: {problem}", file=sys.stderr)
    return status
