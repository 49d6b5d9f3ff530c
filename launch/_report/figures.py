"""Figures of a result: accuracy over width, training curves, update cosines and step times, drawn from its JSON object.

A drawing asks a palette for its colours, either real ones (a print) or sentinels that become CSS variables, so that one
inline SVG follows a page's light or dark theme.

Stands alone because it is the only file that draws; only what draws waits for the import of Matplotlib.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _report.drawing import drawing, legend, numbers, panels
from _report.over import alignment_over_width, measured, movement_over_width, over_option
from _report.series import Series, Spread, series_of, significant, spread, widths
from _report.theme import LIGHT, LOOKS, SENTINELS, Palette, looks
from alignscale.files import write_atomic
from alignscale.results import Result, Run, diverged, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("report.mplstyle")


def _over_width(figure: Figure, data: Result, palette: Palette, *, gaps: bool) -> None:
    """Final accuracy, or its gap to backprop, over the width."""
    runs, found = data["runs"], widths(data["runs"])
    figure.set_size_inches(4.4, 3.0)
    axis, handles, crosses = figure.subplots(), {}, dict.fromkeys(found, 0)
    if gaps:
        handles["backprop"] = axis.axhline(0, color=palette["ink"], linestyle=LOOKS["backprop"].dash, zorder=1)
    lines = looks(series_of(runs))
    room = min(math.log2(wide / narrow) for narrow, wide in itertools.pairwise(found))
    for place, (line, look) in enumerate(lines.items()):
        if gaps and line.base is None:
            continue
        mean, std = numbers([(line.gap if gaps else line.accuracy)(width) for width in found])
        bars: dict[str, Any] = {"yerr": std, "capsize": 2.5, "elinewidth": 1} if any(std) else {}
        aside = 2 ** (0.15 * room * ((place + 0.5) / len(lines) - 0.5)) if bars else 1.0  # or bars hide bars
        handles[line.label] = axis.errorbar([aside * w for w in found], mean, **bars, **drawing(look, palette))[0]
        # A run that diverged has no height: crosses at the foot of the figure see to it that it is not overlooked.
        for width in found:
            if any(diverged(run) for run in line.at(width)):
                foot = 0.03 + 0.06 * crosses[width]
                axis.plot(width, foot, "x", color=palette[look.color], mew=1.6, transform=axis.get_xaxis_transform())
                crosses[width] += 1
    if any(crosses.values()):
        axis.margins(y=0.05 + 0.08 * max(crosses.values()))
        handles["a seed diverged"] = axis.plot([], [], "x", color=palette["ink"], mew=1.6)[0]
    axis.set_xscale("log", base=2)
    axis.set_xticks(found, [str(width) for width in found])
    axis.minorticks_off()
    axis.set(xlabel="width (log scale)", ylabel="gap to backprop (% points)" if gaps else "test accuracy (%)")
    legend(figure, handles)


def _finished(runs: Sequence[Run]) -> Sequence[Run]:
    """The runs that did not diverge; where all did, all."""
    return [run for run in runs if not diverged(run)] or runs


def _history(own: Sequence[Run], key: str) -> tuple[list[float], list[float], list[float]]:
    """Epochs, and a quantity's mean and deviation then, as far as it is finite, over the seeds that did not diverge."""
    points: dict[float, list[float]] = {}
    scale = 100.0 if key.endswith("accuracy") else 1.0
    for run in _finished(own):
        for point in run["curve"]:
            value = finite(point.get(key))
            if value is not None:
                points.setdefault(point["epoch"], []).append(scale * value)
    epochs = sorted(points)
    return epochs, *numbers([spread(points[epoch]) for epoch in epochs])


def _curves(figure: Figure, data: Result, palette: Palette, *, key: str, label: str) -> None:
    """One quantity of the runs' curves over epochs: a panel a width, the mean and standard deviation over seeds."""
    from matplotlib.ticker import MaxNLocator

    runs, handles = data["runs"], {}
    axes = panels(figure, runs, row=2.3, left=0.5, label=label)
    for axis, width in zip(axes, widths(runs), strict=True):
        if key == "update_cosine":
            handles["backprop"] = axis.axhline(1, color=palette["ink"], linestyle=LOOKS["backprop"].dash, zorder=1)
        for line, look in looks(series_of(runs)).items():
            epochs, mean, std = _history(line.at(width), key)
            if not epochs or (key, line.rule) == ("update_cosine", "backprop"):
                continue
            if any(std):
                low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
                axis.fill_between(epochs, low, high, color=palette[look.color], alpha=0.14, linewidth=0)
            every = max(1, math.ceil(len(epochs) / 12))
            handles[line.label] = axis.plot(epochs, mean, markevery=every, **drawing(look, palette))[0]
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _share_range(axes, runs, key)
    legend(figure, handles)


def _share_range(axes: Sequence[Axes], runs: Sequence[Run], key: str) -> None:
    """Give all panels one y range: that of the runs that finished, in a comparison without the untrained accuracy.

    A run on its way to infinity, or an accuracy near chance, would press all that matters into a thin stripe.
    """
    from matplotlib.ticker import LogLocator

    skip = 1 if key.endswith("accuracy") and len(runs) > 1 else 0
    curves = [_history([run], key)[1] for run in _finished(runs)]
    values = [mean for curve in curves for mean in (curve[skip:] or curve)]
    if not values:
        return
    low, high = min(values), max(values)
    if key == "update_cosine":
        high = max(high, 1.0)
    if key.endswith("loss") and 0 < 8 * low < high:
        room = (high / low) ** 0.06
        axes[0].set(yscale="log", ylim=(low / room, high * room))
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].minorticks_off()
    else:
        room = 0.06 * (high - low or 1.0)
        axes[0].set_ylim(low - room, high + room)


def _step_time(figure: Figure, data: Result, palette: Palette) -> None:
    """Time per step as bars: a panel a width, its milliseconds and its ratio to backprop written beside each bar."""
    runs = data["runs"]
    chosen = looks(series_of(runs))
    axes = panels(figure, runs, row=0.55 + 0.23 * len(chosen), left=0.065 * max(len(line.label) for line in chosen))
    for axis, width in zip(axes, widths(runs), strict=True):
        longest = max(line.step_milliseconds(width).mean or 0.0 for line in chosen) or 1.0
        for place, (line, look) in enumerate(chosen.items()):
            time = line.step_milliseconds(width)
            if time.mean is None:
                continue
            axis.barh(place, time.mean, height=0.62, color=palette[look.color], xerr=time.std, ecolor=palette["muted"])
            compared = line.base.step_milliseconds(width).mean if line.base else None
            words = significant(time.mean) + (f" ({time.mean / compared:.2f}×)" if compared else "")
            end = time.mean + (time.std or 0.0) + 0.03 * longest
            axis.text(end, place, words, va="center", fontsize=8, color=palette["ink"])
        axis.set_yticks(range(len(chosen)), [line.label for line in chosen])
        axis.set(xlabel="ms per step", xlim=(0, 1.75 * longest), ylim=(len(chosen) - 0.5, -0.5))
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=False)


def _has(data: Result, key: str, values: int) -> bool:
    """Whether the curve of some run has so many different values of a quantity."""
    return any(len({finite(point.get(key)) for point in run["curve"]} - {None}) >= values for run in data["runs"])


def _has_widths(data: Result, measure: Callable[[Series, int], Spread]) -> bool:
    """Whether a quantity is known at two widths or more: fewer make no figure over the width."""
    lines = series_of(data["runs"])
    return sum(any(measure(line, w).mean is not None for line in lines) for w in widths(data["runs"])) > 1


@dataclass(frozen=True)
class Plot:
    """A figure's title, what it shows in a sentence (its alternative text too), when it exists and how it is drawn."""

    title: str
    caption: str
    exists: Callable[[Result], bool]
    draw: Callable[[Figure, Result, Palette], None]


def _curve_plot(title: str, caption: str, key: str, label: str, values: int = 1) -> Plot:
    return Plot(title, caption, partial(_has, key=key, values=values), partial(_curves, key=key, label=label))


def _has_cosines(data: Result) -> bool:
    """Whether a rule has cosines of its own: backprop's are 1, and make no figure of a comparison."""
    others = [run for run in data["runs"] if run["rule"] != "backprop" or len(data["runs"]) == 1]
    return _has({**data, "runs": others}, "update_cosine", 1)


PLOTS = {
    "accuracy_width": Plot(
        "Test accuracy over width", "Test accuracy at the end of training, for each rule and width.",
        partial(_has_widths, measure=Series.accuracy), partial(_over_width, gaps=False),
    ),
    "gap_width": Plot(
        "Gap to backprop over width",
        "Test accuracy minus that of backprop at the same width and options; 0 is backprop.",
        partial(_has_widths, measure=Series.gap), partial(_over_width, gaps=True),
    ),
    "test_accuracy": _curve_plot(
        "Test accuracy in training", "Test accuracy after each epoch.", "test_accuracy", "test accuracy (%)"
    ),
    "validation_accuracy": _curve_plot(
        "Validation accuracy in training", "Accuracy on the validation set after each epoch.",
        "validation_accuracy", "validation accuracy (%)",
    ),
    "accuracy_option": Plot(
        "Test accuracy over an option", "Test accuracy at the end of training over the option that was varied.",
        lambda data: bool((data.get("experiment") or {}).get("option")), over_option,
    ),
    "alignment_width": Plot(
        "Alignment over width",
        "Score of the weights' change at the end, mean over hidden layers, and of both controls; 1 is full alignment.",
        partial(measured, key="alignment"), alignment_over_width,
    ),
    "alignment": _curve_plot(
        "Alignment in training", "Score of the weights' change after each epoch, mean over hidden layers.",
        "alignment", "alignment score", values=3,
    ),
    "movement_width": Plot(
        "Movement over width",
        "Relative change from the start to the end of training, mean over layers; of relu's gates the share that "
        "opened or closed.",
        partial(measured, key="input_change"), movement_over_width,
    ),
    "train_loss": _curve_plot(
        "Training loss", "Mean loss over the training examples of each epoch.", "train_loss", "training loss"
    ),
    "test_loss": _curve_plot("Test loss", "Loss on the test set after each epoch.", "test_loss", "test loss"),
    "update_cosine": Plot(
        "Cosine of the update with backprop's",
        "Cosine between a rule's update and backprop's at the same weights, mean over layers; 1 is backprop.",
        _has_cosines, partial(_curves, key="update_cosine", label="cosine"),
    ),
    "learning_rate": _curve_plot(
        "Learning rate", "Learning rate at the end of each epoch; rules that share it lie on one another.",
        "lr", "learning rate", values=2,
    ),
    "step_time": Plot(
        "Time per step", "Median time of a training step and, beside it, its ratio to backprop at the same width.",
        lambda data: any(finite(run.get("seconds_per_step")) is not None for run in data["runs"]), _step_time,
    ),
}  # fmt: skip


def figure_names(data: Result) -> list[str]:
    """The figures that a result has the numbers for."""
    return [name for name, plot in PLOTS.items() if plot.exists(data)]


def _render(data: Result, name: str, palette: Palette, kind: str) -> bytes:
    """One figure as a file's bytes; the same for the same data, whatever the reader's own matplotlib settings are."""
    import matplotlib.style
    from matplotlib.figure import Figure

    roles = {
        "ink": ("legend.labelcolor", "xtick.labelcolor", "ytick.labelcolor"),
        "muted": ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "axes.edgecolor"),
        "grid": ("grid.color",),
        "paper": ("figure.facecolor",),
    }
    colors = {setting: palette[role] for role, settings in roles.items() for setting in settings}
    stamps = {"svg": ("Date", "Creator", "Format", "Type"), "pdf": ("CreationDate", "Creator", "Producer")}
    buffer = io.BytesIO()
    with matplotlib.style.context(["default", str(STYLE), {"svg.hashsalt": name, **colors}]):
        figure = Figure(layout="constrained")
        PLOTS[name].draw(figure, data, palette)
        figure.suptitle(PLOTS[name].title, x=0.003, ha="left", color=palette["ink"])
        figure.savefig(buffer, format=kind, metadata=dict.fromkeys(stamps.get(kind, ("Software",))))
    return buffer.getvalue()


def figures(data: Result) -> dict[str, str]:
    """Every figure of a result as SVG for a page: name -> svg.

    The CSS variables of the style sheet of `theme.py` give the colours; ids are such that no other figure has
    them: Matplotlib numbers its own from 1 in every file, and clips and markers would go astray.
    """
    drawn = {}
    for name in figure_names(data):
        svg = _render(data, name, SENTINELS, "svg").decode()
        for role, sentinel in SENTINELS.items():
            svg = svg.replace(sentinel, f"var(--{role})")
        limits = r'style="max-width:calc(1.15 * \1);min-width:calc(0.8 * \1)"'  # its box scrolls before text gets tiny
        svg = re.sub(r'width="([\d.]+pt)" height="[\d.]+pt"', limits, svg[svg.index("<svg") :], count=1)
        drawn[name] = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    return drawn


def save_figure(data: Result, name: str, path: Path) -> None:
    """Draw one figure in print colours into a file of the kind its suffix says: .svg, .png or .pdf."""
    write_atomic(path, _render(data, name, LIGHT, path.suffix.removeprefix(".")))
