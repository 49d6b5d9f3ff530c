"""Claims about the commands, each run as a user runs it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAST = ["net.width=4", "epochs=1", "batch_size=479", "threads=1", "log.progress=false"]


def run(script: str, *options: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script, *options], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )


def test_train_prints_folder_first_and_one_line_of_result_last(tmp_path: Path) -> None:
    done = run("launch/train.py", *FAST, f"run.root={tmp_path}")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert f"folder: {folder}" in lines
    assert re.match(
        rf"{folder.name}: test accuracy \d+\.\d\d %, test loss [\d.]+, 3 steps, [\d.]+ ms a step$", lines[-1]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["rule=alignada"], "align_ada"),
        (["net=resnet"], "imagenet_conv7"),
        (["net.widht=3"], "widht"),
        (
            ["rule=sign_symmetric", "rule.magnitude=big"],
            "rule.magnitude=big: expected one of uniform, fixed, batchwise",
        ),
    ],
)
def test_mistakes_end_with_a_message_and_a_status(tmp_path: Path, options: list[str], message: str) -> None:
    done = run("launch/train.py", *FAST, *options, f"run.root={tmp_path}")
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_compare_refuses_an_unknown_rule_before_any_work(tmp_path: Path) -> None:
    done = run("launch/compare.py", "compare.rules=[backprop,align]", f"compare.folder={tmp_path / 'grid'}")
    assert done.returncode == 2
    assert "compare.rules: align: expected some of align_ada" in done.stderr
    assert not (tmp_path / "grid").exists()


def test_rule_of_the_readme_is_one_file(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (source,) = [block for block in blocks if "@register" in block]
    for name in ("alignscale", "launch", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "alignscale/rules/align_sign.py").write_text(source)
    done = run("launch/train.py", *FAST, "rule=align_sign", root=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "run-align_sign-conv3-w4-s0" in done.stdout
