"""Claims about jobs that need no scheduler: processes here, this process, staging, Hydra's launcher, mistakes."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _stage import copy_of, copy_once
from data_cases import digit_shards, pack_digits, write_image_folder
from run_cases import weights
from warm import PYTHON

ROOT = Path(__file__).parents[1]
NET = ["net=mlp", "net.width=16", "net.depth=2", "epochs=1", "log.progress=false", "threads=1"]
ENVIRONMENT = {**os.environ, "WANDB_API_KEY": "not-for-any-file"}


def submit(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    given = [f"cluster.folder={folder / 'jobs'}", f"run.root={folder / 'runs'}", *NET, *options]
    return run("launch/submit.py", *given, **variables)


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, *command], cwd=ROOT, env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip


def run_of(folder: Path) -> Path:
    (found,) = (path.parent for path in (folder / "runs").glob("*/result.json"))
    return found


def check_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.distributed
def test_two_processes_here_and_this_process_train_alike(tmp_path: Path) -> None:
    done = submit(tmp_path / "debug", "cluster=debug")
    assert done.returncode == 0, done.stdout + done.stderr
    two = ["cluster=local", "cluster.tasks_per_node=2", "engine=deepspeed", "engine.zero_stage=3", "engine.timeout=150"]
    done = submit(tmp_path / "local", *two)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks, ZeRO 3" in done.stdout
    check_close(weights(run_of(tmp_path / "local")), weights(run_of(tmp_path / "debug")))


def test_a_folder_of_another_run_is_refused_and_a_damaged_result_is_made_again(tmp_path: Path) -> None:
    given = ["cluster=debug", f"run.dir={tmp_path / 'run'}", "net=mlp", "net.width=4", "epochs=1"]
    assert submit(tmp_path, *given).returncode == 0
    other = submit(tmp_path, *given, "seed=3")
    assert other.returncode == 2
    assert "seed: 0 -> 3" in other.stderr
    whole = (tmp_path / "run/result.json").read_text()
    (tmp_path / "run/result.json").write_text(whole[:100])
    again = submit(tmp_path, *given)
    assert "1 runs: 1 to submit, 0 finished" in again.stdout
    assert json.loads((tmp_path / "run/result.json").read_text())["runs"] == json.loads(whole)["runs"]


def test_a_failed_job_ends_with_its_status_and_a_sweep_reports_the_others(tmp_path: Path) -> None:
    done = submit(
        tmp_path, "cluster=local", "cluster.concurrent=2", "optim.lr=0.1,1e30", "cluster.sweep=" + str(tmp_path)
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "the loss is not finite at step" in done.stderr
    runs = json.loads((tmp_path / "result.json").read_text())["runs"]
    assert [one["diverged_at"] is None for one in runs] == [True, False]


def beton(folder: Path) -> list[str]:
    pack_digits(folder, "--ffcv")
    options = ["data=ffcv", "data.size=8", "data.workers=1"]
    return [*options, f"data.path={folder / 'train.beton'}", f"data.test_path={folder / 'test.beton'}"]


def images(folder: Path) -> list[str]:
    write_image_folder(folder)
    return ["data=imagefolder", f"data.root={folder}", "data.size=8", "batch_size=4"]


def cached(folder: Path) -> list[str]:
    options = ["jacobian=gates", f"jacobian.dir={folder}"]
    made = run("tools/cache_jacobian.py", *NET, *options)
    assert made.returncode == 0, made.stderr
    return options


def spoil(folder: Path) -> None:
    """Zeros in place of what every file holds, with the same size and times."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        about = path.stat()
        path.write_bytes(bytes(about.st_size))
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.parametrize("make", [digit_shards, cached, pytest.param(beton, marks=pytest.mark.ffcv)])
def test_data_are_read_from_a_nodes_own_disk(tmp_path: Path, make: Callable[[Path], list[str]]) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    options = make(shared)
    for source in {shared, *shared.glob("*.beton")}:
        copy_once(source, copy_of(source, own), "earlier")
    spoil(shared)  # a run that read these would fail
    done = submit(tmp_path, "cluster=debug", *options, f"cluster.stage={own}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "staged" not in done.stderr
    assert run_of(tmp_path).is_dir()


def test_data_are_copied_to_a_nodes_own_disk(tmp_path: Path) -> None:
    options = images(tmp_path / "shared")
    missing = submit(tmp_path, "cluster=debug", *options, "cluster.stage=$NO_SUCH_FOLDER/own")
    assert missing.returncode == 2
    assert "cluster.stage=$NO_SUCH_FOLDER/own: expected variables that the node has" in missing.stderr
    done = submit(tmp_path, "cluster=debug", *options, "cluster.stage=$NODE_DISK/own", NODE_DISK=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "own").rglob("*.png"))) == len(list((tmp_path / "shared").rglob("*.png"))) > 0


def test_a_copy_is_made_again_when_the_data_change_and_half_of_one_is_not_used(tmp_path: Path) -> None:
    source, copy = tmp_path / "shared", tmp_path / "own/copy"
    write_image_folder(source)
    half = copy.with_name("copy.partial")
    half.mkdir(parents=True)
    (half / "left by a killed job").touch()
    for job in ("first", "second"):
        copy_once(source, copy, job)
        names = {path.relative_to(source) for path in source.rglob("*")}
        assert {path.relative_to(copy) for path in copy.rglob("*")} == names
        next(source.rglob("*.png")).unlink()
        copy_once(source, copy, job)  # a second rank of the job does not look again
        assert {path.relative_to(copy) for path in copy.rglob("*")} == names


def test_a_damaged_cache_ends_a_job_as_it_ends_a_run(tmp_path: Path) -> None:
    options = cached(tmp_path / "cache")
    spoil(tmp_path / "cache")
    done = submit(tmp_path, "cluster=debug", *options)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "expected a cache's manifest" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_without_room_for_the_data_is_named(tmp_path: Path) -> None:
    options = images(tmp_path / "shared")
    (tmp_path / "own").write_text("a file where the folder would be")
    done = submit(tmp_path, "cluster=debug", *options, f"cluster.stage={tmp_path / 'own'}")
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"cluster.stage={tmp_path / 'own'}: expected a disk with room for" in done.stderr
    assert not (tmp_path / "runs/result.json").exists()


def test_hydras_own_sweep_runs_as_jobs_of_submitit(tmp_path: Path) -> None:
    sweep = ["--multirun", "hydra/launcher=submitit_local", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    done = run("launch/train.py", *sweep, f"run.root={tmp_path / 'runs'}", *NET)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 2
    assert len(list((tmp_path / "sweep/.submitit").glob("*/*_result.pkl"))) == 2


def test_a_secret_of_the_environment_is_in_no_file(tmp_path: Path) -> None:
    assert submit(tmp_path, "cluster=local").returncode == 0
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not any(b"not-for-any-file" in content for content in written)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["cluster=nowhere"], "cluster=nowhere: expected one of debug, local, slurm, or the path of a preset's .yaml"),
        (["cluster=local", "cluster.node=2"], "options of cluster: executor, nodes, tasks_per_node"),
        (["cluster=local", "cluster.nodes=2"], "cluster.nodes=2: expected 1 with the executor local"),
        (["cluster=local", "cluster.concurrent=0"], "cluster.concurrent=0: expected 1 or more"),
        (["cluster=debug", "cluster.tasks_per_node=2"], "expected 1 with the executor debug; cluster=local"),
        (["cluster=local", "net.widht=3"], "net.width"),
        (["cluster=local", "resume=never"], "resume=never: expected auto"),
        (["cluster=local", "seed=1,1"], "found the same run twice"),
        (["cluster=local", "cluster.setup=['export WANDB_API_KEY=abc']"], "export WANDB_API_KEY before the command"),
        (["cluster=local", "cluster.srun=['--export=ALL,HF_TOKEN=abc']"], "cluster.srun: expected no secret"),
        (["cluster=local", "cluster.sbatch={export:'DB_PASSWORD=abc'}"], "cluster.sbatch: expected no secret"),
    ],
)
def test_a_mistake_ends_with_one_line_and_nothing_is_written(tmp_path: Path, options: list[str], message: str) -> None:
    done = submit(tmp_path, *options)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.iterdir())
