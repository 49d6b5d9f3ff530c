"""Claims about training on several ranks: real processes of torchrun, gloo and DeepSpeed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import RULE_NAMES
from run_cases import same, weights
from safetensors.torch import load_file
from warm import PYTHON, RANKS

from alignscale.checkpoint import complete
from alignscale.choices import ConfigError, DeepSpeedConfig
from tools import evaluate as tool

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "TORCH_EXTENSIONS_DIR": "/dev/null/nothing-is-compiled",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    **RANKS,
}
RUN = [
    "net=mlp",
    "net.width=32",
    "net.depth=2",
    "batch_size=37",
    "optim.momentum=0.9",
    "optim.lr=0.1",
    "log.progress=false",
]


def torchrun(ranks: int, *command: str, restarts: int = 0, python: str = PYTHON) -> list[str]:
    given = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", *command]
    return [python, "-m", "torch.distributed.run", *given]


def run(ranks: int, *options: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    given = [one for one in RUN if "optim=adam" not in options or not one.startswith("optim.momentum")]
    return subprocess.run(
        torchrun(ranks, "launch/train.py", *given, *options, restarts=restarts),
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def alone(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, "launch/train.py", *RUN, "threads=1", *options],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())["runs"][0]


STAGES = [f"zero{stage}" for stage in range(4)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """The rows of tests/distributed_cases.py for a number of ranks, made once."""
    found: dict[int, list[dict[str, Any]]] = {}
    folder = tmp_path_factory.mktemp("rows")

    def of(ranks: int, *options: str) -> list[dict[str, Any]]:
        if ranks not in found:
            path = folder / f"{ranks}.json"
            done = subprocess.run(
                torchrun(ranks, "tests/distributed_cases.py", str(path), *options),
                cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=3000, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-5000:]
            found[ranks] = json.loads(path.read_text())
        return found[ranks]

    return of


def check_equal(found: list[dict[str, Any]]) -> None:
    for row in found:
        if row["case"].endswith(("bf16", "fp16")):  # each rank rounds its own sums
            assert row["loss"] < 1e-2, row
            continue
        adam = "adam" in row["case"]
        assert row["loss"] < (1e-4 if adam else 1e-5), row
        assert adam or row["weights"] < 1e-5, row
        assert row["accuracy"][0] == row["accuracy"][1], row
        assert row["evaluation_loss"] < 1e-5, row
        assert row["cosine"] < 1e-4, row


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rule_net_and_stage_trains_to_the_local_engines_result(ranks: int, rows: Callable[..., Any]) -> None:
    found = rows(ranks)
    words = {word for row in found for word in row["case"].split("-")}
    assert {"mlp", "conv3", "conv7", "rnn", "none", "batch", "calibrated", *RULE_NAMES, *STAGES} <= words
    assert {"adam", "decay", "clip", "adamw", "partitioned", "regenerated", "offload", "bf16", "fp16", "few"} <= words
    check_equal(found)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_whole_table_trains_to_the_local_engines_result(rows: Callable[..., Any]) -> None:
    found = rows(3, "--all")
    assert len(found) == 5 * 3 * len(RULE_NAMES) * len(STAGES)
    check_equal(found)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [2, 4])
def test_align_needs_the_current_weights_once_and_backprop_twice(ranks: int, rows: Callable[..., Any]) -> None:
    found = {row["case"]: row for row in rows(ranks) if row["case"].startswith("wide")}
    assert len(found) == 20
    for case, row in found.items():
        gathered = sum(count for name, count in row["bytes"].items() if name.startswith("all_gather")) / row["psi"]
        scattered = sum(count for name, count in row["bytes"].items() if name.startswith("reduce_scatter")) / row["psi"]
        assert scattered == pytest.approx(1, rel=0.01), case
        assert sum(row["bytes"].values()) / row["psi"] - gathered - scattered < 0.01, case  # by no other way
        if "partitioned" not in case or "feedback" in case:
            assert gathered == pytest.approx(2 if "backprop" in case else 1, rel=0.01), case
    extra = {rule: found[f"wide-none-{rule}-zero3-sgd-parts1-partitioned"] for rule in ("align_prop", "align_ada")}
    assert 1.7 < extra["align_prop"]["bytes"]["all_gather_into_tensor"] / extra["align_prop"]["psi"] < 1.9
    assert 2.7 < extra["align_ada"]["bytes"]["all_gather_into_tensor"] / extra["align_ada"]["psi"] < 2.9


def test_our_options_become_deepspeeds() -> None:
    from alignscale.engine_deepspeed import deepspeed_config

    config = DeepSpeedConfig(
        zero_stage=3, offload=True, extra={"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True}
    )
    assert deepspeed_config(config, 0.5) == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "overlap_comm": False},
        "wall_clock_breakdown": True,
    }
    with pytest.raises(ConfigError, match=r"engine\.extra: bf16: expected precision, the option that decides it"):
        deepspeed_config(DeepSpeedConfig(extra={"bf16": {"enabled": True}}), 0.0)
    for inside, message in (
        ({"stage": 2}, "zero_optimization.stage: expected engine.zero_stage"),
        ({"round_robin_gradients": True}, "zero_optimization.round_robin_gradients: expected false"),
        (5, "zero_optimization: expected settings by name, found 5"),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"engine.extra: {message}")):
            deepspeed_config(DeepSpeedConfig(extra={"zero_optimization": inside}), 0.0)


def test_another_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from alignscale import engine_zero

    monkeypatch.setattr(engine_zero.deepspeed, "__version__", "0.20.0")
    with pytest.raises(ConfigError, match=r"expected DeepSpeed 0\.19\.8, found 0\.20\.0; pip install"):
        engine_zero.make_ready("cpu")


def test_one_command_trains_on_two_ranks_to_the_result_of_one_in_one_folder(tmp_path: Path) -> None:
    both = run(2, f"run.dir={tmp_path / 'two'}", "epochs=2", "evaluation.splits=[train]", "engine=auto")
    assert both.returncode == 0, both.stderr
    assert len(re.findall("folder: ", both.stdout)) == 1
    assert len(re.findall("test accuracy", both.stdout)) == 1
    assert "engine: deepspeed, 2 ranks, ZeRO 1" in both.stdout
    single = alone(f"run.dir={tmp_path / 'one'}", "epochs=2", "evaluation.splits=[train]")
    assert single.returncode == 0, single.stderr
    ours, theirs = (result(tmp_path / name) for name in ("two", "one"))
    assert ours["ranks"] == 2
    for mine, other in zip(ours["curve"], theirs["curve"], strict=True):
        assert mine["test_accuracy"] == other["test_accuracy"]
        assert mine["train_top5"] == other["train_top5"]
        assert mine["test_loss"] == pytest.approx(other["test_loss"], rel=1e-5)
        assert mine["train_loss"] == (other["train_loss"] and pytest.approx(other["train_loss"], rel=1e-5))
        assert mine["update_cosine"] == pytest.approx(other["update_cosine"], abs=1e-5)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("two", "one")]
    assert len(lines[0]) == len(lines[1])
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    assert tool.scores(tmp_path / "two", "last", ["test"], None)[0]["accuracy"] == ours["test"]["accuracy"]


def stopped(
    ranks: int, folder: Path, number: int, *options: str, at: int = 30, torchrun_too: bool = False, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """A run whose first rank gets a signal when it has made a checkpoint at step ``at``."""
    given = [*RUN, "checkpoint.every_steps=10", f"run.dir={folder}", *options]
    command = torchrun(ranks, "launch/train.py", *given, restarts=restarts, python=sys.executable)
    with subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(process, lambda: any(int(path.name[5:]) >= at for path in complete(folder / "checkpoints")))
        for child in [*children(process.pid)[: ranks if torchrun_too else 1], *[process.pid] * torchrun_too]:
            os.kill(child, number)
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool], seconds: float = 240) -> None:
    """Until the process has got there; ends it where it does not."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.terminate()
            pytest.fail(f"did not get there; status {process.poll()}: {process.communicate()[1][-3000:]}")
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """The ranks' processes, in their order."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return sorted(int(line) for line in listed.stdout.split())


@pytest.mark.parametrize(("ranks", "stage", "optim"), [(3, 3, "sgd"), (2, 2, "adam"), (2, 1, "sgd"), (2, 0, "sgd")])
def test_a_signal_to_one_rank_stops_all_and_the_same_ranks_go_on_to_the_same_bits(
    tmp_path: Path, ranks: int, stage: int, optim: str
) -> None:
    options = [f"engine.zero_stage={stage}", "engine=deepspeed", "epochs=4", "schedule=cosine"]
    options += [f"optim={optim}", *(["optim.lr=0.001"] if optim == "adam" else [])]
    given = [option for option in options if optim == "sgd" or not option.startswith("optim.m")]
    rest = [option for option in RUN if optim == "sgd" or not option.startswith("optim.")]
    whole = subprocess.run(
        torchrun(ranks, "launch/train.py", *rest, *given, "checkpoint.every_steps=10", f"run.dir={tmp_path / 'whole'}"),
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    RUN_ = [*rest, *given, "checkpoint.every_steps=10", f"run.dir={tmp_path / 'run'}"]
    command = torchrun(ranks, "launch/train.py", *RUN_, python=sys.executable)
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        wait_for(process, lambda: len(complete(tmp_path / "run/checkpoints")) > 1)
        os.kill(children(process.pid)[1], signal.SIGUSR2)
        _, err = process.communicate(timeout=120)
    assert len(re.findall("stopped by signal 12 after step", err)) == 1, err
    again = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert "resumed after step" in again.stdout
    assert "warning: not as before" not in again.stdout
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert result(tmp_path / "run")["curve"] == result(tmp_path / "whole")["curve"]


def test_a_signal_to_torchrun_and_its_ranks_at_once_is_one(tmp_path: Path) -> None:
    """As SLURM sends it to all processes of a step, and torchrun then to its ranks."""
    slow = ["net.width=1000", "batch_size=700", "engine=deepspeed", "epochs=40"]
    done = stopped(2, tmp_path, signal.SIGTERM, *slow, at=10, torchrun_too=True)
    assert len(re.findall("stopped by signal 15 after step .* and a checkpoint", done.stderr)) == 1, done.stderr


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


def test_other_ranks_another_stage_and_no_deepspeed_at_all_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    options = ["epochs=3", "schedule=cosine", "optim.weight_decay=0.01", "optim.decay_towards=initial"]
    whole = alone(*options, f"run.dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    expected = torch.cat([one.flatten() for one in weights(tmp_path / "whole").values()])
    changes = ((3, 3, (2, 0)), (0, 2, (4, 3)), (2, 2, (3, 1)), (1, 2, (0, 0)))
    for stage, ranks, (more, other) in changes:
        folder = tmp_path / f"{stage}-{ranks}"
        first = stopped(ranks, folder, signal.SIGTERM, *options, "engine=deepspeed", f"engine.zero_stage={stage}")
        assert "stopped by signal 15" in first.stderr, first.stderr
        how = [*options, "checkpoint.every_steps=10", f"run.dir={folder}"]
        again = run(more, *how, "engine=deepspeed", f"engine.zero_stage={other}") if more else alone(*how)
        assert again.returncode == 0, again.stderr
        assert "warning: not as before, so the run ends equal to rounding" in again.stdout
        found = torch.cat([one.flatten() for one in weights(folder).values()])
        assert (found - expected).norm() / expected.norm() < 1e-5


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
    assert "resumed after step" in killed.stdout
    assert same(weights(tmp_path / "run"), weights(uninterrupted))
    assert result(tmp_path / "run")["curve"] == result(uninterrupted)["curve"]


def signalled(
    ranks: int, name: str, phase: str, tmp_path: Path, *options: str, first: bool = False, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """The last rank, or the first, gives itself the signal in the first such phase after step 60, once.

    In a save before its third tensor. A SIGSTOP only when the store, which hears of ranks every few seconds, has heard
    of a step.
    """
    given, always, who = [*RUN, *options, f"run.dir={tmp_path / 'run'}"], name == "SIGKILL", 0 if first else ranks - 1
    (tmp_path / "signal_itself.py").write_text(f"""
import os, pathlib, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from alignscale.distributed import Ranks
beat, still, mark = Ranks.beat, Ranks.still, pathlib.Path({str(tmp_path / "given")!r})
def told(self):
    key = f"beat/{{self.rank}}"
    store = self.heart.store
    return {always} or store.check([key]) and b"(step)" in store.get(key)
now = []
def deadly(self, step, phase):
    beat(self, step, phase)
    now[:] = [step, phase]
    if phase != "save":
        die(self)
def counted(self):
    still(self)
    now.append("a tensor")
    if len(now) == 5:
        assert list((pathlib.Path({str(tmp_path / "run")!r}) / "checkpoints").glob(".*.partial")) or self.rank
        die(self)
def die(self):
    if self.rank == {who} and now[1] == {phase!r} and now[0] > 60 and not mark.exists() and told(self):
        mark.touch()
        os.kill(os.getpid(), signal.{name})
Ranks.beat, Ranks.still = deadly, counted
sys.path.insert(0, {str(ROOT / "launch")!r})
sys.argv[0] = {str(ROOT / "launch/train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    command = torchrun(ranks, str(tmp_path / "signal_itself.py"), *given, restarts=restarts)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert (tmp_path / "given").exists()
    return done


def test_the_loss_of_the_first_rank_which_keeps_what_ranks_tell_is_said(tmp_path: Path) -> None:
    done = signalled(3, "SIGKILL", "step", tmp_path, "engine=deepspeed", first=True)
    assert done.returncode != 0
    assert re.search(r"error: rank \d of 3: another rank ended or did not answer \(rank 0 is gone", done.stderr), (
        done.stderr[-3000:]
    )


def test_what_a_script_trains_on_two_ranks_is_what_one_process_trains(tmp_path: Path) -> None:
    """``Learner.fit``, and gradients in fp16 whose norms take moments over ranks of very different errors."""
    (tmp_path / "script.py").write_text(f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
import torch
from alignscale.choices import ConvConfig, DeepSpeedConfig, MLPConfig
from alignscale.distributed import joined
from alignscale.learner import Learner
from alignscale.parallel import Mesh
from alignscale.types import Batch
torch.manual_seed(0)
torch.set_num_threads(1)
images, labels = torch.randn(48, 1, 6, 6), torch.randint(3, (48,))
targets = torch.randn(48, 3) * torch.tensor([1.0] * 24 + [100.0] * 24)[:, None]
with joined(torch.device("cpu"), 60.0) as ranks:
    both = Mesh(ranks, ranks)
    options = MLPConfig(width=32, depth=2), (1, 6, 6), 3
    alone = Learner(*options)
    shared = Learner(*options, engine=DeepSpeedConfig(zero_stage=1), mesh=both)
    for epochs in (2, 1):
        one, two = (made.fit(images, labels, epochs, 20) for made in (alone, shared))
        assert torch.allclose(torch.tensor(one), torch.tensor(two), rtol=1e-5), (one, two)
    assert abs(alone.evaluate(images, labels)["loss"] / shared.evaluate(images, labels)["loss"] - 1) < 1e-5
    for rule in ("backprop", "align_ada", "align_zero"):
        exact = Learner(ConvConfig(width=16, strides=[1, 2]), (1, 6, 6), 3, rule)
        half = Learner(ConvConfig(width=16, strides=[1, 2]), (1, 6, 6), 3, rule, precision="fp16", mesh=both)
        own = ranks.part(48)
        exact.rule(Batch(images, targets, [], 48)).surrogate.backward()
        half.rule(Batch(images[own].half(), targets[own], [], 48)).surrogate.backward()
        for a, b in zip(exact.net.layers, half.net.layers, strict=True):  # a bias before a norm has no gradient
            whole, wanted = ranks.sum(b.weight.grad.clone()), a.weight.grad
            assert (whole - wanted).norm() < 0.03 * wanted.norm(), (rule, (whole - wanted).norm() / wanted.norm())
""")
    done = subprocess.run(
        torchrun(2, str(tmp_path / "script.py")),
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_calibrated_norms_with_partitioned_initial_weights_train_and_a_cache_of_them_is_refused(tmp_path: Path) -> None:
    options = ["net.norm=calibrated", "calibration.examples=100", "frozen.weights=partitioned", "engine=deepspeed"]
    done = run(2, f"run.dir={tmp_path / 'two'}", *options, "epochs=1", "engine.timeout=60")
    assert done.returncode == 0, done.stderr[-3000:]
    one = alone(f"run.dir={tmp_path / 'one'}", *options[:2], "epochs=1")
    assert one.returncode == 0, one.stderr[-3000:]
    losses = [result(tmp_path / name)["test"]["loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    cached = run(
        2,
        f"run.dir={tmp_path / 'cached'}",
        *options,
        "jacobian=gates",
        "jacobian.build=true",
        f"jacobian.root={tmp_path}",
    )
    assert cached.stderr.count("frozen.weights=partitioned: expected stored or regenerated") == 1, cached.stderr[-3000:]


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


@pytest.mark.parametrize(
    ("options", "message", "status"),
    [
        (["optim.lr=1e30"], "the loss is not finite at step", 3),
        (["net.gain=100", "precision=fp16", "engine.zero_stage=2"], "the gradient is not finite at step 1", 3),
        (["net.gain=1e30", "optim=adam"], "in the output of layer 3 of 3 (Linear)", 3),
        (
            ["optim.lr=1e12", "net.norm=batch", "batch_size=40", "accumulation=18"],
            "not finite at step",
            3,
        ),
        (["data.train_limit=9999"], "data.train_limit=9999: expected at most the 1437 training examples", 2),
        (["engine=local"], "engine=local: expected one process, found 2", 2),
        (["precision=fp64"], "precision=fp64: expected fp32, fp16 or bf16", 2),
        (["engine.extra.zero_optimization.overlap_comm=maybe"], "engine.extra: expected settings that DeepSpeed", 2),
        (
            ["engine.extra.foo=1"],
            "engine.extra: foo: expected a setting of DeepSpeed's, found one it never looks for",
            2,
        ),
        (
            ["engine.extra.zero_allow_untested_optimizer=false"],
            "engine.extra: expected settings that DeepSpeed takes",
            2,
        ),
        (["rule.magnitude=3"], "rule=align_ada has no option magnitude", 2),
    ],
)
def test_what_stops_all_ranks_is_said_once(tmp_path: Path, options: list[str], message: str, status: int) -> None:
    done = run(2 + ("accumulation=18" in options), f"run.dir={tmp_path / 'run'}", "engine=deepspeed", *options)
    assert done.returncode != 0
    assert done.stderr.count(message) == 1, done.stderr
    assert f"exitcode  : {status}" in done.stderr


def test_a_full_disk_stops_all_ranks_with_one_message(tmp_path: Path) -> None:
    script = f"""
        mount -t tmpfs -o size=400k none {tmp_path}
        exec {" ".join(torchrun(2, "launch/train.py", *RUN))} run.dir={tmp_path / "run"} \\
            epochs=50 engine=deepspeed checkpoint.keep=9 log.tensorboard=false log.every_steps=1
    """
    done = subprocess.run(
        ["unshare", "-Urm", "bash", "-c", script], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("No space left on device") == 1, done.stderr[-3000:]


def test_ranks_write_a_checkpoint_together_or_say_together_why_not(tmp_path: Path) -> None:
    """Each tensor is a collective, and no rank holds two; a full disk, numbers that are not finite, a failing rank."""
    (tmp_path / "save.py").write_text(f"""
import pathlib, sys, weakref
sys.path.insert(0, {str(ROOT)!r})
import torch
from alignscale import checkpoint
from alignscale.distributed import joined
folder, made, most = pathlib.Path({str(tmp_path)!r}), [], 0
def maker(name, value=1.0, wrong=lambda: None):
    def make():
        global most
        most = max(most, sum(one() is not None for one in made))
        wrong()
        whole = ranks.sum(torch.full((50_000,), value)).clone()  # gloo keeps the other one for a while
        made.append(weakref.ref(whole))
        return whole
    return name, make
with joined(torch.device("cpu"), 60.0) as ranks:
    def save(step, *model):
        tensors = {{"model": dict(model), "optimizer": dict(maker(name) for name in "xyz")}}
        checkpoint.save(folder, step, tensors, {{"progress": {{"best": None}}}}, 2, ranks)
    save(1, *map(maker, "abc"))
    assert most == 0, most
    def full():
        if ranks.first:
            (folder / ".step-000000002.partial/optimizer.safetensors").symlink_to("/dev/full")
    def refuse():
        if ranks.rank == 1:
            raise ValueError("out of memory")
    for step, kind, part in (2, OSError, maker("b", wrong=full)), (3, FloatingPointError, maker("b", torch.inf)):
        try:
            save(step, maker("a"), part, maker("c"))
        except kind as problem:
            print(f"<{{ranks.rank}}: {{problem}}>", flush=True)
    try:
        save(4, maker("a"), maker("b", wrong=refuse))
    except Exception as problem:
        print(f"<{{ranks.rank}}: {{ranks.explained(problem)}}>", flush=True)
        sys.exit(3)
""")
    done = subprocess.run(
        torchrun(2, str(tmp_path / "save.py")), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    said = sorted(re.findall("<([^<>]*)>", done.stdout))
    full = f"[Errno 28] No space left on device: '{tmp_path / 'step-000000002'}'"
    assert [one for one in said if "space" in one] == [f"{rank}: {full}" for rank in (0, 1)], done
    assert len([one for one in said if one.endswith("expected finite numbers, found others in b")]) == 2
    assert [one for one in said if "memory" in one] == [f"{rank}: rank 1: out of memory" for rank in (0, 1)], done
    assert [path.name for path in complete(tmp_path)] == ["step-000000001"]
    assert (load_file(complete(tmp_path)[0] / "optimizer.safetensors")["z"] == 2).all()
    assert not list(tmp_path.glob("*.partial"))


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


def test_bench_step_writes_a_row_for_each_stage_and_rule(tmp_path: Path) -> None:
    options = ["--distributed", "--net", "mlp", "--width", "64", "--depth", "2"]
    options += ["--rules", "align_ada", "--repeats", "2", "--stages", "0,3"]
    done = subprocess.run(
        torchrun(2, "tools/bench_step.py", *options, "--json", str(tmp_path / "rows.json")),
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {(row["zero_stage"], row["rule"]): row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert set(found) == {(stage, rule) for stage in (0, 3) for rule in ("backprop", "align_ada")}
    assert [found[3, rule]["all_gather_psi"] for rule in ("backprop", "align_ada")] == [2.0, 1.0]
    assert {found[3, rule]["reduce_scatter_psi"] for rule in ("backprop", "align_ada")} == {1.0}
    for row in found.values():
        slow, fast = row["projected_seconds"]["1 GB/s"], row["projected_seconds"]["100 GB/s"]
        assert slow > fast > row["compute_seconds"] > 0
        assert row["peak_bytes"] >= 0
    assert done.stdout.count("Psi, the padded bytes") == 1


def test_a_grid_of_runs_trains_on_two_ranks_with_one_report(tmp_path: Path) -> None:
    options = ["net=mlp", "epochs=1", "log.progress=false"]
    options += ["compare.widths=[4,8]", "compare.rules=[backprop,align_ada]"]
    done = subprocess.run(
        torchrun(2, "launch/compare.py", *options, f"compare.folder={tmp_path / 'grid'}"),
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[4/4]") == done.stdout.count("report: ") == 1
    runs = json.loads((tmp_path / "grid/result.json").read_text())["runs"]
    assert [run["ranks"] for run in runs] == [2, 2, 2, 2]
    assert all((tmp_path / "grid" / run["folder"] / "report.html").exists() for run in runs)


def at_step_20(ranks: int, rank: int, what: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A run in which one of the ranks does ``what`` when it is to read its part of the batch of step 20."""
    (folder / "bad.py").write_text(f"""
import os, runpy, signal, sys, time
sys.path[:0] = [{str(ROOT / "launch")!r}, {str(ROOT)!r}]
from alignscale.data.examples import DataError, Encoding
from alignscale.distributed import launched
encoded = Encoding.encoded
def bad(self, split, images, wanted):
    if wanted.step == 20 and launched().rank == {rank}:
        {what}
    return encoded(self, split, images, wanted)
Encoding.encoded = bad
sys.argv[0] = {str(ROOT / "launch/train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    given = [*RUN, f"run.dir={folder / 'run'}", "engine=deepspeed", *options]
    command = torchrun(ranks, str(folder / "bad.py"), *given)
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.parametrize(
    ("rank", "raised", "last"),
    [
        (1, 'DataError("shard-7.tar: key 0042: found text")', "error: rank 1: shard-7.tar: key 0042: found text"),
        (0, 'DataError("shard-7.tar: key 0042: found text")', "error: rank 0: shard-7.tar: key 0042: found text"),
        (1, 'RuntimeError("in a worker process: no memory")', "RuntimeError: rank 1: in a worker process: no memory"),
        (
            2,
            'OSError(5, "Input/output error", "a.tar")',
            "error: a file could not be read or written: [Errno 5] rank 2:",
        ),
    ],
)
def test_an_error_of_one_rank_in_a_step_ends_all_and_is_said_once(
    tmp_path: Path, rank: int, raised: str, last: str
) -> None:
    done = at_step_20(3, rank, f"raise {raised}", tmp_path)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "RuntimeError: "))]
    assert len(said) == 1, done.stderr[-3000:]
    assert said[0].startswith(last)


def test_a_rank_that_waits_for_its_data_is_named_though_it_lives(tmp_path: Path) -> None:
    done = at_step_20(3, 1, "time.sleep(500)", tmp_path, "engine.timeout=15")
    said = re.findall("error: .*", done.stderr)
    assert len(said) == 1, done.stderr[-3000:]
    assert re.search(r"\(behind the others: rank 1 at step \d+ \(step\)\)", said[0]), said


@pytest.mark.timeout(600)
def test_a_cache_that_ranks_make_trains_ranks_to_the_live_result(tmp_path: Path) -> None:
    cached = ["rule=align_zero", "net.norm=none", "data.views=3", "data.shift=1", f"jacobian.root={tmp_path}/jacobian"]
    live = alone(*cached, f"run.dir={tmp_path}/live")
    assert live.returncode == 0, live.stderr
    for form in ("gates", "explicit"):
        words = [word for word in RUN if not word.startswith(("run.", "log."))]
        made = subprocess.run(
            torchrun(2, "tools/cache_jacobian.py", *words, *cached, f"jacobian={form}"),
            cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr[-3000:]
        assert "3 files to make" in made.stdout
        done = subprocess.run(
            torchrun(2, "launch/train.py", *RUN, *cached, f"jacobian={form}", f"run.dir={tmp_path}/{form}"),
            cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        one, other = result(tmp_path / form), result(tmp_path / "live")
        assert one["test"]["loss"] == pytest.approx(other["test"]["loss"], rel=1e-4)
