"""What a report looks like: the colours of its two themes, the look of each rule; report.css has the rest of the style.

Stands alone because the page and the figures in it must agree on all three, and the page needs them without matplotlib.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignscale.results import Series

Palette = dict[str, str]
Dash = str | tuple[int, tuple[float, ...]]

# Okabe and Ito's hues, lighter or darker: each stands out from its paper by 3:1 or more. Those of backprop, align_ada,
# align_zero, both kinds of feedback and readout_only differ from one another by 13 units of CIELAB or more, also to an
# eye that lacks one of the three kinds of cones (as simulated after Machado, Oliveira and Fernandes, 2009).
LIGHT: Palette = {
    "ink": "#1b1f24", "muted": "#59616b", "grid": "#dde1e6", "paper": "#ffffff", "panel": "#f5f6f8", "link": "#00589b",
    "blue": "#00629f", "vermillion": "#e0660f", "green": "#00805d", "purple": "#c768a0",
    "orange": "#6f4d00", "sky": "#2f95d0", "olive": "#7c8a00",
}  # fmt: skip
DARK: Palette = {
    "ink": "#e8eaed", "muted": "#a3abb5", "grid": "#363c45", "paper": "#14171b", "panel": "#1c2025", "link": "#7cc0f5",
    "blue": "#2f8fd8", "vermillion": "#e2691c", "green": "#10cf98", "purple": "#c97aa6",
    "orange": "#ffc950", "sky": "#9fd4f2", "olive": "#f3e93a",
}  # fmt: skip
# Stand for the roles in a drawing until they are replaced by CSS variables: colours that nothing else has.
SENTINELS: Palette = {role: f"#fd{index:02x}fe" for index, role in enumerate(LIGHT)}


@dataclass(frozen=True)
class Look:
    """How a series is drawn everywhere; colour, marker and dashes each suffice to tell it from the others."""

    color: str
    marker: str
    dash: Dash


LOOKS = {
    "backprop": Look("ink", "o", (0, (5.0, 1.8))),
    "align_ada": Look("blue", "s", "-"),
    "align_zero": Look("vermillion", "^", (0, (7.0, 1.5, 1.5, 1.5))),
    "feedback_alignment": Look("green", "v", (0, (3.0, 1.2))),
    "direct_feedback_alignment": Look("purple", "D", (0, (1.2, 1.2))),
    "readout_only": Look("orange", "P", (0, (5.0, 1.2, 1.2, 1.2, 1.2, 1.2))),
    "align_prop": Look("sky", "X", (0, (9.0, 2.0))),
    "sign_symmetric": Look("olive", "p", (0, (2.0, 2.0))),
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
