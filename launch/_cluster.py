"""Where jobs go: the options of a cluster, its presets in configs/cluster, and submitit's executor for them."""

import dataclasses
import re
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from submitit.core.utils import FailedJobError
from yaml import YAMLError

from alignscale.choices import ConfigError

LAUNCH = Path(__file__).resolve().parent
PRESETS = LAUNCH.parent / "configs/cluster"
EXECUTORS = ("slurm", "local", "debug")
HOPELESS = {
    "AssocGrpNodeLimit", "AssocMaxNodePerJobLimit", "AssocMaxWallDurationPerJobLimit", "BadConstraints",
    "InvalidAccount", "InvalidQOS", "PartitionNodeLimit", "PartitionTimeLimit", "QOSMaxNodePerJobLimit",
    "QOSMaxWallDurationPerJobLimit",
}  # fmt: skip
"""Reasons of SLURM for a job that waits and will never start, where the site does not refuse it at once."""
SECRET = re.compile(r"""\w*(token|secret|password|_key)["']?\s*=\s*["']?[^\s"'$]""", re.IGNORECASE)
SECONDS = 60
"""A dead controller keeps SLURM's clients waiting for minutes."""


@dataclass
class ClusterConfig:
    """What a job asks for.

    ``tasks_per_node``: ranks on each node, 0 for one a GPU. ``minutes``: the time limit, ``warning`` seconds before
    which SLURM signals the run, which must be enough for a step and a checkpoint. ``concurrent``: jobs of a sweep
    that run at the same time. ``requeues``: how often one job starts again by itself. ``setup``: lines of shell
    before the run, such as ``module load cuda``. ``sbatch`` and ``srun``: any other parameters of theirs. ``stage``:
    a folder on each node's own disk to which the data's files are copied once a node. ``folder``: job scripts and what
    the ranks print. ``sweep``: the folder of a sweep's runs and report, by default below ``run.root``. An empty text
    leaves the choice to the site.
    """

    executor: str = "slurm"
    nodes: int = 1
    tasks_per_node: int = 0
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    memory_gb: float = 0.0
    minutes: int = 60
    warning: int = 120
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""
    reservation: str = ""
    setup: list[str] = field(default_factory=list)
    sbatch: dict[str, Any] = field(default_factory=dict)
    srun: list[str] = field(default_factory=list)
    concurrent: int = 8
    requeues: int = 10
    stage: str = ""
    folder: str = "runs/.jobs"
    sweep: str = ""
    wait: bool = False

    @property
    def logs(self) -> Path:
        """``folder``, from wherever it is looked for."""
        return Path(self.folder).expanduser().absolute()

    @property
    def tasks(self) -> int:
        """Ranks on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1


def read_cluster(arguments: Sequence[str]) -> ClusterConfig:
    """The options of ``cluster=<preset>`` and ``cluster.<option>=<value>``. Raises ConfigError."""
    preset = next((line.partition("=")[2] for line in reversed(arguments) if line.startswith("cluster=")), "slurm")
    path = Path(preset).expanduser() if preset.endswith(".yaml") else PRESETS / f"{preset}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(found.stem for found in PRESETS.glob("*.yaml")))
        raise ConfigError(f"cluster={preset}: expected one of {names}, or the path of a preset's .yaml file")
    config, where = OmegaConf.structured(ClusterConfig), str(path)
    try:
        config = OmegaConf.merge(config, OmegaConf.load(path))
        for where in arguments:
            if not where.startswith("cluster="):
                (override,) = OverridesParser.create().parse_overrides([where])
                if override.is_sweep_override():
                    raise ValueError("expected one value, found several; a sweep is over options of the training")
                node = {override.key_or_group.removeprefix("cluster."): override.value()}
                config = OmegaConf.merge(config, node)
        cluster: ClusterConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as problem:
        names = ", ".join(option.name for option in dataclasses.fields(ClusterConfig))
        raise ConfigError(f"{where}: {str(problem).splitlines()[0]}; options of cluster: {names}") from problem
    _validate(cluster)
    return cluster


def _validate(cluster: ClusterConfig) -> None:
    if cluster.executor not in EXECUTORS:
        raise ConfigError(f"cluster.executor={cluster.executor}: expected one of {', '.join(EXECUTORS)}")
    least = {"nodes": 1, "tasks_per_node": 0, "gpus_per_node": 0, "cpus_per_task": 0, "memory_gb": 0, "minutes": 1,
             "warning": 1, "concurrent": 1, "requeues": 0}  # fmt: skip
    for name, minimum in least.items():
        if getattr(cluster, name) < minimum:
            raise ConfigError(f"cluster.{name}={getattr(cluster, name)}: expected {minimum} or more")
    if cluster.executor != "slurm" and cluster.nodes > 1:
        raise ConfigError(f"cluster.nodes={cluster.nodes}: expected 1 with the executor {cluster.executor}")
    if cluster.executor == "debug" and cluster.tasks > 1:
        raise ConfigError(f"cluster.tasks_per_node={cluster.tasks}: expected 1 with the executor debug; cluster=local")
    _refuse_secrets(cluster)
    if cluster.executor == "slurm" and shutil.which("srun") is None:
        raise ConfigError("cluster: expected SLURM's sbatch and srun on PATH, found none; cluster=local runs here")
    if cluster.executor == "slurm" and cluster.warning >= 60 * cluster.minutes:
        raise ConfigError(
            f"cluster.warning={cluster.warning}: expected less than the time limit, {60 * cluster.minutes} s "
            "(cluster.minutes), or the run would be stopped at once"
        )


def _refuse_secrets(cluster: ClusterConfig) -> None:
    given = {"setup": cluster.setup, "srun": cluster.srun, "sbatch": [f"{k}={v}" for k, v in cluster.sbatch.items()]}
    for option, lines in given.items():
        found = next(filter(None, map(SECRET.search, lines)), None)
        if found:
            name = found[0].partition("=")[0].strip()
            raise ConfigError(
                f"cluster.{option}: expected no secret, which would be written to the job's script; found {name}=...; "
                f"export {name} before the command: the job has its environment"
            )


def make_executor(cluster: ClusterConfig, folder: Path, name: str) -> submitit.Executor:
    """Submitit's executor, which writes its files into ``folder``. name: of the jobs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it notes what it takes from the environment
        executor = submitit.AutoExecutor(folder, cluster=cluster.executor, slurm_max_num_timeout=cluster.requeues)
    options: dict[str, Any] = {
        "name": name, "timeout_min": cluster.minutes, "nodes": cluster.nodes, "tasks_per_node": cluster.tasks,
    }  # fmt: skip
    if cluster.gpus_per_node:
        options["gpus_per_node"] = cluster.gpus_per_node
    if cluster.cpus_per_task:
        options["cpus_per_task"] = cluster.cpus_per_task
    if cluster.memory_gb:
        options["mem_gb"] = cluster.memory_gb
    if cluster.executor == "slurm":
        options["slurm_signal_delay_s"] = cluster.warning
        options["slurm_array_parallelism"] = cluster.concurrent
        options["slurm_setup"] = [f'export PYTHONPATH="{LAUNCH}:$PYTHONPATH"', *cluster.setup]
        options["slurm_srun_args"] = ["--kill-on-bad-exit=1", *cluster.srun]
        for key in ("partition", "account", "qos", "constraint", "exclude"):
            if getattr(cluster, key):
                options[f"slurm_{key}"] = getattr(cluster, key)
        extra = {"requeue": True, **({"reservation": cluster.reservation} if cluster.reservation else {})}
        options["slurm_additional_parameters"] = {**extra, **cluster.sbatch}
    executor.update_parameters(**options)
    return executor


def submit(executor: submitit.Executor, jobs: Sequence[Any]) -> list[submitit.Job[Any]]:
    """The jobs as one array, or as one job where there is one. Raises ConfigError with SLURM's reason."""
    try:
        if len(jobs) == 1:
            submitted = [executor.submit(jobs[0])]
        else:
            with executor.batch():
                submitted = [executor.submit(job) for job in jobs]
    except (FailedJobError, subprocess.SubprocessError) as problem:
        told = [line.strip() for line in str(problem).splitlines() if "error" in line.lower()] or [str(problem)]
        raise ConfigError(f"cluster: expected a request that SLURM takes; it says: {'; '.join(told)}") from problem
    for job in submitted:
        reason = show_job(job.job_id).get("Reason", "") if isinstance(job, submitit.SlurmJob) else ""
        if reason in HOPELESS:
            for one in submitted:
                one.cancel(check=False)
            raise ConfigError(
                f"cluster: expected a request that can start; SLURM would let job {job.job_id} wait for ever: {reason}"
            )
    return submitted


def show_job(job_id: str) -> dict[str, str]:
    """What SLURM's controller knows of a job; nothing of one that it has forgotten, or while it does not answer."""
    try:
        done = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job_id],
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return {}
    fields = (word.partition("=") for word in done.stdout.split("\n")[0].split())
    return {key: value for key, equals, value in fields if equals}
