"""Train rules x widths x seeds and report on them: python launch/compare.py compare.rules=[backprop,align_ada].

The same command goes on where it was stopped; finished runs are not trained again.
"""

import shlex
import sys
from pathlib import Path

import hydra
from _hydra import CONFIGS, guarded, register, typed
from omegaconf import DictConfig

from alignscale.compare import compare
from alignscale.config import GridConfig
from alignscale.report import text_table


def run(config: GridConfig) -> None:
    """Train the grid, print accuracy x width, and say where the report is."""
    command = shlex.join(["python", "launch/compare.py", *sys.argv[1:]])
    result = compare(config, command)
    folder = Path(config.compare.folder)
    print(f"\n{text_table(result)}\n\nreport: {folder / 'report.html'}\nnumbers: {folder / 'result.json'}")


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="compare")
def main(options: DictConfig) -> None:
    """Hydra's entry point."""
    guarded(lambda: run(typed(options)))


if __name__ == "__main__":
    register()
    main()
