"""What runs on the cluster: a small callable that submitit pickles, and ``train`` inside of it."""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import submitit
from _outcome import outcome
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from alignscale.config import TrainConfig
from alignscale.files import write_atomic
from alignscale.interrupts import Interrupted
from alignscale.liveness import LOST, Heart, RankError

PATIENCE = 60.0
"""Seconds that a rank leaves to SLURM, and to a rank that speaks, to end it."""


class Lost(RuntimeError):
    """A job that started again as often as it may, for ``problem``; told: by another rank."""

    def __init__(self, problem: Exception, why: str) -> None:
        super().__init__(f"{problem}; {why}")
        self.told = getattr(problem, "told", False)


@dataclass
class Job:
    """One run. requeues: how often it starts again after a signal or a lost node. folder: of its logs."""

    config: TrainConfig
    command: str
    requeues: int = 0
    stage: str = ""
    folder: str = ""

    def checkpoint(self) -> DelayedSubmission:
        """What submitit submits again when a signal comes while the run is not yet in its loop."""
        return DelayedSubmission(self)

    def __call__(self) -> str:  # noqa: RET503
        """Train as one rank of the job and return the run's one line. Ends with launch/train.py's status."""
        job = submitit.JobEnvironment()
        failure = failure_file(Path(self.folder), job.job_id, job.global_rank)
        failure.unlink(missing_ok=True)
        if job.num_tasks > 1:  # the variables that torchrun would have set
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
            Heart.end = lambda problem: self._end(failure, job, LOST, self._again(job, problem))
        status = 1
        try:
            from _report.series import summary  # the rest, after the ranks are known
            from _runs import silent, train_and_report
            from _stage import stage

            if self.stage:
                stage(self.config, self.stage, str(job.job_id))
            show = print if job.global_rank == 0 else silent
            line = summary(train_and_report(self.config, show, self.command))
            show(line)
            if job.num_tasks > 1:  # native threads do not always survive Python's own end
                atexit.register(os._exit, 0)
            return line
        except (Interrupted, RankError) as problem:
            status = LOST if isinstance(problem, RankError) else 128 + problem.signum
            stopped_here = isinstance(problem, Interrupted) and problem.signum != signal.SIGUSR2
            error = problem if stopped_here else self._again(job, problem)
        except Exception as problem:
            found = outcome(problem)
            if found is None:
                traceback.print_exc()
            status, before, after = found or (1, "error", "")
            error = RuntimeError(f"{before}: {problem}{after}".removeprefix("error: "))
        self._end(failure, job, status, error)

    def _again(self, job: submitit.JobEnvironment, problem: Exception) -> Exception:
        """Have SLURM start the job again, which ends this process; else say why not."""
        if job.cluster != "slurm" or not getattr(problem, "lost", True):
            return problem
        before = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if before >= self.requeues:
            return Lost(problem, f"started again {before} times, and cluster.requeues={self.requeues} allows no more")
        time.sleep(min(job.global_rank, 30))  # one rank asks, the lowest that is left
        print(f"requeued ({before + 1} of {self.requeues}): {problem}", file=sys.stderr, flush=True)
        try:
            subprocess.run(["scontrol", "requeue", str(job.job_id)], timeout=PATIENCE, check=True, capture_output=True)
        except (OSError, subprocess.SubprocessError) as refused:
            words = (getattr(refused, "stderr", b"") or b"").decode().strip() or str(refused)
            if "pending" not in words:  # another rank has asked
                return Lost(problem, f"SLURM did not requeue the job: {words}")
        time.sleep(PATIENCE)  # SLURM ends the job; a rank that ended first would make it one that failed
        return problem

    def _end(self, failure: Path, job: submitit.JobEnvironment, status: int, problem: Exception) -> NoReturn:
        node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        error = {"rank": job.global_rank, "node": node, "status": status, "error": str(problem)}
        error["told"] = bool(getattr(problem, "told", False))
        where = f"rank {job.global_rank} on {node}: " if job.num_tasks > 1 else ""
        with suppress(OSError):  # on a full disk it is said and ends all the same
            write_atomic(failure, json.dumps(error).encode())
        with suppress(OSError):
            print(f"error: {where}{problem}", file=sys.stderr, flush=True)
        if job.num_tasks > 1 and error["told"]:
            time.sleep(5)  # the rank that failed ends the job, with its own status
        sys.stdout.flush()
        if job.cluster == "debug":
            sys.exit(status)
        os._exit(status)


def failure_file(folder: Path, job_id: str, rank: int) -> Path:
    """Where a rank of a job leaves why it ended."""
    return Path(folder) / f"{job_id}_{rank}_failed.json"
