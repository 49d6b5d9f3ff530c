"""Figures of experiments: alignment and movement over width, and accuracy over an option that was varied.

Stands alone beside the figures that every comparison has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from _report.drawing import drawing, legend, numbers, panels
from _report.series import Spread, accuracy, series_of, spread, widths
from _report.theme import LOOKS, Palette
from alignscale.results import Result, Run, diverged, finite, flatten

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def measured(data: Result, key: str) -> bool:
    """Whether a quantity was measured at the end of runs at two widths or more."""
    ends = [(run["width"], finite(run["curve"][-1].get(key))) for run in data["runs"] if run["curve"]]
    return len({width for width, value in ends if value is not None}) > 1


def _end(runs: Sequence[Run], key: str) -> Spread:
    return spread(finite(run["curve"][-1].get(key)) for run in runs if run["curve"])


def _bars(std: Sequence[float]) -> dict[str, Any]:
    return {"yerr": std, "capsize": 2.5, "elinewidth": 1} if any(std) else {}


def _over_width(figure: Figure, data: Result, palette: Palette, named: dict[str, str], label: str) -> None:
    """Quantities at the ends of the first rule's runs over width, with deviations over seeds."""
    rule, found, handles = series_of(data["runs"])[0].rule, widths(data["runs"]), {}
    own = [run for run in data["runs"] if run["rule"] == rule]
    figure.set_size_inches(4.4, 3.0)
    axis = figure.subplots()
    for (key, name), look in zip(named.items(), list(LOOKS.values())[1:], strict=False):
        mean, std = numbers([_end([run for run in own if run["width"] == width], key) for width in found])
        handles[name] = axis.errorbar(found, mean, **_bars(std), **drawing(look, palette))[0]
    axis.set_xscale("log", base=2)
    axis.set_xticks(found, [str(width) for width in found])
    axis.minorticks_off()
    axis.set(xlabel="width (log scale)", ylabel=f"{label} ({rule})")
    legend(figure, handles)


def alignment_over_width(figure: Figure, data: Result, palette: Palette) -> None:
    """The score and both controls."""
    keys = ("alignment", "alignment_shuffled", "alignment_shuffled_update")
    named = dict(zip(keys, ("score", "control: weights shuffled", "control: update shuffled"), strict=True))
    _over_width(figure, data, palette, named, "alignment score")
    figure.axes[0].set_ylim(0, 1.02)


def movement_over_width(figure: Figure, data: Result, palette: Palette) -> None:
    """Weights, layer inputs and gates, on a logarithmic scale."""
    named = {"weight_change": "weights", "input_change": "layer inputs", "gate_change": "gates"}
    _over_width(figure, data, palette, named, "relative change")
    axis = figure.axes[0]
    axis.set_yscale("log")
    ticks = [tick for tick in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if axis.get_ylim()[0] < tick]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()


def over_option(figure: Figure, data: Result, palette: Palette) -> None:
    """Final accuracy over the values of an experiment's option, evenly spaced: a panel a width, a line a rule."""
    option, runs, handles = data["experiment"]["option"], data["runs"], {}
    values = {id(run): float(flatten(run["config"])[option]) for run in runs}
    found = sorted(set(values.values()), key=lambda value: value or math.inf)
    axes = panels(figure, runs, row=2.6, left=0.5, label="test accuracy (%)")
    for axis, width in zip(axes, widths(runs), strict=True):
        for place, rule in enumerate(dict.fromkeys(line.rule for line in series_of(runs))):
            own = [run for run in runs if (run["rule"], run["width"]) == (rule, width)]
            mean, std = numbers([spread(accuracy(run) for run in own if values[id(run)] == value) for value in found])
            look = LOOKS.get(rule, list(LOOKS.values())[-1])
            handles[rule] = axis.errorbar(range(len(found)), mean, **_bars(std), **drawing(look, palette))[0]
            lost = [at for at, value in enumerate(found) for run in own if values[id(run)] == value and diverged(run)]
            foot = axis.get_xaxis_transform()
            for at in lost:  # as over the width: what has no height must not be overlooked
                mark = axis.plot(at, 0.04 + 0.06 * place, "x", color=palette[look.color], transform=foot)
                handles["a seed diverged"] = mark[0]
        axis.set_xticks(range(len(found)), [f"{value:g}" if value else "all" for value in found])
        axis.set_xlabel(option)
    legend(figure, handles)
