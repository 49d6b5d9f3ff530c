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
from jacobian_cases import DATA, ROOT, options
from run_cases import same, silent, weights
from safetensors import safe_open

from alignscale.choices import ConfigError, ConvConfig, MLPConfig, RNNConfig, SGDConfig, SyntheticConfig
from alignscale.config import JACOBIANS, CalibrationConfig, TrainConfig
from alignscale.interrupts import Interrupted
from alignscale.jacobian.files import CacheError, Mapped
from alignscale.run import Diverged
from alignscale.train import train
from alignscale.validation import validate


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


def test_a_run_with_a_cache_resumes_to_the_same_bits(cache: Path) -> None:
    whole, halved = options(cache, epochs=4), options(cache, epochs=4)
    halved.run.dir += "-halved"
    train(whole, silent)
    first = subprocess.Popen(
        [sys.executable, "-c", f"""
import sys; sys.path[:0] = ["tests", "."]
from pathlib import Path
from jacobian_cases import options
from alignscale.train import train
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
