"""Claims about training on several ranks: real processes of torchrun, gloo and DeepSpeed."""

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import RULE_NAMES, SUMS
from distributed_cases import beyond
from launches import ROOT, RUN, alone, finished, result, run, stopped, torchrun
from run_cases import weights
from warm import PYTHON

from alignscale.choices import ConfigError, DeepSpeedConfig
from tools import evaluate as tool

pytestmark = pytest.mark.distributed


STAGES = [f"zero{stage}" for stage in range(4)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """The rows of tests/distributed_cases.py for a number of ranks, made once."""
    found: dict[tuple[int, tuple[str, ...]], list[dict[str, Any]]] = {}
    folder = tmp_path_factory.mktemp("rows")

    def of(ranks: int, *options: str) -> list[dict[str, Any]]:
        if (ranks, options) not in found:
            path = folder / f"{ranks}.json"
            done = finished(torchrun(ranks, "tests/distributed_cases.py", str(path), *options), 3000)
            assert done.returncode == 0, done.stderr[-5000:]
            found[ranks, options] = json.loads(path.read_text())
        return found[ranks, options]

    return of


def check_equal(found: list[dict[str, Any]]) -> None:
    assert [(row["case"], off) for row in found if (off := beyond(row))] == []
    again = [row["before"] for row in found if "before" in row]
    assert len(again) <= 1 + len(found) // 50, again
    assert [(row["case"], off) for row in again if (off := beyond(row, 30))] == []  # a flip moves them no further


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rule_net_and_stage_trains_to_the_local_engines_result(ranks: int, rows: Callable[..., Any]) -> None:
    found = rows(ranks)
    words = {word for row in found for word in row["case"].split("-")}
    assert {"mlp", "conv3", "conv7", "rnn", "none", "batch", "calibrated", *RULE_NAMES, *STAGES} <= words
    assert {"adam", "decay", "clip", "adamw", "partitioned", "regenerated", "offload", "bf16", "fp16", "few"} <= words
    check_equal(found)
    for row in found:  # a checkpoint's weights are fp32, whatever the layers read
        assert row["exact"], row
        assert not row["rounded"], row


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_whole_table_trains_to_the_local_engines_result(ranks: int, rows: Callable[..., Any]) -> None:
    found = rows(ranks, "--all")
    assert len(found) == 5 * 3 * len(RULE_NAMES) * len(STAGES)
    check_equal(found)


def summed(case: str) -> float:
    """Bytes of a case's gradients in Psi."""
    return SUMS.get(case.split("parts1-")[-1], 4) / 4


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [2, 4])
def test_align_needs_the_current_weights_once_and_backprop_twice(ranks: int, rows: Callable[..., Any]) -> None:
    found = {row["case"]: row for row in rows(ranks) if row["case"].startswith("wide") and "zero3" in row["case"]}
    assert len(found) == 20 + 2 * len(SUMS)
    for case, row in found.items():
        gathered = sum(count for name, count in row["bytes"].items() if name.startswith("all_gather")) / row["psi"]
        scattered = sum(count for name, count in row["bytes"].items() if name.startswith("reduce_scatter")) / row["psi"]
        half = case.endswith(("fp16", "bf16"))
        assert scattered == pytest.approx(summed(case), rel=0.01), case
        assert sum(row["bytes"].values()) / row["psi"] - gathered - scattered < 0.01, case  # by no other way
        assert row["copies"] == 0, case  # what a step would keep of weights that ZeRO 3 has released
        if "partitioned" not in case or "feedback" in case or "backprop" in case:
            narrow = 0.5 if half else 1  # weights go as layers compute
            assert gathered == pytest.approx(narrow * (2 if "backprop" in case else 1), rel=0.01), case
    for rule, initial in (("align_prop", 0.8), ("align_ada", 1.8), ("align_zero", 1.8)):  # and the current weights once
        row = found[f"wide-none-{rule}-zero3-sgd-parts1-partitioned"]
        assert row["bytes"]["all_gather_into_tensor"] / row["psi"] == pytest.approx(1 + initial, abs=0.1), rule


@pytest.mark.timeout(1200)
def test_in_half_precision_weights_are_gathered_in_it_and_gradients_summed_in_what_they_are_told_to_be(
    rows: Callable[..., Any],
) -> None:
    wide = [row for row in rows(2) if row["case"].startswith("wide-none-backprop") and "zero3" not in row["case"]]
    assert len(wide) == 3 * len(SUMS)
    for row in wide:  # whole gradients at each of these stages, on gloo
        assert row["bytes"]["all_reduce"] / row["psi"] == pytest.approx(summed(row["case"]), rel=0.01), row
        gathered = 0 if "zero0" in row["case"] else 0.5  # weights too, after the update
        assert row["bytes"].get("all_gather_into_tensor", 0) / row["psi"] == pytest.approx(gathered, abs=0.01), row


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
    for stage in range(4):
        assert deepspeed_config(DeepSpeedConfig(zero_stage=stage), 0.0) == {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": stage},
        }
    for given, dtype, found in (
        ("auto", torch.bfloat16, "bf16"), ("bf16", torch.float16, "bf16"), ("bf16", torch.float32, "bf16"),
        ("auto", torch.float16, None), ("auto", torch.float32, None), ("fp32", torch.bfloat16, None),
    ):  # fmt: skip
        options = DeepSpeedConfig(reduce_dtype=given)
        assert deepspeed_config(options, 0.0, dtype).get("communication_data_type") == found
    with pytest.raises(ConfigError, match=r"communication_data_type: expected engine\.reduce_dtype, the option that"):
        deepspeed_config(DeepSpeedConfig(extra={"communication_data_type": "fp16"}), 0.0)
    with pytest.raises(ConfigError, match=r"engine\.extra: bf16: expected precision, the option that decides it"):
        deepspeed_config(DeepSpeedConfig(extra={"bf16": {"enabled": True}}), 0.0)
    with pytest.raises(ConfigError, match=r"gradient_allreduce_op: expected settings that leave a step's numbers"):
        deepspeed_config(DeepSpeedConfig(extra={"gradient_allreduce_op": "sum"}), 0.0)
    for inside, message in (
        ({"stage": 2}, "zero_optimization.stage: expected engine.zero_stage"),
        ({"zenflow": {}}, "zero_optimization.zenflow: expected settings that leave a step's numbers as they are"),
        ({"round_robin_gradients": True}, "zero_optimization.round_robin_gradients: expected false"),
        ({"cpu_offload": True}, "zero_optimization.cpu_offload: expected engine.offload"),
        ({"offload_optimizer": {"device": "none"}}, "offload_optimizer.device: expected engine.offload"),
        ({"compute_grad_norm": False}, "zero_optimization.compute_grad_norm: expected settings that leave a step's"),
        (5, "zero_optimization: expected settings by name, found 5"),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"engine.extra: {message}")):
            deepspeed_config(DeepSpeedConfig(extra={"zero_optimization": inside}), 0.0)


def test_another_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from alignscale import engine_zero

    monkeypatch.setattr(engine_zero.deepspeed, "__version__", "0.20.0")
    with pytest.raises(ConfigError, match=r"expected DeepSpeed 0\.19\.8, found 0\.20\.0; pip install"):
        engine_zero.make_ready("cpu")
    monkeypatch.undo()
    script = """
import sys, deepspeed
deepspeed.__version__ = "0.16.4"
sys.modules["deepspeed.runtime.torch_autocast"] = None  # which an older one has not
from alignscale import engine_zero
engine_zero.make_ready("cpu")
"""
    older = finished([PYTHON, "-c", script])
    assert "expected DeepSpeed 0.19.8, found 0.16.4; pip install deepspeed==0.19.8" in older.stderr


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
    for mine, other in zip(*(map(json.loads, one) for one in lines), strict=True):  # each written once
        assert mine.keys() == other.keys()
        if mine["kind"] == "train":  # the others' numbers were compared above
            own = {
                **other,
                "examples_per_second": mine["examples_per_second"],
                "loss": pytest.approx(other["loss"], rel=1e-5),
            }
            assert mine == own
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    assert tool.scores(tmp_path / "two", "last", ["test"], None)[0]["accuracy"] == ours["test"]["accuracy"]


def test_logits_at_each_step_of_a_sequence_train_on_ranks_as_in_one_process(tmp_path: Path) -> None:
    options = ["data=add", "net=rnn", "net.readout=every", "net.width=16", "optim.lr=0.002", "epochs=2"]
    two = [*options, "engine=deepspeed", "engine.zero_stage=3", f"run.dir={tmp_path / 'two'}"]
    for command in (
        torchrun(2, "launch/train.py", *two),
        [PYTHON, "launch/train.py", *options, f"run.dir={tmp_path}/one"],
    ):
        done = finished(command)
        assert done.returncode == 0, done.stderr
    ours, theirs = (result(tmp_path / name)["test"]["loss"] for name in ("two", "one"))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_resume_with_the_optimizer_elsewhere_is_said_not_to_be_to_the_bit(tmp_path: Path) -> None:
    options = [f"run.dir={tmp_path}", "epochs=1", "engine=deepspeed"]
    said = []
    for more in ([], [], ["engine.offload=true"], ["engine.extra={zero_optimization:{overlap_comm:false}}"]):
        (tmp_path / "result.json").unlink(missing_ok=True)
        done = alone(*options, *more)
        assert done.returncode == 0, done.stderr
        said.append(re.findall("not as before, .* to the bit: (.*)", done.stdout))
    assert [len(found) for found in said] == [0, 0, 1, 1]
    assert "offload" in said[2][0]
    assert "overlap_comm" in said[3][0]


CHANGES = {
    "sgd": ((3, 3, (2, 0)), (0, 2, (4, 3)), (2, 2, (3, 1)), (1, 2, (0, 0)), (0, 0, (2, 3))),
    "adam": ((3, 3, (2, 2)), (1, 2, (3, 0))),
    "half": ((1, 2, (3, 3)), (3, 2, (0, 0))),
}
"""Stage and ranks (0: one process without DeepSpeed), and after them ranks and stage."""


@pytest.mark.parametrize("optim", CHANGES)
def test_other_ranks_another_stage_and_no_deepspeed_at_all_go_on_from_a_checkpoint(tmp_path: Path, optim: str) -> None:
    options = ["epochs=3", "schedule=cosine", "optim.weight_decay=0.01", "optim.decay_towards=initial"]
    options += ["optim=adam", "optim.lr=0.003"] if optim != "sgd" else []
    options += ["precision=bf16"] if optim == "half" else []  # whose weights would be 2e-3 away if they were rounded
    whole = alone(*options, f"run.dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    expected = torch.cat([one.flatten() for one in weights(tmp_path / "whole").values()])
    for stage, ranks, (more, other) in CHANGES[optim]:
        folder = tmp_path / f"{stage}-{ranks}"
        engine = ["engine=deepspeed", f"engine.zero_stage={stage}"] if ranks else ["threads=1"]
        first = stopped(ranks, folder, signal.SIGTERM, *options, *engine)
        assert "stopped by signal 15" in first.stderr, first.stderr
        how = [*options, "checkpoint.every_steps=10", f"run.dir={folder}"]
        again = run(more, *how, "engine=deepspeed", f"engine.zero_stage={other}") if more else alone(*how)
        assert again.returncode == 0, again.stderr
        assert "warning: not as before, so the run ends equal to rounding" in again.stdout
        found = torch.cat([one.flatten() for one in weights(folder).values()])
        assert (found - expected).norm() / expected.norm() < (1e-5 if optim == "sgd" else 1e-4)


def test_live_alignment_is_of_the_fp32_weights_where_layers_have_them_rounded(tmp_path: Path) -> None:
    """ZeRO 0 has none rounded; the change of weights here is a fifth of what rounding them would be."""
    options = ["epochs=1", "optim.lr=0.01", "optim.momentum=0", "net.width=256", "precision=bf16"]
    options += ["analysis.track_errors=true", "log.alignment_every=10", "engine=deepspeed"]
    found = []
    for stage in (0, 1):
        done = run(2, *options, f"engine.zero_stage={stage}", f"run.dir={tmp_path / str(stage)}")
        assert done.returncode == 0, done.stderr
        rows = map(json.loads, (tmp_path / str(stage) / "metrics.jsonl").read_text().splitlines())
        found.append([(row["alignment"], row["weight_change"]) for row in rows if row.get("alignment") is not None])
    assert 0 < found[0][-1][1] < 1e-3
    for (score, change), (rounded_score, rounded_change) in zip(*found, strict=True):
        assert rounded_score == pytest.approx(score, rel=1e-3)
        assert rounded_change == pytest.approx(change, rel=1e-3)


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
    done = finished(torchrun(2, str(tmp_path / "script.py")))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_a_step_that_is_left_out_leaves_nothing_and_a_checkpoint_is_the_same_to_the_bit(
    tmp_path: Path, precision: str
) -> None:
    """On 3 ranks, at each stage: a loss and a gradient that are not finite, parts, offload, buffers of each kind."""
    (tmp_path / "script.py").write_text(f"""
import itertools, math, sys
sys.path[:0] = [{str(ROOT)!r}]
import pytest, torch
from alignscale.choices import AdamConfig, DeepSpeedConfig, MLPConfig, SGDConfig
from alignscale.distributed import joined
from alignscale.learner import Learner
from alignscale.parallel import Mesh
from alignscale.types import Batch
torch.set_num_threads(1)
images, targets = torch.randn(36, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.eye(3).repeat(12, 1)
images = images.to(torch.{ {"fp32": "float32", "bf16": "bfloat16"}[precision] })
def state(made):
    return {{part: {{name: one.make(0).clone() for name, one in named.items()}}
            for part, named in made.engine.state().items()}}
def same(one, other):
    return all(torch.equal(value, other[part][name]) for part in one for name, value in one[part].items())
with joined(torch.device("cpu"), 120.0) as ranks:
    def parts(count, factor=1.0):
        found = []
        for part in range(count):
            rows = torch.arange(part, 36, count)
            rows = rows[ranks.part(len(rows))]
            found.append(Batch(images[rows] * (factor if part == count - 1 else 1.0), targets[rows], [], 36))
        return found
    def infinite(a, delta, factor=1.0):
        gradient, bias = weight_gradient(a, delta, factor)
        return gradient * (torch.inf if ranks.rank == 1 else 1.0), bias
    apart = {{"zero_optimization": {{"contiguous_gradients": False}}}}
    twice = {{"zero_optimization": {{"zero_hpz_partition_size": ranks.size}}}}  # last: its group stays
    optims, begun = {{1: SGDConfig(momentum=0.9), 2: AdamConfig()}}, {{}}
    for extra, stage, offload, count in itertools.product(({{}}, apart, twice), range(4), (False, True), (1, 2)):
        if (offload and stage == 0) or (extra and (offload or stage not in ((1, 2) if extra is apart else (3,)))):
            continue
        case, optim = (stage, offload, count, extra), optims[count]
        def learner():
            engine = DeepSpeedConfig(zero_stage=stage, offload=offload, extra=extra)
            options = {{"engine": engine, "mesh": Mesh(ranks, ranks), "precision": {precision!r}}}
            return Learner(MLPConfig(width=16, depth=2), (1, 4, 4), 3, "align_ada", optim, **options)
        made, other = learner(), learner()
        for one in (made, other):
            one.update(parts(count), 0.1)
        biases = [one for name, one in state(made)["model"].items() if "bias" in name]  # what was added to 0
        for one, first in zip(biases, begun.setdefault(count, biases), strict=True):  # of stage 0
            assert (one - first).norm() < 0.02 * first.norm(), case
        assert not math.isfinite(made.update(parts(count, factor=torch.inf), 0.1)[0])
        assert same(state(made), state(other)), (case, "loss")
        weight_gradient = made.net.layers[1].weight_gradient
        made.net.layers[1].weight_gradient = infinite
        if stage:  # ZeRO 0 leaves no step out
            with pytest.raises(FloatingPointError, match="the gradient is not finite"):
                made.update(parts(count), 0.1)
            assert same(state(made), state(other)), (case, "gradient")
        del made.net.layers[1].weight_gradient
        for often in (count, 3 - count, count):
            for one in (made, other):
                one.update(parts(often), 0.1)
            assert same(state(made), state(other)), (case, "after", often)
        saved, again = state(made), learner()
        again.engine.load(saved if ranks.first else {{"model": {{}}, "optimizer": {{}}}})
        assert same(state(again), saved), (case, "loaded")
        scores = [one.evaluate(images, targets.argmax(1)) for one in (made, again)]
        assert scores[0] == scores[1], (case, "layers read what was loaded")
        for one in (made, again):
            one.update(parts(count), 0.1)
        assert same(state(made), state(again)), (case, "went on")
        assert not same(state(made), saved), case
        nothing = {{"model": {{}}, "optimizer": {{}}}}
        lacking = {{**saved, "model": {{name: one for name, one in saved["model"].items() if "layers.1." not in name}}}}
        with pytest.raises(ValueError, match="found none of layers.1.bias, layers.1.weight"):
            again.engine.load(lacking if ranks.first else nothing)
        again.engine.load({{**saved, "optimizer": {{}}}} if ranks.first else nothing)  # as before a first step
        assert not any(one.any() for one in state(again)["optimizer"].values()), case
        again.engine.load(state(made) if ranks.first else (state(made), nothing)[1])
        def broken_off(*_):
            raise KeyboardInterrupt
        made.net.layers[0].weight_gradient = broken_off
        with pytest.raises(KeyboardInterrupt):
            made.update(parts(count), 0.1)
        del made.net.layers[0].weight_gradient
        if stage:
            with pytest.raises(RuntimeError, match="a backward pass that has ended, found one that was broken off"):
                made.update(parts(count), 0.1)
        else:
            made.update(parts(count), 0.1)
            again.update(parts(count), 0.1)
            assert same(state(made), state(again))
""")
    done = finished(torchrun(3, str(tmp_path / "script.py")), 500)
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


def test_bench_step_writes_a_row_for_each_stage_and_rule(tmp_path: Path) -> None:
    options = ["--distributed", "--net", "mlp", "--width", "1024", "--depth", "2"]
    options += ["--rules", "align_ada", "--repeats", "2", "--stages", "0,3"]
    done = finished(torchrun(2, "tools/bench_step.py", *options, "--json", str(tmp_path / "rows.json")))
    assert done.returncode == 0, done.stderr
    found = {(row["zero_stage"], row["rule"]): row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert set(found) == {(stage, rule) for stage in (0, 3) for rule in ("backprop", "align_ada")}
    assert [found[3, rule]["all_gather_psi"] for rule in ("backprop", "align_ada")] == [2.0, 1.0]
    assert {found[3, rule]["reduce_scatter_psi"] for rule in ("backprop", "align_ada")} == {1.0}
    for row in found.values():
        slow, fast = row["projected_seconds"]["1 GB/s"], row["projected_seconds"]["100 GB/s"]
        assert slow > fast > row["compute_seconds"] > 0
        assert row["peak_bytes"] > row["calculated_bytes"] > row["psi_bytes"]
        assert row["plain_peak_bytes"] > row["psi_bytes"]
    assert done.stdout.count("Psi, the padded bytes") == 1


def test_bench_save_times_the_first_rank_alone_and_all(tmp_path: Path) -> None:
    options = ["--width", "1024", "--depth", "2", "--repeats", "1", "--folder"]
    done = finished(torchrun(2, "tools/bench_save.py", *options, str(tmp_path)))
    assert re.search(r"^22 MB, 2 of 2 ranks, ZeRO 3: the first alone [\d.]+ s, all [\d.]+ s", done.stdout, re.M), done
    assert not list(tmp_path.iterdir())
    refused = finished([PYTHON, "tools/bench_save.py", *options, str(tmp_path / "none")])
    assert refused.returncode == 2
    assert "error: [Errno 2] No such file or directory" in refused.stderr


def test_bench_step_measures_half_precision_and_refuses_what_has_no_effect(tmp_path: Path) -> None:
    options = ["--distributed", "--device", "cpu", "--net", "mlp", "--width", "64", "--depth", "2"]
    options += ["--precision", "bf16"]
    measured = [*options, "--rules", "align_ada", "--repeats", "2", "--stages", "3"]
    measured += ["--json", str(tmp_path / "rows.json")]
    done = finished(torchrun(2, "tools/bench_step.py", *measured))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["precision"], row["all_gather_psi"], row["reduce_scatter_psi"]) for row in found] == [
        ("bf16", 1.0, 0.5), ("bf16", 0.5, 0.5),
    ]  # fmt: skip
    refused = finished([PYTHON, "tools/bench_step.py", *options, "--parallel-width", "2"])
    assert refused.returncode == 2
    assert "--precision: has no effect with --distributed; leave it out" in refused.stderr


def test_a_grid_of_runs_trains_on_two_ranks_with_one_report(tmp_path: Path) -> None:
    options = ["net=mlp", "epochs=1", "log.progress=false"]
    options += ["compare.widths=[4,8]", "compare.rules=[backprop,align_ada]"]
    done = finished(torchrun(2, "launch/compare.py", *options, f"compare.folder={tmp_path / 'grid'}"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[4/4]") == done.stdout.count("report: ") == 1
    runs = json.loads((tmp_path / "grid/result.json").read_text())["runs"]
    assert [run["ranks"] for run in runs] == [2, 2, 2, 2]
    assert all((tmp_path / "grid" / run["folder"] / "report.html").exists() for run in runs)


@pytest.mark.timeout(600)
def test_a_cache_that_ranks_make_trains_ranks_to_the_live_result(tmp_path: Path) -> None:
    cached = ["rule=align_zero", "net.norm=none", "data.views=3", "data.shift=1", f"jacobian.root={tmp_path}/jacobian"]
    live = alone(*cached, f"run.dir={tmp_path}/live")
    assert live.returncode == 0, live.stderr
    for form in ("gates", "explicit"):
        words = [word for word in RUN if not word.startswith(("run.", "log."))]
        made = finished(torchrun(2, "tools/cache_jacobian.py", *words, *cached, f"jacobian={form}"))
        assert made.returncode == 0, made.stderr[-3000:]
        assert "3 files to make" in made.stdout
        done = finished(torchrun(2, "launch/train.py", *RUN, *cached, f"jacobian={form}", f"run.dir={tmp_path}/{form}"))
        assert done.returncode == 0, done.stderr[-3000:]
        one, other = result(tmp_path / form), result(tmp_path / "live")
        assert one["test"]["loss"] == pytest.approx(other["test"]["loss"], rel=1e-4)
