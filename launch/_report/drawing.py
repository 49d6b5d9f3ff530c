"""What the figures share: panels, legends, and how a line is drawn.

Stands alone because the figures over width, epochs and options must look the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from _report.series import Spread, widths
from _report.theme import Look, Palette
from alignscale.results import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


def panels(figure: Figure, runs: Sequence[Run], row: float, left: float, label: str = "") -> list[Axes]:
    """A panel for each width, at most three abreast; a row's height and the left margin are in inches."""
    found = widths(runs)
    columns = {1: 1, 2: 2, 4: 2}.get(len(found), 3)
    rows = math.ceil(len(found) / columns)
    panel = {1: max(2.0, 4.4 - left), 2: 3.5, 3: 2.5}[columns]
    figure.set_size_inches(columns * panel + left, rows * row + 0.35)
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for empty in axes[len(found) :]:
        empty.remove()
    for place, width in enumerate(found):
        axes[place].set(title=f"width {width}", ylabel="" if place % columns else label)
    return axes[: len(found)]


def legend(figure: Figure, handles: dict[str, Line2D]) -> None:
    """A legend below the panels, in as many columns as the figure has room for, which grows by its height."""
    for columns in (3, 2, 1) if len(handles) > 1 else ():
        legend = figure.legend(list(handles.values()), list(handles), loc="outside lower left", ncols=columns)
        size = legend.get_window_extent()
        if columns == 1 or size.width < figure.bbox.width:
            figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)
            break
        legend.remove()


def drawing(look: Look, palette: Palette) -> dict[str, Any]:
    edge = {"markeredgecolor": palette["paper"], "markeredgewidth": 0.6}
    return {"color": palette[look.color], "marker": look.marker, "linestyle": look.dash, **edge}


def numbers(spreads: Sequence[Spread]) -> tuple[list[float], list[float]]:
    """Means and standard deviations; NaN, which is not drawn, for a mean that does not exist."""
    return [math.nan if one.mean is None else one.mean for one in spreads], [one.std or 0.0 for one in spreads]
