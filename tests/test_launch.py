"""Claims about the commands. Each is run as a user runs it, but for the checks of the command line alone."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from _hydra import entry
from _mistakes import check
from warm import PYTHON

from alignscale.checkpoint import CheckpointError
from alignscale.choices import ConfigError
from alignscale.config import TrainConfig
from alignscale.data.examples import DataError
from alignscale.interrupts import Interrupted
from alignscale.run import Diverged
from alignscale.train import train

ROOT = Path(__file__).parents[1]
DATA = ["data=synthetic", "data.train=60", "data.test=20", "data.shape=[1,8,8]"]
FAST = [*DATA, "net.width=4", "epochs=1", "batch_size=20", "threads=1", "log.progress=false", "log.tensorboard=false"]


def run(script: str, *options: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, script, *options], cwd=root, capture_output=True, text=True, timeout=120, check=False
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


def test_a_mistake_in_one_of_several_jobs_leaves_nothing_behind(tmp_path: Path) -> None:
    done = run(str(ROOT / "launch/train.py"), "--multirun", "rule=backprop,align", *FAST, root=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: rule=backprop,align: expected one of align_ada")
    assert not list(tmp_path.iterdir())


def command(monkeypatch: pytest.MonkeyPatch, work: Callable[[Any], object], *options: str) -> object:
    """The status that a command with this work ends with."""
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    with pytest.raises(SystemExit) as ended:
        entry("train")(work)()
    return ended.value.code


@pytest.mark.parametrize(
    ("problem", "status"),
    [
        (ConfigError("why"), 2),
        (DataError("why"), 2),
        (CheckpointError("why"), 2),
        (Diverged("why"), 3),
        (OSError("why"), 1),
        (Interrupted("why", signal.SIGTERM), 143),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: why"), 1),
        (torch.OutOfMemoryError("CUDA out of memory: why"), 1),
        (MemoryError("why"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_ends_a_run_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], problem: Exception, status: int
) -> None:
    def work(config: TrainConfig) -> None:
        raise problem

    assert command(monkeypatch, work) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert "why" in line


def test_an_import_that_swallows_an_interrupt_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(config: TrainConfig) -> None:
        with suppress(KeyboardInterrupt):  # as some imports inside torch do
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        raise AttributeError("half a module")

    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        assert command(monkeypatch, work) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: interrupted")


def test_a_rank_that_waits_for_the_others_in_vain_says_where() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    done = subprocess.run(
        [PYTHON, "launch/train.py", "net=mlp", "engine=deepspeed", "engine.timeout=2"], env={**os.environ, **ranks},
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 4
    said = f"error: rank 0: expected all 2 ranks at localhost:{port} within engine.timeout=2 s, found: "
    assert next(line for line in done.stderr.splitlines() if line.startswith("error")).startswith(said), done.stderr


def test_a_rank_whose_machine_alone_is_wrong_says_so_when_the_first_has_nothing_to_say() -> None:
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29999"}
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "launch")!r})
import _hydra
_hydra.PATIENCE = 0.5
sys.argv = ["train.py", "threads=9999"]
import runpy
runpy.run_path({str(ROOT / "launch/train.py")!r}, run_name="__main__")
"""
    done = subprocess.run(
        [PYTHON, "-c", script], env={**os.environ, **ranks}, cwd=ROOT, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert re.search("error: rank 1 of 2, on .*: threads=9999", done.stderr), done.stderr


def test_a_bug_shows_its_stack_trace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def work(config: TrainConfig) -> None:
        raise RuntimeError("a bug")

    assert command(monkeypatch, work) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "RuntimeError: a bug" in error


def test_a_value_that_the_run_refuses_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = (*FAST, "rule=sign_symmetric", "rule.magnitude=big", f"run.root={tmp_path}")
    assert command(monkeypatch, train, *options) == 2
    assert "error: rule.magnitude=big: expected one of uniform, fixed, batchwise" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_multirun_trains_one_run_with_each_value(tmp_path: Path) -> None:
    done = run(str(ROOT / "launch/train.py"), "--multirun", "rule=align_ada,backprop", *FAST, root=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(folder.name.split("-")[1] for folder in (tmp_path / "runs").iterdir()) == ["align_ada", "backprop"]


def test_a_sweep_goes_on_where_a_run_diverges_and_says_so_at_its_end(tmp_path: Path) -> None:
    sweep = ["--multirun", "optim.lr=1e30,0.1", *FAST]
    for _ in range(2):
        done = run(str(ROOT / "launch/train.py"), *sweep, root=tmp_path)
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.count("diverged: run-align_ada") == 1
        assert done.stderr.splitlines()[-1] == "error: 1 of the runs diverged, as was said above"
    results = [json.loads(path.read_text())["runs"][0] for path in (tmp_path / "runs").glob("*/result.json")]
    assert sorted(one["diverged_at"] is None for one in results) == [False, True]


def test_runs_of_a_sweep_in_one_folder_are_refused(tmp_path: Path) -> None:
    for values in ("seed=0,1", f"run.dir={tmp_path / 'run'}"), ("seed=1,1", f"run.root={tmp_path}"):
        given = ["--multirun", *values, *FAST, "resume=never"]
        done = run(str(ROOT / "launch/train.py"), *given, root=tmp_path)
        assert done.returncode == 2
        assert "expected a folder of its own for each of 2 runs, found the same run twice" in done.stderr
        assert not list(tmp_path.iterdir())


def test_a_python_without_the_packages_says_which_one_has_them() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "launch/train.py", "net=mlp"], cwd=ROOT, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected the packages of alignscale, found none in ")
    assert done.stderr.endswith(".venv/bin/python launch/train.py net=mlp\n")


def test_the_version_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check("train", ["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out == f"alignscale {importlib.metadata.version('alignscale')}\n"


def test_an_interrupt_while_torch_loads_is_quiet(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", ROOT / "launch/train.py"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while not process.stderr.readline().endswith(" hydra\n"):  # a line for each module once it is imported
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == -signal.SIGINT


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
