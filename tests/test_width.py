"""Claims about sharing a network's width out over ranks: real processes of torchrun, gloo and DeepSpeed."""

import json
import math
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import alignment
import pytest
import torch
from cases import RULE_NAMES
from launches import ENVIRONMENT, ROOT, alone, result, run, stopped, torchrun
from mesh_costs import flop, memory, seconds
from run_cases import same, weights
from safetensors.torch import load_file
from test_distributed import STAGES, check_equal

from alignscale.choices import ConfigError, ConvConfig, DeepSpeedConfig, EngineConfig, MLPConfig, RuleConfig, SGDConfig
from alignscale.choices_data import DigitsConfig
from alignscale.config import TrainConfig
from alignscale.jacobian.form import Form
from alignscale.jacobian.plan import Costs, Machine, Planner
from alignscale.nets import build
from alignscale.parallel import check_mesh
from alignscale.traffic import Plan, exchanges, plan_of, wires
from tools import evaluate as tool
from tools import show_checkpoint

pytestmark = pytest.mark.distributed
DEEP = ["engine=deepspeed", "net.width=33", "net.depth=3"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], list[dict[str, Any]]]:
    """The rows of tests/width_cases.py for a number of ranks, made once."""
    found: dict[Any, list[dict[str, Any]]] = {}
    folder = tmp_path_factory.mktemp("rows")

    def of(ranks: int, widths: str, *options: str) -> list[dict[str, Any]]:
        if (ranks, options) not in found:
            path = folder / f"{ranks}.json"
            done = subprocess.run(
                torchrun(ranks, "tests/width_cases.py", str(path), widths, *options),
                cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False,
                timeout=7000 if options else 1100,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-5000:]
            found[ranks, options] = json.loads(path.read_text())
        return found[ranks, options]

    return of


MESHES = pytest.mark.parametrize(("ranks", "widths"), [(2, "2"), (4, "2,4")])


@pytest.mark.timeout(1200)
@MESHES
def test_every_rule_net_and_stage_trains_to_the_unsharded_result(ranks: int, widths: str, rows: Any) -> None:
    trained = [row for row in rows(ranks, widths) if "loss" in row]
    for width in map(int, widths.split(",")):
        words = {word for row in trained if row["width"] == width for word in row["case"].split("-")}
        assert {"mlp", "conv3", "conv7", "rnn", "none", "batch", "calibrated", *RULE_NAMES, *STAGES} <= words
    check_trained(trained)


def check_trained(found: list[dict[str, Any]]) -> None:
    check_equal(found)
    assert all(row["start"] for row in found), "a rank's initial rows have other bits than the whole network's"
    assert all(row["copies"] for row in found), "of the readout's bias other copies than the first rank's count"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_whole_table_trains_to_the_unsharded_result(rows: Any) -> None:
    check_trained(rows(4, "2,4", "--all"))


@pytest.mark.timeout(1200)
@MESHES
def test_the_collectives_of_a_step_are_those_of_the_traffic_table(ranks: int, widths: str, rows: Any) -> None:
    found = [row for row in rows(ranks, widths) if "found" in row]
    assert found
    for row in found:
        assert row["weights"] < 1e-6, row
        if row["stage"] == 0:  # DeepSpeed adds a norm of gradients to it at others
            assert row["found"]["width"] == row["expected"]["width"], row
        if row["stage"] == 3 and row["ranks"] > row["width"]:
            for call in ("all_gather", "reduce_scatter"):  # the gradients' norm is summed besides
                assert row["found"]["data"][call][1] == row["expected"]["data"][call][1], row


@pytest.mark.timeout(1200)
@MESHES
def test_a_layer_exchanges_activations_as_often_as_its_rule_needs(ranks: int, widths: str, rows: Any) -> None:
    times = {("backprop", "live"): 2, ("align_ada", "live"): 3, ("align_ada", "gates"): 2, ("align_ada", "explicit"): 1}
    times |= {("align_zero", "explicit"): 1}
    for row in rows(ranks, widths):
        if "found" in row and row["net"] != "rnn" and (row["rule"], row["form"]) in times:
            calls = row["found"]["width"]
            between = row["layers"] - 2  # hidden layers that read a hidden layer
            exchanges = between * times[row["rule"], row["form"]] * row["turns"]
            assert calls["all_gather"][0] + calls["reduce_scatter"][0] == exchanges, row
            if row["form"] == "explicit":
                assert calls["reduce_scatter"] == [0, 0]


def test_a_sharded_run_is_the_unsharded_one_and_goes_on_at_another_width(tmp_path: Path) -> None:
    whole = alone(f"run.dir={tmp_path / 'whole'}", "epochs=2", "net.norm=calibrated", *DEEP[1:])
    assert whole.returncode == 0, whole.stderr

    for number, (ranks, extra) in enumerate([(2, ["parallel.overlap=true"]), (4, ["engine.zero_stage=3"])]):
        one = tmp_path / str(number)
        done = run(ranks, "epochs=2", "net.norm=calibrated", *DEEP, "parallel.width=2", *extra, f"run.dir={one}")
        assert done.returncode == 0, done.stderr
        assert f"{ranks} ranks, ZeRO" in done.stdout
        assert "width over 2 of them" in done.stdout
        ours, theirs = weights(one), weights(tmp_path / "whole")
        assert max((ours[name] - theirs[name]).norm() / theirs[name].norm() for name in ours) < 1e-5
        assert result(one)["test"]["accuracy"] == result(tmp_path / "whole")["test"]["accuracy"]
        assert result(one)["curve"][-1]["update_cosine"] == pytest.approx(
            result(tmp_path / "whole")["curve"][-1]["update_cosine"], abs=1e-5
        )


def test_a_sharded_checkpoint_is_whole_for_other_widths_the_local_engine_and_tools(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, options = tmp_path / "run", [*DEEP, "net.norm=calibrated", "schedule=cosine"]
    first = stopped(4, folder, signal.SIGTERM, *options, "epochs=6", "parallel.width=4")
    assert "stopped by signal 15" in first.stderr, first.stderr
    exported = tmp_path / "weights.safetensors"
    assert show_checkpoint.main([str(folder), "--export", str(exported)]) == 0
    assert "width_ranks 4" in capsys.readouterr().out
    assert same(load_file(exported), weights(folder))
    assert load_file(exported)["layers.1.weight"].shape == (33, 33)
    assert tool.scores(folder, "last", ["test"], None)[0]["accuracy"] > 0
    again = run(2, *options, "epochs=6", "parallel.width=2", "checkpoint.every_steps=10", f"run.dir={folder}")
    assert "resumed after step" in again.stdout, again.stderr
    whole = alone(*options[1:], "epochs=6", f"run.dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    ours, theirs = (
        torch.cat([one.flatten() for one in weights(tmp_path / name).values()]) for name in ("run", "whole")
    )
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("rule", ["rule=align_ada", "rule=align_zero"])
def test_each_rank_caches_its_own_units_and_trains_to_the_unsharded_result(tmp_path: Path, rule: str) -> None:
    options = [rule, "jacobian=explicit", "jacobian.build=true", "epochs=1", "data.train_limit=300"]
    whole = alone(*options, *DEEP[1:], f"run.dir={tmp_path / 'whole'}", f"jacobian.dir={tmp_path / 'one'}")
    assert whole.returncode == 0, whole.stderr
    cache = tmp_path / "two"
    shared = [*options, *DEEP, "parallel.width=2", f"jacobian.dir={cache}"]
    done = run(2, *shared, f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert max((ours[name] - theirs[name]).norm() / theirs[name].norm() for name in ours) < 1e-5
    (one,) = (tmp_path / "one").glob("*.safetensors")
    parts = [load_file(cache / f"width-{rank}-of-2" / one.name) for rank in range(2)]
    joined = torch.cat([part["jacobian.1"] for part in parts], 2)
    assert [part["jacobian.1"].shape[2] for part in parts] == [16, 17]
    assert torch.allclose(joined, load_file(one)["jacobian.1"], atol=1e-6)
    (cache / "width-1-of-2" / one.name).unlink()
    refused = run(2, *[option for option in shared if "build" not in option], f"run.dir={tmp_path / 'again'}")
    assert refused.stderr.count("width-1-of-2: lacks 1 of 1 files") == 1, refused.stderr


@pytest.mark.parametrize(
    ("ranks", "width", "units", "message"),
    [
        (4, 3, 64, r"parallel\.width=3: expected one of 1, 2, 4, found 4 ranks"),
        (6, 6, 4, r"parallel\.width=6: expected one of 1, 2, 3, found net\.width=4, as each rank has a row"),
        (1, 2, 64, r"parallel\.width=2: expected one of 1, found 1 ranks; start as many ranks as it divides"),
    ],
)
def test_a_mesh_that_there_cannot_be_is_refused_with_the_valid_ones(
    ranks: int, width: int, units: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_mesh(ranks, width, units)
    check_mesh(ranks, 1, units)


def test_alignment_is_scored_alike_from_the_checkpoints_of_any_engine(tmp_path: Path) -> None:
    """One process, ZeRO 3 on two ranks, and two ranks of width by two of data: the same training, the same scores."""
    given = ["epochs=3", "optim.momentum=0", "net.norm=none"]
    tracked, deep = "analysis.track_errors=true", "engine=deepspeed"
    done = [
        alone(*given, tracked, f"run.dir={tmp_path / 'alone'}"),
        run(2, *given, tracked, deep, "engine.zero_stage=3", f"run.dir={tmp_path / 'zero'}"),
        run(4, *given, deep, "engine.zero_stage=1", "parallel.width=2", f"run.dir={tmp_path / 'width'}"),
    ]
    assert not any(one.returncode for one in done), [one.stderr[-2000:] for one in done]
    expected = alignment.analyse(tmp_path / "alone", "last", replay=True, sample=50)["layers"]
    for name, score in (("zero", "definition"), ("width", "frozen_network")):  # whose ranks sum no errors
        found = alignment.analyse(tmp_path / name, "last", replay=name == "width", sample=50)["layers"]
        for ours, theirs in zip(found, expected, strict=True):
            assert 0 < theirs[score] <= 1
            for key in (score, "update_cosine", "weight_change"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (name, key)


def test_the_cost_model_counts_what_ranks_tell_each_other(tmp_path: Path) -> None:
    words = ["net=mlp", "net.width=64", "parallel.width=2", "engine=deepspeed", "jacobian=auto", "threads=1"]
    done = subprocess.run(
        torchrun(2, "tools/cache_jacobian.py", "--plan", *words, f"jacobian.dir={tmp_path / 'cache'}"),
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"disk \S+ \(writing \S+\), network [\d.]+ a rank", done.stdout), done.stdout
    plan = Plan(MLPConfig(width=64, depth=2), (1, 8, 8), 10, 50, "align_ada", width=2)
    told = wires(plan)
    assert told["live"] > told["backprop"] == told["gates"] > told["explicit"] > 0
    machine = Machine(1e10, 1e9, 1e9, 1e10, network=1e3)
    net = build(plan.net, plan.shape, plan.classes)
    layers = len(net.layers)
    costs = Costs((1.0,) * layers, (1.0,) * layers, (1.0,) * layers, 1.0, 0.0, 1.0)
    inputs = [(64,)] * layers
    apart, alone_ = (
        Planner(net, inputs, 10, 50, replace(machine, network=speed), costs, 4, False, told)
        for speed in (1e3, math.inf)
    )
    for name, form in (("live", None), *((kind, Form((kind,) * 2, "fp32", None)) for kind in ("gates", "explicit"))):
        assert apart.step(form, "host") - alone_.step(form, "host") == pytest.approx(told[name] / 1e3)
    assert apart.best(Form(("gates",) * 2, "fp32", None, True), "host", math.inf, 10).gathered
    assert apart.backprop - alone_.backprop == pytest.approx(told["backprop"] / 1e3)


def test_a_bad_mesh_ends_a_run_with_one_line_and_nothing_written(tmp_path: Path) -> None:
    done = run(2, f"run.dir={tmp_path / 'run'}", "parallel.width=3")
    assert done.stderr.count("error: parallel.width=3: expected one of 1, 2, found 2 ranks") == 1
    assert not (tmp_path / "run").exists()
    for option, found in (("net.norm=batch", "2, batch and 1"), ("engine.zero_stage=3", "2, none and 3")):
        options = ["parallel.width=2", "parallel.overlap=true", "engine=deepspeed", option]
        done = run(2, f"run.dir={tmp_path / 'run'}", *options)
        assert done.stderr.count("error: parallel.overlap=true: expected parallel.width above 1, ") == 1, done.stderr
        assert f"found {found}; leave it false" in done.stderr
    options = ["net=rnn", "net.initial_state=trained", "parallel.width=2", "evaluation.batch_size=30"]
    trained = subprocess.run(
        torchrun(2, "launch/train.py", *options, f"run.dir={tmp_path / 'run'}"),
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert "net.initial_state=trained: expected one process, found 2 ranks" in trained.stderr


def test_the_formulas_give_numbers_worked_out_by_hand() -> None:
    """An MLP of 3 hidden layers of 8 units on 4 numbers, 2 classes, a batch of 6, on 2 x 3 ranks."""
    plan = Plan(MLPConfig(width=8, depth=3), (1, 2, 2), 2, 6, "align_ada", 2, 3, 3)
    width = [(one.layer, one.what, one.messages, one.bytes) for one in exchanges(plan) if one.over == "width"]
    assert width == [
        (1, "activations", 2, 2 * 2 * 8 * 4), (1, "signals", 1, 2 * 8 * 4),
        (2, "activations", 2, 2 * 2 * 8 * 4), (2, "signals", 1, 2 * 8 * 4),
        (3, "logits", 2, 2 * 2 * 2 * 4),
    ]  # fmt: skip
    weights = 4 * 4 + 4 * 8 + 4 * 8 + 2 * 4
    assert flop(plan) == 4 * 2 * 2 * weights  # four passes, two examples
    assert memory(plan)["weights"] == -(-4 * (weights + 4 + 4 + 4 + 2) // 3)
    assert seconds(plan, 1e30, 1e30, 1.0) == pytest.approx(
        8 + sum(o.messages for o in exchanges(plan) if o.over == "data")
    )


@pytest.mark.parametrize("reduced", [2, 4])
def test_half_precision_halves_the_weights_of_zero_3_on_their_way_and_gradients_that_are_summed_in_it(
    reduced: int,
) -> None:
    plan = Plan(MLPConfig(width=8, depth=3), (1, 2, 2), 2, 6, data=3, stage=3, itemsize=2, reduced=reduced)
    for rule, times in (("align_ada", 2), ("backprop", 4), ("sign_symmetric", 6)):  # whose signs are fp32's
        moved: Counter[str] = Counter()
        for one in exchanges(replace(plan, rule=rule)):
            moved[one.what] += one.bytes
        assert moved["weights"] == times * moved["gradients"] // reduced > 0


def test_the_plan_of_a_run_has_the_gradients_of_its_options() -> None:
    def reduced(precision: str, **options: Any) -> int:
        engine = DeepSpeedConfig(**options) if options else EngineConfig()
        config = TrainConfig(RuleConfig("backprop"), MLPConfig(), DigitsConfig(), SGDConfig(), engine=engine)
        config.precision = precision
        return plan_of(config, (1, 8, 8), 10, 1, 2, 4 if precision == "fp32" else 2).reduced

    assert [reduced("fp32"), reduced("fp16"), reduced("bf16")] == [4, 4, 2]
    assert [reduced("bf16", reduce_dtype="fp32"), reduced("fp16", reduce_dtype="bf16")] == [4, 2]


def test_a_convolutions_exchange_is_its_map() -> None:
    plan = Plan(ConvConfig(width=5, strides=[1, 2]), (3, 4, 4), 2, 6, "backprop", 2, 1, 0)
    assert [(one.what, one.bytes) for one in exchanges(plan)] == [
        ("activations", 6 * 6 * 16 * 4), ("signals", 6 * 6 * 16 * 4), ("logits", 6 * 2 * 4),
    ]  # fmt: skip
