"""Claims about clusters: a real SLURM of three nodes on this machine, submitit, torchrun, and nodes killed with -9."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from data_cases import digit_shards
from launches import ENVIRONMENT, torchrun
from run_cases import same, weights
from slurm_cluster import Cluster
from slurm_jobs import (
    ENDLESS,
    NET,
    ROOT,
    TRAINING,
    ZERO,
    begin,
    begin_both_ways,
    check_close,
    command,
    nodes,
    python_path,
    restarts,
    run_of,
    sbatch,
    send,
    submit,
    training,
    until,
)
from warm import PYTHON

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(600)]
SABOTAGE = """
import os
if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID")) == "1":
    from alignscale.data.examples import DataError, Encoding
    encoded = Encoding.encoded
    def bad(self, split, images, one):
        if one.step == 9:
            raise DataError("shard-7.tar: key 0042: expected a JPEG, found text")
        return encoded(self, split, images, one)
    Encoding.encoded = bad
"""
PATIENT = """
import time
from alignscale.data.examples import Encoding
encoded = Encoding.encoded
def slow(self, split, images, one):
    time.sleep(0.2)
    return encoded(self, split, images, one)
Encoding.encoded = slow
"""
"""A step takes its time, as a large network's, and leaves the processor to other tests."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What two ranks make of it outside of the cluster."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    words = torchrun(2, "launch/train.py", f"run.dir={folder}", *training(TRAINING))
    subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=300)
    return weights(folder)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options of a short training on shards."""
    return [*digit_shards(tmp_path_factory.mktemp("digits")), "epochs=1", "optim.lr=0.1"]


@pytest.fixture(scope="module")
def alone(digits: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    words = [PYTHON, "launch/train.py", f"run.dir={folder}", *NET, *digits]
    subprocess.run(words, cwd=ROOT, check=True, timeout=200)
    return weights(folder)


def test_two_nodes_with_two_tasks_train_to_the_result_of_one_process_whatever_starts_them(
    cluster: Cluster, tmp_path: Path, digits: list[str], alone: dict[str, torch.Tensor]
) -> None:
    ours, other = tmp_path / "submitit", tmp_path / "torchrun"
    other.mkdir()
    job = sbatch(cluster, other, "--nodes=2", *digits, *ZERO)
    tasks = ["cluster.nodes=2", "cluster.tasks_per_node=2", f"cluster.stage={ours}/$SLURMD_NODENAME"]
    done = submit(cluster, ours, *tasks, "--wait", *digits, *ZERO)
    assert done.returncode == 0, done.stdout + done.stderr
    until(cluster, other, lambda: cluster.state(job) == "COMPLETED", job)
    for folder in (ours, other):
        check_close(folder, alone)
    said = "".join(path.read_text() for path in (ours / "jobs").glob("*_log.err"))
    copies = re.findall(rf"^staged .* to {ours}/(node\d)/", said, re.MULTILINE)
    assert len(copies) == len(set(copies)) == 2  # once a node, not once a rank


def test_a_sweep_is_one_array_with_one_report_and_only_lost_members_go_again(cluster: Cluster, tmp_path: Path) -> None:
    sweep = ["rule=align_ada,align_zero", "epochs=1", "cluster.concurrent=1", "--wait"]
    done = submit(cluster, tmp_path, *sweep)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = re.findall(r"^job (\d+_\d):", done.stdout, re.MULTILINE)
    assert first.partition("_")[0] == second.partition("_")[0]
    assert cluster.state(second, "StartTime") >= cluster.state(first, "EndTime")  # one at a time, as was asked for
    results = sorted((tmp_path / "runs/run-sweep").glob("*/result.json"))
    assert len(results) == 2
    assert len(json.loads((tmp_path / "runs/run-sweep/result.json").read_text())["runs"]) == 2
    results[0].unlink()
    again = submit(cluster, tmp_path, *sweep)
    assert "1 to submit, 1 finished" in again.stdout
    assert results[0].exists()


def test_a_rank_that_fails_by_itself_is_named_and_the_job_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    torchrun = sbatch(cluster, tmp_path, "--nodes=2", "epochs=1", "optim.lr=0.1", *ZERO, path=tmp_path)
    done = submit(cluster, tmp_path, python_path(tmp_path), "cluster.nodes=2", "--wait", *ZERO)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "rank 1 on node2: rank 1: shard-7.tar: key 0042: expected a JPEG, found text" in done.stderr
    assert restarts(cluster, done.stdout.split("job ")[1].split(":")[0]) == 0

    cluster.until(lambda: cluster.state(torchrun) in {"COMPLETED", "FAILED"}, 200)
    assert cluster.state(torchrun, "ExitCode") == "2:0"
    assert "error: rank 1: shard-7.tar: key 0042: expected a JPEG, found text" in (tmp_path / "out").read_text()
    assert restarts(cluster, torchrun) == 0


def test_every_option_of_a_request_arrives_at_slurm(cluster: Cluster, tmp_path: Path) -> None:
    ours = ["reservationname=ours", "starttime=now", "duration=60", "users=root", "nodes=node3"]
    made = cluster.run("scontrol", "create", "reservation", *ours)
    assert made.returncode == 0, made.stderr
    given = {
        "reservation": "ours", "constraint": "small", "exclude": "node1", "account": "physics", "qos": "high",
        "partition": "test", "minutes": 7, "memory_gb": 1, "cpus_per_task": 2, "gpus_per_node": 1,
        "setup": f"['echo set up > {tmp_path / 'setup'}']", "srun": "[--label]", "sbatch": "{comment:words,nice:7}",
    }  # fmt: skip
    try:
        job = send(cluster, tmp_path, "epochs=1", *(f"cluster.{name}={value}" for name, value in given.items()))
        until(cluster, tmp_path, lambda: cluster.state(job) == "COMPLETED", job)
        expected = {
            "Reservation": "ours", "Features": "small", "ExcNodeList": "node1", "Account": "physics",
            "Partition": "test", "TimeLimit": "00:07:00", "MinMemoryNode": "1G", "CPUs/Task": "2",
            "TresPerNode": "gres:gpu:1", "NodeList": "node3", "Comment": "words", "Nice": "7", "Requeue": "1",
        }  # fmt: skip
        assert {name: cluster.state(job, name) for name in expected} == expected
    finally:
        cluster.run("scontrol", "delete", "reservationname=ours")
    # SLURM knows no QOS without its accounting, and drops the name.
    assert "#SBATCH --qos=high\n" in (tmp_path / f"jobs/{job}_submission.sh").read_text()
    assert (tmp_path / "setup").read_text() == "set up\n"
    assert "\n0: rule:\n" in (tmp_path / f"jobs/{job}_0_log.out").read_text()  # srun --label


def test_hydras_own_sweep_runs_as_jobs_of_slurm(cluster: Cluster, tmp_path: Path) -> None:
    sweep = ["--multirun", "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5", "seed=0,1"]
    folders = [f"hydra.sweep.dir={tmp_path / 'sweep'}", f"run.root={tmp_path / 'runs'}"]
    done = cluster.run(sys.executable, "launch/train.py", *sweep, *folders, *training(["epochs=1"]), timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 2


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("cluster.nodes=9", "Node count specification invalid"),
        ("cluster.minutes=600", "time limit is invalid"),
        ("cluster.partition=none", "invalid partition"),
        ("cluster.sbatch={constraint:gpu9}", "Invalid feature"),
    ],
)
def test_an_impossible_request_is_refused_with_slurms_reason(
    cluster: Cluster, tmp_path: Path, option: str, reason: str
) -> None:
    done = submit(cluster, tmp_path, option)
    assert done.returncode == 2, done.stdout + done.stderr
    assert reason.lower() in done.stderr.lower()
    assert not (tmp_path / "runs").exists()


def test_jobs_that_are_preempted_and_then_lose_a_node_go_on_to_the_same_weights_whatever_starts_their_ranks(
    cluster: Cluster, tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    jobs = begin_both_ways(cluster, tmp_path)
    (ours, first), (other, _) = jobs.items()
    logs = [ours / f"jobs/{first}_0_log.out", other / "out"]
    urgent = ["--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 2"]
    assert cluster.run("sbatch", *urgent).returncode == 0
    for (folder, job), log in zip(jobs.items(), logs, strict=True):
        until(cluster, folder, lambda log=log: "resumed after step" in log.read_text(), job)  # type: ignore[misc]
    assert "stopped by signal 12" in logs[0].with_suffix(".err").read_text()
    assert "requeued: a rank ended with 140" in logs[1].read_text()

    (node,) = {nodes(cluster, job)[1] for job in jobs.values()}
    cluster.kill_node(node)
    for folder, job in jobs.items():
        until(cluster, folder, lambda job=job: cluster.state(job) == "COMPLETED", job)  # type: ignore[misc]
        assert restarts(cluster, job) >= 2
        assert node not in nodes(cluster, job)
        assert same(weights(run_of(folder)), uninterrupted)
    cluster.start_node(node)


def test_jobs_at_their_time_limit_save_and_go_on_whatever_starts_their_ranks(cluster: Cluster, tmp_path: Path) -> None:
    ours, other = tmp_path / "submitit", tmp_path / "torchrun"
    other.mkdir()
    (tmp_path / "sitecustomize.py").write_text(PATIENT)
    second = sbatch(cluster, other, "--time=2", "--signal=USR2@15", *ENDLESS, path=tmp_path)
    first = begin(cluster, ours, "cluster.minutes=2", "cluster.warning=15", python_path(tmp_path), *ENDLESS)
    log = ours / f"jobs/{first}_0_log.out"
    until(cluster, ours, lambda: "resumed after step" in log.read_text(), first)
    until(cluster, other, lambda: "resumed after step" in (other / "out").read_text(), second)
    assert "requeued (1 of 10)" in log.with_suffix(".err").read_text()
    assert "requeued: a rank ended with 140" in (other / "out").read_text()
    cluster.run("scancel", first, second)
    said = (
        (log.with_suffix(".err").read_text(), "requeued ("),
        ((other / "out").read_text(), "requeued: a rank ended with"),
    )
    for job, (text, words) in zip((first, second), said, strict=True):  # each restart is one that the job asked for
        assert restarts(cluster, job) == text.count(words) >= 1


def test_a_cancelled_job_ends_and_is_not_started_again(cluster: Cluster, tmp_path: Path) -> None:
    job = begin(cluster, tmp_path, *ENDLESS)
    again = submit(cluster, tmp_path, *ENDLESS)
    assert f"job {job}: " in again.stdout
    assert "already under way" in again.stdout
    with subprocess.Popen(
        cluster.inside(*command(tmp_path, *ENDLESS, "--wait")), env=cluster.environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as waiting:  # fmt: skip
        assert waiting.stdout is not None
        while "already under way" not in waiting.stdout.readline():
            assert waiting.poll() is None
        cluster.run("scancel", job)
        cluster.until(lambda: cluster.state(job) == "CANCELLED", 60)
        _, said = waiting.communicate(timeout=60)
    assert waiting.returncode != 0
    assert f"job {job}: " in said  # as if it had been followed from the beginning
    cluster.until(lambda: "stopped by signal 15" in (tmp_path / f"jobs/{job}_0_log.err").read_text(), 60)
    assert restarts(cluster, job) == 0


def test_clean_up_leaves_no_process_even_when_the_owner_is_killed(tmp_path: Path) -> None:
    def alive() -> list[str]:
        """Processes with this cluster's configuration in their environment, or its folder on their command lines."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if str(tmp_path / "own").encode() in (path / "environ").read_bytes() + (path / "cmdline").read_bytes():
                    found.append((path / "comm").read_text().strip())
        return found

    owner = subprocess.Popen([sys.executable, "tests/slurm_cluster.py", str(tmp_path / "own"), "600"], cwd=ROOT)
    while alive().count("slurmd") < 3:
        time.sleep(0.2)
    assert {"slurmctld", "munged"} <= set(alive())
    owner.kill()
    owner.wait()
    while alive():
        time.sleep(0.2)
