"""Jobs under way: what they print as it comes, how they ended, and the rank, node and last lines of one that failed."""

import json
import time
from collections.abc import Callable, Sequence
from operator import itemgetter
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
        """Whether the job has ended: for good, since one that is started again may seem to have ended at one look."""
        if not isinstance(self.job, submitit.SlurmJob):
            if self.job.done():
                self.state = "COMPLETED" if self._finished() else "FAILED"
            return bool(self.state)
        shown, before = show_job(self.job.job_id), self.state
        self.unknown = 0 if shown else self.unknown + 1
        self.state, self.code = shown.get("JobState", before), shown.get("ExitCode", self.code)
        if self.unknown >= FORGOTTEN:
            self.state = "COMPLETED" if self._finished() else "FORGOTTEN"
        return self.unknown >= FORGOTTEN or (self.state in ENDED and self.state == before)

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
        """The exit status of a job that has ended, and why it failed: the rank, its node and its last lines."""
        if self.state == "COMPLETED":
            return 0, ""
        files = self.job.paths.folder.glob(f"{self.job.job_id}_*_failed.json")
        failures = sorted((json.loads(path.read_text()) for path in files), key=itemgetter("told", "rank"))
        if failures:
            first = failures[0]
            words = f"rank {first['rank']} on {first['node']}: {first['error']}{self._last(first['rank'])}"
            return first["status"], f"job {self.job.job_id}: {words}"
        code, signum = (int(number or 0) for number in self.code.split(":"))
        words = f"{self.state}, exit status {code}" + (f", signal {signum}" if signum else "") + self._last("*")
        return code or 128 * bool(signum) + signum or 1, f"job {self.job.job_id}: {words}"

    def _last(self, rank: int | str, count: int = 10) -> str:
        """The last lines of a rank's errors, or of each rank's; its error itself is told already."""
        words = ""
        for path in sorted(self.job.paths.folder.glob(f"{self.job.job_id}_{rank}_log.err")):
            lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
            lines = [line for line in lines if not line.startswith(("error: ", "submitit "))]
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
