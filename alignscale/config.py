"""Every option of a run as plain dataclasses, and what identifies a run. ``validation.py`` checks their values.

The parts that are chosen by name are in choices.py.

Stands alone (no torch) so that launchers and cluster tools can read and check a configuration without loading a
numerical library. Hydra composes these classes in ``launch/``; library users construct them directly.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignscale import choices
from alignscale.results import ABSENT, flatten


@dataclass
class FrozenConfig:
    """The initial network's weights: ``stored`` on every rank, ``regenerated`` at each use, or ``partitioned``.

    They cost memory, compute, or the network, over which the ranks gather each other's parts at each use.
    """

    weights: str = "stored"


@dataclass
class ParallelConfig:
    """``width``: ranks over which the rows of every hidden layer are shared out; the others share the examples out.

    ``inputs``: align_zero's cached initial layer inputs are ``whole`` on each rank, or its own units, ``gathered`` in
    each step. ``overlap``: exchange one half of a batch while the other is computed; not with norm batch or ZeRO 3.
    """

    width: int = 1
    inputs: str = "whole"
    overlap: bool = False


@dataclass
class JacobianConfig:
    """What align_ada and align_zero get the initial network's Jacobian from; no other rule reads one.

    ``name``: ``live`` (a frozen forward pass and a pullback in each step), ``gates`` (the pullback, through cached
    activation derivatives), ``explicit`` (cached d logits / d x of each unit, so neither), or ``auto`` (of these, layer
    by layer, what a cost model finds fastest when the cache is made). ``layers``: gates or explicit for each hidden
    layer by itself. ``dtype``: of explicit Jacobians, and of gates that are no bits. ``inputs``: align_zero's initial
    layer inputs, cached in fp32 or bf16, or ``recomputed``. ``tier``: where training keeps the cache: ``device``,
    ``host`` memory, memory-mapped from ``disk``, or ``auto``.
    The cache is in ``dir``, or in ``root``/<name and digest of what it belongs to>. ``build``: make what is missing of
    it before training, which is else an error. ``verify``: its files' checksums, before training.
    """

    name: str = "live"
    layers: list[str] = field(default_factory=list)
    dtype: str = "fp32"
    inputs: str = "fp32"
    tier: str = "auto"
    root: str = "runs/jacobian"
    dir: str = ""
    build: bool = False
    verify: bool = True


JACOBIANS = {name: JacobianConfig(name) for name in ("live", "gates", "explicit", "auto")}


@dataclass
class CalibrationConfig:
    """``norm=calibrated``: the initial network's moments over the first ``examples`` training examples in key order."""

    examples: int = 1000


@dataclass
class EvaluationConfig:
    """Of ``splits`` (train, validation, test; test always), every ``every_epochs``: top-1, top-5 and loss, exact.

    In near-equal batches of at most ``batch_size``, in key order (norm batch depends on both).
    """

    splits: list[str] = field(default_factory=lambda: ["test"])
    batch_size: int = 120
    every_epochs: int = 1


@dataclass
class CheckpointConfig:
    """A checkpoint every ``every_epochs``, ``every_steps`` and ``every_minutes`` (0: not by these), and at the end.

    The newest ``keep`` are kept, and that with the highest accuracy on the split ``best``.
    """

    every_epochs: int = 1
    every_steps: int = 0
    every_minutes: float = 0.0
    keep: int = 2
    best: str = "test"


@dataclass
class LogConfig:
    """``every_steps``: training rows in metrics.jsonl; ``update_cosine``: cosine with backprop's update, each epoch.

    ``alignment_every``: updates between rows of kind ``alignment`` (0: none): the paper's score, how far the weights
    have moved and the update's cosine, for Sigma over ``alignment_examples`` training examples (0: all).
    ``wandb``: send the rows to Weights & Biases as well, to its project ``wandb_project`` (needs the extra wandb).
    """

    every_steps: int = 10
    progress: bool = True
    tensorboard: bool = True
    update_cosine: bool = True
    alignment_every: int = 0
    alignment_examples: int = 50
    wandb: bool = False
    wandb_project: str = "alignscale"


@dataclass
class AnalysisConfig:
    """``track_errors``: sum each training example's errors, (examples, classes), which the alignment score needs."""

    track_errors: bool = False


@dataclass
class RunConfig:
    """The run's folder: ``dir``, or ``root``/<name and digest of the configuration> when ``dir`` is empty."""

    root: str = "runs"
    dir: str = ""


@dataclass
class TrainConfig:
    """One training run.

    ``name``: its folder begins with it. ``seed``: of the initial network and of the order of examples. ``device``:
    ``auto`` (a GPU where there is one) or one of torch's. ``threads``: of torch's, 0 for as many as it takes.
    ``resume``: ``auto`` goes on from the folder's newest checkpoint, ``never`` starts again.
    ``batch_size``: examples in an update on all ranks, computed in ``accumulation`` parts that are as equal as they can
    be. Norm batch takes the moments of each part, over all ranks with ``sync_norm``, else over each rank's examples.
    ``form``: of what learns: ``primal`` (weights) or ``dual`` (align_zero's coefficients of the training examples).
    ``precision``: of the computation; with fp16 and bf16 the weights, the optimizer and the loss stay in fp32.
    ``deterministic``: the same bits on every run on a machine, whatever that costs; one thread unless ``threads`` says
    how many.
    """

    rule: choices.RuleConfig
    net: choices.NetConfig
    data: choices.DataConfig
    optim: choices.OptimConfig
    loss: choices.LossConfig = field(default_factory=choices.MSEConfig)
    schedule: choices.ScheduleConfig = field(default_factory=choices.ConstantConfig)
    engine: choices.EngineConfig = field(default_factory=choices.EngineConfig)
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    jacobian: JacobianConfig = field(default_factory=JacobianConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    run: RunConfig = field(default_factory=RunConfig)
    name: str = "run"
    seed: int = 0
    epochs: int = 10
    batch_size: int = 50
    accumulation: int = 1
    form: str = "primal"
    sync_norm: bool = True
    precision: str = "fp32"
    device: str = "auto"
    threads: int = 0
    deterministic: bool = False
    resume: str = "auto"


READING = ("workers", "worker_restarts", "checksums", "retries", "timeout", "cache", "cache_gib")
"""Options of data that is streamed that say how it is read, not what is read."""

DISPLAY = (
    "run", "log", "analysis", "checkpoint", "resume", "name", "threads", "device", "engine", "parallel",
    *(f"jacobian.{name}" for name in ("tier", "root", "dir", "build", "verify")),
    *(f"data.{name}" for name in READING),
)  # fmt: skip
"""Options that change none of a run's numbers, or, as threads, device, engine and parallel, only their rounding."""


def as_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested dictionaries, lists and plain values, ready for JSON or YAML."""
    return dataclasses.asdict(config)


def defining(config: TrainConfig) -> dict[str, Any]:
    """The options that decide the numbers of a run: all but where it writes and what it shows."""
    return without_display(as_dict(config))


def without_display(options: dict[str, Any]) -> dict[str, Any]:
    """``defining`` of a configuration that is already a dictionary, as config.yaml holds it."""

    def kept(node: dict[str, Any], prefix: str) -> dict[str, Any]:
        pairs = [(name, value) for name, value in node.items() if prefix + name not in DISPLAY]
        return {name: kept(one, f"{prefix}{name}.") if isinstance(one, dict) else one for name, one in pairs}

    return kept(options, "")


def digest(config: TrainConfig) -> str:
    """Eight hex digits of the defining options: equal exactly when two runs are the same run."""
    return hashlib.sha256(json.dumps(defining(config), sort_keys=True).encode()).hexdigest()[:8]


def run_name(config: TrainConfig) -> str:
    """``<name>-<rule>-<net>-w<width>-s<seed>-<digest>``: follows from name and configuration, not from the time."""
    return f"{config.name}-{config.rule.name}-{config.net.name}-w{config.net.width}-s{config.seed}-{digest(config)}"


def run_folder(config: TrainConfig) -> Path:
    """Where a run leaves everything: ``run.dir``, or ``run.root`` and its name; ``~`` is the home folder."""
    return Path(config.run.dir or Path(config.run.root) / run_name(config)).expanduser()


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """``option: old -> new`` for every leaf in which two nested dictionaries differ."""
    before, after = flatten(old), flatten(new)
    pairs = {key: (before.get(key, ABSENT), after.get(key, ABSENT)) for key in sorted(before.keys() | after.keys())}
    return [f"{key}: {one} -> {other}" for key, (one, other) in pairs.items() if one != other]


def refuse_difference(path: Path, old: dict[str, Any], new: dict[str, Any], what: str) -> None:
    """Raise ConfigError, with the difference, if the run at ``path`` is not the one that is asked for."""
    changed = difference(old, new)
    if changed:
        raise choices.ConfigError(
            f"{path}: the run was made with other {what} than these: {'; '.join(changed)}. "
            "Use the old ones, or another run.dir, or resume=never to start again"
        )
