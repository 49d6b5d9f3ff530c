"""Runs as the commands do them: one with its page; or rules x widths x seeds, gone on with and reported on as one."""

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from _options import CompareConfig, GridConfig, apart
from _report.claims import CLAIMS
from _report.page import write_report

from alignscale.choices import ConfigError
from alignscale.config import TrainConfig, run_folder, run_name
from alignscale.distributed import Ranks, launched
from alignscale.files import write_atomic
from alignscale.results import Result, make_result
from alignscale.rules import RULES
from alignscale.run import Diverged
from alignscale.train import train
from alignscale.validation import validate


def silent(line: str) -> None:
    """What a rank shows that is not the first."""


def train_and_report(config: TrainConfig, show: Callable[[str], None], command: str) -> Result:
    """``train``, and report.html in the run's folder, for a run that diverged as well. Raises what ``train`` raises."""
    folder = run_folder(config)
    if not (launched() or Ranks()).first:
        return train(config, show, command)
    try:
        result = train(config, show, command)
    except Diverged as problem:
        _draw(problem.result, folder)
        raise
    _draw(result, folder)
    return result


def _draw(result: Result, folder: Path) -> None:
    """Write the page where there is none, or one that is older than the numbers."""
    page = folder / "report.html"
    if not page.exists() or page.stat().st_mtime_ns < (folder / "result.json").stat().st_mtime_ns:
        write_report(result, page)


def compare(config: GridConfig, command: str, show: Callable[[str], None] = print) -> Result:
    """Train every run of the grid and write result.json and report.html into ``config.compare.folder``.

    Runs that are finished are not trained again. A run that diverges is reported as such and the others go on.
    command: shown in the report. Raises ConfigError before any work for an option that is wrong.
    """
    grid = list(expand(config))
    apart(grid, f"compare.option={config.compare.option}, compare.values={config.compare.values}")
    first = (launched() or Ranks()).first
    if not first:
        show = silent
    folder = Path(config.compare.folder).expanduser()
    done: list[Result] = []
    for number, run in enumerate(grid, 1):
        show(f"[{number}/{len(grid)}] {run.rule.name}, width {run.net.width}, seed {run.seed}: {run.run.dir}")
        try:
            done.append(train_and_report(run, lambda line: None, command))
        except Diverged as problem:
            show(f"diverged: {problem}")
            done.append(problem.result)
    result = combine(config.compare, grid, done, command)
    if not first:
        return result
    others = {page.parent.name for page in folder.glob("*/result.json")} - {run["folder"] for run in result["runs"]}
    if others:
        show(f"note: the report leaves out {len(others)} runs in {folder} that are not of this grid")
    write_atomic(folder / "result.json", json.dumps(result, indent=1, allow_nan=False).encode())
    write_report(result, folder / "report.html", "result.json")
    return result


def expand(config: GridConfig) -> Iterator[TrainConfig]:
    """The runs of the grid, rule by rule, checked. Raises ConfigError."""
    grid = config.compare
    for option in ("rules", "widths", "seeds"):
        values = getattr(grid, option)
        if not values or len(set(values)) != len(values):
            raise ConfigError(f"compare.{option}={values}: expected at least one value, each once")
    for rule in grid.rules:
        if rule not in RULES:
            raise ConfigError(f"compare.rules: {rule}: expected some of {', '.join(sorted(RULES))}")
    if bool(grid.option) != bool(grid.values):
        raise ConfigError(f"compare.option={grid.option}, compare.values={grid.values}: expected both, or neither")
    if grid.option in ("net.width", "seed"):
        raise ConfigError(f"compare.option={grid.option}: expected compare.widths or compare.seeds in its place")
    if grid.claim and grid.claim not in CLAIMS:
        raise ConfigError(f"compare.claim={grid.claim}: expected one of {', '.join(CLAIMS)}, or nothing")
    if not grid.folder:
        raise ConfigError("compare.folder=: expected a folder for the runs and their report, found nothing")
    shared = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    values = grid.values or [0.0]
    for width, seed, value, name in itertools.product(grid.widths, grid.seeds, values, grid.rules):
        single = TrainConfig(**copy.deepcopy(shared))
        if single.rule.name != name:  # else it has the options that were given
            single.rule = RULES[name].options(name=name)
        single.net = replace(single.net, width=width)
        single.seed = seed
        if grid.option:
            _set(single, grid.option, value)
        validate(single)
        single.run.dir = str(Path(grid.folder) / run_name(single))
        yield single


def _set(config: TrainConfig, option: str, value: float) -> None:
    """Set a number by its dotted name. Raises ConfigError for a name that is none."""
    *groups, name = option.split(".")
    node: Any = config
    for group in groups:
        node = getattr(node, group, None)
    found = getattr(node, name, None)
    if not isinstance(found, int | float) or isinstance(found, bool):
        raise ConfigError(f"compare.option={option}: expected an option that is a number, such as optim.lr")
    if isinstance(found, int) and not (math.isfinite(value) and value == int(value)):
        raise ConfigError(f"compare.values={value}: expected whole numbers for {option}")
    setattr(node, name, int(value) if isinstance(found, int) else float(value))


def combine(compared: CompareConfig, grid: list[TrainConfig], results: list[Result], command: str) -> Result:
    """One result of many: the common options, and every run with its folder, which lies in the grid's."""
    runs = []
    for config, result in zip(grid, results, strict=True):
        run = dict(result["runs"][0])
        run["folder"] = run_folder(config).name
        run["config"] = {group: options for group, options in run["config"].items() if group != "run"}
        runs.append(run)
    result = make_result(compared.title, command, results[-1], _common([run["config"] for run in runs]), runs)
    if compared.claim or compared.option:
        asked = {"claim": compared.claim, "option": compared.option, "protocol": compared.protocol}
        result["experiment"] = asked
    return result


def _common(configs: list[dict[str, Any]]) -> dict[str, Any]:
    """The options in which all runs agree, nested as they were."""
    common: dict[str, Any] = {}
    for key, value in configs[0].items():
        values = [config.get(key) for config in configs]
        if isinstance(value, dict):
            common[key] = _common([one if isinstance(one, dict) else {} for one in values])
        elif all(key in config and config[key] == value for config in configs):
            common[key] = value
    return {key: value for key, value in common.items() if value != {}}
