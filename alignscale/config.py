"""Every option of a run as plain dataclasses, and what identifies a run. ``validation.py`` checks their values.

Stands alone (no torch) so that launchers and cluster tools can read and check a configuration without loading a
numerical library. Hydra composes these classes in ``launch/``; library users construct them directly.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """A user's option is wrong; the message names the option, the value found and the valid values."""


@dataclass
class RuleConfig:
    """A learning rule by name. A rule with options of its own subclasses this in its own file."""

    name: str


@dataclass
class NetConfig:
    """Options that every network has; ``gain`` multiplies the weights of each layer that reads an activation.

    ``gain`` is 1 in the public code of the paper, where a batch norm follows every layer. Without a norm relu wants
    sqrt(2), or a deep network's signal halves at each layer. ``blocks`` says where the blocks end that the Align rules
    take from the initial network: ``theory`` (at every pre-activation) or ``public`` (as the paper's public code).
    """

    name: str
    width: int
    activation: str = "relu"
    norm: str = "none"
    parameterisation: str = "ntk"
    gain: float = 1.0
    blocks: str = "theory"


@dataclass
class MLPConfig(NetConfig):
    """``depth`` hidden layers of ``width`` units on the flattened image."""

    name: str = "mlp"
    width: int = 512
    depth: int = 3
    gain: float = math.sqrt(2.0)


@dataclass
class ConvConfig(NetConfig):
    """3x3 convolutions, one per stride, SAME padding, then the mean over the map and a linear readout."""

    name: str = "conv"
    width: int = 128
    norm: str = "batch"
    strides: list[int] = field(default_factory=lambda: [1, 2, 2])


@dataclass
class RNNConfig(NetConfig):
    """A recurrent network that reads an image row by row, or a sequence step by step; gain 1, or the state grows.

    ``readout``: ``last`` (logits after the last step) or ``every`` (at each step). ``initial_state``: ``zero`` or
    ``trained`` (one trained row per place in the batch, as the paper's public code; needs full batches).
    """

    name: str = "rnn"
    width: int = 128
    readout: str = "last"
    initial_state: str = "zero"


NETS: dict[str, NetConfig] = {
    "mlp": MLPConfig(),
    "conv3": ConvConfig(name="conv3", strides=[1, 2, 2]),
    "conv7": ConvConfig(name="conv7", strides=[1, 1, 1, 2, 1, 2, 1]),
    "imagenet_conv7": ConvConfig(name="imagenet_conv7", width=512, strides=[4, 2, 1, 2, 1, 2, 1]),
    "rnn": RNNConfig(),
}


@dataclass
class DataConfig:
    """A data set by name; its classes and shape come from the data."""

    name: str


@dataclass
class DigitsConfig(DataConfig):
    """scikit-learn's handwritten digits, 1437 for training and 360 for testing."""

    name: str = "digits"


@dataclass
class SyntheticConfig(DataConfig):
    """Noisy class prototypes of any shape (channels, height, width), drawn from ``seed``."""

    name: str = "synthetic"
    shape: list[int] = field(default_factory=lambda: [3, 16, 16])
    classes: int = 10
    train: int = 2000
    test: int = 500
    noise: float = 1.0
    seed: int = 0


DATA: dict[str, DataConfig] = {"digits": DigitsConfig(), "synthetic": SyntheticConfig()}


@dataclass
class OptimConfig:
    """An optimizer of torch by name."""

    name: str
    lr: float


@dataclass
class SGDConfig(OptimConfig):
    """Gradient descent; in the NTK parameterisation good rates are of order 1, whatever the width."""

    name: str = "sgd"
    lr: float = 1.0
    momentum: float = 0.0


@dataclass
class AdamConfig(OptimConfig):
    """Adam: every weight moves by about ``lr`` a step, so it wants ``net.parameterisation=standard`` or a low rate."""

    name: str = "adam"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


OPTIMS: dict[str, OptimConfig] = {"sgd": SGDConfig(), "adam": AdamConfig()}


@dataclass
class FrozenConfig:
    """The initial network: its weights ``stored`` (memory) or ``regenerated`` from the seed at each use (compute)."""

    weights: str = "stored"


@dataclass
class CalibrationConfig:
    """``norm=calibrated``: the initial network's moments over the first ``examples`` training examples in key order."""

    examples: int = 1000


@dataclass
class EvaluationConfig:
    """The test set in near-equal batches of at most ``batch_size``, in key order (norm batch depends on both)."""

    batch_size: int = 120
    every_epochs: int = 1


@dataclass
class CheckpointConfig:
    """A checkpoint every ``every_epochs`` and at the end; the newest ``keep`` are kept."""

    every_epochs: int = 1
    keep: int = 2


@dataclass
class LogConfig:
    """``every_steps``: training rows in metrics.jsonl; ``update_cosine``: cosine with backprop's update, each epoch."""

    every_steps: int = 10
    progress: bool = True
    tensorboard: bool = True
    update_cosine: bool = True


@dataclass
class RunConfig:
    """The run's folder: ``dir``, or ``root``/<name and digest of the configuration> when ``dir`` is empty."""

    root: str = "runs"
    dir: str = ""


@dataclass
class TrainConfig:
    """One training run. ``label_offset`` is taken off the one-hot labels (the paper's public code: 0.1)."""

    rule: RuleConfig
    net: NetConfig
    data: DataConfig
    optim: OptimConfig
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: RunConfig = field(default_factory=RunConfig)
    name: str = "run"
    seed: int = 0
    epochs: int = 10
    batch_size: int = 50
    label_offset: float = 0.1
    precision: str = "fp32"
    device: str = "auto"
    threads: int = 0
    resume: str = "auto"


@dataclass
class CompareConfig:
    """The grid of ``launch/compare.py``: each rule at each width with each seed."""

    title: str = "Learning rules compared"
    rules: list[str] = field(default_factory=lambda: ["backprop", "align_ada", "align_zero"])
    widths: list[int] = field(default_factory=lambda: [8, 32, 128])
    seeds: list[int] = field(default_factory=lambda: [0])
    folder: str = "runs/compare"


@dataclass
class GridConfig(TrainConfig):
    """A comparison: the options of every run, and the grid."""

    compare: CompareConfig = field(default_factory=CompareConfig)


def as_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested dictionaries, lists and plain values, ready for JSON or YAML."""
    return dataclasses.asdict(config)


def defining(config: TrainConfig) -> dict[str, Any]:
    """The options that decide the numbers of a run: all but where it writes and what it shows."""
    return without_display(as_dict(config))


def without_display(options: dict[str, Any]) -> dict[str, Any]:
    """``defining`` of a configuration that is already a dictionary, as config.yaml holds it."""
    return {
        name: value for name, value in options.items() if name not in ("run", "log", "checkpoint", "resume", "name")
    }


def digest(config: TrainConfig) -> str:
    """Eight hex digits of the defining options: equal exactly when two runs are the same run."""
    return hashlib.sha256(json.dumps(defining(config), sort_keys=True).encode()).hexdigest()[:8]


def run_name(config: TrainConfig) -> str:
    """``<name>-<rule>-<net>-w<width>-s<seed>-<digest>``: follows from name and configuration, not from the time."""
    return f"{config.name}-{config.rule.name}-{config.net.name}-w{config.net.width}-s{config.seed}-{digest(config)}"


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """``option: old -> new`` for every leaf in which two nested dictionaries differ."""
    lines: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(before, dict) and isinstance(after, dict):
            lines += difference(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines
