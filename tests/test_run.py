"""Claims about what a run refuses, goes on from and leaves alone."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import config, silent
from safetensors.torch import load_file

from alignscale import environment
from alignscale.checkpoint import CheckpointError, complete, sealed
from alignscale.choices import ConfigError, ConvConfig, DeepSpeedConfig, MLPConfig, RuleConfig, SyntheticConfig
from alignscale.config import EvaluationConfig, FrozenConfig
from alignscale.data import load
from alignscale.distributed import Ranks
from alignscale.folder import opened
from alignscale.learner import Learner
from alignscale.memory import check_memory
from alignscale.parallel import Mesh
from alignscale.restore import restored
from alignscale.train import train

ROOT = Path(__file__).parents[1]


def test_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train(config(tmp_path / "run"), silent)
    lines: list[str] = []
    assert train(config(tmp_path / "run"), lines.append) == first
    assert "finished before; resume=never trains it again" in lines


def test_changed_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=1), silent)
    before = (tmp_path / "run/config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"seed: 0 -> 3"):
        train(config(tmp_path / "run", epochs=1, seed=3), silent)
    assert (tmp_path / "run/config.yaml").read_text() == before


def test_resume_never_starts_again(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=3), silent)
    train(config(tmp_path / "run", epochs=1, seed=3, resume="never"), silent)
    assert [path.name for path in complete(tmp_path / "run/checkpoints")] == ["step-000000006"]


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=1), silent)
    path = complete(tmp_path / "run/checkpoints")[-1] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="the file is damaged"):
        train(config(tmp_path / "run", epochs=1), silent)


def test_checkpoint_of_another_initial_network_is_refused(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=1), silent)
    path = complete(tmp_path / "run/checkpoints")[-1] / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(sealed({**manifest, "fingerprint": "0" * 16})))
    with pytest.raises(CheckpointError, match="expected the initial network"):
        train(config(tmp_path / "run", epochs=1), silent)


def test_checkpoints_of_the_format_before_are_read_and_later_ones_refused(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=1), silent)
    path = complete(tmp_path / "run/checkpoints")[-1] / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(sealed({**manifest, "format": 3})))
    said: list[str] = []
    train(config(tmp_path / "run", epochs=1), said.append)
    assert "finished before" in "".join(said)
    path.write_text(json.dumps(sealed({**manifest, "format": 5})))
    with pytest.raises(CheckpointError, match="expected checkpoint format 4 or 3, found 5; use the version"):
        train(config(tmp_path / "run", epochs=1), silent)


def test_moments_of_another_configuration_are_refused(tmp_path: Path) -> None:
    options = config(tmp_path / "run", net=MLPConfig(width=16, depth=2, norm="calibrated"), epochs=1)
    options.calibration.examples = 50
    train(options, silent)
    for path in complete(tmp_path / "run/checkpoints"):
        shutil.rmtree(path)  # as if the run had died before its first checkpoint
    options.seed = 1
    with pytest.raises(ConfigError, match="seed: 0 -> 1"):
        train(options, silent)
    options.seed = 0
    (tmp_path / "run/norms.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="put the file back, or train again with resume=never"):
        train(options, silent)


def test_damaged_result_is_written_again(tmp_path: Path) -> None:
    first = train(config(tmp_path / "run", epochs=1), silent)
    (tmp_path / "run/result.json").write_text("{")
    assert train(config(tmp_path / "run", epochs=1), silent)["runs"][0]["curve"] == first["runs"][0]["curve"]
    assert json.loads((tmp_path / "run/result.json").read_text())["runs"]


def test_resume_on_other_threads_warns(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=1), silent)
    path = complete(tmp_path / "run/checkpoints")[-1] / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["made_with"]["threads"] = 7
    path.write_text(json.dumps(sealed(manifest)))
    (tmp_path / "run/result.json").unlink()
    lines: list[str] = []
    train(config(tmp_path / "run", epochs=1), lines.append)
    assert any(line.startswith("warning: not as before") and "threads: 7 -> 1" in line for line in lines)


def test_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/mine").write_text("precious")
    with pytest.raises(ConfigError, match="expected a new folder or a run's"):
        train(config(tmp_path, resume="never"), silent)
    assert (tmp_path / "checkpoints/mine").read_text() == "precious"


def test_network_that_cannot_fit_is_refused_before_it_is_built(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"net\.width=9999999: weights, gradient, optimizer and initial weights take"):
        train(config(tmp_path / "run", net=MLPConfig(width=9_999_999)), silent)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as of a job with a GPU for each task
    for rank in range(2):  # so that the first, which speaks, does not wait for the other
        with pytest.raises(
            ConfigError, match=f"for each of the 2 ranks of this machine, found 1 that rank {rank} sees"
        ):
            environment.take_gpu(rank, 2)


def test_ranks_share_the_batch_and_what_zero_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = config(tmp_path, net=MLPConfig(width=20_000, depth=3), frozen=FrozenConfig("regenerated"))
    train = load(wide.data)["train"]  # 3.2 GB of weights
    monkeypatch.setattr(environment, "available_memory", lambda device: 5 * 10**9)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def fits(stage: int, ranks: int, **changes: object) -> bool:
        mesh = Mesh(data=Ranks(size=ranks))
        try:
            check_memory(replace(wide, **changes), train, torch.device("cpu"), DeepSpeedConfig(zero_stage=stage), mesh)
        except ConfigError:
            return False
        return True

    assert not fits(0, 64)
    assert not fits(3, 2)
    assert fits(3, 64)
    assert fits(3, 64, frozen=FrozenConfig("partitioned"))
    random = RuleConfig("feedback_alignment")  # whose weights each rank has whole
    assert not fits(3, 64, frozen=FrozenConfig("partitioned"), rule=random)
    narrow = {"net": MLPConfig(width=1000, depth=3), "batch_size": 2_000_000}
    assert not fits(0, 1, **narrow)
    assert fits(0, 8, **narrow)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert not fits(0, 8, **narrow)


def test_the_update_cosine_is_of_a_part_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, cosines = [], Learner.cosines
    monkeypatch.setattr(Learner, "cosines", lambda self, batch: sizes.append(len(batch.images)) or cosines(self, batch))
    train(config(tmp_path, epochs=1, accumulation=4), silent)
    assert set(sizes) == {5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 200}, "batch_size=200: expected at most the 107 training examples"),
        ({"batch_size": 53, "net": MLPConfig(norm="batch")}, "a batch of one example of 107"),
        ({"batch_size": 1, "net": MLPConfig(norm="batch")}, "a batch of one example of 107"),
        (
            {"evaluation": EvaluationConfig(batch_size=1), "net": MLPConfig(norm="batch")},
            "a batch of 1 of 31 examples",
        ),
        ({"net": MLPConfig(norm="calibrated")}, "calibration.examples=1000: expected at most the 107"),
        ({"device": "tpu"}, "device=tpu: expected one of auto, cpu, cuda"),
    ],
)
def test_options_that_do_not_fit_the_data_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path / "run", **changes), silent)
    assert not (tmp_path / "run").exists()


def test_unknown_rule_lists_the_valid_ones(tmp_path: Path) -> None:
    options = config(tmp_path / "run")
    options.rule = RuleConfig(name="alignada")
    with pytest.raises(ConfigError, match="rule=alignada: expected one of align_ada, align_prop, align_zero, backprop"):
        train(options, silent)


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="expected a folder that can be written"):
        train(config(tmp_path / "file/run"), silent)


def test_resume_never_leaves_nothing_of_the_old_run(tmp_path: Path) -> None:
    options = config(tmp_path / "run", net=MLPConfig(width=16, depth=2, norm="calibrated"))
    options.calibration.examples = 50
    train(options, silent)
    (tmp_path / "run/notes.txt").write_text("mine")
    (tmp_path / "run/checkpoints/latest").write_text("step-000000099")
    train(config(tmp_path / "run", epochs=1, resume="never"), silent)
    assert not (tmp_path / "run/norms.safetensors").exists()
    assert (tmp_path / "run/checkpoints/latest").read_text() == complete(tmp_path / "run/checkpoints")[-1].name
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1
    assert (tmp_path / "run/notes.txt").read_text() == "mine"


def test_the_newest_process_is_named_as_the_holder(tmp_path: Path) -> None:
    options = config(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").write_text("process 1 on elsewhere")
    with opened(tmp_path / "run", options):
        assert re.fullmatch(rf"process {os.getpid()} on \S+", (tmp_path / "run/.lock").read_text())


def test_calibration_uses_the_first_examples_alone(tmp_path: Path) -> None:
    options = config(tmp_path / "run", net=MLPConfig(width=16, depth=2, norm="calibrated"), epochs=1)
    options.calibration.examples = 50
    train(options, silent)
    learner = Learner(options.net, (1, 4, 4), 4)
    learner.calibrate(load(options.data)["train"].images[:50])
    moments = load_file(tmp_path / "run/norms.safetensors")
    assert torch.equal(moments["0.mean"], learner.net.norms[0].mean)


@pytest.mark.parametrize("change", [{"step": 1}, {"progress": {}}, {"files": {}}, {"fingerprint": "0" * 16}])
def test_a_manifest_that_was_changed_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    train(config(tmp_path / "run", epochs=1), silent)
    path = complete(tmp_path / "run/checkpoints")[-1] / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(
        CheckpointError, match=r"expected the manifest as it was written for step-000000006, found another"
    ):
        train(config(tmp_path / "run", epochs=1), silent)
    with pytest.raises(CheckpointError, match=r"delete .*step-000000006 to go on from the checkpoint before it"):
        restored(tmp_path / "run")


def test_a_checkpoint_under_another_name_is_refused(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=1), silent)
    path = complete(tmp_path / "run/checkpoints")[-1]
    path.rename(path.with_name("step-000000004"))
    with pytest.raises(CheckpointError, match=r"written for step-000000004, found another"):
        train(config(tmp_path / "run", epochs=1), silent)


def test_what_trained_a_finished_run_stays_on_record(tmp_path: Path) -> None:
    first = train(config(tmp_path / "run", epochs=1), silent)
    versions = tmp_path / "run/versions.json"
    versions.write_text("as it was")
    assert train(config(tmp_path / "run", epochs=1, device="cpu", threads=1), silent) == first
    assert versions.read_text() == "as it was"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a NoneType in place of options"),
        ("rule: {name: x}", "no or an unknown 'x'"),
        ("[", "while parsing"),
        ("x", "a str in"),
    ],
)
def test_a_damaged_configuration_is_explained_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    train(config(tmp_path / "run", epochs=1), silent)
    (tmp_path / "run/config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"expected a run's configuration, found: .*{message}") as error:
        restored(tmp_path / "run")
    assert len(str(error.value).splitlines()) == 1


def test_outputs_that_cannot_fit_the_memory_are_refused(tmp_path: Path) -> None:
    data = SyntheticConfig(shape=[1, 300, 300], train=2000, test=2)
    options = config(tmp_path / "run", net=ConvConfig(width=4000, norm="none"), data=data, batch_size=2000)
    with pytest.raises(ConfigError, match=r"the layers' outputs \d+\.\d GiB, found .* smaller width or batch_size"):
        train(options, silent)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"data.train=1000000000, data.test=2: they take .* GiB of available memory"):
        train(config(tmp_path / "run", data=SyntheticConfig(train=10**9, test=2)), silent)
