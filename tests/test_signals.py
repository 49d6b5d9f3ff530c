"""Claims about signals to a run: where it ends, what it leaves, and what goes on from it."""

import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
from run_cases import config, rows, same, silent, weights

from alignscale import environment
from alignscale.checkpoint import complete, read_manifest
from alignscale.config import EvaluationConfig
from alignscale.data.examples import DataError
from alignscale.engine import Engine
from alignscale.interrupts import Interrupted, Interrupts
from alignscale.learner import Learner
from alignscale.train import train
from alignscale.types import Batch, StepOutput


def test_a_signal_at_an_epochs_end_saves_first_and_what_goes_on_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation may take longer than what ends the run waits; and what goes on may be killed in its turn."""
    whole = train(config(tmp_path / "whole"), silent)["runs"][0]
    calls = 0

    def update(self: Learner, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 11:  # of 6 in an epoch: the next one learns of it
            os.kill(os.getpid(), signal.SIGTERM)
        if calls == 13:
            raise MemoryError("killed")
        return updated(self, *arguments)

    updated = Learner.update
    monkeypatch.setattr(Learner, "update", update)
    options = config(tmp_path / "run")
    with pytest.raises(Interrupted, match="after step 12 of 18"):
        train(options, silent)
    progress = read_manifest(complete(tmp_path / "run/checkpoints")[-1])["progress"]
    assert [point["step"] for point in progress["curve"]] == [0, 6]
    with pytest.raises(MemoryError):
        train(options, silent)
    again = train(options, silent)["runs"][0]
    assert again["curve"] == whole["curve"]
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert again["best"] == whole["best"]
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("step", [12, 18])
def test_a_signal_in_an_evaluation_breaks_it_off_and_what_goes_on_makes_it_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """It would be killed before a long one ends, and the epoch would be lost; step 18 is the run's last."""
    options = {"evaluation": EvaluationConfig(["test"], 10)}
    whole = train(config(tmp_path / "whole", **options), silent)["runs"][0]
    updates, batches = 0, 0

    def update(self: Learner, *arguments: Any) -> Any:
        nonlocal updates, batches
        updates, batches = updates + 1, 0
        return updated(self, *arguments)

    def measure(self: Engine, batch: Batch) -> StepOutput:
        nonlocal batches
        batches += 1
        if (updates, batches) == (step, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return measured(self, batch)

    updated, measured = Learner.update, Engine.evaluate
    monkeypatch.setattr(Learner, "update", update)
    monkeypatch.setattr(Engine, "evaluate", measure)
    with pytest.raises(Interrupted, match=f"after step {step} of 18"):
        train(config(tmp_path / "run", **options), silent)
    assert batches == 2
    (progress,) = (read_manifest(path)["progress"] for path in complete(tmp_path / "run/checkpoints")[-1:])
    assert progress["curve"][-1]["step"] == step - 6
    monkeypatch.undo()
    again = train(config(tmp_path / "run", **options), silent)["runs"][0]
    assert again["curve"] == whole["curve"]
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    newest = read_manifest(complete(tmp_path / "run/checkpoints")[-1])
    assert newest["progress"]["curve"] == whole["curve"]
    assert newest["progress"]["best"] == again["best"]["step"] == whole["best"]["step"]


@pytest.mark.parametrize("how", ["before", "in", "taken for a damaged file"])
def test_a_signal_while_the_data_are_read_ends_it_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def reading(options: Any) -> Any:
        try:
            os.kill(os.getpid(), signal.SIGUSR2)
        except Interrupted as problem:
            raise (DataError("damaged") if how == "taken for a damaged file" else problem) from None
        raise AssertionError("read on")

    if how == "before":
        settings = environment.keep_freed_memory
        monkeypatch.setattr(
            environment, "keep_freed_memory", lambda: (settings(), os.kill(os.getpid(), signal.SIGUSR2))
        )
    monkeypatch.setattr("alignscale.prepare.load", reading)
    with pytest.raises(Interrupted, match="signal 12 before its first step") as caught:
        train(config(tmp_path / "run"), silent)
    assert pickle.loads(pickle.dumps(caught.value)).signum == signal.SIGUSR2  # as ranks send it to each other


def test_a_signal_that_comes_twice_at_once_is_one_and_a_second_one_ends_it() -> None:
    """SLURM's SIGTERM comes to a rank and to torchrun, which sends it on."""
    with Interrupts(speaks=False) as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.flags == [0, 1, 0]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
