"""Claims about the tools that measure; what they time is never asserted."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from argument_types import ended
from plain_step import plain_conv, plain_mlp, plain_rnn
from warm import PYTHON
from width_distance import distances, slope

from alignscale.choices import NETS, ConvConfig, MLPConfig, NetConfig, RNNConfig
from alignscale.frozen import initialise
from alignscale.initial import normal
from alignscale.nets import build

ROOT = Path(__file__).parents[1]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PYTHON, *command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_distance_to_backprop_falls_with_width() -> None:
    rows = distances(["align_ada", "align_zero"], [64, 256, 1024], [0, 1], steps=20, lr=0.5)
    for rule in ("align_ada", "align_zero"):
        assert -1.1 < slope(rows, rule) < -0.5


def test_width_distance_writes_rows_and_draws_them(tmp_path: Path) -> None:
    paths = [str(tmp_path / "rows.json"), str(tmp_path / "figure.svg")]
    done = run(
        "tools/width_distance.py", "--widths", "8", "16", "--seeds", "0", "--json", paths[0], "--figure", paths[1]
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(Path(paths[0]).read_text())["rows"]) == 4
    assert "<svg" in Path(paths[1]).read_text()


def test_a_file_for_results_that_cannot_be_made_is_refused_before_any_work(tmp_path: Path) -> None:
    done = run("tools/width_distance.py", "--json", str(tmp_path / "missing/rows.json"))
    assert done.returncode == 2
    assert "--json: expected a file in a folder that is there, found" in done.stderr


@pytest.mark.parametrize(
    ("problem", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"),
            1,
            "error: expected more memory, found: ",
        ),
    ],
    ids=("interrupt", "memory"),
)
def test_what_breaks_a_tool_off_is_said_in_one_line(
    problem: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise problem

    with pytest.raises(SystemExit) as end:
        ended(main)
    assert end.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


def test_a_cost_follows_the_form_of_the_jacobian() -> None:
    given = ["launch/cost.py", "experiment=imagenet_conv7_w512", "net.norm=none", "data.views=1"]
    live, gates = (float(run(*given, *more).stdout.split("|")[-6]) for more in ((), ("jacobian=gates",)))
    assert gates == pytest.approx(live * 3 / 4, rel=0.01)
    wrong = run("launch/cost.py", "precision=tf32")
    assert wrong.returncode == 2
    assert "precision=tf32: expected one of fp32" in wrong.stderr


@pytest.mark.parametrize("net", ["mlp", "conv3", "rnn"])
def test_bench_step_writes_a_row_for_each_contender(tmp_path: Path, net: str) -> None:
    depth = ["--depth", "2"] if net == "mlp" else []
    path = tmp_path / "rows.json"
    command = [
        "--net",
        net,
        "--width",
        "8",
        "--batch",
        "6",
        "--rules",
        "align_ada,readout_only",
        "--repeats",
        "3",
        "--threads",
        "1",
    ]
    done = run("tools/bench_step.py", *command, *depth, "--jacobian", "live", "--json", str(path))
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())
    assert [row["rule"] for row in rows] == ["plain", "backprop", "align_ada", "readout_only"]
    assert [row["jacobian"] for row in rows] == [None, None, "live", None]
    wanted = {
        "net",
        "width",
        "depth",
        "batch",
        "rule",
        "jacobian",
        "seconds_median",
        "ratio_to_backprop",
        "ratio_to_plain",
        "tier",
        "precision",
        "images_per_second",
        "frozen_pass_seconds",
    }
    assert all(wanted <= row.keys() for row in rows)
    assert rows[1]["ratio_to_backprop"] == 1.0
    backprop, align = rows[1]["tflops"] * rows[1]["seconds_median"], rows[2]["tflops"] * rows[2]["seconds_median"]
    assert 1.25 < align / backprop < 1.6  # a forward pass more than three without the first layer's pullback
    assert rows[2]["frozen_pass_seconds"] > 0
    assert [row["frozen_pass_seconds"] is None for row in rows] == [True, True, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rules", "align"], "expected some of align_ada"),
        (["--jacobian", "cached"], "expected some of live"),
        (["--width", "0"], "at least 1"),
        (["--depth", "3"], "only --net mlp has a depth"),
    ],
)
def test_bench_step_refuses_mistakes(options: list[str], message: str) -> None:
    done = run("tools/bench_step.py", *options)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    "config",
    [
        MLPConfig(width=6, depth=2),
        ConvConfig(width=5),
        ConvConfig(width=5, norm="none", strides=[4, 2, 1]),
        RNNConfig(width=6),
        RNNConfig(width=6, norm="batch"),
    ],
    ids=str,
)
def test_plain_step_computes_the_same_network(config: NetConfig) -> None:
    shape = (2, 7, 6)
    net = build(config, shape, 3)
    initialise(net, 1)
    makers = {MLPConfig: plain_mlp, ConvConfig: plain_conv, RNNConfig: plain_rnn}
    weights, forward = makers[type(config)](config, shape, 3)  # type: ignore[operator]
    for layer, weight in zip(net.layers, weights, strict=False):
        weight.copy_(layer.weight.detach())
    images = torch.rand(9, *shape)
    with torch.no_grad():
        torch.testing.assert_close(forward(images), net(images), rtol=1e-4, atol=1e-5)


def test_check_device_finds_what_differs_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import check_device

    command = ["--device", "cpu", "--groups", "initial,steps,cache", "--rules", "align_zero"]
    assert check_device.main(command) == 0
    out = capsys.readouterr().out
    assert "cache: 20 of 20 as on the CPU" in out
    assert "steps: 12 of 12 as on the CPU" in out

    def wrong_unless_sliced(*arguments: Any, device: object, dtype: torch.dtype) -> torch.Tensor:
        return normal(*arguments, device="cpu", dtype=dtype) + (arguments[4] is None and device != "reference")

    monkeypatch.setattr(check_device, "normal", wrong_unless_sliced)
    monkeypatch.setattr(check_device, "CPU", "reference")
    assert check_device.main(["--device", "cpu", "--groups", "initial"]) == 1
    assert "initial: 24 of 48 as on the CPU" in capsys.readouterr().out


def test_check_device_names_the_devices_there_are() -> None:
    done = run("tools/check_device.py", "--device", "cuda:7")
    assert done.returncode == 2
    assert "device=cuda:7: expected auto or cpu" in done.stderr


def test_every_net_has_a_benchmark_shape() -> None:
    from bench_step import SHAPES

    assert SHAPES.keys() == NETS.keys()
