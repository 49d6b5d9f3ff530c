"""Claims about the processes that read a stream, and the transforms that they make."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stream_cases import batches, config, same

from alignscale.choices import ConfigError
from alignscale.data import load
from alignscale.data.examples import DataError
from alignscale.data.workers import results


def test_a_transform_of_torchvisions_is_a_function_of_example_and_view(tmp_path: Path) -> None:
    plain = batches(config(tmp_path, workers=0), 0, 5)
    first, second = (batches(config(tmp_path, transform="TrivialAugmentWide", workers=n), 0, 5) for n in (0, 2))
    assert same(first, second)
    assert not same(first, plain)
    with pytest.raises(ConfigError, match=r"data\.transform=Nonsense: expected the name of a class in torchvision"):
        load(config(tmp_path, transform="Nonsense"))
    for other in ("ConvertImageDtype", "RandomZoomOut", "ToPILImage"):
        with pytest.raises(ConfigError, match=rf"data\.transform={other}: expected .* of the same size and type"):
            load(config(tmp_path, transform=other))


def test_a_killed_worker_is_started_again_and_one_killed_too_often_is_an_error(tmp_path: Path) -> None:
    def work(job: list[Any], slot: np.ndarray) -> int:
        slot[:4] = job[0]
        if job[0] == job[1] and not (tmp_path / str(job[0])).exists():
            (tmp_path / str(job[0])).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if job[1] == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        return job[0]

    jobs = [[number, 7] for number in range(20)]
    with pytest.warns(RuntimeWarning, match="killed by signal 9, and is started again"):
        assert [(found, slot[3]) for found, slot in results(work, jobs, 3, 4, 1)] == [(n, n) for n in range(20)]
    with (
        pytest.warns(RuntimeWarning, match="started again"),
        pytest.raises(DataError, match=r"killed by signal 9 once more than data\.worker_restarts allows"),
    ):
        list(results(work, [[0, -1]], 1, 4, 2))


def test_workers_end_with_the_stream_and_with_the_process(tmp_path: Path) -> None:
    def work(job: int, slot: np.ndarray) -> int:
        return os.getpid()

    found = results(work, iter(range(100)), 2, 1, 0)
    pids = {next(found)[0], next(found)[0]}
    assert len(pids) == 2
    found.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    parent = os.fork()
    if parent == 0:
        mine = results(work, iter(range(100)), 1, 1, 0)
        (tmp_path / "pid").write_text(str(next(mine)[0]))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    worker, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
