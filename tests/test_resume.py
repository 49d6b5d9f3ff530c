"""Claims about stopped runs: at whatever moment and however they stop, they go on to the bits of one that did not."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from run_cases import config, long_run, long_run_that_may_be_stopped, rows, same, silent, weights
from warm import PYTHON

from alignscale.checkpoint import CheckpointError, complete, find, read_manifest, sealed
from alignscale.choices import ConfigError, MLPConfig
from alignscale.config import AnalysisConfig, CheckpointConfig, EvaluationConfig
from alignscale.interrupts import Interrupted
from alignscale.prepare import prepare
from alignscale.train import train
from tools import show_checkpoint

ROOT = Path(__file__).parents[1]


def test_a_run_stopped_at_20_random_moments_ends_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    begin = time.monotonic()
    whole = train(long_run(tmp_path / "whole"), silent)
    longest = (time.monotonic() - begin) / 20  # the stopped parts add up to about half of a whole run
    parts = tmp_path / "parts"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["run_cases", "torch._dynamo"])
    dice, stopped = random.Random(0), 0
    while stopped < 20:
        begun = processes.Event()
        process = processes.Process(target=long_run_that_may_be_stopped, args=(parts, begun))
        process.start()
        assert begun.wait(60)
        time.sleep(dice.uniform(0, longest))
        number = dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(20)
        assert process.exitcode in (-number, 128 + number), "ended before it was stopped, or did not stop"
        assert not (parts / "result.json").exists()
        stopped += 1
    lines: list[str] = []
    ended = train(long_run(parts), lines.append)
    assert any(line.startswith("resumed after step") for line in lines)
    assert same(weights(tmp_path / "whole"), weights(parts))
    assert ended["runs"][0]["curve"] == whole["runs"][0]["curve"]
    assert rows(parts) == rows(tmp_path / "whole")
    assert not list(parts.rglob("*.partial"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_after_a_checkpoint_with_its_own_status(tmp_path: Path, number: int) -> None:
    command = [PYTHON, "launch/train.py", "net=mlp", "net.width=16", "epochs=2000", "log.progress=false"]
    process = subprocess.Popen(
        [*command, f"run.dir={tmp_path / 'run'}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while not (tmp_path / "run/checkpoints").exists() or not complete(tmp_path / "run/checkpoints"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "and a checkpoint; the same command goes on from it" in errors
    assert "Traceback" not in errors
    step = read_manifest(complete(tmp_path / "run/checkpoints")[-1])["step"]
    assert f"after step {step} of" in errors


def test_checkpoints_come_by_steps_and_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    options = config(tmp_path / "run", checkpoint=CheckpointConfig(every_steps=5, every_epochs=0, keep=2))
    run = train(options, silent)["runs"][0]
    kept = {int(path.name[5:]) for path in complete(tmp_path / "run/checkpoints")}
    assert kept == {15, 18, run["best"]["step"]}
    best = max(run["curve"][1:], key=lambda point: point["test_accuracy"])
    assert run["best"] == {
        "split": "test",
        "accuracy": best["test_accuracy"],
        "epoch": best["epoch"],
        "step": best["step"],
    }


def test_a_finished_run_without_its_checkpoints_is_not_trained_again(tmp_path: Path) -> None:
    first = train(config(tmp_path / "run"), silent)
    rows_before = (tmp_path / "run/metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run/checkpoints")
    said: list[str] = []
    assert train(config(tmp_path / "run"), said.append) == first
    assert "finished before, and its checkpoints are gone" in said[-1]
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == rows_before


def test_the_name_of_the_newest_checkpoint_is_mended(tmp_path: Path) -> None:
    options = config(tmp_path / "run", epochs=1)
    train(options, silent)
    latest = tmp_path / "run/checkpoints/latest"
    latest.write_text("step-000000003")  # as after a kill between the two renames
    train(options, silent)
    assert latest.read_text() == complete(latest.parent)[-1].name


def test_checkpoints_come_by_minutes(tmp_path: Path) -> None:
    options = config(
        tmp_path / "run", epochs=1, checkpoint=CheckpointConfig(every_minutes=1e-9, every_epochs=0, keep=9)
    )
    train(options, silent)
    assert [path.name[-1] for path in complete(tmp_path / "run/checkpoints")] == ["1", "2", "3", "4", "5", "6"]


def test_other_data_under_the_same_options_are_refused(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=1), silent)
    path = complete(tmp_path / "run/checkpoints")[-1] / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["examples"]["train"] = "107-0"
    path.write_text(json.dumps(sealed(manifest)))
    with pytest.raises(ConfigError, match=r"examples\.train: 107-0 -> 107-"):
        train(config(tmp_path / "run", epochs=1), silent)


def test_another_network_is_refused_with_what_differs(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=1), silent)
    with pytest.raises(ConfigError, match=r"net\.gain: 1\.41.* -> 1\.0; net\.width: 16 -> 32"):
        train(config(tmp_path / "run", epochs=1, net=MLPConfig(width=32, depth=2, gain=1.0)), silent)


def test_a_copy_of_a_checkpoint_is_none_of_the_runs(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=1), silent)
    (path,) = complete(tmp_path / "run/checkpoints")
    shutil.copytree(path, path.with_name(f"{path.name}-good"))
    (tmp_path / "run/result.json").unlink()
    train(config(tmp_path / "run", epochs=1), silent)
    assert complete(tmp_path / "run/checkpoints") == [path]
    assert path.with_name(f"{path.name}-good").exists()
    with pytest.raises(CheckpointError, match=r"expected last, best or one of the steps in .*: 6"):
        find(tmp_path / "run/checkpoints", "5")


def test_the_best_is_by_one_split_all_along(tmp_path: Path) -> None:
    evaluation = EvaluationConfig(splits=["train"])
    train(config(tmp_path / "run", epochs=1, evaluation=evaluation), silent)
    with pytest.raises(ConfigError, match=r"checkpoint.best=train: expected test, by which the run has kept its best"):
        train(
            config(tmp_path / "run", epochs=1, evaluation=evaluation, checkpoint=CheckpointConfig(best="train")), silent
        )


def test_a_stop_is_whole_when_whoever_reads_the_output_dies_of_it_too(tmp_path: Path) -> None:
    """As with ``command 2>&1 | tee log`` and Ctrl-C."""
    command = [PYTHON, "launch/train.py", "net=mlp", "net.width=64", "epochs=4000", "checkpoint.every_epochs=0"]
    with subprocess.Popen(
        [*command, f"run.dir={tmp_path / 'run'}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        rows = tmp_path / "run/metrics.jsonl"
        while not (rows.exists() and rows.read_text().count("\n") > 20):
            time.sleep(0.05)
        assert process.stdout is not None
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    path = complete(tmp_path / "run/checkpoints")[-1]
    assert read_manifest(path)["step"] >= json.loads(rows.read_text().splitlines()[-1])["step"]


def test_resume_never_is_refused_where_torchrun_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config(tmp_path, epochs=1), silent)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ConfigError, match=r"resume=never: expected auto where torchrun"):
        train(config(tmp_path, epochs=1, resume="never"), silent)
    assert complete(tmp_path / "checkpoints")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    train(config(tmp_path, epochs=1, resume="never"), silent)


def test_moments_per_rank_want_as_many_ranks_as_before(tmp_path: Path) -> None:
    options = {"epochs": 1, "net": MLPConfig(width=16, depth=2, norm="batch"), "sync_norm": False}
    train(config(tmp_path, **options), silent)
    path = complete(tmp_path / "checkpoints")[-1] / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["made_with"]["ranks"] = 2
    path.write_text(json.dumps(sealed(manifest)))
    assert train(config(tmp_path, **options), silent)["runs"]  # which has ended
    (tmp_path / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"sync_norm=false: expected 2 ranks as before, .* found 1; use"):
        train(config(tmp_path, **options), silent)


def test_a_resumed_run_holds_no_file_of_its_checkpoint(tmp_path: Path) -> None:
    options = {"epochs": 1, "analysis": AnalysisConfig(track_errors=True)}
    train(config(tmp_path, **options), silent)
    with ExitStack() as held:
        run = prepare(config(tmp_path, **options), silent, "", held)
        assert run.start == 6
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_the_message_of_a_stop_leaves_resume_never_out(tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("folder"):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="the same command, without resume=never, goes on from it"):
        train(config(tmp_path / "run", resume="never"), interrupt)


def test_every_file_of_a_checkpoint_is_checked_where_it_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(tmp_path / "run", epochs=1, analysis=AnalysisConfig(track_errors=True)), silent)
    path = complete(tmp_path / "run/checkpoints")[-1] / "errors.safetensors"
    assert show_checkpoint.main([str(tmp_path / "run")]) == 0
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert show_checkpoint.main([str(tmp_path / "run")]) == 2
    assert "errors.safetensors: expected SHA-256" in capsys.readouterr().err
