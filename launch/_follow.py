"""Jobs under way: what they print as it comes, how they ended, and the rank, node and last lines of one that failed."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import submitit
from _cluster import show_job

ENDED = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED",
)  # fmt: skip
POLL = 1.0
FORGOTTEN = 5
"""Looks at a job that SLURM does not know before it is taken to have ended."""


class Follower:
    """One job: its state, the new lines of its first rank, and its end."""

    def __init__(self, job: submitit.Job[Any]) -> None:
        self.job, self.read, self.unknown, self.state, self.code = job, 0, 0, "", "0:0"

    def look(self) -> bool:
        """Whether the job has ended."""
        if not isinstance(self.job, submitit.SlurmJob):
            if self.job.done():
                self.state = "COMPLETED" if self._finished() else "FAILED"
            return bool(self.state)
        shown = show_job(self.job.job_id)
        self.unknown = 0 if shown else self.unknown + 1
        state = shown.get("JobState", "")
        if state in ENDED or self.unknown >= FORGOTTEN:
            self.state, self.code = (
                state or ("COMPLETED" if self._finished() else "FORGOTTEN"),
                shown.get("ExitCode", "1:0"),
            )
        elif state and state != self.state:
            self.state = state
        return state in ENDED or self.unknown >= FORGOTTEN

    def lines(self) -> str:
        """What the first rank has printed since the last look."""
        try:
            with self.job.paths.stdout.open(errors="replace") as file:
                file.seek(self.read)
                text = file.read()
                self.read = file.tell()
        except FileNotFoundError:
            return ""
        return "".join(line for line in text.splitlines(True) if not line.startswith("submitit "))

    def _finished(self) -> bool:
        return self.job.paths.result_pickle.exists()

    def end(self) -> tuple[int, str]:
        """The exit status of a job that has ended, and why it failed, in one line and the last ones of its rank."""
        if self.state == "COMPLETED":
            return 0, ""
        found = [json.loads(path.read_text()) for path in self._failures()]
        told = [one for one in found if not one["told"]] or found
        code, _, signum = self.code.partition(":")
        status = told[0]["status"] if told else int(code) or (128 + int(signum or 0) if int(signum or 0) else 1)
        if told:
            first = min(told, key=lambda one: one["status"])
            status, where = first["status"], f"rank {first['rank']} on {first['node']}: {first['error']}"
            last = ""
        else:
            where, last = f"{self.state}, exit status {self.code}", self._last()
        return status, f"job {self.job.job_id}: {where}{last}"

    def _failures(self) -> list[Path]:
        return sorted(self.job.paths.folder.glob(f"{self.job.job_id}_*_failed.json"))

    def _last(self, count: int = 10) -> str:
        """The last lines of each rank's errors that has any, newest last."""
        words = ""
        for path in sorted(self.job.paths.folder.glob(f"{self.job.job_id}_*_log.err")):
            lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
            if lines:
                words += f"\n{path}:\n  " + "\n  ".join(lines[-count:])
        return words


def wait(jobs: Sequence[submitit.Job[Any]], show: Callable[[str], None]) -> list[tuple[int, str]]:
    """Follow the jobs until all have ended. Returns the status and the error of each."""
    followers = [Follower(job) for job in jobs]
    left = list(followers)
    while left:
        for one in list(left):
            over = one.look()
            text = one.lines()
            if text:
                before = f"[{one.job.job_id}] " if len(jobs) > 1 else ""
                show("\n".join(before + line for line in text.rstrip("\n").split("\n")))
            if over:
                left.remove(one)
        if left:
            time.sleep(POLL)
    return [one.end() for one in followers]
