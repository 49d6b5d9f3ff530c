"""Claims about what tools/show_checkpoint.py exports, by the readers of others: safetensors, DeepSpeed."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from launches import ENVIRONMENT, ROOT, run, torchrun
from run_cases import same, weights
from safetensors.torch import load_file
from warm import PYTHON

from alignscale.checkpoint import complete
from alignscale.engine_zero import VERSION
from alignscale.restore import restored
from tools import show_checkpoint

pytestmark = pytest.mark.distributed


def test_show_checkpoint_reads_what_three_ranks_wrote_and_exports_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["net.width=1024", "net.depth=4", "engine=deepspeed", "engine.zero_stage=3"]
    done = run(3, f"run.dir={tmp_path / 'run'}", "epochs=1", *options)
    assert done.returncode == 0, done.stderr
    path = complete(tmp_path / "run/checkpoints")[-1] / "optimizer.safetensors"
    files = [one.name for one in path.parent.glob("*.safetensors")]
    assert all(
        any(name.endswith(f"{rank}.safetensors") for name in files) for rank in ("model", "optimizer", "-1", "-2")
    ), files
    exported = tmp_path / "weights.safetensors"
    assert show_checkpoint.main([str(tmp_path / "run"), "--export", str(exported)]) == 0
    shown = capsys.readouterr().out
    assert "ranks 3" in shown
    assert "zero_stage 3" in shown
    assert "layers.0.weight.momentum_buffer" in shown
    assert same(load_file(exported), weights(tmp_path / "run"))
    before = path.read_bytes()
    assert show_checkpoint.main([str(tmp_path / "run"), "--export", str(path)]) == 2
    assert "expected a place outside of the checkpoint" in capsys.readouterr().err
    assert path.read_bytes() == before
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    assert show_checkpoint.main([str(tmp_path / "run"), "--export", str(pipe)]) == 2
    assert f"found a folder or device: '{pipe}'" in capsys.readouterr().err
    assert pipe.is_fifo()
    assert show_checkpoint.main([str(tmp_path / "run"), "--export", str(tmp_path / "weights.pt")]) == 2
    assert "weights.pt: expected a name that ends in .safetensors" in capsys.readouterr().err
    of_another = path.with_name("model-2.safetensors")
    for wrong in (path, of_another):
        wrong.write_bytes(wrong.read_bytes()[:-1])
        assert show_checkpoint.main([str(path.parent)]) == 2
        assert f"{wrong}: expected SHA-256" in capsys.readouterr().err
    of_another.unlink()
    assert show_checkpoint.main([str(path.parent)]) == 2
    assert re.search(r"-2\.safetensors: expected SHA-256 \w+, found no file", capsys.readouterr().err)


PLAIN = """
import os, sys
sys.path.insert(0, {root!r})
os.environ["DS_ACCELERATOR"] = "cpu"
from pathlib import Path
import torch
from alignscale.engine_zero import deepspeed, make_ready
from alignscale.restore import restored
make_ready("cpu")
deepspeed.init_distributed("gloo")
torch.manual_seed(5)
images, targets = torch.rand(8, 1, 8, 8), torch.rand(8, 10)
rank = torch.distributed.get_rank()
for name, stage in (("adam", 1), ("adam", 2), ("adam", 3), ("sgd", 1), ("sgd", 2)):
    net = restored(Path({folder!r}, name)).learner.net
    with torch.no_grad():
        for weight in net.parameters():
            weight.zero_()
    weights = net.parameters()
    optimizer = torch.optim.Adam(weights, 0.01) if name == "adam" else torch.optim.SGD(weights, 0.01, momentum=0.9)
    settings = {{
        "train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True,
        "checkpoint": {{"load_universal": True}}, "zero_optimization": {{"stage": stage}},
        "zero_force_ds_cpu_optimizer": False,
    }}
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)
    engine.load_checkpoint({folder!r} + "/for-" + name)
    before = engine.global_steps
    for step in range(4):
        loss = (engine(images[rank::2]) - targets[rank::2]).square().mean()
        engine.backward(loss)
        engine.step()
        whole = loss.detach().clone()
        torch.distributed.all_reduce(whole)
        if rank == 0:
            print("loss", name, before, whole.item() / 2, flush=True)
"""


def train(*options: str) -> subprocess.CompletedProcess[str]:
    small = ["net=mlp", "net.width=32", "net.depth=2", "batch_size=37", "log.progress=false", "threads=1"]
    return subprocess.run(
        [PYTHON, "launch/train.py", *small, *options], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


def test_deepspeed_goes_on_from_a_universal_export(tmp_path: Path) -> None:
    """A plain loop on two ranks, at the stages that its reader knows the optimizer at, as torch alone goes on."""
    torch.manual_seed(5)
    images, targets = torch.rand(8, 1, 8, 8), torch.rand(8, 10)
    expected: dict[str, list[float]] = {}
    for name in ("adam", "sgd"):
        options = [f"run.dir={tmp_path / name}", "epochs=1", f"optim={name}", "optim.lr=0.01"]
        done = train(*options, *(["optim.momentum=0.9"] if name == "sgd" else []))
        assert done.returncode == 0, done.stderr
        assert show_checkpoint.main([str(tmp_path / name), "--export-universal", str(tmp_path / f"for-{name}")]) == 0
        net = restored(tmp_path / name).learner.net
        optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        if name == "adam":
            optimizer = torch.optim.Adam(net.parameters(), 0.01)
        states = load_file(complete(tmp_path / name / "checkpoints")[-1] / "optimizer.safetensors")
        for owner, weight in net.named_parameters():
            optimizer.state[weight] = {
                key.removeprefix(f"{owner}."): one for key, one in states.items() if key.startswith(f"{owner}.")
            }
        expected[name] = []
        for _ in range(4):
            loss = (net(images) - targets).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            expected[name].append(loss.item())
    script = tmp_path / "plain.py"
    script.write_text(PLAIN.format(root=str(ROOT), folder=str(tmp_path)))
    done = subprocess.run(
        torchrun(2, str(script)), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("loss")]
    steps = len(restored(tmp_path / "adam").splits["train"]) // 37 + 1
    assert {int(line[1]) for line in lines} == {steps}
    found = [float(line[2]) for line in lines]
    assert found == pytest.approx(expected["adam"] * 3 + expected["sgd"] * 2, rel=1e-5)


def test_a_universal_export_is_whole_or_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(f"run.dir={tmp_path / 'run'}", "epochs=1", "rule=readout_only", "optim.momentum=0.9").returncode == 0
    for _ in range(2):
        show_checkpoint.main([str(tmp_path / "run"), "--export-universal", str(tmp_path / "out")])
    tag = (tmp_path / "out/latest_universal").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["latest_universal", tag]
    assert f"out/{tag}: expected no checkpoint of that name yet" in capsys.readouterr().err
    (tmp_path / "full.py").write_text(f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
sys.path.insert(0, {str(ROOT)!r})
from tools import show_checkpoint
sys.exit(show_checkpoint.main(sys.argv[1:]))
""")
    command = [PYTHON, "full.py", "run", "--export-universal", "full"]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 2
    assert re.search(r"File too large: '.*fp32.pt'", done.stderr), done.stderr
    assert list((tmp_path / "full").iterdir()) == []


def test_the_universal_format_is_that_of_the_deepspeed_that_trains() -> None:
    assert show_checkpoint.UNIVERSAL["ds_version"] == VERSION
