"""The JSON object that a run or a comparison leaves: making it, reading it, and what its numbers say of a run.

Format 1 holds `title`, `created`, `command`, `hardware`, `versions`, `config` (the options common to all runs) and
`runs`: a list with one object per run, each with its resolved `config`, its final `test` and `train` numbers and a
`curve` with one point per evaluation, the first before training. A loss that ended as NaN or infinity is null or
JSON's NaN: the run diverged. Some runs have more: OPTIONAL, and top-5 accuracies; accuracies are fractions.

Stands alone because the loop, the page and the terminal must agree on when a run diverged and how it ended.
"""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Run = dict[str, Any]
Options = dict[str, Any]

FORMAT = 1
TOP_FIELDS = {"title": str, "created": str, "command": str, "hardware": dict, "versions": dict, "config": dict}
RUN_FIELDS = {
    "name": str, "folder": str, "rule": str, "net": str, "width": int, "seed": int, "parameters": int, "config": dict,
    "steps": int, "epochs": int, "batch": int, "test": dict, "train": dict, "curve": list,
    "validation": dict, "best": dict, "skipped": int, "data": str, "failed": str,
}  # fmt: skip
# Absent or null in many runs: `best` has split, accuracy, epoch and step; `skipped` counts the examples that could not
# be decoded; `data` names the data set; `failed` says where a run diverged.
OPTIONAL = ("validation", "best", "skipped", "data", "failed")
ABSENT = "(absent)"


def make_result(title: str, command: str, run_on: Mapping[str, Any], config: Options, runs: list[Run]) -> Result:
    """A result of now. run_on: the hardware and versions; config: the options common to all runs."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "format": FORMAT, "title": title, "created": created, "command": command, "hardware": run_on["hardware"],
        "versions": run_on["versions"], "config": config, "runs": runs,
    }  # fmt: skip


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
    fault = next(_faults(data), None)
    if fault:
        raise ValueError(f"{path}: expected an alignscale result of format {FORMAT}, found {fault}; {remedy}")
    return dict(data)


def _faults(data: Any) -> Iterator[str]:
    """What keeps an object from being a result, in words; each check relies on those before it."""
    if not isinstance(data, dict):
        yield f"a {type(data).__name__} in place of an object"
    elif data.get("format") != FORMAT:
        yield f"format {data['format']!r}" if "format" in data else "an object without 'format'"
    elif not isinstance(data.get("runs"), list) or not data["runs"]:
        yield "no runs"
    else:
        yield from _wrong_fields(data, TOP_FIELDS)
        for index, run in enumerate(data["runs"]):
            for fault in _wrong_fields(run, RUN_FIELDS) if isinstance(run, dict) else ["no object"]:
                yield f"run {index} with {fault}"
            if any(not isinstance(point, dict) or finite(point.get("epoch")) is None for point in run["curve"]):
                yield f"run {index} with a curve that has a point without 'epoch'"


def _wrong_fields(record: Result, fields: Mapping[str, type]) -> Iterator[str]:
    for key, kind in fields.items():
        value = record.get(key)
        if key not in record and key not in OPTIONAL:
            yield f"no '{key}'"
        elif (not isinstance(value, kind) or isinstance(value, bool)) and not (key in OPTIONAL and value is None):
            yield f"'{key}' that is {type(value).__name__}, not {kind.__name__}"


def finite(value: object) -> float | None:
    """The value, or None where it is absent, NaN, infinite or so large that averages would overflow."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100 else None


def diverged(run: Run) -> bool:
    """Whether a run ended with a loss that is no number (what was never measured is not a divergence)."""
    return bool(run.get("failed")) or any(finite(run[part].get("loss", 0)) is None for part in ("test", "train"))


def flatten(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as dotted names, the form in which the command line takes them."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
