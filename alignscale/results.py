"""The JSON object that a run or a comparison leaves beside its report: reading it, and summaries over its seeds.

Format 1 holds `title`, `created`, `command`, `hardware`, `versions`, `config` (the options common to all runs) and
`runs`: a list with one object per run, each with its resolved `config`, its final `test` and `train` numbers and a
`curve` with one point per epoch. A loss that ended as NaN or infinity is null or JSON's NaN: the run diverged.

Stands alone because the page, the figures and the terminal's table must agree on every mean, gap and divergence.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Run = dict[str, Any]

FORMAT = 1
TOP_FIELDS = {"title": str, "created": str, "command": str, "hardware": dict, "versions": dict, "config": dict}
RUN_FIELDS = {
    "name": str, "folder": str, "rule": str, "net": str, "width": int, "seed": int, "parameters": int, "config": dict,
    "steps": int, "epochs": int, "batch": int, "test": dict, "train": dict, "curve": list,
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """What one line, row or bar stands for: the runs of one rule on one net, of any width and seed."""

    rule: str
    net: str
    label: str


@dataclass(frozen=True)
class Spread:
    """Mean over the seeds that gave a value, and their sample standard deviation (from two on)."""

    mean: float | None
    std: float | None


def read_result(path: Path) -> Result:
    """Read and check a result.

    Raises:
        ValueError: the file is missing or not a result; one line with what was expected, what was found and what to do.
    """
    remedy = "give the JSON that lies beside a report.html"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: expected a result file, found none ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:  # a truncated file, or bytes that are no text
        raise ValueError(f"{path}: expected JSON, found something else ({error}); {remedy}") from error
    fault = _fault(data)
    if fault:
        raise ValueError(f"{path}: expected an alignscale result of format {FORMAT}, found {fault}; {remedy}")
    return dict(data)


def _fault(data: object) -> str | None:
    """What keeps an object from being a result, in words; None when nothing does."""
    if not isinstance(data, dict):
        return f"a {type(data).__name__} in place of an object"
    if data.get("format") != FORMAT:
        return f"format {data['format']!r}" if "format" in data else "an object without 'format'"
    runs = data.get("runs")
    if not isinstance(runs, list) or not runs:
        return "no runs"
    wrong = _wrong_field(data, TOP_FIELDS)
    if wrong:
        return wrong
    for index, run in enumerate(runs):
        wrong = _wrong_field(run, RUN_FIELDS) if isinstance(run, dict) else "no object"
        if wrong:
            return f"run {index} with {wrong}"
        if not all(isinstance(point, dict) and finite(point.get("epoch")) is not None for point in run["curve"]):
            return f"run {index} with a curve that has a point without 'epoch'"
    return None


def _wrong_field(record: Result, fields: Mapping[str, type]) -> str | None:
    for key, kind in fields.items():
        if key not in record:
            return f"no '{key}'"
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            return f"'{key}' that is {type(record[key]).__name__}, not {kind.__name__}"
    return None


def finite(value: object) -> float | None:
    """The value as a float, or None where it is absent, NaN, infinite or so large that averages would overflow."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e100:
        return None
    return float(value)


def diverged(run: Run) -> bool:
    """Whether a run ended with a loss that is no number (an accuracy that was never measured is not a divergence)."""
    return finite(run["test"].get("loss")) is None or finite(run["train"].get("loss")) is None


def accuracy(run: Run) -> float | None:
    """Test accuracy at the end of a run in percent, None where it diverged or has none."""
    value = finite(run["test"].get("accuracy"))
    return None if value is None or diverged(run) else 100 * value


def spread(values: Iterable[float | None]) -> Spread:
    """Summarise one quantity over seeds."""
    known = [value for value in values if value is not None]
    return Spread(statistics.fmean(known) if known else None, statistics.stdev(known) if len(known) > 1 else None)


def widths(runs: Sequence[Run]) -> list[int]:
    """Every width in the runs, ascending."""
    return sorted({run["width"] for run in runs})


def series(runs: Sequence[Run]) -> list[Series]:
    """The rules (on each net, if there are several) in the order of the runs, backprop first."""
    pairs = sorted(dict.fromkeys((run["rule"], run["net"]) for run in runs), key=lambda pair: pair[0] != "backprop")
    several = len({net for _, net in pairs}) > 1
    return [Series(rule, net, f"{rule} ({net})" if several else rule) for rule, net in pairs]


def cell(runs: Sequence[Run], line: Series, width: int) -> list[Run]:
    """The runs of one series at one width: one for each seed."""
    return [run for run in runs if (run["rule"], run["net"], run["width"]) == (line.rule, line.net, width)]


def accuracies(runs: Sequence[Run], line: Series, width: int) -> Spread:
    """Final test accuracy of one series at one width, in percent, over seeds."""
    return spread(accuracy(run) for run in cell(runs, line, width))


def reference(runs: Sequence[Run], line: Series) -> Series | None:
    """Backprop on the same net; None where it was not run, and for backprop itself."""
    return next((one for one in series(runs) if one.rule == "backprop" != line.rule and one.net == line.net), None)


def gap(runs: Sequence[Run], line: Series, width: int) -> Spread:
    """Accuracy minus backprop's in percentage points: the difference of the two means.

    Its standard deviation is that of the differences seed by seed, given where both finished the same seeds.
    """
    other = reference(runs, line)
    if other is None:
        return Spread(None, None)
    mean, base = accuracies(runs, line, width).mean, accuracies(runs, other, width).mean
    if mean is None or base is None:
        return Spread(None, None)
    ours, theirs = (
        sorted((run["seed"], reached) for run in cell(runs, one, width) if (reached := accuracy(run)) is not None)
        for one in (line, other)
    )
    same_seeds = [seed for seed, _ in ours] == [seed for seed, _ in theirs]
    paired = spread(a - b for (_, a), (_, b) in zip(ours, theirs, strict=False))
    return Spread(mean - base, paired.std if same_seeds else None)


def step_milliseconds(runs: Sequence[Run], line: Series, width: int) -> Spread:
    """Median time of a step in milliseconds, over seeds."""
    times = (finite(run.get("seconds_per_step")) for run in cell(runs, line, width))
    return spread(None if time is None else 1000 * time for time in times)


def flatten(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as dotted names, the form in which the command line takes them."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def option_text(value: object) -> str:
    """An option's value as one would write it in a config file."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def differences(runs: Sequence[Run]) -> dict[str, dict[str, list[Run]]]:
    """Options that differ between runs: name -> value -> its runs.

    An option that only repeats a run's rule, net, width, seed, name or folder is left out: the tables show these.
    """
    configs = [flatten(run["config"]) for run in runs]
    found: dict[str, dict[str, list[Run]]] = {}
    for option in dict.fromkeys(name for config in configs for name in config):
        values: dict[str, list[Run]] = {}
        for run, config in zip(runs, configs, strict=True):
            values.setdefault(option_text(config[option]) if option in config else "(absent)", []).append(run)
        shown = ("rule", "net", "width", "seed", "name", "folder")
        repeats = any(all(value == str(run[key]) for value, its in values.items() for run in its) for key in shown)
        if len(values) > 1 and not repeats:
            found[option] = values
    return found


def summary(data: Result) -> str:
    """One line for the terminal: how the first run ended."""
    run = data["runs"][0]
    reached, step = accuracy(run), finite(run["seconds_per_step"])
    parts = ["diverged" if reached is None else f"test accuracy {reached:.2f} %"]
    loss = finite(run["test"].get("loss"))
    parts += [] if loss is None else [f"test loss {loss:.4f}"]
    parts += [f"{run['steps']} steps"]
    parts += [] if step is None else [f"{1000 * step:.1f} ms a step"]
    return f"{run['name']}: {', '.join(parts)}"


def significant(value: float, digits: int = 3) -> str:
    """A positive number to a few significant digits, never in exponential notation."""
    places = 0 if value <= 0 else max(0, digits - 1 - math.floor(math.log10(value)))
    return f"{value:.{places}f}"
