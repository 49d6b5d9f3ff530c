"""Claims about what goes wrong on one rank or on all: each ends all ranks, with one message."""

import re
import subprocess
from pathlib import Path

import pytest
from launches import ROOT, RUN, finished, run, torchrun
from warm import PYTHON

from alignscale.checkpoint import MANIFEST, complete, read, read_manifest

pytestmark = pytest.mark.distributed


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
        (["engine.extra.flops_profiler=true"], "engine.extra: expected settings that DeepSpeed takes, found: ", 2),
        (["rule.magnitude=3"], "rule=align_ada has no option magnitude", 2),
    ],
)
def test_what_stops_all_ranks_is_said_once(tmp_path: Path, options: list[str], message: str, status: int) -> None:
    done = run(2 + ("accumulation=18" in options), f"run.dir={tmp_path / 'run'}", "engine=deepspeed", *options)
    assert done.returncode != 0
    assert done.stderr.count(message) == 1, done.stderr
    assert f"exitcode  : {status}" in done.stderr


def test_a_mistake_is_said_by_a_first_rank_that_comes_late() -> None:
    """The others have met it by then, and noted that no start of torchrun's would mend it."""
    late = f"[ $RANK = 0 ] && sleep 8; exec {PYTHON} launch/train.py net.widht=3"
    done = finished(torchrun(2, "--no-python", "bash", "-c", late, restarts=1))
    assert done.stderr.count("error: net.widht=3") == 1, done.stderr
    assert done.returncode != 0


def test_a_full_disk_stops_all_ranks_with_one_message(tmp_path: Path) -> None:
    script = f"""
        mount -t tmpfs -o size=400k none {tmp_path}
        exec {" ".join(torchrun(2, "launch/train.py", *RUN, restarts=2))} run.dir={tmp_path / "run"} \\
            epochs=50 engine=deepspeed checkpoint.keep=9 log.tensorboard=false log.every_steps=1
    """
    done = finished(["unshare", "-Urm", "bash", "-c", script])
    assert done.returncode != 0
    assert done.stderr.count("No space left on device") == 1, done.stderr[-3000:]


@pytest.mark.parametrize(("least", "file"), [(2**24, "optimizer"), (1, "optimizer-1")], ids=["first", "both"])
def test_ranks_write_a_checkpoint_together_or_say_together_why_not(tmp_path: Path, least: int, file: str) -> None:
    """Tensors, each a collective, that the first rank writes, or both; a full disk, infinity, a failing rank."""
    (tmp_path / "save.py").write_text(f"""
import pathlib, sys, weakref
sys.path.insert(0, {str(ROOT)!r})
import torch
from alignscale import checkpoint
from alignscale.distributed import joined
folder, made, most, checkpoint.LEAST = pathlib.Path({str(tmp_path)!r}), [], 0, {least}
def maker(name, value=1.0, wrong=lambda: None):
    def make():
        global most
        most = max(most, sum(one() is not None for one in made))
        wrong()
        whole = ranks.sum(torch.full((50_000,), value)).clone()  # gloo keeps the other one for a while
        made.append(weakref.ref(whole))
        return whole
    return name, checkpoint.Coming(200_000, lambda to: make())
with joined(torch.device("cpu"), 60.0) as ranks:
    def save(step, *model):
        tensors = {{"model": dict(model), "optimizer": dict(maker(name) for name in "xyz")}}
        checkpoint.save(folder, step, tensors, {{"progress": {{"best": None}}}}, 2, ranks)
    save(1, *map(maker, "abc"))
    assert most <= (ranks.first or {least} == 1), most
    def full():
        if ranks.first:
            (*folder.glob(".step-000000002.*.partial"),)[0].joinpath("{file}.safetensors").symlink_to("/dev/full")
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
    done = finished(torchrun(2, str(tmp_path / "save.py")))
    said = sorted(re.findall("<([^<>]*)>", done.stdout))
    full = f"[Errno 28] No space left on device: '{tmp_path / 'step-000000002'}'"
    assert [one for one in said if "space" in one] == [f"{rank}: {full}" for rank in (0, 1)], done
    assert len([one for one in said if one.endswith("expected finite numbers, found others in b")]) == 2
    assert [one for one in said if "memory" in one] == [f"{rank}: rank 1: out of memory" for rank in (0, 1)], done
    assert [path.name for path in complete(tmp_path)] == ["step-000000001"]
    (path,) = complete(tmp_path)
    assert (path / f"{file}.safetensors").is_file()
    for part, names in ("model", "abc"), ("optimizer", "xyz"):
        found = read(path, read_manifest(path), part)
        assert sorted(found) == [*names]
        assert all((one == 2).all() for one in found.values())
    assert not list(tmp_path.glob("*.partial"))


def test_a_rank_on_another_disk_writes_nothing_of_a_checkpoint(tmp_path: Path) -> None:
    """Of five ranks the second has no such folder, the fourth one of its own, and the fifth sees it read-only."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "save.py").write_text(f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from alignscale import checkpoint
from alignscale.distributed import joined
checkpoint.LEAST = 1
with joined(torch.device("cpu"), 60.0) as ranks:
    folder = pathlib.Path({str(tmp_path)!r}) / ("shared", "none", "shared", "other", "shared")[ranks.rank]
    if ranks.rank == 3:
        (folder / ".step-000000001.partial").mkdir(parents=True)
    tensors = {{name: checkpoint.Coming.at_hand(torch.full((9,), float(place))) for place, name in enumerate("abcd")}}
    checkpoint.save(folder, 1, {{"model": tensors}}, {{"progress": {{"best": None}}}}, 2, ranks)
""")
    save, shared = f"exec {PYTHON} {tmp_path / 'save.py'}", tmp_path / "shared"
    closed = f"mount --bind {shared} {shared}; mount -o remount,bind,ro {shared}; ! touch {shared}/x && {save}"
    each = f"[ $RANK = 4 ] && exec unshare -Urm sh -c '{closed}'; {save}"
    done = finished(torchrun(5, "--no-python", "bash", "-c", each))
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = complete(tmp_path / "shared")
    assert {one.name for one in path.iterdir()} == {"model.safetensors", "model-2.safetensors", MANIFEST}
    found = read(path, read_manifest(path), "model")
    assert [found[name].tolist() for name in "abcd"] == [[float(place)] * 9 for place in range(4)]
    assert [one.name for one in (tmp_path / "other").iterdir()] == [".step-000000001.partial"]
    assert not (tmp_path / "none").exists()


def at_step_20(
    ranks: int,
    rank: int | str,
    what: str,
    folder: Path,
    *options: str,
    where: str = "wanted.step == 20",
    restarts: int = 0,
) -> subprocess.CompletedProcess[str]:
    """A run in which one of the ranks, or each (``any``), does ``what`` for its part of the batch of step 20."""
    (folder / "bad.py").write_text(f"""
import os, runpy, signal, sys, time
sys.path[:0] = [{str(ROOT / "launch")!r}, {str(ROOT)!r}]
from alignscale.data.examples import DataError, Encoding
from alignscale.distributed import launched
encoded = Encoding.encoded
def bad(self, split, images, wanted):
    if {where} and {rank!r} in (launched().rank, "any"):
        {what}
    return encoded(self, split, images, wanted)
Encoding.encoded = bad
sys.argv[0] = {str(ROOT / "launch/train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    given = [*RUN, f"run.dir={folder / 'run'}", "engine=deepspeed", *options]
    return finished(torchrun(ranks, str(folder / "bad.py"), *given, restarts=restarts))


@pytest.mark.parametrize(
    ("rank", "raised", "last"),
    [
        (1, 'DataError("shard-7.tar: key 0042: found text")', "error: rank 1: shard-7.tar: key 0042: found text"),
        (0, 'DataError("shard-7.tar: key 0042: found text")', "error: rank 0: shard-7.tar: key 0042: found text"),
        (1, 'RuntimeError("in a worker process: no memory")', "RuntimeError: rank 1: in a worker process: no memory"),
        ("any", 'DataError("shard-7.tar: key 0042: found text")', "error: rank "),
        (
            2,
            'OSError(5, "Input/output error", "a.tar")',
            "error: a file could not be read or written: [Errno 5] rank 2:",
        ),
    ],
)
def test_an_error_of_one_rank_in_a_step_ends_all_and_is_said_once(
    tmp_path: Path, rank: int | str, raised: str, last: str
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


@pytest.mark.parametrize("what", ["evaluation", "step"])
def test_a_rank_that_hangs_while_others_in_the_same_phase_wait_for_it_is_named(tmp_path: Path, what: str) -> None:
    """In the evaluation of the 360 test digits, or in the backward pass."""
    where, hangs = "wanted.size == 360", "time.sleep(500)"
    if what == "step":
        where = "wanted.step == 20"
        hangs = "import torch; torch.autograd.backward = torch.Tensor.backward = lambda *_, **__: time.sleep(500)"
    done = at_step_20(3, 1, hangs, tmp_path, "engine.timeout=15", where=where)
    said = re.findall("error: .*", done.stderr)
    assert len(said) == 1, done.stderr[-3000:]
    assert re.search(rf"\(behind the others: rank 1 at step \d+ \({what}\)\)", said[0]), said


def test_bad_data_that_one_rank_alone_has_met_may_be_mended_by_a_restart(tmp_path: Path) -> None:
    mark = str(tmp_path / "mark")
    fails = f"if not os.path.exists({mark!r}): open({mark!r}, 'w').close(); raise DataError('no answer')"
    done = at_step_20(2, 1, fails, tmp_path, restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("error: rank 1: no answer") == 1


def test_a_loss_that_is_not_finite_on_one_rank_alone_ends_all_and_is_said_once(tmp_path: Path) -> None:
    done = at_step_20(3, 1, "images = images.float() * float('nan')", tmp_path)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr[-3000:]
    assert "at step 21" in said[0]
    assert "the images" in said[0]
