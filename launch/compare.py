"""Train rules x widths x seeds and report on them: python launch/compare.py compare.rules=[backprop,align_ada].

The same command goes on where it was stopped; finished runs are not trained again.
"""

import sys
from pathlib import Path

from _hydra import FIRST, command_line, entry
from _options import GridConfig
from _report.claims import verdict
from _report.page import text_table
from _runs import compare

from alignscale.choices import ConfigError

GRID = ("net.width", "seed", "run.dir", "run.root")


@entry("compare")
def main(config: GridConfig) -> None:
    """Train the grid, print accuracy x width, and say where the report is."""
    for option in sys.argv[1:]:
        name, _, value = option.partition("=")
        if name in GRID or (name == "rule" and value not in config.compare.rules):
            raise ConfigError(
                f"{option}: the grid sets it; use compare.rules, compare.widths, compare.seeds, compare.folder"
            )
    result = compare(config, command_line("launch/compare.py"))
    folder = Path(config.compare.folder).expanduser()
    if FIRST:
        judged = verdict(result)
        if judged:
            print(f"\n{judged}")
        print(f"\n{text_table(result)}\n\nreport: {folder / 'report.html'}\nnumbers: {folder / 'result.json'}")


if __name__ == "__main__":
    main()
