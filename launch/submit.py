"""Send a run, or a sweep, to a cluster: python launch/submit.py cluster=slurm cluster.nodes=2 net.width=512.

cluster=<preset> is slurm, local (processes on this machine), debug (this process) or a file; cluster.<option>=<value>
changes it, and all other options are those of launch/train.py, where several values (seed=0,1,2) make a sweep: one job
array, one folder for each run. --wait shows the progress and ends with the job's status and, for a sweep, its report.
The same command again submits only the runs that are not finished and not under way.
"""

import copy
import importlib.util
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _hydra import command_line, for_jobs, guarded, quoted
from _options import CompareConfig, apart, register

from alignscale.choices import ConfigError
from alignscale.config import TrainConfig, run_folder, run_name
from alignscale.files import write_atomic
from alignscale.folder import same_run
from alignscale.results import read_result
from alignscale.validation import validate

MARK = ".job"
"""The file in a run's folder that names the job it was last submitted as."""


def expand(options: Sequence[str]) -> list[TrainConfig]:
    """The runs that the options ask for, checked. Raises ConfigError for the first mistake."""
    from _mistakes import check

    configs: list[TrainConfig] = check("train", [*options, "--multirun"])
    for config in configs:
        validate(config)
    return configs


def place(configs: list[TrainConfig], sweep: str) -> Path | None:
    """Give each run of a sweep a folder of its own in the sweep's, which is returned; None for a single run."""
    for config in configs:
        if config.resume == "never":
            raise ConfigError("resume=never: expected auto, or a job that is requeued would start from nothing")
    if len(configs) == 1 and not sweep:
        configs[0].run.dir = str(run_folder(configs[0]).absolute())
        return None
    if configs[0].run.dir:
        raise ConfigError(f"run.dir={configs[0].run.dir}: expected cluster.sweep=<folder>, for all of them")
    folder = Path(sweep or Path(configs[0].run.root) / f"{configs[0].name}-sweep").expanduser().absolute()
    for config in configs:
        config.run.dir = str(folder / run_name(config))
    apart(configs, "the sweep")
    return folder


def finished(config: TrainConfig) -> bool:
    """Whether the run in the folder is done, be it with a divergence. Raises ConfigError if it is another run's."""
    same_run(run_folder(config) / "config.yaml", config)
    try:
        return bool(read_result(run_folder(config) / "result.json"))
    except ValueError:  # there is none, or a damaged one, which the run writes again from its checkpoint
        return False


def under_way(config: TrainConfig, logs: Path) -> Any:
    """The job that the run was submitted as, if SLURM still has it. logs: of marks that do not say where."""
    import submitit
    from _cluster import show_job
    from _follow import ENDED

    try:
        mark = json.loads((run_folder(config) / MARK).read_text())
        job: str = mark["slurm"]
    except (OSError, ValueError, KeyError):
        return None
    state = show_job(job).get("JobState")
    return None if state is None or state in ENDED else submitit.SlurmJob(mark.get("logs", logs), job)


def report(configs: list[TrainConfig], folder: Path, command: str) -> None:
    """One table and one page of the runs of a sweep that are done."""
    from _report.page import text_table, write_report
    from _runs import combine

    done = [config for config in configs if finished(config)]
    if not done:
        return
    results = [read_result(run_folder(config) / "result.json") for config in done]
    result = combine(CompareConfig(title=folder.name, folder=str(folder)), done, results, command)
    write_atomic(folder / "result.json", json.dumps(result, indent=1, allow_nan=False).encode())
    write_report(result, folder / "report.html", "result.json")
    print(f"\n{text_table(result)}\n\n{len(done)} of {len(configs)} runs; report: {folder / 'report.html'}")


def send(cluster: Any, todo: list[TrainConfig], command: str) -> list[Any]:
    """Submit the runs, note each one's job in its folder, and say where they are and how to follow them."""
    from _cluster import make_executor, submit
    from _job import Job

    logs = cluster.logs
    executor = make_executor(cluster, logs, todo[0].name)
    jobs = submit(
        executor, [Job(copy.deepcopy(one), command, cluster.requeues, cluster.stage, str(logs)) for one in todo]
    )
    for job, config in zip(jobs, todo, strict=True):
        folder = run_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / MARK, json.dumps({cluster.executor: job.job_id, "logs": str(logs)}).encode())
        print(f"job {job.job_id}: {folder}")
    first = jobs[0]
    if cluster.executor != "debug":
        print(f"follow: tail -F {shlex.quote(str(first.paths.stdout))}", flush=True)
    if cluster.executor == "slurm":
        whole = first.job_id.partition("_")[0]
        print(f"state: squeue --job {whole}; cancel: scancel {whole}", flush=True)
    return jobs


def in_process(job: Any) -> tuple[int, str]:
    """Do a job of the executor debug here; its error is on the screen already."""
    try:
        job.result()
    except SystemExit as ended:
        return int(ended.code or 0), ""
    return 0, ""


def main() -> None:
    """Submit, and with --wait follow."""
    guarded(_installed)
    if {"--help", "-h"} & set(sys.argv[1:]):
        from _cluster import ClusterConfig

        options = "\n".join(f"    cluster.{name}={value!r}" for name, value in vars(ClusterConfig()).items())
        print(f"{__doc__}\n{ClusterConfig.__doc__}\nAll of them, with their defaults:\n\n{options}")
        return
    register()
    for_jobs()
    guarded(run)


def _installed() -> None:
    if importlib.util.find_spec("submitit") is None:
        raise ConfigError("expected the package submitit, found none; pip install 'alignscale[slurm]', or make setup")


def run() -> None:
    """What ``main`` guards."""
    from _cluster import read_cluster
    from _follow import wait

    given = [quoted(line) for line in sys.argv[1:] if line != "--wait"]
    ours = [line for line in given if line.startswith(("cluster=", "cluster."))]
    cluster = read_cluster(ours)
    configs = expand([line for line in given if line not in ours])
    folder = place(configs, cluster.sweep)
    command = command_line("launch/submit.py")
    todo, begun = [config for config in configs if not finished(config)], []
    for config in list(todo):
        job = under_way(config, cluster.logs)
        if job is not None:
            todo.remove(config)
            begun += [job] if cluster.executor == "slurm" else []
            print(f"job {job.job_id}: {run_folder(config)}, already under way", flush=True)
    print(f"{len(configs)} runs: {len(todo)} to submit, {sum(map(finished, configs))} finished")
    cluster.wait = cluster.wait or "--wait" in sys.argv or cluster.executor != "slurm"
    size = len(todo) if cluster.executor == "slurm" else cluster.concurrent
    ends: list[tuple[int, str]] = []
    for first in range(0, len(todo), max(size, 1)):
        jobs = send(cluster, todo[first : first + size], command)
        if cluster.executor == "debug":
            ends += map(in_process, jobs)
        elif cluster.wait:
            ends += wait([*jobs, *begun], lambda text: print(text, flush=True))
            begun = []
    if begun and cluster.wait:
        ends += wait(begun, lambda text: print(text, flush=True))
    if todo and not cluster.wait:
        return
    for _, error in ends:
        if error:
            print(f"error: {error}", file=sys.stderr)
    if folder is not None:
        report(configs, folder, command)
    sys.exit(next((status for status, _ in ends if status), 0))


if __name__ == "__main__":
    main()
