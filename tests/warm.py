"""Python for tests that start many: ``PYTHON`` in place of ``sys.executable``, and ``RANKS`` in torchrun's environment.

The first that uses one starts its server (tests/warm_python.py), which ends with the process of the tests. Tests that
look a process up by its id, limit, stop or kill it, or ask what it imports start a Python of their own.
"""

import atexit
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def program(kind: str) -> str:
    """The path of a program that stands for Python."""
    folder = tempfile.mkdtemp(prefix="warm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    own, client = Path(folder) / "python", Path(folder) / "client.py"
    words = [sys.executable, str(HERE / "warm_python.py"), str(Path(folder) / "socket"), kind, str(os.getpid())]
    words.append(str(Path("/proc/self/ns/mnt").readlink()))
    client.write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport warm_python\nsys.exit(warm_python.client({words!r}))\n"
    )
    own.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -IS {client} "$@"\n')  # a path may have a space
    own.chmod(0o755)
    return str(own)


PYTHON = program("run")
RANKS = {"PYTHON_EXEC": program("rank")}
