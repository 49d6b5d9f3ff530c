"""Claims about training on shards: the command on one rank or several, killed and gone on with, and evaluated."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import make_shards
import pytest
from launches import ENVIRONMENT, ROOT, torchrun
from shard_cases import plant
from stream_cases import config, jpeg, write
from warm import PYTHON, RANKS

from alignscale.checkpoint import complete
from tools import evaluate as tool

NOTHING = subprocess.DEVNULL
NET = ["net=conv3", "net.width=8", "net.norm=none", "batch_size=8", "optim.lr=0.01", "optim.momentum=0.9", "seed=3"]
OFTEN = ["checkpoint.every_epochs=0", "log.update_cosine=false"]
LOG = ["log.every_steps=1", "log.progress=false", "log.tensorboard=false", "evaluation.batch_size=4", "threads=1"]


def options(folder: Path, *more: str) -> list[str]:
    """On 3 shards of 13, 1 and 9 training examples and one of 7 for testing, made where there are none."""
    if folder.exists():
        config(folder)
    data = ["data=webdataset", f"data.urls={folder}/train-{{000..002}}.tar", f"data.test_urls={folder}/test-000.tar"]
    small = ["data.size=24", "data.resize=28", "data.streams=3", "data.block=4", "data.workers=1"]
    return [*NET, *LOG, *data, *small, *more]


def command(ranks: int, *given: str, python: str = PYTHON) -> list[str]:
    if ranks == 0:
        return [python, "launch/train.py", *given]
    return torchrun(ranks, "launch/train.py", *given, python=python)


def run(ranks: int, *given: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(ranks, *given), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def losses(folder: Path) -> dict[int, float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def check_close(ours: dict[int, float], theirs: dict[int, float]) -> None:
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[step] - theirs[step]) / theirs[step] for step in theirs) < 1e-5


def kill_after(folder: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a rank, or the command itself, once a checkpoint of ``step`` is there."""
    try:
        while not any(int(path.name[5:]) >= step for path in complete(folder / "checkpoints")):
            assert process.poll() is None
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        torchrun = b"torch.distributed.run" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        os.kill(int(children[-1]) if torchrun else process.pid, signal.SIGKILL)
    finally:
        process.wait(60)


def workers_of(folder: Path) -> list[str]:
    """Processes that were started for this run and still go on."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_a_killed_run_leaves_no_worker_and_goes_on_with_the_rest_of_the_epoch(tmp_path: Path) -> None:
    given = options(tmp_path, *OFTEN, "epochs=150", "checkpoint.every_steps=4", "evaluation.every_epochs=50")
    run(0, *given, f"run.dir={tmp_path}/whole")
    killed = tmp_path / "killed"
    words = command(0, *given, f"run.dir={killed}", python=sys.executable)
    kill_after(killed, 40, subprocess.Popen(words, cwd=ROOT, stdout=NOTHING))
    deadline = time.monotonic() + 10
    while workers_of(killed):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    done = run(0, *given, "data.workers=2", f"run.dir={killed}")
    assert "resumed after step" in done.stdout
    assert losses(killed) == losses(tmp_path / "whole")


@pytest.mark.distributed
def test_two_ranks_train_as_one_process_and_a_killed_run_goes_on_on_other_ranks(tmp_path: Path) -> None:
    """The whole path, from a tree in ImageNet's layout: make shards, two ranks, kill, resume on three, evaluate."""
    plant(tmp_path / "tree", 23, 7)
    made = ["--root", str(tmp_path / "tree"), "--out", str(tmp_path), "--shard-size", "10", "--quiet", "--workers", "1"]
    assert make_shards.main(made) == 0
    urls = [f"data.urls={tmp_path}/train-{{000000..000002}}.tar", f"data.test_urls={tmp_path}/val-000000.tar"]
    grown = ["data.first_size=16", "data.growth=[1,10]"]  # 16 pixels before epoch 2, where it may be killed
    given = options(
        tmp_path / "none", *OFTEN, *urls, *grown, "epochs=40", "checkpoint.every_steps=5", "evaluation.every_epochs=20"
    )
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    run(0, *given, f"run.dir={alone}")
    words = ["engine=deepspeed", "engine.timeout=150", f"run.dir={killed}"]
    ranks = command(2, *given, *words, python=sys.executable)
    own = {name: value for name, value in ENVIRONMENT.items() if name not in RANKS}
    kill_after(killed, 10, subprocess.Popen(ranks, cwd=ROOT, env=own, stdout=NOTHING, stderr=NOTHING))
    reached = int(complete(killed / "checkpoints")[-1].name[5:])
    assert 10 <= reached < 120
    done = run(3, *given, "engine=deepspeed", f"run.dir={killed}")
    assert f"resumed after step {reached}" in done.stdout
    check_close(losses(killed), losses(alone))
    scores = [tool.scores(folder, "last", ["train", "test"], None) for folder in (alone, killed)]
    for ours, theirs in zip(*scores, strict=True):
        assert ours["accuracy"] == theirs["accuracy"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    recorded = json.loads((killed / "result.json").read_text())["runs"][0]
    assert recorded["test"]["accuracy"] == scores[1][1]["accuracy"]


def test_norm_calibrated_and_held_out_examples_work_on_shards(tmp_path: Path) -> None:
    norm = [
        "net.norm=calibrated",
        "calibration.examples=12",
        "data.validation=5",
        "evaluation.splits=[train,validation]",
    ]
    given = options(tmp_path, "epochs=2", *norm, f"run.dir={tmp_path}/run")
    given.remove("net.norm=none")
    assert "examples: 18 for training, 5 for validation, 7 for testing" in run(0, *given).stdout
    assert (tmp_path / "run/norms.safetensors").exists()


def test_images_left_out_are_counted_in_the_result_and_bad_ones_end_with_one_line(tmp_path: Path) -> None:
    write(tmp_path, "train", [13, 1, 9], lambda number: jpeg(number)[:200] if number == 4 else jpeg(number))
    write(tmp_path, "test", [7])
    given = options(tmp_path, "epochs=2", f"run.dir={tmp_path}/run")
    failed = subprocess.run(command(0, *given), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/train-000.tar, key n0004: expected a whole image, found")
    done = run(0, *given, "data.skip=1", f"run.dir={tmp_path}/skipping")
    assert f"left out: {tmp_path}/train-000.tar, key n0004" in done.stderr
    assert json.loads((tmp_path / "skipping/result.json").read_text())["runs"][0]["skipped"] == 1


def test_ctrl_c_saves_and_ends_with_workers_under_way(tmp_path: Path) -> None:
    given = options(tmp_path, "epochs=5000", "checkpoint.every_steps=5", f"run.dir={tmp_path}/run")
    words = command(0, *given, python=sys.executable)
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=NOTHING, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while not complete(tmp_path / "run/checkpoints"):
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to all processes
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "goes on from it" in errors
    assert "killed by signal" not in errors
