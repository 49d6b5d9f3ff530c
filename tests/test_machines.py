"""Claims about several machines: launch/torchrun.sh and torchrun where names and addresses are not one machine's."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launches import ENVIRONMENT, RUN, alone, result, wait_for
from machines import Machine
from warm import RANKS

from alignscale.checkpoint import complete

pytestmark = [pytest.mark.distributed, pytest.mark.machines]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with Machine(tmp_path_factory.mktemp("first")) as made:
        yield made


def started(machine: Machine, *command: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in RANKS}  # a server's are elsewhere
    environment |= {"RANKS": "1", "PYTHON": sys.executable}
    return subprocess.Popen(
        [*machine.enter, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_the_same_command_on_two_machines_trains_to_the_result_of_one_process(first: Machine, tmp_path: Path) -> None:
    options = [*RUN, "epochs=2"]
    assert alone(*options, f"run.dir={tmp_path / 'one'}").returncode == 0
    script = ["launch/torchrun.sh", "2", f"{first.address}:29511"]
    hand = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    hand += [f"--master-addr={first.address}", "--master-port=29512", "--node-rank"]
    with Machine(tmp_path, first, 2) as second:
        for name, commands in {
            "script": [script, script],
            "hand": [[*hand, str(rank), "launch/train.py"] for rank in range(2)],
        }.items():
            given = [*options, f"run.dir={tmp_path / name}"]
            nodes = [
                started(machine, *command, *given) for machine, command in zip((first, second), commands, strict=True)
            ]
            said = [node.communicate(timeout=200) for node in nodes]
            assert [node.returncode for node in nodes] == [0, 0], said
            assert result(tmp_path / name)["ranks"] == 2
            losses = [result(tmp_path / run)["test"]["loss"] for run in ("one", name)]
            assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_machine_that_is_lost_is_replaced_by_giving_the_command_on_another_one(
    first: Machine, tmp_path: Path
) -> None:
    """It is gone with its network: nothing tells the others."""
    command = ["launch/torchrun.sh", "2", f"{first.address}:29513", *RUN, "epochs=6", "engine=deepspeed"]
    command += ["engine.timeout=20", "checkpoint.every_steps=10", f"run.dir={tmp_path / 'run'}"]
    node = started(first, *command)
    with Machine(tmp_path, first, 2) as second:
        lost = started(second, *command)
        wait_for(node, lambda: len(complete(tmp_path / "run/checkpoints")) > 1)
    lost.communicate(timeout=60)
    with Machine(tmp_path, first, 3) as third:
        other = started(third, *command)
        said = [one.communicate(timeout=300) for one in (node, other)]
        assert [node.returncode, other.returncode] == [0, 0], said
    assert "resumed after step" in said[0][0] + said[1][0]
    assert result(tmp_path / "run")["steps"] == 6 * 39
