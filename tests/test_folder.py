"""Claims about what a run's folder says of the program that made it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_changed_source_leaves_its_difference_in_the_folder(tmp_path: Path) -> None:
    """In a checkout of its own, with one file changed."""
    clone = tmp_path / "clone"
    ignored = shutil.ignore_patterns("__pycache__", "runs", ".git", ".venv", ".cache")
    shutil.copytree(ROOT / "alignscale", clone / "alignscale", ignore=ignored)
    git = ["git", "-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    (clone / "alignscale/loss.py").write_text((clone / "alignscale/loss.py").read_text() + "# changed\n")
    code = (
        "from pathlib import Path; import torch; from alignscale.folder import describe_folder; "
        "from alignscale.choices import *; from alignscale.config import TrainConfig; "
        "c = TrainConfig(RuleConfig('backprop'), MLPConfig(), DigitsConfig(), SGDConfig()); "
        f"describe_folder(Path({str(tmp_path)!r}), c, torch.device('cpu'))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=clone, check=True)
    about = json.loads((tmp_path / "versions.json").read_text())
    assert about["source"]["changed"] == [" M alignscale/loss.py"]
    assert about["versions"]["source"].endswith("+")
    assert "+# changed" in (tmp_path / "source.diff").read_text()
    subprocess.run([*git, "commit", "-qam", "second"], check=True)
    subprocess.run([sys.executable, "-c", code], cwd=clone, check=True)
    assert not (tmp_path / "source.diff").exists()  # of a session before
