"""Claims about ranks that are not alike: other options or files on another machine, and work that takes long on one."""

from pathlib import Path

import pytest
from data_cases import image_files, write_image_folder
from launches import ROOT, RUN, finished, result, torchrun

from alignscale.results import read_result

pytestmark = pytest.mark.distributed
SCRIPT = f"""
import os, runpy, sys, time
sys.path[:0] = [{str(ROOT / "launch")!r}, {str(ROOT)!r}]
rank = os.environ["RANK"]
sys.argv[0] = {str(ROOT / "launch/train.py")!r}
EXTRA
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launched(folder: Path, extra: str, *options: str) -> tuple[int, str]:
    (folder / "script.py").write_text(SCRIPT.replace("EXTRA", extra))
    done = finished(torchrun(2, str(folder / "script.py"), *RUN, f"run.dir={folder / 'run'}", *options))
    return done.returncode, done.stderr


def test_other_options_on_another_machine_are_refused(tmp_path: Path) -> None:
    code, said = launched(tmp_path, 'sys.argv += ["seed=" + rank, "threads=" + str(1 + int(rank))]')
    assert code != 0
    assert said.count("error: expected the same options on all ranks, found on rank 0 -> on rank 1: seed: 0 -> 1;") == 1
    assert not (tmp_path / "run").exists()
    code, said = launched(tmp_path, 'sys.argv += ["parallel.width=" + str(1 + int(rank))]')
    assert code != 0
    assert said.count("on rank 0 -> on rank 1: parallel.width: 1 -> 2;") == 1


def test_other_files_on_another_machine_are_refused(tmp_path: Path) -> None:
    for rank in range(2):
        write_image_folder(tmp_path / f"{rank}/images")
    next(image_files(tmp_path / "1/images", "train")).unlink()
    options = ["data=imagefolder", "data.root=images", "data.size=8", "batch_size=4"]
    code, said = launched(tmp_path, f'os.chdir({str(tmp_path)!r} + "/" + rank)', *options)
    assert code != 0
    assert said.count("error: expected the same data on all ranks, found on rank 0 -> on rank 1: ") == 1, said[-3000:]


def test_a_run_of_a_grid_that_diverges_is_known_where_the_first_rank_alone_sees_its_folder(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    script = SCRIPT.replace("launch/train.py", "launch/compare.py")
    (tmp_path / "script.py").write_text(script.replace("EXTRA", f'os.chdir({str(tmp_path)!r} + "/" + rank)'))
    words = ["net=mlp", "compare.rules=[backprop,align_ada]", "compare.widths=[8]", "compare.seeds=[0]", "epochs=1"]
    words += ["compare.folder=grid", "optim.lr=1e30", "log.progress=false", "log.tensorboard=false"]
    for _ in range(2):  # and again, when both have diverged before
        done = finished(torchrun(2, str(tmp_path / "script.py"), *words))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("diverged: ") == 2
        runs = read_result(tmp_path / "0/grid/result.json")["runs"]
        assert [run["diverged_at"] is None for run in runs] == [False, False]
    assert not (tmp_path / "1/grid/result.json").exists()


def test_reading_data_may_take_longer_than_a_rank_waits_for_another(tmp_path: Path) -> None:
    """Both ranks read for 25 s, and none waits for the other more than 15."""
    slow = """
from alignscale import prepare
load = prepare.load
prepare.load = lambda config: (time.sleep(25), load(config))[1]"""
    code, said = launched(tmp_path, slow, "engine=deepspeed", "engine.timeout=15", "epochs=1")
    assert code == 0, said[-3000:]
    assert result(tmp_path / "run")["steps"] == 39


def test_a_script_that_trains_may_take_longer_than_a_rank_waits_for_another(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}]
import torch
from alignscale.choices import DeepSpeedConfig, SGDConfig
from alignscale.distributed import joined
from alignscale.learner import Learner
from alignscale.parallel import Mesh
with joined(torch.device("cpu"), 15.0) as ranks:
    learner = Learner("mlp", (1, 4, 4), 2, optim=SGDConfig(lr=0.01), engine=DeepSpeedConfig(), mesh=Mesh(ranks, ranks))
    forward = learner.rule.forward
    learner.rule.forward = lambda batch: (time.sleep(1.5), forward(batch))[1]
    learner.fit(torch.rand(40, 1, 4, 4), torch.arange(40) % 2, 8, 20)
print("done")
""")
    done = finished(torchrun(2, str(tmp_path / "script.py")))
    assert (done.returncode, done.stdout.count("done")) == (0, 2), done.stderr[-3000:]
