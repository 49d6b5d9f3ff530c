"""Claims about what training on ImageNet is said to cost."""

import subprocess
from pathlib import Path

import pytest
from warm import PYTHON

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("experiment", ["imagenet_conv7_w512", "imagenet_modern"])
def test_the_table_of_the_page_is_what_the_command_prints(experiment: str) -> None:
    """By hand for 224 pixels: 2 x 512 x (27 x 56^2 + 4608 x (2 x 28^2 + 2 x 14^2 + 2 x 7^2) + 1000) = 9.80 GFLOP."""
    done = subprocess.run(
        [PYTHON, "launch/cost.py", f"experiment={experiment}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    row = done.stdout.splitlines()[-1]
    assert row in (ROOT / "docs/streaming.md").read_text().splitlines()
    by_hand = 2 * 512 * (27 * 56**2 + 4608 * 2 * (28**2 + 14**2 + 7**2) + 1000) / 1e9
    assert experiment == "imagenet_modern" or f"| {by_hand:.2f} |" in row


def test_options_that_training_would_refuse_are_refused() -> None:
    done = subprocess.run(
        [PYTHON, "launch/cost.py", "experiment=imagenet_modern", "data.growth=[3]"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: data.first_size=128, data.growth=[3]: expected data.growth=[from, to]")
