"""Claims about the package as a library: its public names, and the README's example as a script and in a notebook."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import alignscale

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
(EXAMPLE,) = [block for block in BLOCKS if "from alignscale import Learner" in block]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


def check(printed: str) -> None:
    """The two lines that the example prints."""
    scores, cosines = (ast.literal_eval(line) for line in printed.strip().splitlines())
    assert scores["accuracy"] > 0.75
    assert scores["top5"] > 0.95
    assert len(cosines) == 3
    assert 0.4 < min(cosines) <= max(cosines) == pytest.approx(1.0, abs=1e-6)  # the readout's update is backprop's


def test_the_readmes_example_is_about_ten_lines() -> None:
    assert len(EXAMPLE.strip().splitlines()) <= 12


def test_the_readmes_example_runs_as_a_script(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(EXAMPLE)
    done = run(sys.executable, str(tmp_path / "example.py"))
    assert (done.returncode, done.stderr) == (0, "")
    check(done.stdout)


def test_the_readmes_example_runs_in_a_notebook(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(EXAMPLE)])  # type: ignore[no-untyped-call]
    nbformat.write(notebook, tmp_path / "example.ipynb")  # type: ignore[no-untyped-call]
    done = run(sys.executable, "-m", "jupyter", "execute", "--inplace", str(tmp_path / "example.ipynb"))
    assert done.returncode == 0, done.stderr
    (cell,) = json.loads((tmp_path / "example.ipynb").read_text())["cells"]
    assert {output["output_type"] for output in cell["outputs"]} == {"stream"}
    check("".join(text for output in cell["outputs"] for text in output["text"]))


def test_a_run_in_a_notebook_can_be_stopped_and_gone_on_with(tmp_path: Path) -> None:
    """A kernel's interrupt is SIGINT: the run saves itself, and the next cell goes on."""
    first = f"""
import pathlib, signal, threading, time
from alignscale.choices import MLPConfig, SGDConfig, SyntheticConfig
from alignscale.config import LogConfig, RunConfig, TrainConfig
from alignscale.interrupts import Interrupted
from alignscale.rules import RULES
from alignscale.train import train
config = TrainConfig(
    rule=RULES["align_ada"].options(name="align_ada"), net=MLPConfig(width=16), optim=SGDConfig(lr=0.01), epochs=40,
    data=SyntheticConfig(shape=[1, 4, 4], train=400, test=20), run=RunConfig(dir={str(tmp_path / "run")!r}),
    batch_size=10, log=LogConfig(progress=False, every_steps=1),
)
rows = pathlib.Path({str(tmp_path / "run/metrics.jsonl")!r})
def interrupt():
    while not (rows.exists() and rows.read_text().count("train") > 100):
        time.sleep(0.01)
    signal.raise_signal(signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    train(config, lambda line: None)
except Interrupted as stopped:
    print("saved" if "and a checkpoint" in str(stopped) else stopped)
"""
    cells = [nbformat.v4.new_code_cell(code) for code in (first, "print(train(config, print)['runs'][0]['steps'])")]  # type: ignore[no-untyped-call]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "run.ipynb")  # type: ignore[no-untyped-call]
    done = run(sys.executable, "-m", "jupyter", "execute", "--inplace", str(tmp_path / "run.ipynb"))
    assert done.returncode == 0, done.stderr
    outputs = [
        "".join(text for output in cell["outputs"] for text in output["text"])
        for cell in json.loads((tmp_path / "run.ipynb").read_text())["cells"]
    ]
    assert "saved" in outputs[0]
    assert "resumed after step" in outputs[1]
    assert outputs[1].strip().endswith("1600")


def test_public_names_are_few_and_each_is_documented() -> None:
    assert len(alignscale.__all__) <= 12
    for name in alignscale.__all__:
        assert getattr(alignscale, name).__doc__
    with pytest.raises(AttributeError, match="Learner"):
        _ = alignscale.learn  # type: ignore[attr-defined]


def test_the_package_is_typed_and_reading_a_configuration_needs_no_torch() -> None:
    assert (ROOT / "alignscale/py.typed").exists()
    code = "import sys, alignscale.validation; from alignscale import MLPConfig; sys.exit('torch' in sys.modules)"
    assert run(sys.executable, "-c", code).returncode == 0
