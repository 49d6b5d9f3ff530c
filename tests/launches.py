"""Runs on several ranks, and what they leave behind."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from warm import PYTHON, RANKS

from alignscale.checkpoint import complete

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "TORCH_EXTENSIONS_DIR": "/dev/null/nothing-is-compiled",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    **RANKS,
}
RUN = [
    "net=mlp",
    "net.width=32",
    "net.depth=2",
    "batch_size=37",
    "optim.momentum=0.9",
    "optim.lr=0.1",
    "log.progress=false",
]


def torchrun(ranks: int, *command: str, restarts: int = 0, python: str = PYTHON) -> list[str]:
    given = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", *command]
    return [python, "-m", "torch.distributed.run", *given]


def finished(command: list[str], seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """What a command said, and how it ended, within so many seconds."""
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=seconds, check=False
    )


def run(ranks: int, *options: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    return finished(torchrun(ranks, "launch/train.py", *usual(options), *options, restarts=restarts))


def usual(options: Sequence[str]) -> list[str]:
    """RUN, but for SGD's momentum where Adam is asked for."""
    return [one for one in RUN if "optim=adam" not in options or not one.startswith("optim.momentum")]


def alone(*options: str) -> subprocess.CompletedProcess[str]:
    return finished([PYTHON, "launch/train.py", *usual(options), "threads=1", *options])


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())["runs"][0]


def stopped(
    ranks: int, folder: Path, number: int, *options: str, at: int = 30, torchrun_too: bool = False, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """A run whose first rank gets a signal when it has made a checkpoint at step ``at``; ranks: 0 without torchrun."""
    given = ["launch/train.py", *usual(options), "checkpoint.every_steps=10", f"run.dir={folder}", *options]
    command = torchrun(ranks, *given, restarts=restarts, python=sys.executable) if ranks else [sys.executable, *given]
    with subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(process, lambda: any(int(path.name[5:]) >= at for path in complete(folder / "checkpoints")))
        beside = children(process.pid)[: ranks if torchrun_too else 1] if ranks else []
        for child in [*beside, *[process.pid] * (torchrun_too or not ranks)]:
            os.kill(child, number)
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool], seconds: float = 240) -> None:
    """Until the process has got there; ends it where it does not."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.terminate()
            pytest.fail(f"did not get there; status {process.poll()}: {process.communicate()[1][-3000:]}")
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """The ranks' processes, in their order."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return sorted(int(line) for line in listed.stdout.split())
