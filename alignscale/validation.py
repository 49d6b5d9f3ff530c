"""The one place where options are checked, before any work: an error names the option, the value and the valid values.

Stands alone (no torch) beside config.py, for launchers and cluster tools.
"""

import math
import os
import re
from collections.abc import Sized
from typing import Any

from alignscale.choices import (
    AdamConfig,
    ConfigError,
    ConvConfig,
    MLPConfig,
    NetConfig,
    RNNConfig,
    SGDConfig,
    SyntheticConfig,
)
from alignscale.config import TrainConfig

ACTIVATIONS = ("relu", "gelu", "tanh", "erf")
NORMS = ("none", "batch", "calibrated")
PARAMETERISATIONS = ("ntk", "standard")
BLOCKS = ("theory", "public")
PRECISIONS = ("fp32", "fp64")


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


def validate(config: TrainConfig) -> None:
    """Check every value that does not depend on the data. Raises ConfigError for the first that is wrong."""
    _validate_net(config.net)
    if isinstance(config.data, SyntheticConfig):
        if len(config.data.shape) != 3:
            raise ConfigError(f"data.shape={config.data.shape}: expected [channels, height, width]")
        for length in config.data.shape:
            _count("data.shape", length, 1)
        _count("data.classes", config.data.classes, 2)
        for option in ("train", "test"):
            _count(f"data.{option}", getattr(config.data, option), 1)
        _at_least("data.noise", config.data.noise, 0)
        _seed("data.seed", config.data.seed)
    _positive("optim.lr", config.optim.lr)
    if isinstance(config.optim, SGDConfig) and not 0 <= config.optim.momentum < 1:
        raise ConfigError(f"optim.momentum={config.optim.momentum}: expected a number from 0 to below 1")
    if isinstance(config.optim, AdamConfig):
        for option in ("beta1", "beta2"):
            if not 0 <= getattr(config.optim, option) < 1:
                raise ConfigError(f"optim.{option}={getattr(config.optim, option)}: expected from 0 to below 1")
        _positive("optim.eps", config.optim.eps)
    _validate_trained_state(config)
    _choice("frozen.weights", config.frozen.weights, ("stored", "regenerated"))
    _choice("precision", config.precision, PRECISIONS)
    _choice("device", config.device, ("auto", "cpu", "cuda"))
    _choice("resume", config.resume, ("auto", "never"))
    _seed("seed", config.seed)
    for option, least in (("epochs", 1), ("batch_size", 1), ("threads", 0)):
        _count(option, getattr(config, option), least)
    _count("calibration.examples", config.calibration.examples, 2)
    _count("evaluation.batch_size", config.evaluation.batch_size, 1)
    _count("evaluation.every_epochs", config.evaluation.every_epochs, 1)
    _count("checkpoint.every_epochs", config.checkpoint.every_epochs, 1)
    _count("checkpoint.keep", config.checkpoint.keep, 1)
    _count("log.every_steps", config.log.every_steps, 1)
    most = 4 * (os.cpu_count() or 1)
    if config.threads > most:
        raise ConfigError(
            f"threads={config.threads}: expected at most {most} on this machine, or 0 for torch's own number"
        )
    if not re.fullmatch(r"\w[\w.-]*", config.name):
        raise ConfigError(
            f"name={config.name}: expected letters, digits, '.', '_' and '-': it begins the folder's name"
        )
    if not math.isfinite(config.label_offset):
        raise ConfigError(f"label_offset={config.label_offset}: expected a finite number")


def _validate_trained_state(config: TrainConfig) -> None:
    trained = isinstance(config.net, RNNConfig) and config.net.initial_state == "trained"
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


def check_data(config: TrainConfig, train: Sized, test: Sized) -> None:
    """Check the options that depend on the number of examples. Raises ConfigError for the first that is wrong."""
    if config.batch_size > len(train):
        raise ConfigError(f"batch_size={config.batch_size}: expected at most the {len(train)} training examples")
    if config.net.norm == "calibrated" and config.calibration.examples > len(train):
        raise ConfigError(
            f"calibration.examples={config.calibration.examples}: expected at most the {len(train)} training examples"
        )
    if config.net.norm == "batch":
        if config.batch_size == 1 or len(train) % config.batch_size == 1:
            raise ConfigError(
                f"batch_size={config.batch_size}: it makes a batch of one example of {len(train)}, which has no batch "
                "moments; choose another, or net.norm=none or calibrated"
            )
        if len(test) // -(-len(test) // config.evaluation.batch_size) == 1:
            raise ConfigError(
                f"evaluation.batch_size={config.evaluation.batch_size}: it makes a batch of 1 of {len(test)} examples, "
                "which has no batch moments; choose another, or net.norm=none or calibrated"
            )
    if isinstance(config.net, RNNConfig) and config.net.readout == "every":
        raise ConfigError(
            f"net.readout=every: wants a target at each step, and data={config.data.name} has one label an example; "
            "expected net.readout=last"
        )
