"""Claims about several machines: launch/torchrun.sh and torchrun where names and addresses are not one machine's."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launches import ENVIRONMENT, ROOT, RUN, alone, children, result, wait_for
from machines import ADDRESSES, machines

from alignscale.checkpoint import complete

pytestmark = [pytest.mark.distributed, pytest.mark.machines]
HOST = f"{ADDRESSES[0]}:29511"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[list[str]]]:
    with machines(tmp_path_factory.mktemp("machines")) as enter:
        yield enter


def started(machine: list[str], command: list[str]) -> subprocess.Popen[str]:
    environment = {**ENVIRONMENT, "RANKS": "1", "PYTHON": sys.executable}
    return subprocess.Popen(
        [*machine, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_the_same_command_on_two_machines_trains_to_the_result_of_one_process(
    two: list[list[str]], tmp_path: Path
) -> None:
    options = [*RUN, "epochs=2"]
    assert alone(*options, f"run.dir={tmp_path / 'one'}").returncode == 0
    by_hand = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    by_hand += [f"--master-addr={ADDRESSES[0]}", "--master-port=29512"]
    for name, commands in {
        "script": [["launch/torchrun.sh", "2", HOST]] * 2,
        "hand": [[*by_hand, f"--node-rank={rank}", "launch/train.py"] for rank in range(2)],
    }.items():
        given = [*options, f"run.dir={tmp_path / name}"]
        nodes = [started(machine, [*command, *given]) for machine, command in zip(two, commands, strict=True)]
        said = [node.communicate(timeout=200) for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], said
        assert result(tmp_path / name)["ranks"] == 2
        assert result(tmp_path / name)["test"]["loss"] == pytest.approx(
            result(tmp_path / "one")["test"]["loss"], rel=1e-5
        )


def test_a_machine_that_is_lost_is_replaced_by_giving_the_command_on_another_one(
    two: list[list[str]], tmp_path: Path
) -> None:
    """Its link goes down, so nothing says that it is gone, and then all that ran there is killed."""
    whole = [*RUN, "epochs=6", "engine=deepspeed"]
    command = ["launch/torchrun.sh", "2", HOST, *whole, "engine.timeout=20", "checkpoint.every_steps=10"]
    given = [*command, f"run.dir={tmp_path / 'lost'}"]
    first, second = (started(machine, given) for machine in two)
    wait_for(first, lambda: len(complete(tmp_path / "lost/checkpoints")) > 1)
    subprocess.run([*two[1], "ip", "link", "set", "eth0", "down"], check=True)
    for pid in children(second.pid):
        os.kill(pid, signal.SIGKILL)
    second.kill()
    second.communicate()
    subprocess.run([*two[1], "ip", "link", "set", "eth0", "up"], check=True)
    third = started(two[1], given)
    said = [node.communicate(timeout=300) for node in (first, third)]
    assert [first.returncode, third.returncode] == [0, 0], said
    assert "resumed after step" in said[0][0] + said[1][0]
    assert result(tmp_path / "lost")["steps"] == 6 * 39
