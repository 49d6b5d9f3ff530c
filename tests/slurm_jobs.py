"""Jobs on the SLURM of tests/slurm_cluster.py: how they are sent, what they leave, and what is waited for."""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from run_cases import weights
from slurm_cluster import Cluster

ROOT = Path(__file__).parents[1]
NET = [
    "net=mlp", "net.width=16", "net.depth=2", "batch_size=100", "optim.momentum=0.9",
    "log.progress=false", "threads=1",
]  # fmt: skip
SYNTHETIC = ["data=synthetic", "data.shape=[1,8,8]", "data.train=1437", "data.test=360"]
"""No rank takes seconds to import what reads digits."""
ZERO = ["engine=deepspeed", "engine.zero_stage=3", "engine.timeout=150"]
TRAINING = ["epochs=30", "optim.lr=0.001", "checkpoint.every_steps=20", *ZERO]
TWO_NODES = ["cluster.nodes=2", *TRAINING]
ENDLESS = ["epochs=100000", "optim.lr=1e-6", "checkpoint.every_steps=20"]


def training(options: Sequence[str]) -> list[str]:
    data = [] if any(option.startswith("data") for option in options) else SYNTHETIC
    return [*NET, *data, *options]


def command(folder: Path, *options: str) -> list[str]:
    given = [f"cluster.folder={folder / 'jobs'}", f"run.root={folder / 'runs'}", *training(options)]
    return [sys.executable, "launch/submit.py", "cluster=slurm", *given]


def submit(cluster: Cluster, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return cluster.run(*command(folder, *options), timeout=280)


def send(cluster: Cluster, folder: Path, *options: str) -> str:
    """The job of launch/submit.py."""
    sent = submit(cluster, folder, *options)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    job = re.search(r"^job (\d+):", sent.stdout, re.MULTILINE)
    assert job is not None
    return job[1]


def begin(cluster: Cluster, folder: Path, *options: str) -> str:
    """The job, which has written a few checkpoints."""
    job = send(cluster, folder, *options)
    until(cluster, folder, lambda: step(folder) >= 40, job)
    return job


def begin_both_ways(cluster: Cluster, folder: Path) -> dict[Path, str]:
    """The same training by launch/submit.py and by launch/slurm.sbatch: the jobs by their folders."""
    ours, other = folder / "submitit", folder / "torchrun"
    other.mkdir()
    torchrun = sbatch(cluster, other, "--nodes=2", *TRAINING, ranks=1)
    jobs = {ours: begin(cluster, ours, *TWO_NODES), other: torchrun}
    until(cluster, other, lambda: step(other) >= 40, torchrun)
    return jobs


def nodes(cluster: Cluster, job: str) -> list[str]:
    return cluster.run("scontrol", "show", "hostnames", cluster.state(job, "NodeList")).stdout.split()


def until(cluster: Cluster, folder: Path, true: Callable[[], bool], job: str, seconds: float = 300) -> None:
    """Wait, but not for what a job that has failed will not do."""

    def hopeless() -> bool:
        return cluster.state(job) == "FAILED"

    cluster.until(lambda: true() or hopeless(), seconds)
    if not true():
        logs = [*sorted((folder / "jobs").glob("*.err")), *folder.glob("out")]
        raise AssertionError("\n".join(path.read_text()[-2000:] for path in logs))


def sbatch(cluster: Cluster, folder: Path, *options: str, path: Path = ROOT, ranks: int = 2) -> str:
    """The job of launch/slurm.sbatch. path: of PYTHONPATH. ranks: on each of its nodes."""
    ours = [option for option in options if option.startswith("--")]
    given = [f"run.root={folder / 'runs'}", *training([option for option in options if option not in ours])]
    environment = ["env", f"RANKS={ranks}", f"PYTHON={sys.executable}", f"PYTHONPATH={path}"]
    sent = cluster.run(
        *environment, "sbatch", "--parsable", *ours, f"--output={folder}/out", "launch/slurm.sbatch", *given
    )
    assert sent.returncode == 0, sent.stderr
    return sent.stdout.strip()


def run_of(folder: Path) -> Path:
    (run,) = (path.parent for path in (folder / "runs").glob("*/config.yaml"))
    return run


def check_close(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    for name, found in weights(run_of(folder)).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5)


def step(folder: Path) -> int:
    found = (folder / "runs").glob("*/checkpoints/step-*")
    return max((int(path.name.partition("-")[2]) for path in found), default=0)


def restarts(cluster: Cluster, job: str) -> int:
    return int(cluster.state(job, "Restarts") or 0)


def python_path(folder: Path) -> str:
    return f"cluster.setup=['export PYTHONPATH={folder}:$PYTHONPATH']"
