"""What a report looks like: theme.toml has its colours and the look of each rule, report.css the rest of the style.

Stands alone because the page and the figures in it must agree on all three, and the page needs them without matplotlib.
"""

import itertools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _report.series import Series

Palette = dict[str, str]
Dash = str | tuple[int, tuple[float, ...]]

_STYLE = tomllib.loads(Path(__file__).with_name("theme.toml").read_text(encoding="utf-8"))
LIGHT: Palette = _STYLE["light"]
DARK: Palette = _STYLE["dark"]
# Stand for the roles in a drawing until they are replaced by CSS variables: colours that nothing else has.
SENTINELS: Palette = {role: f"#fd{index:02x}fe" for index, role in enumerate(LIGHT)}


@dataclass(frozen=True)
class Look:
    """How a series is drawn everywhere; colour, marker and dashes each suffice to tell it from the others."""

    color: str
    marker: str
    dash: Dash


LOOKS = {
    rule: Look(color, marker, (0, tuple(dash)) if isinstance(dash, list) else dash)
    for rule, (color, marker, dash) in _STYLE["looks"].items()
}


def looks(lines: Sequence[Series]) -> dict[Series, Look]:
    """The look of each series: its rule's own for the first, for others one that is free.

    Where none is free any more, one rule's colour goes with another's marker and dashes.
    """
    used, own = {line.rule for line in lines}, list(LOOKS.values())[1:]
    mixed = (zip(own, own[turn:] + own[:turn], strict=True) for turn in range(1, len(own)))
    mixtures = [Look(one.color, other.marker, other.dash) for pairs in mixed for one, other in pairs]
    spare = itertools.cycle([look for rule, look in LOOKS.items() if rule not in used] + mixtures)
    chosen: dict[Series, Look] = {}
    for line in lines:
        first = line.rule not in {other.rule for other in chosen}
        chosen[line] = LOOKS[line.rule] if first and line.rule in LOOKS else next(spare)
    return chosen


def style_sheet() -> str:
    """The page's style sheet: one set of rules over the roles, which take the theme's colours as CSS variables."""
    light, dark = ("".join(f"--{role}:{color};" for role, color in one.items()) for one in (LIGHT, DARK))
    rules = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{rules}"
