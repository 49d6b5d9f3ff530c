"""Claims about clusters: a real SLURM of three nodes on this machine, submitit, torchrun, and nodes killed with -9."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from run_cases import weights
from slurm_cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[1]
NET = [
    "net=mlp",
    "net.width=16",
    "net.depth=2",
    "batch_size=100",
    "optim.momentum=0.9",
    "log.progress=false",
    "threads=1",
]
ZERO = ["engine=deepspeed", "engine.zero_stage=3", "engine.timeout=150"]
LONG = ["epochs=60", "checkpoint.every_steps=20"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache/torch_extensions"))
    os.environ["OMP_NUM_THREADS"] = "1"
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    yield made
    made.stop()


def command(folder: Path, *options: str) -> list[str]:
    given = [f"cluster.folder={folder / 'jobs'}", f"run.root={folder / 'runs'}", *NET, *options]
    return [sys.executable, "launch/submit.py", "cluster=slurm", *given]


def submit(cluster: Cluster, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return cluster.run(*command(folder, *options), timeout=280)


def job_of(done: subprocess.CompletedProcess[str]) -> str:
    return next(line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("job "))


def alone(folder: Path, *options: str) -> dict[str, torch.Tensor]:
    subprocess.run(
        [sys.executable, "launch/train.py", f"run.dir={folder}", *NET, *options], cwd=ROOT, check=True, timeout=200
    )
    return weights(folder)


def check_close(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    (run,) = [path.parent for path in (folder / "runs").glob("*/result.json")]
    for name, found in weights(run).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5)


def step(folder: Path) -> int:
    return max((int(path.name.partition("-")[2]) for path in (folder / "runs").glob("*/checkpoints/step-*")), default=0)


def test_two_nodes_with_two_tasks_train_to_the_result_of_one_process(cluster: Cluster, tmp_path: Path) -> None:
    options = ["epochs=1", *ZERO]
    done = submit(cluster, tmp_path, "cluster.nodes=2", "cluster.tasks_per_node=2", "--wait", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    check_close(tmp_path, alone(tmp_path / "alone", "epochs=1"))


def test_sbatch_with_torchrun_trains_to_the_result_of_one_process(cluster: Cluster, tmp_path: Path) -> None:
    cluster.environment |= {"RANKS": "2", "PYTHON": sys.executable}
    done = cluster.run(
        "sbatch", "--wait", "--nodes=2", f"--output={tmp_path}/out", "launch/slurm.sbatch",
        f"run.root={tmp_path / 'runs'}", *NET, "epochs=1", *ZERO, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, (tmp_path / "out").read_text()
    check_close(tmp_path, alone(tmp_path / "alone", "epochs=1"))


def test_a_sweep_is_one_array_with_one_report_and_only_lost_members_go_again(cluster: Cluster, tmp_path: Path) -> None:
    sweep = ["rule=align_ada,align_zero", "epochs=1", "cluster.concurrent=2", "--wait"]
    done = submit(cluster, tmp_path, *sweep)
    assert done.returncode == 0, done.stdout + done.stderr
    results = sorted((tmp_path / "runs/run-sweep").glob("*/result.json"))
    assert len(results) == 2
    assert len(json.loads((tmp_path / "runs/run-sweep/result.json").read_text())["runs"]) == 2
    results[0].unlink()
    again = submit(cluster, tmp_path, *sweep)
    assert "1 to submit, 1 finished" in again.stdout
    assert results[0].exists()


def test_a_run_that_fails_by_itself_is_not_requeued_and_says_why(cluster: Cluster, tmp_path: Path) -> None:
    done = submit(
        cluster, tmp_path, "data=imagefolder", f"data.root={tmp_path}", "cluster.tasks_per_node=2", "--wait", *ZERO
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "rank 0 on node" in done.stderr
    assert cluster.state(job_of(done), "Restarts") == "0"


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


def test_a_job_whose_node_is_killed_goes_on_elsewhere_to_the_same_weights(cluster: Cluster, tmp_path: Path) -> None:
    sent = submit(cluster, tmp_path, "cluster.nodes=2", *LONG, *ZERO)
    job = job_of(sent)
    cluster.until(lambda: step(tmp_path) >= 40, 90)
    node = cluster.run("scontrol", "show", "hostnames", cluster.state(job, "NodeList")).stdout.split()[1]
    cluster.kill_node(node)
    cluster.until(lambda: cluster.state(job) == "COMPLETED", 150)
    cluster.start_node(node)
    assert int(cluster.state(job, "Restarts")) >= 1
    check_close(tmp_path, alone(tmp_path / "alone", *LONG))


def test_a_preempted_job_saves_and_goes_on_to_the_same_weights(cluster: Cluster, tmp_path: Path) -> None:
    job = job_of(submit(cluster, tmp_path, "cluster.sbatch={exclusive:true}", *LONG))
    cluster.until(lambda: step(tmp_path) >= 20, 60)
    node = cluster.state(job, "NodeList")
    cluster.run(
        "sbatch", "--partition=urgent", f"--nodelist={node}", "--exclusive", "--output=/dev/null", "--wrap", "sleep 2"
    )
    cluster.until(lambda: cluster.state(job) == "COMPLETED", 120)
    assert int(cluster.state(job, "Restarts")) >= 1
    check_close(tmp_path, alone(tmp_path / "alone", *LONG))


def test_a_cancelled_job_ends_and_leaves_a_checkpoint_to_go_on_from(cluster: Cluster, tmp_path: Path) -> None:
    job = job_of(submit(cluster, tmp_path, *LONG, "epochs=4000"))
    cluster.until(lambda: step(tmp_path) >= 20, 60)
    cluster.run("scancel", job)
    cluster.until(lambda: cluster.state(job) == "CANCELLED", 60)
    assert step(tmp_path) >= 20


def test_clean_up_leaves_no_process_even_when_the_owner_is_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "tests/slurm_cluster.py", str(tmp_path / "own"), "600"], cwd=ROOT)
    while not (tmp_path / "own/started").exists():
        time.sleep(0.2)
    owner.kill()
    owner.wait()
    end = time.monotonic() + 30
    while left := subprocess.run(["pgrep", "-f", str(tmp_path / "own")], capture_output=True, text=True).stdout:
        assert time.monotonic() < end, left
        time.sleep(0.2)
