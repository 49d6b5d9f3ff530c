"""Skips the tests whose mark asks for what this machine lacks, and fixes the number of torch's threads."""

import importlib
import importlib.util
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling


def lacks_program(*names: str) -> str | None:
    missing = [name for name in names if shutil.which(name) is None]
    return f"not on PATH: {', '.join(missing)}" if missing else None


def lacks_module(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"{name} cannot be imported ({error}); make setup says why"
    return None


def lacks_gpu() -> str | None:
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


LONG = [
    "test_slurm",
    "test_distributed",
    "test_width",
    "test_lost_ranks",
    "test_rank_errors",
    "test_machines",
    "test_submit",
]
"""Files that take minutes, the longest first."""

# Each mark's requirement: a reason to skip, or None. A mark that is not here needs nothing.
REQUIREMENTS: dict[str, Callable[[], str | None]] = {
    "browser": lambda: lacks_program("chromium", "chromedriver"),
    "distributed": lambda: None if importlib.util.find_spec("deepspeed") else "no deepspeed; run make setup",
    "ffcv": cache(lambda: lacks_module("ffcv")),
    "gpu": lacks_gpu,
    "machines": lambda: lacks_program("ip", "unshare", "nsenter") or (None if os.geteuid() == 0 else "no root"),
    "slurm": lambda: lacks_program("slurmctld", "slurmd", "srun", "munged", "ip", "unshare"),
}


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the same sums, hence the same bits, on every machine
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # in processes of tests too, as two threads that share a core spin
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so its children


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    """Workers (pytest -n 3) have whole files, as a file's tests share what they wait for, in the order collected."""

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return Scheduling(config, log) if config.getvalue("dist") == "load" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for item in items:
        for mark in REQUIREMENTS.keys() & {marker.name for marker in item.iter_markers()}:
            item.user_properties.append(("group", mark))  # goes into the junit file, where CI reads it
            if reason := REQUIREMENTS[mark]():
                item.add_marker(pytest.mark.skip(reason=f"{mark}: {reason}"))
