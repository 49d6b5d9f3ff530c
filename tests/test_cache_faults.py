"""Claims about caches that must not be used, and about what goes wrong while one is made."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import config, same, silent, weights
from safetensors import safe_open
from warm import PYTHON

from alignscale.choices import ConfigError, ConvConfig, MLPConfig, RNNConfig, SGDConfig, SyntheticConfig
from alignscale.config import JACOBIANS, CalibrationConfig, TrainConfig
from alignscale.interrupts import Interrupted
from alignscale.jacobian.files import CacheError, Mapped, Writer
from alignscale.jacobian.form import Form
from alignscale.jacobian.identity import checked, claimed
from alignscale.run import Diverged
from alignscale.train import train
from alignscale.validation import validate

ROOT = Path(__file__).parents[1]
DATA = SyntheticConfig(shape=[1, 4, 4], train=107, test=31, classes=4, views=2, shift=1)
OPTIONS: dict[str, Any] = {"net": MLPConfig(width=16, depth=2, norm="calibrated"), "data": DATA, "epochs": 2}
OPTIONS |= {"calibration": CalibrationConfig(50), "optim": SGDConfig(lr=0.1)}


def options(folder: Path, build: bool = False, cached: str = "gates", **changes: Any) -> TrainConfig:
    """A run on the one cache of ``folder``."""
    jacobian = replace(JACOBIANS[cached], dir=str(folder / "cache"), build=build)
    name = f"run-{len(list(folder.glob('run-*')))}"
    return config(folder / name, changes.pop("rule", "align_ada"), **OPTIONS | {"jacobian": jacobian} | changes)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder with a cache that a run made."""
    train(options(tmp_path, build=True), silent)
    return tmp_path


@pytest.mark.parametrize(("changes", "found"), [
    ({"seed": 1}, "seed: 0 -> 1"),
    ({"net": MLPConfig(width=17, depth=2, norm="calibrated")}, "net.width: 16 -> 17"),
    ({"net": MLPConfig(width=16, depth=2, norm="calibrated", gain=1.0)}, "net.gain: 1.41.* -> 1.0"),
    ({"net": MLPConfig(width=16, depth=2, norm="none")}, "net.norm: calibrated -> none"),
    ({"precision": "bf16"}, "precision: fp32 -> bf16"),
    ({"data": replace(DATA, shift=2)}, "transform.shift: 1 -> 2"),
    ({"data": replace(DATA, flip=True)}, "transform.flip: False -> True"),
    ({"data": replace(DATA, normalisation="channel")}, "transform.affine: None ->"),
    ({"data": replace(DATA, views=3)}, r"lacks 1 of 3 files, the first for synthetic-train in view 2"),
    ({"data": replace(DATA, train=120)}, "lacks 13 of the 120 training examples, the first in row 107"),
    ({"data": replace(DATA, seed=1)}, "expected the norm statistics of this run's .*, found others"),
    ({"calibration": CalibrationConfig(20)}, "expected the norm statistics of this run's .*, found others"),
    ({"rule": "align_zero"}, "expected a cache in the form .*inputs='fp32'.*, found .*inputs=None"),
], ids=str)  # fmt: skip
def test_a_cache_of_anything_else_is_refused_with_the_difference(
    cache: Path, changes: dict[str, Any], found: str
) -> None:
    run = options(cache, **changes)
    with pytest.raises(CacheError, match=found) as caught:
        train(run, silent)
    assert "jacobian.build=true" in str(caught.value)
    assert not list(Path(run.run.dir).glob("checkpoints/*"))


def test_other_examples_are_refused(tmp_path: Path) -> None:
    train(options(tmp_path, True, net=MLPConfig(width=16)), silent)
    with pytest.raises(CacheError, match="was made of other data: 107 examples differ, the first in row 0"):
        train(options(tmp_path, net=MLPConfig(width=16), data=replace(DATA, seed=1)), silent)


def test_a_missing_cache_is_an_error_that_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"found none; make it: python tools/cache_jacobian.py with the same options"):
        train(options(tmp_path), silent)


@pytest.mark.parametrize("damage", ["cut", "flipped", "header", "empty", "gone"])
def test_a_damaged_file_is_refused_and_made_again(cache: Path, damage: str) -> None:
    path = next((cache / "cache").glob("*.view1.safetensors"))
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[{"cut": -9, "flipped": -9, "header": 12, "empty": 0}[damage]] ^= 4
        path.write_bytes(content[: {"cut": -5, "empty": 0}.get(damage, len(content))])
    expected = "lacks 1 of 2 files" if damage == "gone" else f"{re.escape(str(path))}: expected a whole cache file"
    with pytest.raises(CacheError, match=expected) as caught:
        train(options(cache), silent)
    assert "delete it, and make it" in str(caught.value) or damage == "gone"
    path.unlink(missing_ok=True)
    train(options(cache, build=True), silent)
    assert path.read_bytes() != content or damage == "gone"


def test_a_cache_file_is_a_safetensors_file(cache: Path) -> None:
    path = next((cache / "cache").glob("*.view0.safetensors"))
    ours = Mapped(path, "", True)
    with safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == ours.tensors.keys() == {"rows", "sums", "gates.0", "gates.1"}
        assert all(torch.equal(theirs.get_tensor(name), one) for name, one in ours.tensors.items())


def test_a_manifest_says_what_the_cache_is(cache: Path) -> None:
    manifest = json.loads((cache / "cache/manifest.json").read_text())
    assert manifest["format"] == 1
    assert re.fullmatch("[0-9a-f]{16}", manifest["fingerprint"])
    assert (manifest["sites"], manifest["classes"]) == ([[16], [16]], 4)
    form = {"sites": ["gates", "gates"], "dtype": "fp32", "inputs": None, "gathered": False}
    assert manifest["form"] == form


@pytest.mark.parametrize(("changes", "found"), [
    ({"net": MLPConfig(norm="batch")}, "jacobian=gates: expected net.norm=none or calibrated, found batch"),
    ({"net": RNNConfig(width=64), "cached": "explicit"}, r"steps x 64 numbers an example \(5,120 for 10 classes and 8"),
    ({"net": ConvConfig(norm="none", blocks="public"), "cached": "explicit"}, "net.blocks=public"),
    ({"jacobian": replace(JACOBIANS["live"], layers=["gates"])}, "expected none with jacobian=live"),
    ({"jacobian": replace(JACOBIANS["gates"], dtype="fp8"), "net": MLPConfig(activation="tanh")}, "the gates of tanh"),
    ({"jacobian": replace(JACOBIANS["auto"], dtype="fp8"), "net": MLPConfig(activation="tanh")}, "the gates of tanh"),
    ({"jacobian": replace(JACOBIANS["gates"], tier="tape")}, "jacobian.tier=tape: expected one of auto, device"),
], ids=str)  # fmt: skip
def test_options_that_exclude_one_another_are_refused(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        validate(options(tmp_path, **changes))


def test_a_cache_that_does_not_fit_is_refused_before_any_work(tmp_path: Path) -> None:
    data = SyntheticConfig(shape=[1, 4, 4], train=100_000, test=31, classes=1000)
    huge = options(tmp_path, True, "explicit", net=MLPConfig(width=4096, depth=8), data=data)
    with pytest.raises(CacheError, match=r"GiB, found .* GiB"):
        train(huge, silent)
    assert not list((tmp_path / "cache").glob("*.safetensors*"))


def command(folder: Path, *more: str, python: str = PYTHON) -> list[str]:
    words = ["net=mlp", "net.width=256", "net.norm=calibrated", "rule=align_zero", "threads=1", "data.views=6"]
    words += ["data.shift=1", f"jacobian.dir={folder}/cache", "jacobian=explicit"]
    return [python, "tools/cache_jacobian.py", *words, *more]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "cache").iterdir() if path.name != ".lock"}


def test_a_builder_that_is_killed_is_gone_on_with_to_the_same_files(tmp_path: Path) -> None:
    for place in ("whole", "killed"):
        (tmp_path / place).mkdir()
    assert run(command(tmp_path / "whole")).returncode == 0
    words = command(tmp_path / "killed", python=sys.executable)
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None
        assert any("view 3" in line for line in builder.stdout)
        builder.send_signal(signal.SIGKILL)
    before = files(tmp_path / "killed")
    assert len([name for name in before if name.endswith("safetensors") and "view" in name]) < 6
    done = run(command(tmp_path / "killed"))
    assert done.returncode == 0, done.stderr
    assert "6 files to make" not in done.stdout
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_builder_that_is_killed_before_its_manifest_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "norms.safetensors").write_bytes(b"of the one before")
    form, moments = Form(("gates",), "fp32", None), {"norms.0.mean": torch.ones(2)}
    claimed(tmp_path, {"seed": 0}, form, moments)
    assert checked(tmp_path, {"seed": 0}, moments) == form


def test_a_second_builder_is_refused_while_the_first_goes_on(tmp_path: Path) -> None:
    words = command(tmp_path, python=sys.executable)
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert any("caching" in line for line in first.stdout)
        first.send_signal(signal.SIGSTOP)
        second = run(command(tmp_path))
        first.send_signal(signal.SIGCONT)
        first.stdout.read()
    assert second.returncode == 2
    assert re.search(rf"expected no other builder, found process {first.pid} on .* at work", second.stderr)
    assert first.wait() == 0
    assert run(command(tmp_path)).returncode == 0


def test_a_full_disk_while_building_leaves_no_half_file(tmp_path: Path) -> None:
    words = " ".join(f"'{word}'" for word in command(tmp_path / "disk"))
    script = f"""
        mount -t tmpfs -o size=60m none {tmp_path}/disk
        head -c 1000000 /dev/zero > {tmp_path}/filler
        ( sleep 0; while sleep 0.05; do cat {tmp_path}/filler >> {tmp_path}/disk/filler 2>/dev/null || exit; done ) &
        {words} > /dev/null; echo "status $?"
        find {tmp_path}/disk -name '*.partial'
        rm {tmp_path}/disk/filler
    """
    (tmp_path / "disk").mkdir()
    done = run(["unshare", "-Urm", "sh", "-c", script])
    assert done.stdout.split("\n")[0] in ("status 1", "status 2"), done.stderr
    assert "partial" not in done.stdout
    assert re.search("No space left on device|GiB of free disk", done.stderr)
    assert "Traceback" not in done.stderr


def test_a_writer_that_has_no_room_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    script = """
import sys, torch, resource, signal
from pathlib import Path
from alignscale.jacobian.build import write_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
part = {"rows": torch.arange(100), "sums": torch.arange(100), "gates.0": torch.zeros(100, 1000, dtype=torch.uint8)}
try:
    write_file(Path(sys.argv[1]), {"gates.0": (torch.uint8, (1000,))}, 300, iter([part, part, part]), {})
except OSError as problem:
    print(problem.errno)
"""
    done = run([sys.executable, "-c", script, str(tmp_path / "file")])
    assert done.stdout.strip() == "27", done.stderr  # EFBIG
    assert list(tmp_path.iterdir()) == []


def test_plan_prints_every_form_and_makes_nothing(tmp_path: Path) -> None:
    done = run([*command(tmp_path, "jacobian=auto"), "--plan"])
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[3:5]] == ["backprop", "live"]
    forms = {tuple(line.split()[:2]) for line in done.stdout.splitlines()[5:11]}
    assert forms == {(form, tier) for form in ("gates", "explicit", "auto") for tier in ("host", "disk")}
    assert "width / classes: 26, 26, 26" in done.stdout
    assert not list(tmp_path.glob("cache/*.safetensors*"))


@pytest.mark.parametrize(("words", "message"), [
    (["rule=backprop"], "rule=backprop: reads no frozen Jacobian; expected one of align_ada, align_zero"),
    (["jacobian=live"], "jacobian=live: expected gates, explicit or auto"),
    (["jacobian=bits"], "expected one of auto, explicit, gates, live"),
])  # fmt: skip
def test_the_tool_refuses_mistakes(tmp_path: Path, words: list[str], message: str) -> None:
    done = run([*command(tmp_path), *words])
    assert done.returncode == 2
    assert message in done.stderr


def test_a_run_with_a_cache_resumes_to_the_same_bits(cache: Path) -> None:
    whole, halved = options(cache, epochs=4), options(cache, epochs=4)
    halved.run.dir += "-halved"
    train(whole, silent)
    first = subprocess.Popen(
        [sys.executable, "-c", f"""
import sys; sys.path[:0] = ["tests", "."]
from pathlib import Path
from test_cache_faults import options, train
import dataclasses
run = options(Path({str(cache)!r}), epochs=4)
run.run.dir = {halved.run.dir!r}
run.checkpoint.every_steps = 1
train(run)
"""], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(Path(halved.run.dir).glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    train(halved, silent)
    assert same(weights(Path(whole.run.dir)), weights(Path(halved.run.dir)))


def test_a_writer_puts_every_dtype_where_it_can_be_read(tmp_path: Path) -> None:
    layout = {"a": (torch.uint8, (3,)), "b": (torch.float64, (1,)), "c": (torch.bfloat16, (5,)), "d": (torch.int64, ())}
    writer = Writer(tmp_path / "x", layout, 7, {"about": "é"})
    parts = [{name: torch.ones(n, *shape).to(dtype) for name, (dtype, shape) in layout.items()} for n in (2, 4, 1)]
    for part in parts:
        writer.write(part)
    writer.close()
    found = Mapped(tmp_path / "x", "", True)
    assert found.about["about"] == "é"
    assert all(bool((one == 1).all()) and one.shape[0] == 7 for one in found.tensors.values())


@pytest.mark.parametrize("which", ["seed", "view"])
def test_a_file_of_another_cache_or_view_is_refused_whatever_its_name(tmp_path: Path, which: str) -> None:
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        train(options(tmp_path / str(seed), True, net=MLPConfig(width=16), seed=seed), silent)
    first, second = (sorted((tmp_path / str(seed) / "cache").glob("*.view*")) for seed in (0, 1))
    second[0].write_bytes((first[0] if which == "seed" else second[1]).read_bytes())
    with pytest.raises(CacheError, match="found one of another cache, shard, view or form"):
        train(options(tmp_path / "1", net=MLPConfig(width=16), seed=1), silent)


def test_auto_takes_no_other_dtype(tmp_path: Path) -> None:
    jacobian = replace(JACOBIANS["explicit"], dir=str(tmp_path / "cache"), build=True, dtype="fp8")
    train(options(tmp_path, jacobian=jacobian, net=MLPConfig(width=16)), silent)
    with pytest.raises(CacheError, match=r"expected a cache in the form .*fp32.*, found .*fp8"):
        train(options(tmp_path, cached="auto", net=MLPConfig(width=16)), silent)


def test_a_finished_run_needs_its_cache_no_more(tmp_path: Path) -> None:
    run = options(tmp_path, True, net=MLPConfig(width=16))
    ended = train(run, silent)
    shutil.rmtree(tmp_path / "cache")
    run.jacobian.build = False
    assert train(run, silent)["runs"] == ended["runs"]


def test_a_run_does_not_go_on_with_another_form_of_auto(tmp_path: Path) -> None:
    run = options(tmp_path, cached="auto", net=MLPConfig(width=16), epochs=900)
    run.run.dir += "-auto"
    for layers in (["gates"] * 3, ["explicit"] * 3):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        named = replace(run.jacobian, name="gates", layers=layers, build=True)
        train(options(tmp_path, net=MLPConfig(width=16), jacobian=named), silent)
        if layers[0] == "gates":
            stop_after_a_step(run)
    with pytest.raises(ConfigError, match=r"has trained with the form .*gates.*, found .*explicit"):
        train(run, silent)


def stop_after_a_step(run: TrainConfig) -> None:
    """Train until SIGTERM, which comes with the first checkpoint."""

    def stop() -> None:
        while not list(Path(run.run.dir).glob("checkpoints/step-*")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(Interrupted):
        train(run, silent)


@pytest.mark.parametrize("rate", [1e9])
def test_a_dual_run_that_diverges_says_so(tmp_path: Path, rate: float) -> None:
    jacobian = replace(JACOBIANS["explicit"], dir=str(tmp_path / "cache"), build=True)
    run = options(
        tmp_path, rule="align_zero", form="dual", jacobian=jacobian, data=replace(DATA, views=1, shift=0, train=20),
        net=MLPConfig(width=512, depth=2), optim=SGDConfig(lr=rate), batch_size=10, epochs=40,
    )  # fmt: skip
    with pytest.raises(Diverged, match="is not finite at step"):
        train(run, silent)
