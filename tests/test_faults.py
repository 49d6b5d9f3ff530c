"""Claims about what goes wrong around a run: full disks, held and closed folders, numbers that are not finite."""

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import config, silent
from safetensors import SafetensorError
from warm import PYTHON

from alignscale.checkpoint import complete
from alignscale.choices import ConfigError, ConvConfig, MLPConfig, MSEConfig, RNNConfig, SGDConfig, SyntheticConfig
from alignscale.config import CheckpointConfig, RunConfig
from alignscale.data.examples import DataError, Encoding, Examples, Split, Wanted
from alignscale.evaluate import evaluate
from alignscale.folder import opened
from alignscale.learner import Learner
from alignscale.run import Diverged
from alignscale.train import train
from alignscale.types import Batch

ROOT = Path(__file__).parents[1]
SMALL = ["net=mlp", "net.width=64", "epochs=5", "optim.lr=0.1", "log.progress=false", "threads=1"]
COMMAND = [PYTHON, "launch/train.py", *SMALL]
OWN = [sys.executable, *COMMAND[1:]]
"""In a Python of its own, whose process id and capabilities are the command's."""


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_full_disk_ends_the_run_and_the_same_command_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """On a file system of 1200 kB of its own, in a mount namespace that ends with the test."""
    again = [*COMMAND, "optim.momentum=0.9", "checkpoint.keep=9", f"run.dir={tmp_path / 'disk/run'}"]
    command = " ".join(f"'{word}'" for word in again)
    script = f"""
        mount -t tmpfs -o size=1200k none {tmp_path}/disk
        head -c 700000 /dev/zero > {tmp_path}/disk/filler
        {command} > /dev/null; echo "status $?"
        find {tmp_path}/disk -name '*.partial' -o -name '*.tmp'
        ls {tmp_path}/disk/run/checkpoints/*/manifest.json | wc -l
        rm {tmp_path}/disk/filler
        {command} | grep -c 'resumed after step'
        cp -r {tmp_path}/disk/run {tmp_path}/kept
    """
    (tmp_path / "disk").mkdir()
    done = run(["unshare", "-Urm", "sh", "-c", script])
    assert done.returncode == 0, done.stderr
    status, count, resumed = done.stdout.split("\n")[:3]
    assert (status, resumed) == ("status 1", "1")
    assert 1 <= int(count) <= 4
    assert "No space left on device" in done.stderr
    assert "free space or mend it, then give the same command" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "kept/result.json").read_text())["runs"][0]["steps"] == 145


def test_a_folder_in_use_by_another_run_is_refused_with_its_process(tmp_path: Path) -> None:
    options = config(tmp_path / "run", epochs=1)
    with opened(tmp_path / "run", options), pytest.raises(ConfigError, match=rf"in use .*process {os.getpid()} on "):
        train(options, silent)
    train(options, silent)


def test_the_hold_on_a_folder_ends_with_a_killed_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen([*OWN, "epochs=5000", f"run.dir={folder}"], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (folder / "checkpoints").exists():
        assert process.poll() is None
    second = run([*COMMAND, f"run.dir={folder}"])
    assert second.returncode == 2
    assert f"in use by another run (process {process.pid} on" in second.stderr
    process.kill()
    process.wait()
    shutil.rmtree(folder / "checkpoints")
    third = run([*COMMAND, "resume=never", f"run.dir={folder}"])
    assert third.returncode == 0, third.stderr


def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    # root may write anywhere, but for a root without this capability
    without = ["setpriv", "--bounding-set", "-dac_override"] if os.getuid() == 0 else []
    done = run([*without, *OWN, f"run.dir={tmp_path / 'closed/run'}"])
    assert done.returncode == 2, done.stderr
    assert "expected a folder that can be written, found: [Errno 13] Permission denied" in done.stderr
    assert "choose another (run.dir or run.root, compare.folder for a comparison)" in done.stderr
    assert not list((tmp_path / "closed").iterdir())


@pytest.mark.parametrize(
    ("net", "layer"),
    [
        (MLPConfig(width=8, depth=3), "layer 2 of 4 (Linear)"),
        (ConvConfig(width=4), "layer 2 of 4 (Conv)"),
        (RNNConfig(width=8), "layer 2 of 3 (Linear)"),
    ],
    ids=str,
)
def test_a_loss_that_is_not_finite_names_step_and_layer_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, net: MLPConfig | ConvConfig | RNNConfig, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer's output overflows from the ninth update on."""
    options = config(tmp_path / "run", net=net, optim=SGDConfig(lr=0.01), checkpoint=CheckpointConfig(every_steps=4))
    calls = 0

    def overflow(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output * float("inf") if calls > 8 else output

    def count(learner: object, *arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 1:
            learner.net.layers[1].register_forward_hook(overflow)  # type: ignore[attr-defined]
        return update(learner, *arguments)

    from alignscale.learner import Learner

    update = Learner.update
    monkeypatch.setattr(Learner, "update", count)
    with pytest.raises(Diverged) as caught:
        train(options, silent)
    assert "the loss is not finite at step 9" in str(caught.value)
    assert f"in the output of {layer}" in str(caught.value)
    assert [path.name[-1] for path in complete(tmp_path / "run/checkpoints")] == ["6", "8"]
    assert f"the last good checkpoint is {tmp_path}/run/checkpoints/step-000000008" in str(caught.value)
    run = json.loads((tmp_path / "run/result.json").read_text())["runs"][0]
    assert run["diverged_at"] == 9
    assert layer in run["failed"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    options = config(
        tmp_path / "run",
        optim=SGDConfig(lr=3e38),
        loss=MSEConfig(reduction="sum"),
        checkpoint=CheckpointConfig(every_steps=1, keep=1),
        epochs=1,
    )
    with pytest.raises(Diverged, match=r"the weight is not finite at step 1: .* in the weights of layer 1 of 3"):
        train(options, silent)
    assert complete(tmp_path / "run/checkpoints") == []


def test_images_that_are_not_finite_are_no_layers_fault(tmp_path: Path) -> None:
    options = config(tmp_path / "run", data=SyntheticConfig(shape=[1, 4, 4], train=107, test=31, noise=3e38))
    with pytest.raises(Diverged, match="in the images"):
        train(options, silent)


@pytest.mark.parametrize(("size", "bad", "what"), [(107, 40, "loss"), (31, 25, "test loss")])
def test_a_bad_image_is_found_in_any_part_of_a_batch_and_of_the_test_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, bad: int, what: str
) -> None:
    def spoilt(self: Encoding, split: Split, images: torch.Tensor, wanted: Wanted) -> Batch:
        batch = encoded(self, split, images, wanted)
        if len(split) == size:
            batch.images[wanted.places == bad] = torch.nan
        return batch

    encoded = Encoding.encoded
    monkeypatch.setattr(Encoding, "encoded", spoilt)
    with pytest.raises(Diverged, match=rf"the {what} is not finite at step \d+: .* in the images; look at the data"):
        train(config(tmp_path / "run", accumulation=2), silent)


def test_a_file_that_cannot_be_written_is_named_once(tmp_path: Path) -> None:
    """The kernel refuses to let metrics.jsonl grow, also when it is closed."""
    script = """
import resource, runpy, sys
sys.path[:0] = ["launch", "."]
import alignscale.train
steps = alignscale.train.steps
def limited(*given):
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    steps(*given)
alignscale.train.steps = limited
sys.argv[0] = "launch/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    words = [*SMALL, "log.every_steps=1", "log.tensorboard=false", f"run.dir={tmp_path / 'run'}"]
    done = run([PYTHON, "-c", script, *words])
    assert done.returncode == 1, done.stderr
    said = f"could not be read or written: [Errno 27] File too large: '{tmp_path / 'run/metrics.jsonl'}'"
    assert said in done.stderr.splitlines()[-1], done.stderr


def test_a_full_disk_is_no_mistake_in_the_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("alignscale.folder._claim", full)
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{tmp_path / 'run'}'")):
        train(config(tmp_path / "run"), silent)


def test_tasks_that_train_alone_beside_each_other_are_told_how_to_train_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    options = config(tmp_path / "run")
    with (
        opened(tmp_path / "run", options),
        pytest.raises(ConfigError, match=r"SLURM_STEP_NUM_TASKS=4: .* want torchrun"),
    ):
        train(options, silent)


def test_a_refused_folder_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    options = config(tmp_path)
    options.run = RunConfig(dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"found thesis\.tex and no config\.yaml"):
        train(options, silent)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_split_of_which_every_example_was_left_out_is_refused() -> None:
    learner = Learner("mlp", (1, 4, 4), 2)
    whole = Examples.whole(torch.rand(4, 1, 4, 4), torch.arange(4) % 2, 2, "images")

    class Lost(Examples):
        def batches(self, wanted: Any, encoding: Encoding) -> Any:
            for batch in super().batches(wanted, encoding):
                none = slice(0)
                yield replace(batch, images=batch.images[none], targets=batch.targets[none], keys=[])

    lost = Lost(**{field.name: getattr(whole, field.name) for field in fields(whole) if field.init})
    with pytest.raises(DataError, match="found all 4 of a split left out"):
        evaluate(learner.engine, lost, learner.encoding, 2)


@pytest.mark.parametrize(
    ("problem", "status", "words"),
    [
        (MemoryError("1 TiB"), 1, "error: expected more memory, found: 1 TiB; a smaller batch_size"),
        (OSError(28, "No space left on device"), 1, "error: a file could not be read or written: [Errno 28]"),
        (SafetensorError("cut off"), 1, "error: a file could not be read or written: cut off; free space"),
        (Diverged("lost"), 3, "error: lost"),
    ],
)
def test_a_job_of_a_scheduler_ends_with_the_words_and_status_of_the_command(
    tmp_path: Path, problem: Exception, status: int, words: str
) -> None:
    """submitit's own debug executor; the run of the job is broken off by ``problem``."""
    (tmp_path / "job.py").write_text(f"""
import sys
sys.path[:0] = [{str(ROOT / "launch")!r}, {str(ROOT)!r}]
import pickle, submitit, _runs
from _job import Job
problem = pickle.loads({pickle.dumps(problem)!r})
def broken(*given):
    raise problem
_runs.train_and_report = broken
job = submitit.AutoExecutor({str(tmp_path)!r}, cluster="debug").submit(Job(None, "", folder={str(tmp_path)!r}))
job.result()
""")
    done = subprocess.run([PYTHON, tmp_path / "job.py"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said.startswith(words)
    assert "Traceback" not in done.stderr
