"""The runs of a result as series over widths: means, gaps to backprop, and the options that set runs apart.

Stands alone because the page, the figures and the terminal's table must agree on every one of them.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from alignscale.config import DISPLAY
from alignscale.results import ABSENT, Result, Run, diverged, finite, flatten

# Options that change none of the numbers, and so set no two runs apart.
INERT = tuple(f"{name}." for name in DISPLAY)


@dataclass(frozen=True)
class Spread:
    """Mean over the seeds that gave a value, and their sample standard deviation (from two on)."""

    mean: float | None
    std: float | None


@dataclass(frozen=True, eq=False)
class Series:
    """What one line, row or bar stands for: runs that at each width differ in the seed alone.

    options: those that set it apart from other series, with its values. base: the series of backprop on the same net
    and with the same options, to which the gap is; None where there is none, and for backprop itself.
    """

    rule: str
    net: str
    label: str
    options: dict[str, str] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    base: "Series | None" = None

    def at(self, width: int) -> list[Run]:
        """The runs at one width: one for each seed."""
        return [run for run in self.runs if run["width"] == width]

    def accuracy(self, width: int) -> Spread:
        """Final test accuracy at one width, in percent, over seeds."""
        return spread(accuracy(run) for run in self.at(width))

    def gap(self, width: int) -> Spread:
        """Accuracy minus that of `base` in percentage points: the difference of the two means.

        Its standard deviation is that of the differences seed by seed, given where both finished the same seeds.
        """
        mean, base = self.accuracy(width).mean, self.base.accuracy(width).mean if self.base else None
        if self.base is None or mean is None or base is None:
            return Spread(None, None)
        ours, theirs = (
            sorted((run["seed"], reached) for run in line.at(width) if (reached := accuracy(run)) is not None)
            for line in (self, self.base)
        )
        same_seeds = [seed for seed, _ in ours] == [seed for seed, _ in theirs]
        paired = spread(a - b for (_, a), (_, b) in zip(ours, theirs, strict=False))
        return Spread(mean - base, paired.std if same_seeds else None)

    def step_milliseconds(self, width: int) -> Spread:
        """Median time of a step in milliseconds, over seeds."""
        times = (finite(run.get("seconds_per_step")) for run in self.at(width))
        return spread(None if time is None else 1000 * time for time in times)


def accuracy(run: Run, split: str = "test", key: str = "accuracy") -> float | None:
    """An accuracy at the end of a run in percent, None where it diverged or has none; key: `accuracy` or `top5`."""
    value = finite((run.get(split) or {}).get(key))
    return None if value is None or diverged(run) else 100 * value


def spread(values: Iterable[float | None]) -> Spread:
    """Summarise one quantity over seeds."""
    known = [value for value in values if value is not None]
    return Spread(statistics.fmean(known) if known else None, statistics.stdev(known) if len(known) > 1 else None)


def widths(runs: Sequence[Run]) -> list[int]:
    """Every width in the runs, ascending."""
    return sorted({run["width"] for run in runs})


def series_of(runs: Sequence[Run]) -> list[Series]:
    """The runs as series, rule by rule in the order of the runs, backprop first.

    Runs of one rule, net and width that differ in an option belong to different series: their mean would be over
    more than seeds. Of options that differ together, the first is enough.
    """
    keys: list[tuple[str, ...]] = [(run["rule"], run["net"]) for run in runs]
    at = [run["width"] for run in runs]
    parting = []
    for option, values in differences(runs).items():
        finer = [(*key, value) for key, value in zip(keys, values, strict=True)]
        splits_cells = len(set(zip(finer, at, strict=True))) > len(set(zip(keys, at, strict=True)))
        if splits_cells and not f"{option}.".startswith(INERT):
            keys = finer
            parting.append(option)
    rules = list(dict.fromkeys(["backprop", *(run["rule"] for run in runs)]))
    lines: list[Series] = []
    for key in sorted(dict.fromkeys(keys), key=lambda key: rules.index(key[0])):
        rule, net, *values = key
        options = dict(zip(parting, values, strict=True))
        label = rule if len({net for _, net, *_ in keys}) == 1 else f"{rule} ({net})"
        for place, (option, value) in enumerate(options.items(), 2):
            varies = len({other[place] for other in keys if other[:2] == key[:2]}) > 1
            label += f", {option}={value}" if varies else ""
        bases = [
            line
            for line in lines
            if (line.rule, line.net) == ("backprop", net) != (rule, net)
            and all(len({value, line.options[option]} - {ABSENT}) < 2 for option, value in options.items())
        ]
        own = [run for run, its in zip(runs, keys, strict=True) if its == key]
        lines.append(Series(rule, net, label, options, own, bases[0] if len(bases) == 1 else None))
    return lines


def option_text(value: object) -> str:
    """An option's value as one would write it in a config file."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Options that differ between runs, each with its value in every run.

    An option that only repeats a run's rule, net, width, seed, name or folder is left out: the tables show these.
    """
    configs = [flatten(run["config"]) for run in runs]
    shown = [[str(run[key]) for run in runs] for key in ("rule", "net", "width", "seed", "name", "folder")]
    found = {}
    for option in dict.fromkeys(name for config in configs for name in config):
        values = [option_text(config[option]) if option in config else ABSENT for config in configs]
        if len(set(values)) > 1 and values not in shown:
            found[option] = values
    return found


def significant(value: float, digits: int = 3) -> str:
    """A positive number to a few significant digits, never in exponential notation."""
    places = 0 if value <= 0 else max(0, digits - 1 - math.floor(math.log10(value)))
    return f"{value:.{places}f}"


def duration(seconds: float) -> str:
    """A time in the unit that suits it, to two digits."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{significant(seconds / size, 2)} {unit}"
    return f"{significant(seconds, 2)} s"


def summary(data: Result) -> str:
    """One line for the terminal: how the first run ended."""
    run = data["runs"][0]
    reached, step = accuracy(run), finite(run.get("seconds_per_step"))
    parts = ["diverged" if reached is None else f"test accuracy {reached:.2f} %"]
    loss = finite(run["test"].get("loss"))
    parts += [] if loss is None else [f"test loss {loss:.4f}"]
    parts += [f"{run['steps']} steps"]
    parts += [] if step is None else [f"{1000 * step:.1f} ms a step"]
    return f"{run['name']}: {', '.join(parts)}"
