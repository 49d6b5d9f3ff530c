"""Types of command-line arguments, for argparse: a wrong value is refused with the valid ones. And a tool's end."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from alignscale.choices import ConfigError
from alignscale.environment import out_of_memory
from alignscale.files import write_atomic


def ended(main: Callable[[], int | None]) -> NoReturn:
    """Do a tool's work and end with its status; with a line and 2 for a wrong option, 130 on Ctrl-C, 1 for memory."""
    try:
        sys.exit(main())
    except ConfigError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted; nothing more is written", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as problem:
        if not out_of_memory(problem):
            raise
        print(f"error: expected more memory, found: {(str(problem) or 'MemoryError').splitlines()[0]}", file=sys.stderr)
        sys.exit(1)


def write_json(path: Path | None, found: object, allow_nan: bool = True) -> None:
    """Write what a tool found to the file of its --json, where one was given."""
    if path:
        write_atomic(path, (json.dumps(found, indent=1, allow_nan=allow_nan) + "\n").encode())


def new_file(text: str) -> Path:
    path = Path(text).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that is there, found {text!r}")
    return path


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def shape(text: str) -> tuple[int, ...]:
    lengths = tuple(positive(part) for part in text.split(","))
    if len(lengths) != 3:
        raise argparse.ArgumentTypeError(f"expected C,H,W, found {text!r}")
    return lengths


def numbers(valid: range) -> Callable[[str], list[int]]:
    named = names(tuple(str(number) for number in valid))
    return lambda text: [int(name) for name in named(text)]


def speeds(text: str) -> list[float]:
    try:
        speeds = [float(part) for part in text.split(",")]
    except ValueError:
        speeds = []
    if not speeds or min(speeds) <= 0:
        raise argparse.ArgumentTypeError(f"expected numbers above 0, as 1,10,100, found {text!r}")
    return speeds


def names(valid: tuple[str, ...]) -> Callable[[str], list[str]]:
    def chosen(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        wrong = [name for name in found if name not in valid]
        if wrong or not found:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(valid)}, found {text!r}")
        return list(dict.fromkeys(found))

    return chosen
