"""The one place where options are checked, before any work: an error names the option, the value and the valid values.

Stands alone (no torch) beside config.py, for launchers and cluster tools.
"""

import dataclasses
import math
import numbers
import os
import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

from alignscale.choices import AddConfig, ConfigError, RNNConfig
from alignscale.config import TrainConfig, as_dict
from alignscale.conflicts import conflicts
from alignscale.results import flatten

ONE_OF = {
    "checkpoint.best": ("train", "validation", "test"),
    "data.channels": (1, 3),
    "data.normalisation": ("none", "channel", "imagenet"),
    "data.checksums": ("remote", "always", "never"),
    "device": ("auto", "cpu", "cuda"),
    "evaluation.splits": ("train", "validation", "test"),
    "engine.zero_stage": (0, 1, 2, 3),
    "engine.reduce_dtype": ("auto", "fp32", "bf16"),
    "form": ("primal", "dual"),
    "frozen.weights": ("stored", "regenerated", "partitioned"),
    "jacobian.dtype": ("fp64", "fp32", "bf16", "fp16", "fp8"),
    "jacobian.inputs": ("fp64", "fp32", "bf16", "recomputed"),
    "jacobian.layers": ("gates", "explicit"),
    "jacobian.name": ("live", "gates", "explicit", "auto"),
    "jacobian.tier": ("auto", "device", "host", "disk"),
    "loss.reduction": ("mean", "sum"),
    "net.activation": ("relu", "gelu", "tanh", "erf"),
    "net.blocks": ("theory", "public"),
    "net.initial_state": ("zero", "trained"),
    "net.norm": ("none", "batch", "calibrated"),
    "net.parameterisation": ("ntk", "standard"),
    "net.readout": ("last", "every"),
    "optim.decay_towards": ("zero", "initial"),
    "precision": ("fp32", "fp16", "bf16", "fp64"),
    "parallel.inputs": ("whole", "gathered"),
    "resume": ("auto", "never"),
}
AT_LEAST = {
    **dict.fromkeys(("accumulation", "batch_size", "epochs", "checkpoint.keep", "data.shape", "data.size"), 1),
    **dict.fromkeys(("data.test", "data.train", "evaluation.batch_size", "evaluation.every_epochs"), 1),
    **dict.fromkeys(("data.block", "data.resize", "data.steps", "data.streams"), 1),
    **dict.fromkeys(("data.first_size", "data.growth"), 0),
    **dict.fromkeys(("data.retries", "data.skip", "data.views", "data.workers", "data.worker_restarts"), 0),
    **dict.fromkeys(("log.every_steps", "net.depth", "net.strides", "net.width", "parallel.width"), 1),
    **dict.fromkeys(("calibration.examples", "data.classes"), 2),
    **dict.fromkeys(("checkpoint.every_epochs", "checkpoint.every_minutes", "checkpoint.every_steps", "threads"), 0),
    **dict.fromkeys(("log.alignment_every", "log.alignment_examples"), 0),
    **dict.fromkeys(("data.noise", "data.shift", "data.train_limit", "data.validation", "optim.clip_norm"), 0),
    **dict.fromkeys(("optim.weight_decay", "schedule.final", "schedule.milestones", "schedule.warmup"), 0),
}
ABOVE_0 = (
    "data.cache_gib", "data.scale", "data.timeout", "engine.timeout", "net.gain", "optim.lr", "optim.eps",
    "schedule.factor",
)  # fmt: skip
FRACTIONS = ("optim.momentum", "optim.beta1", "optim.beta2", "loss.label_smoothing")
SEEDS = ("seed", "data.seed")
KINDS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real, bool: bool, str: str}


def validate(config: TrainConfig) -> None:
    """Check every value that does not depend on the data. Raises ConfigError for the first that is wrong."""
    check_values(config)
    for conflict in conflicts(config):
        raise ConfigError(conflict)


def check_values(config: TrainConfig) -> None:
    """``validate`` each value for itself."""
    for option, value, kind in _untyped(config):
        raise ConfigError(f"{option}={value!r}: expected {kind}, found {type(value).__name__}")
    for option, values in flatten(as_dict(config)).items():
        for value in values if isinstance(values, list) else [values]:
            wanted = _wanted(option, value)
            if wanted:
                raise ConfigError(f"{option}={values}: expected {wanted}")


def _untyped(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """The options whose values are not of their types, which Hydra sees to and Python does not."""
    for name, hint in get_type_hints(type(node)).items():
        value, option = getattr(node, name), f"{prefix}{name}"
        (of,) = get_args(hint) if get_origin(hint) is list else (hint,)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _untyped(value, f"{option}.")
        elif (get_origin(hint) is list) != isinstance(value, list):
            yield option, value, f"{of.__name__}" if of is hint else f"list of {of.__name__}"
        elif of in KINDS:
            for one in value if isinstance(value, list) else [value]:
                if not isinstance(one, KINDS[of]) or (of is not bool and isinstance(one, bool)):
                    yield option, value, of.__name__


def _wanted(option: str, value: Any) -> str | None:
    """What a value should have been, in words; None if it may be so."""
    if option in ONE_OF and value not in ONE_OF[option]:
        return f"one of {', '.join(map(str, ONE_OF[option]))}"
    if option in AT_LEAST and not (math.isfinite(value) and value >= AT_LEAST[option]):
        return f"a {'whole' if isinstance(value, int) else 'finite'} number of at least {AT_LEAST[option]}"
    if option in ABOVE_0 and not (math.isfinite(value) and value > 0):
        return "a finite number above 0"
    if option.endswith(".timeout") and value > 1e9:
        return "at most 1e9 seconds"
    if option in FRACTIONS and not 0 <= value < 1:
        return "a number from 0 to below 1"
    if option in SEEDS and not 0 <= value < 2**63:
        return "a whole number from 0 to 2^63 - 1"
    if option in ("run.root", "data.root", "jacobian.root") and not value:
        return "a folder, found nothing"
    if isinstance(value, float) and abs(value) > 3.4e38:
        return "a number of at most 3.4e+38 in size, as fp32 holds"
    if option == "name" and not re.fullmatch(r"\w[\w.-]*", value):
        return "letters, digits, '.', '_' and '-': it begins the folder's name"
    if option == "threads" and value > (most := 4 * (os.cpu_count() or 1)):
        return f"at most {most} on this machine, or 0 for torch's own number"
    return None


def check_data(config: TrainConfig, sizes: dict[str, int]) -> None:
    """Check the options that depend on the number of examples in each split. Raises ConfigError for the first wrong."""
    if "train" in sizes:
        _check_train(config, sizes["train"])
    evaluated = [split for split in ("test", *config.evaluation.splits) if split in sizes]
    for split in evaluated if config.net.norm == "batch" else ():
        if sizes[split] // -(-sizes[split] // config.evaluation.batch_size) == 1:
            raise ConfigError(
                f"evaluation.batch_size={config.evaluation.batch_size}: it makes a batch of 1 of {sizes[split]} "
                "examples, which has no batch moments; choose another, or net.norm=none or calibrated"
            )
    every = isinstance(config.net, RNNConfig) and config.net.readout == "every"
    if every != isinstance(config.data, AddConfig):
        raise ConfigError(
            f"net={config.net.name}, net.readout={getattr(config.net, 'readout', '(absent)')}, "
            f"data={config.data.name}: data=add has a target at each step and other data one label an example; "
            "expected net=rnn net.readout=every with data=add alone, or net.readout=last"
        )


def _check_train(config: TrainConfig, train: int) -> None:
    if config.batch_size > train:
        raise ConfigError(f"batch_size={config.batch_size}: expected at most the {train} training examples")
    if config.net.norm == "calibrated" and config.calibration.examples > train:
        raise ConfigError(
            f"calibration.examples={config.calibration.examples}: expected at most the {train} training examples"
        )
    if config.net.norm == "batch" and smallest_part(config, train) == 1:
        raise ConfigError(
            f"batch_size={config.batch_size}, accumulation={config.accumulation}: they make a batch of one "
            f"example of {train}, which has no batch moments; choose others, or net.norm=none or calibrated"
        )


def smallest_part(config: TrainConfig, train: int) -> int:
    """Examples in the smallest part of a batch that a run on ``train`` examples makes."""
    batches = (config.batch_size, train % config.batch_size or config.batch_size)
    return min(batch // -(-batch // -(-batch // config.accumulation)) for batch in batches)


def check_ranks(config: TrainConfig, train: int, ranks: int) -> None:
    """Check the options that depend on the number of ranks. Raises ConfigError for the first wrong."""
    if ranks > 1 and isinstance(config.net, RNNConfig) and config.net.initial_state == "trained":
        raise ConfigError(f"net.initial_state=trained: expected one process, found {ranks} ranks; use zero")
    ranks, least = ranks // config.parallel.width, smallest_part(config, train)
    if config.net.norm == "batch" and not config.sync_norm and least < 2 * ranks:
        raise ConfigError(
            f"sync_norm=false: expected at least 2 examples a rank, found parts of batches of {least} for {ranks} "
            "ranks; choose another batch_size, or sync_norm=true"
        )
