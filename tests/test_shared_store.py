"""Claims about torchrun as it comes: its own store is its ranks' too, and stays when they start again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launches import ENVIRONMENT, ROOT, RUN, torchrun, wait_for
from warm import PYTHON

from alignscale import distributed
from alignscale.checkpoint import complete
from alignscale.choices import ConfigError

pytestmark = pytest.mark.distributed
AS_IT_COMES = {name: value for name, value in ENVIRONMENT.items() if name != "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"}


def test_ranks_that_start_again_do_not_hear_what_those_before_them_said(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(f"""
import os, runpy, sys
sys.path[:0] = [{str(ROOT / "launch")!r}, {str(ROOT)!r}]
from alignscale.learner import Learner
update = Learner.update
def broken(self, *given):
    if os.environ["RANK"] == "1":
        raise ArithmeticError("broken in start " + os.environ["TORCHELASTIC_RESTART_COUNT"])
    return update(self, *given)
Learner.update = broken
sys.argv[0] = {str(ROOT / "launch/train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    command = torchrun(2, str(tmp_path / "broken.py"), *RUN, f"run.dir={tmp_path / 'run'}", restarts=1, python=PYTHON)
    done = subprocess.run(command, cwd=ROOT, env=AS_IT_COMES, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert [done.stderr.count(f"rank 1: broken in start {start}") for start in range(2)] == [1, 1], done.stderr[-4000:]


def test_a_signal_to_torchrun_ends_it_without_killing_ranks(tmp_path: Path) -> None:
    options = [*RUN, "epochs=400", "checkpoint.every_steps=10", f"run.dir={tmp_path / 'run'}"]
    command = torchrun(3, "launch/train.py", *options, python=sys.executable)
    with subprocess.Popen(command, cwd=ROOT, env=AS_IT_COMES, stderr=subprocess.PIPE, text=True) as process:
        wait_for(process, lambda: bool(complete(tmp_path / "run/checkpoints")))
        os.kill(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert err.count("stopped by signal 15 after step") == 1, err
    assert "Unable to shutdown" not in err


def test_restarts_on_several_machines_want_a_store_for_each_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of their torchruns counts the starts on its own, so no name tells one start from another."""
    given = {"USE_AGENT_STORE": "True", "MAX_RESTARTS": "1", "RESTART_COUNT": "0"}
    for name, value in given.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --rdzv-backend=c10d"):
        distributed._of_this_start(None)
