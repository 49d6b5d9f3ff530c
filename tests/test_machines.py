"""Claims about several machines: launch/torchrun.sh and torchrun where names and addresses are not one machine's."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launches import ENVIRONMENT, ROOT, RUN, alone, result, wait_for
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
    command = ["launch/torchrun.sh", "2", f"{first.address}:29513", *RUN, "epochs=12", "engine=deepspeed"]
    command += ["net.width=600", "engine.timeout=20", "checkpoint.every_steps=10", f"run.dir={tmp_path / 'run'}"]
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
    assert result(tmp_path / "run")["steps"] == 12 * 39


def test_a_machine_may_have_the_command_twice(first: Machine, tmp_path: Path) -> None:
    """Both find that the address is theirs, in the same moment."""
    command = ["launch/torchrun.sh", "2", f"{first.address}:29517", *RUN, f"run.dir={tmp_path}"]
    nodes = [started(first, *command) for _ in range(2)]
    said = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert result(tmp_path)["ranks"] == 2


def test_an_address_is_free_again_at_once_and_names_of_ones_own_are_told_as_they_are(
    first: Machine, tmp_path: Path
) -> None:
    """The same command again meets connections that ended a moment ago, at the port that it asks for."""
    script = [sys.executable, "-I", "alignscale/address.py"]
    gone = """
import socket, sys
server, client = socket.create_server((sys.argv[1], 29519)), socket.create_connection((sys.argv[1], 29519))
one, _ = server.accept()
one.close(), client.close()
"""

    def said(*words: str) -> list[str]:
        found = subprocess.run([*first.enter, *words], capture_output=True, text=True, check=True)
        return found.stdout.split()

    said(sys.executable, "-c", gone, first.address)
    assert said(*script, f"{first.address}:29519") == [first.address, "true"]
    assert said(*script, "machine1:29519") == ["machine1"]
    assert said(*script, "localhost:29519") == ["127.0.0.1"]
    assert said(*script, "[::1]:29519") == ["::1"]
    for host in (f"{first.address}:99999999", "nobody.invalid:1", "localhost:x", "nothing"):
        wrong = subprocess.run([*first.enter, *script, host], capture_output=True, text=True, check=False)
        assert wrong.returncode == 1
        assert wrong.stderr.startswith(f"error: {host}: expected HOST:PORT, a machine that this one can reach")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_a_host_without_a_port_has_one(tmp_path: Path, host: str) -> None:
    """By what torchrun is given, in place of which a program prints it."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -m ] && echo "$@" || exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = {**ENVIRONMENT, "RANKS": "1", "PYTHON": str(python)}
    for given, told in ((host, f"{host}:29500"), (f"{host}:4", f"{host}:4")):
        done = subprocess.run(
            ["launch/torchrun.sh", "1", given, "net=mlp"],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert f"--rdzv-endpoint={told} " in done.stdout
