"""Train rules x widths x seeds and report on them: python launch/compare.py compare.rules=[backprop,align_ada].

The same command goes on where it was stopped; finished runs are not trained again.
"""

import shlex
import sys
from pathlib import Path

import hydra
from _hydra import CONFIGS, guarded, typed
from omegaconf import DictConfig

from alignscale.compare import compare
from alignscale.report import text_table


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="compare")
def main(options: DictConfig) -> None:
    """Train the grid, print accuracy x width, and say where the report is."""
    config = typed(options)
    command = shlex.join(["python", "launch/compare.py", *sys.argv[1:]])
    result = compare(config, command)
    print(f"\n{text_table(result)}\n")
    folder = Path(config.compare.folder)
    print(f"report: {folder / 'report.html'}\nnumbers: {folder / 'result.json'}")


if __name__ == "__main__":
    guarded(main)
