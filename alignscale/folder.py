"""The folder of a run, which holds all of it and belongs to one configuration.

config.yaml, versions.json, metrics.jsonl, tensorboard/, checkpoints/, norms.safetensors, result.json, report.html.
"""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from alignscale.choices import DATA, ENGINES, LOSSES, NETS, OPTIMS, SCHEDULES, ConfigError
from alignscale.config import TrainConfig, as_dict, defining, refuse_difference, without_display
from alignscale.distributed import alone_beside
from alignscale.environment import hardware, source, source_diff, versions
from alignscale.files import held, write_atomic
from alignscale.rules import RULES

OURS = (
    "metrics.jsonl", "norms.safetensors", "result.json", "report.html", "config.yaml", "versions.json", "source.diff",
    "wandb.id", "checkpoints/latest",
)  # fmt: skip


@contextmanager
def opened(folder: Path, config: TrainConfig) -> Iterator[None]:
    """Hold the folder of a run: made when new, else made sure that it is this run's; emptied first by resume=never.

    Raises ConfigError if it belongs to another configuration or to something else, is held by another run, or cannot
    be written. The hold ends with the block, or with the process, however that ends.
    """
    with ExitStack() as hold:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _refuse_strange(folder)
            hold.enter_context(held(folder))
            _claim(folder, config)
        except BlockingIOError as problem:
            raise ConfigError(
                f"run folder {folder}: in use by another run ({problem.strerror}); wait for it to end, or choose "
                f"another run.dir{alone_beside()}"
            ) from problem
        except OSError as problem:
            if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):  # another folder there is no better
                problem.filename = problem.filename or str(folder)
                raise
            raise ConfigError(
                f"run folder {folder}: expected a folder that can be written, found: {problem}; choose another "
                "(run.dir or run.root, compare.folder for a comparison)"
            ) from problem
        yield


def _refuse_strange(folder: Path) -> None:
    strange = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    if strange and not (folder / "config.yaml").exists():
        raise ConfigError(
            f"run folder {folder}: expected a new folder or a run's, found {', '.join(sorted(strange)[:3])} and no "
            "config.yaml; choose another run.dir"
        )


def _claim(folder: Path, config: TrainConfig) -> None:
    if config.resume == "never":
        _empty(folder)
    else:
        same_run(folder / "config.yaml", config)
    for partial in [*folder.glob(".*.partial"), *(folder / "checkpoints").glob(".*.partial")]:
        # half a file or checkpoint of a killed process
        shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink()
    if not (folder / "config.yaml").exists():
        _write_config(folder, config)
    (folder / "checkpoints").mkdir(exist_ok=True)  # after config.yaml, by which a killed run's folder is known


def _write_config(folder: Path, config: TrainConfig) -> None:
    write_atomic(folder / "config.yaml", yaml.safe_dump(as_dict(config), sort_keys=False).encode())


def describe_folder(folder: Path, config: TrainConfig, device: torch.device) -> None:
    """config.yaml, versions.json and source.diff, as this session of the run has them."""
    _write_config(folder, config)
    about = {"versions": versions(), "hardware": hardware(device), "source": source()}
    write_atomic(folder / "versions.json", json.dumps(about, indent=1).encode())
    if changes := source_diff():
        write_atomic(folder / "source.diff", changes.encode())
    else:
        (folder / "source.diff").unlink(missing_ok=True)


def read_config(folder: Path) -> TrainConfig:
    """The configuration of the run in ``folder``. Raises ConfigError if there is none, or not one of this version."""
    path = folder / "config.yaml"
    chosen: dict[str, Any] = {"net": NETS, "data": DATA, "optim": OPTIMS, "loss": LOSSES, "schedule": SCHEDULES}
    chosen |= {"engine": ENGINES, "rule": {name: rule.options(name=name) for name, rule in RULES.items()}}
    try:
        if (folder / "result.json").exists() and not path.exists():
            raise TypeError("a comparison's folder, which holds runs' folders")
        options = yaml.safe_load(path.read_text())
        if not isinstance(options, dict):
            raise TypeError(f"a {type(options).__name__} in place of options")
        for field in fields(TrainConfig):
            value = options[field.name]
            if field.name in chosen:
                options[field.name] = replace(chosen[field.name][value["name"]], **value)
            elif isinstance(value, dict):
                assert callable(field.default_factory)
                options[field.name] = replace(field.default_factory(), **value)
        return TrainConfig(**options)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as problem:
        raise ConfigError(
            f"{path}: expected a run's configuration, found: {_one_line(problem)}; give the folder of a run of this "
            "version"
        ) from problem


def _one_line(problem: Exception) -> str:
    return f"no or an unknown {problem}" if isinstance(problem, KeyError) else " ".join(str(problem).split())


def same_run(path: Path, config: TrainConfig) -> None:
    """Raise ConfigError, with the difference, if there is a config.yaml at ``path`` and it is another run's."""
    if not path.exists():
        return
    try:
        options = without_display(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as problem:
        raise ConfigError(
            f"{path}: expected a run's configuration, found: {_one_line(problem)}; use another run.dir"
        ) from problem
    refuse_difference(path, options, defining(config), "options")


def _empty(folder: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for path in folder.glob("checkpoints/step-*"):
        shutil.rmtree(path)
    for path in [*folder.glob("tensorboard/events.out.tfevents.*"), *(folder / name for name in OURS)]:
        path.unlink(missing_ok=True)
