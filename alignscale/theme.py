"""What a report looks like: the colours of its two themes, the look of each rule, and the page's style sheet.

Stands alone because the page and the figures in it must agree on all three, and the page needs them without matplotlib.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

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
    """The look of each series: its rule's own, or for a rule unknown here (or met on a second net) one that is free."""
    used = {line.rule for line in lines}
    spare = itertools.cycle([look for rule, look in LOOKS.items() if rule not in used] or list(LOOKS.values())[1:])
    chosen: dict[Series, Look] = {}
    for line in lines:
        first = line.rule not in {other.rule for other in chosen}
        chosen[line] = LOOKS[line.rule] if first and line.rule in LOOKS else next(spare)
    return chosen


def style_sheet() -> str:
    """The page's style sheet: one set of rules over the roles, which take the theme's colours as CSS variables."""
    light, dark = ("".join(f"--{role}:{color};" for role, color in one.items()) for one in (LIGHT, DARK))
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{STYLE}"


STYLE = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.2rem 1.2rem 3rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.8rem 0 .8rem;padding-top:.9rem;border-top:1px solid var(--grid)}
h3{font-size:.95rem;margin:0 0 .3rem}
p{margin:.4rem 0;max-width:46rem}
a{color:var(--link);text-underline-offset:.15em}
a:focus-visible,.box:focus-visible{outline:2px solid var(--link);outline-offset:2px}
.quiet,figcaption,thead th,dt{color:var(--muted)}
.quiet,figcaption{font-size:.875rem}
code,pre{font-family:ui-monospace,"SF Mono",Menlo,Consolas,monospace;font-size:.84rem}
.box{overflow-x:auto;max-width:100%}
pre.box{background:var(--panel);border:1px solid var(--grid);border-radius:6px;padding:.6rem .8rem;margin:.6rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem;margin-top:.6rem}
th,td{padding:.36rem .8rem;text-align:right;white-space:nowrap;vertical-align:top}
th{font-weight:600}
thead th{border-top:2px solid var(--ink);border-bottom:1px solid var(--ink)}
tbody tr:last-child>*{border-bottom:2px solid var(--ink)}
tbody tr+tr>*{border-top:1px solid var(--grid)}
th:first-child,.text{text-align:left}
th:first-child{padding-left:0}
tbody th{position:sticky;left:0;background:var(--paper)}
td.text{white-space:normal}
td small{display:block;color:var(--muted);font-size:.8rem;line-height:1.3}
.dense{font-size:.8rem}
.dense th,.dense td{padding:.16rem .45rem}
.dense th:first-child{padding-left:0}
.dense td.text{white-space:nowrap}
.dense thead th{white-space:normal;vertical-align:bottom}
.dense tbody th{font-weight:400}
.key{display:inline-flex;gap:.5em;align-items:baseline}
.key i{flex:none;width:.7em;height:.7em;border-radius:2px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:.6rem 2rem;align-items:start}
figure{margin:1.6rem 0 0;min-width:0}
figure svg{display:block;width:100%;height:auto}
figure svg text{font-family:system-ui,-apple-system,"Segoe UI",sans-serif!important}
figcaption{margin-top:.4rem;max-width:46rem}
dl,dd{margin:0}
dt{font-size:.875rem}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:1rem 1.4rem}
.tiles dd{font-size:1.3rem;font-weight:600;font-variant-numeric:tabular-nums}
.groups{columns:19rem;column-gap:2.2rem}
.group{break-inside:avoid;padding-bottom:1.1rem}
.group dl{display:grid;grid-template-columns:minmax(6rem,auto) 1fr;gap:.1rem .9rem}
.group dd{overflow-wrap:anywhere;font-size:.9rem}
@media (max-width:36rem){
main{padding:1.3rem 1rem 2rem}
th,td{padding:.36rem .5rem}
tbody th{white-space:normal;max-width:8.6rem}
.dense tbody th{position:static}
.tiles{grid-template-columns:repeat(2,1fr)}
}
@media print{main{max-width:none}.box{overflow:visible}figure,tr{break-inside:avoid}}
"""
