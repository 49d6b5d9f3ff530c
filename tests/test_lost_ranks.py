"""Claims about ranks that are stopped, killed or silent: real processes of torchrun, gloo and DeepSpeed."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launches import ENVIRONMENT, ROOT, RUN, children, finished, result, run, stopped, torchrun, wait_for
from run_cases import same, weights

from alignscale.checkpoint import complete, parts, read, read_manifest

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("ranks", "stage", "optim", "more"),
    [
        (3, 3, "sgd", ["analysis.track_errors=true"]), (2, 2, "adam", []), (2, 1, "sgd", []),
        (2, 0, "sgd", []), (4, 2, "sgd", ["parallel.width=2", "net.width=37"]),
    ],
)  # fmt: skip
def test_a_signal_to_one_rank_stops_all_and_the_same_ranks_go_on_to_the_same_bits(
    tmp_path: Path, ranks: int, stage: int, optim: str, more: list[str]
) -> None:
    options = [f"engine.zero_stage={stage}", "engine=deepspeed", "epochs=4", "schedule=cosine", *more]
    options += [f"optim={optim}", *(["optim.lr=0.001"] if optim == "adam" else [])]
    given = [option for option in options if optim == "sgd" or not option.startswith("optim.m")]
    rest = [option for option in RUN if optim == "sgd" or not option.startswith("optim.")]
    whole = finished(
        torchrun(ranks, "launch/train.py", *rest, *given, "checkpoint.every_steps=10", f"run.dir={tmp_path / 'whole'}")
    )
    assert whole.returncode == 0, whole.stderr
    RUN_ = [*rest, *given, "checkpoint.every_steps=10", f"run.dir={tmp_path / 'run'}"]
    command = torchrun(ranks, "launch/train.py", *RUN_, python=sys.executable)
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        wait_for(process, lambda: len(complete(tmp_path / "run/checkpoints")) > 1)
        os.kill(children(process.pid)[1], signal.SIGUSR2)
        _, err = process.communicate(timeout=120)
    assert len(re.findall("stopped by signal 12 after step", err)) == 1, err
    again = finished(command)
    assert again.returncode == 0, again.stderr
    assert "resumed after step" in again.stdout
    assert "warning: not as before" not in again.stdout
    found, expected = (checkpointed(tmp_path / name) for name in ("run", "whole"))
    assert same(found, expected)
    assert ("errors sums" in found) == ("analysis.track_errors=true" in more)
    assert result(tmp_path / "run")["curve"] == result(tmp_path / "whole")["curve"]


def test_a_signal_to_torchrun_and_its_ranks_at_once_is_one(tmp_path: Path) -> None:
    """As SLURM sends it to all processes of a step, and torchrun then to its ranks."""
    slow = ["net.width=1000", "batch_size=700", "engine=deepspeed", "epochs=40"]
    done = stopped(2, tmp_path, signal.SIGTERM, *slow, at=10, torchrun_too=True)
    assert len(re.findall("stopped by signal 15 after step .* and a checkpoint", done.stderr)) == 1, done.stderr


def test_sigusr2_before_training_ends_a_run_that_has_restarts_left(tmp_path: Path) -> None:
    (tmp_path / "early.py").write_text(f"""
import os, runpy, signal, sys, time
sys.path[:0] = [{str(ROOT / "launch")!r}, {str(ROOT)!r}]
import _hydra
check = _hydra.check
def signalled(*given):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(60)
    return check(*given)
_hydra.check = signalled
sys.argv[0] = {str(ROOT / "launch/train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    words = [*RUN, "epochs=400", "engine=deepspeed", f"run.dir={tmp_path / 'run'}"]
    done = finished(torchrun(2, str(tmp_path / "early.py"), *words, restarts=2))
    assert done.returncode == 1
    assert "exitcode  : 140" in done.stderr, done.stderr[-3000:]
    assert not (tmp_path / "run/result.json").exists()


@pytest.mark.parametrize(("given", "status"), [("optim.lr=1e30", 3), ("engine.zero_stage=4", 2), ("", 140)])
def test_torchruns_restarts_are_for_lost_ranks(tmp_path: Path, given: str, status: int) -> None:
    if given:
        done = run(2, f"run.dir={tmp_path / 'run'}", "engine=deepspeed", given, restarts=2)
    else:
        done = stopped(2, tmp_path / "run", signal.SIGUSR2, "engine=deepspeed", "epochs=40", restarts=2)
        assert done.stderr.count("stopped by signal 12") == 1
    assert done.returncode == 1
    assert "resumed" not in done.stdout
    assert done.stderr.count("error: ") <= 1, done.stderr
    assert f"exitcode  : {status}" in done.stderr


def test_torchrun_sh_trains_on_two_nodes_and_passes_signals_on(tmp_path: Path) -> None:
    """Two launchers on this machine, as two machines would have them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    options = [*RUN, "epochs=1", f"run.dir={tmp_path / 'run'}", "engine=deepspeed", "engine.zero_stage=3"]
    command = ["launch/torchrun.sh", "2", f"localhost:{port}", *options]
    environment = {**ENVIRONMENT, "RANKS": "1", "PYTHON": sys.executable}
    nodes = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert result(tmp_path / "run")["ranks"] == 2
    (tmp_path / "long").mkdir()
    more = [*options[:-4], "checkpoint.every_steps=10", "epochs=400", f"run.dir={tmp_path / 'long'}", *options[-2:]]
    nodes = [
        subprocess.Popen([*command[:3], *more], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    wait_for(nodes[0], lambda: bool(complete(tmp_path / "long/checkpoints")))
    for node in nodes:  # as it is, torchrun dies of this one, and its ranks train on
        node.send_signal(signal.SIGUSR2)
    said = [node.communicate(timeout=200) for node in nodes]
    assert "".join(err for _, err in said).count("stopped by signal 12 after step") == 1, said
    wrong = subprocess.run(["launch/torchrun.sh", "net=mlp"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "usage: launch/torchrun.sh NODES HOST[:PORT] OPTIONS..." in wrong.stderr


def checkpointed(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint, by part and name."""
    path = complete(folder / "checkpoints")[-1]
    manifest = read_manifest(path)
    return {f"{part} {name}": value for part in parts(manifest) for name, value in read(path, manifest, part).items()}


KILLED = ["engine=deepspeed", "engine.zero_stage=3", "epochs=3", "checkpoint.every_steps=10"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = run(3, *KILLED, f"run.dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("phase", "first"), [("step", False), ("save", True), ("evaluation", False)])
def test_a_killed_rank_is_restarted_and_the_run_ends_with_the_same_weights(
    tmp_path: Path, phase: str, first: bool, uninterrupted: Path
) -> None:
    killed = signalled(3, "SIGKILL", phase, tmp_path, *KILLED, first=first, restarts=2)
    assert killed.returncode == 0, killed.stderr[-3000:]
    assert "resumed after step" + " 60 " * (phase == "step") in killed.stdout  # of 67, the last of which was half made
    assert same(weights(tmp_path / "run"), weights(uninterrupted))
    assert result(tmp_path / "run")["curve"] == result(uninterrupted)["curve"]


def signalled(
    ranks: int, name: str, phase: str, tmp_path: Path, *options: str, first: bool = False, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """The last rank, or the first, gives itself the signal in the first such phase after step 66, once.

    In a save before its third tensor; SIGKILL in a step between backward pass and update, and in an evaluation after a
    batch of it. A SIGSTOP only when the store, which hears of ranks every few seconds, has heard
    of a step.
    """
    given, always, who = [*RUN, *options, f"run.dir={tmp_path / 'run'}"], name == "SIGKILL", 0 if first else ranks - 1
    (tmp_path / "signal_itself.py").write_text(f"""
import os, pathlib, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from alignscale.distributed import Ranks
os.environ.setdefault("DS_ACCELERATOR", "cpu")
from alignscale import checkpoint
from alignscale.engine_deepspeed import DeepSpeedEngine
checkpoint.LEAST = 1  # so that each rank writes
beat, still, mark = Ranks.beat, Ranks.still, pathlib.Path({str(tmp_path / "given")!r})
def told(self):
    key = f"beat/{{self.rank}}"
    store = self.heart.store
    return {always} or store.check([key]) and b"(step)" in store.get(key)
now = []
def deadly(self, step, phase):
    beat(self, step, phase)
    now[:] = [step, phase, self]
    if phase != "save" and not {always}:
        die(self)
def inside(name, phase):
    made = getattr(DeepSpeedEngine, name)
    def call(*given):
        found = made(*given)
        if now and now[1] == phase and {always}:
            die(now[2])
        return found
    setattr(DeepSpeedEngine, name, call)
inside("backward", "step")
inside("evaluate", "evaluation")
def counted(self):
    still(self)
    now.append("a tensor")
    if len(now) == 6:
        assert list((pathlib.Path({str(tmp_path / "run")!r}) / "checkpoints").glob(".*.partial")) or self.rank
        die(self)
def die(self):
    if self.rank == {who} and now[1] == {phase!r} and now[0] > 66 and not mark.exists() and told(self):
        mark.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.{name})
Ranks.beat, Ranks.still = deadly, counted
sys.path.insert(0, {str(ROOT / "launch")!r})
sys.argv[0] = {str(ROOT / "launch/train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    command = torchrun(ranks, str(tmp_path / "signal_itself.py"), *given, restarts=restarts)
    out, err = tmp_path / "out", tmp_path / "err"
    with (
        out.open("w") as said, err.open("w") as wrong,
        subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=said, stderr=wrong) as process,
    ):  # fmt: skip
        try:
            if name == "SIGSTOP":
                until = time.monotonic() + 240
                while process.poll() is None and "error: " not in err.read_text() and time.monotonic() < until:
                    time.sleep(0.2)
                assert "error: " in err.read_text(), "nobody said anything"
                os.kill(int((tmp_path / "given").read_text()), signal.SIGKILL)  # or torchrun waits half a minute for it
            process.wait(300)
        finally:
            process.kill()
    assert (tmp_path / "given").exists()
    return subprocess.CompletedProcess(command, process.returncode, out.read_text(), err.read_text())


def test_the_loss_of_the_first_rank_which_keeps_what_ranks_tell_is_said(tmp_path: Path) -> None:
    done = signalled(3, "SIGKILL", "step", tmp_path, "engine=deepspeed", first=True)
    assert done.returncode != 0
    assert re.search(r"error: rank \d of 3: another rank ended or did not answer \(rank 0 is gone", done.stderr), (
        done.stderr[-3000:]
    )


def test_a_rank_that_hangs_is_named(tmp_path: Path) -> None:
    options = ["epochs=4000", "engine=deepspeed", "engine.timeout=20", "net.norm=batch"]  # moments over all ranks
    done = signalled(3, "SIGSTOP", "step", tmp_path, *options)
    assert done.returncode != 0
    said = re.findall("error: rank .*", done.stderr)
    assert len(said) == 1, done.stderr[-3000:]
    assert re.search(r"last heard of: rank 2 at step \d+ \(step\)\)", said[0])


def test_a_first_rank_that_hangs_and_keeps_what_ranks_tell_does_not_hold_the_others(tmp_path: Path) -> None:
    done = signalled(3, "SIGSTOP", "step", tmp_path, "epochs=4000", "engine=deepspeed", "engine.timeout=20", first=True)
    assert done.returncode != 0
    assert "rank 0, which keeps what the ranks tell each other, does not answer" in done.stderr, done.stderr[-3000:]
    assert "exitcode  : 4 " in done.stderr
