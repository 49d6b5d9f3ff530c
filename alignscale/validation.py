"""The one place where options are checked, before any work: an error names the option, the value and the valid values.

Stands alone (no torch) beside config.py, for launchers and cluster tools.
"""

import importlib.util
import math
import os
import re
from typing import Any

from alignscale.choices import (
    AdamConfig,
    ConfigError,
    ConvConfig,
    CosineConfig,
    CrossEntropyConfig,
    DataConfig,
    ImageFolderConfig,
    MLPConfig,
    MSEConfig,
    NetConfig,
    RNNConfig,
    SGDConfig,
    StepConfig,
    SyntheticConfig,
)
from alignscale.config import TrainConfig

ACTIVATIONS = ("relu", "gelu", "tanh", "erf")
NORMS = ("none", "batch", "calibrated")
PARAMETERISATIONS = ("ntk", "standard")
BLOCKS = ("theory", "public")
PRECISIONS = ("fp32", "bf16", "fp64")


def _choice(option: str, value: Any, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{option}={value}: expected one of {', '.join(valid)}")


def _count(option: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{option}={value}: expected a whole number of at least {least}")


def _at_least(option: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(f"{option}={value}: expected a finite number of at least {least:g}")


def _positive(option: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{option}={value}: expected a finite number above 0")


def _fraction(option: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{option}={value}: expected a number from 0 to below 1")


def validate(config: TrainConfig) -> None:
    """Check every value that does not depend on the data. Raises ConfigError for the first that is wrong."""
    _validate_net(config.net)
    _validate_data(config.data)
    _validate_optim(config)
    _validate_trained_state(config)
    _choice("frozen.weights", config.frozen.weights, ("stored", "regenerated"))
    _choice("precision", config.precision, PRECISIONS)
    _choice("device", config.device, ("auto", "cpu", "cuda"))
    _choice("resume", config.resume, ("auto", "never"))
    _seed("seed", config.seed)
    for option, least in (("epochs", 1), ("batch_size", 1), ("accumulation", 1), ("threads", 0)):
        _count(option, getattr(config, option), least)
    if config.accumulation > config.batch_size:
        raise ConfigError(
            f"accumulation={config.accumulation}: expected at most batch_size={config.batch_size}, the examples that "
            "it divides"
        )
    _count("calibration.examples", config.calibration.examples, 2)
    _validate_outputs(config)
    most = 4 * (os.cpu_count() or 1)
    if config.threads > most:
        raise ConfigError(
            f"threads={config.threads}: expected at most {most} on this machine, or 0 for torch's own number"
        )
    if not re.fullmatch(r"\w[\w.-]*", config.name):
        raise ConfigError(
            f"name={config.name}: expected letters, digits, '.', '_' and '-': it begins the folder's name"
        )


def _validate_data(data: DataConfig) -> None:
    for option, least in (("train_limit", 0), ("validation", 0), ("views", 1), ("shift", 0)):
        _count(f"data.{option}", getattr(data, option), least)
    _choice("data.normalisation", data.normalisation, ("none", "channel"))
    moves = data.shift > 0 or data.flip
    if moves != (data.views > 1):
        raise ConfigError(
            f"data.views={data.views}, data.shift={data.shift}, data.flip={data.flip}: views above 1 differ by shift "
            "or flip, and view 0 has neither; expected both, or neither"
        )
    if isinstance(data, ImageFolderConfig):
        _count("data.size", data.size, 1)
        if data.channels not in (1, 3):
            raise ConfigError(f"data.channels={data.channels}: expected 1 (grey) or 3 (colour)")
    if isinstance(data, SyntheticConfig):
        if len(data.shape) != 3:
            raise ConfigError(f"data.shape={data.shape}: expected [channels, height, width]")
        for length in data.shape:
            _count("data.shape", length, 1)
        _count("data.classes", data.classes, 2)
        for option in ("train", "test"):
            _count(f"data.{option}", getattr(data, option), 1)
        _at_least("data.noise", data.noise, 0)
        _seed("data.seed", data.seed)


def _validate_optim(config: TrainConfig) -> None:
    optim, loss, schedule = config.optim, config.loss, config.schedule
    _positive("optim.lr", optim.lr)
    _at_least("optim.weight_decay", optim.weight_decay, 0)
    _at_least("optim.clip_norm", optim.clip_norm, 0)
    _choice("optim.decay_towards", optim.decay_towards, ("zero", "initial"))
    if isinstance(optim, SGDConfig):
        _fraction("optim.momentum", optim.momentum)
        if optim.nesterov and optim.momentum == 0:
            raise ConfigError("optim.nesterov=true: expected optim.momentum above 0, found 0")
    if isinstance(optim, AdamConfig):
        _choice("optim.name", optim.name, ("adam", "adamw"))
        _fraction("optim.beta1", optim.beta1)
        _fraction("optim.beta2", optim.beta2)
        _positive("optim.eps", optim.eps)
    if isinstance(loss, MSEConfig):
        _choice("loss.reduction", loss.reduction, ("mean", "sum"))
    if isinstance(loss, CrossEntropyConfig):
        _fraction("loss.label_smoothing", loss.label_smoothing)
    _at_least("schedule.warmup", schedule.warmup, 0)
    if schedule.warmup > config.epochs:
        raise ConfigError(f"schedule.warmup={schedule.warmup}: expected at most epochs={config.epochs}")
    if isinstance(schedule, StepConfig):
        _positive("schedule.factor", schedule.factor)
        for milestone in schedule.milestones:
            _at_least("schedule.milestones", milestone, 0)
    if isinstance(schedule, CosineConfig):
        _at_least("schedule.final", schedule.final, 0)


def _validate_outputs(config: TrainConfig) -> None:
    """Evaluation, checkpoints and logging."""
    evaluation, checkpoint = config.evaluation, config.checkpoint
    _count("evaluation.batch_size", evaluation.batch_size, 1)
    _count("evaluation.every_epochs", evaluation.every_epochs, 1)
    valid = ("train", "test") if config.data.validation == 0 else ("train", "validation", "test")
    why = "" if config.data.validation else " (validation needs data.validation above 0)"
    for split in evaluation.splits:
        if split not in valid:
            raise ConfigError(f"evaluation.splits: {split}: expected some of {', '.join(valid)}{why}")
    if checkpoint.best not in {"test", *evaluation.splits}:
        raise ConfigError(
            f"checkpoint.best={checkpoint.best}: expected a split that is evaluated, one of "
            f"{', '.join(dict.fromkeys(('test', *evaluation.splits)))}; add it to evaluation.splits{why}"
        )
    _count("checkpoint.every_epochs", checkpoint.every_epochs, 0)
    _count("checkpoint.every_steps", checkpoint.every_steps, 0)
    _at_least("checkpoint.every_minutes", checkpoint.every_minutes, 0)
    _count("checkpoint.keep", checkpoint.keep, 1)
    _count("log.every_steps", config.log.every_steps, 1)
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "log.wandb=true: expected the package wandb, found none; pip install 'alignscale[wandb]' or leave it out"
        )


def _validate_trained_state(config: TrainConfig) -> None:
    trained = isinstance(config.net, RNNConfig) and config.net.initial_state == "trained"
    if trained and config.accumulation > 1:
        raise ConfigError(
            f"accumulation={config.accumulation}: expected 1 with net.initial_state=trained, whose rows belong to the "
            "places in a batch"
        )
    if trained and config.evaluation.batch_size > config.batch_size:
        raise ConfigError(
            f"evaluation.batch_size={config.evaluation.batch_size}: expected at most batch_size={config.batch_size}, "
            "the rows of net.initial_state=trained"
        )


def _seed(option: str, value: int) -> None:
    if not 0 <= value < 2**63:
        raise ConfigError(f"{option}={value}: expected a whole number from 0 to 2^63 - 1")


def _validate_net(net: NetConfig) -> None:
    _count("net.width", net.width, 1)
    _choice("net.activation", net.activation, ACTIVATIONS)
    _choice("net.norm", net.norm, NORMS)
    _choice("net.parameterisation", net.parameterisation, PARAMETERISATIONS)
    _choice("net.blocks", net.blocks, BLOCKS)
    _positive("net.gain", net.gain)
    if isinstance(net, MLPConfig):
        _count("net.depth", net.depth, 1)
        if net.blocks == "public":
            raise ConfigError("net.blocks=public: the paper's public code has no mlp; expected theory")
    if isinstance(net, ConvConfig):
        if not net.strides:
            raise ConfigError("net.strides=[]: expected at least one stride, one for each convolution")
        for stride in net.strides:
            _count("net.strides", stride, 1)
    if isinstance(net, RNNConfig):
        _choice("net.readout", net.readout, ("last", "every"))
        _choice("net.initial_state", net.initial_state, ("zero", "trained"))


def check_data(config: TrainConfig, sizes: dict[str, int]) -> None:
    """Check the options that depend on the number of examples in each split. Raises ConfigError for the first wrong."""
    train = sizes["train"]
    if config.batch_size > train:
        raise ConfigError(f"batch_size={config.batch_size}: expected at most the {train} training examples")
    if config.net.norm == "calibrated" and config.calibration.examples > train:
        raise ConfigError(
            f"calibration.examples={config.calibration.examples}: expected at most the {train} training examples"
        )
    if config.net.norm == "batch":
        for batch in (config.batch_size, train % config.batch_size or config.batch_size):
            if batch // -(-batch // -(-batch // config.accumulation)) == 1:
                raise ConfigError(
                    f"batch_size={config.batch_size}, accumulation={config.accumulation}: they make a batch of one "
                    f"example of {train}, which has no batch moments; choose others, or net.norm=none or calibrated"
                )
        for split in dict.fromkeys(("test", *config.evaluation.splits)):
            if sizes[split] // -(-sizes[split] // config.evaluation.batch_size) == 1:
                raise ConfigError(
                    f"evaluation.batch_size={config.evaluation.batch_size}: it makes a batch of 1 of {sizes[split]} "
                    "examples, which has no batch moments; choose another, or net.norm=none or calibrated"
                )
    if isinstance(config.net, RNNConfig) and config.net.readout == "every":
        raise ConfigError(
            f"net.readout=every: wants a target at each step, and data={config.data.name} has one label an example; "
            "expected net.readout=last"
        )
