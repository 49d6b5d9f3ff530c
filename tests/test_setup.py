"""tools/setup.sh with a stand-in for Python and pip, so that every path through it takes milliseconds."""

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

# A Python that knows what the script asks of it. PIP_SAYS, PIP_EXITS and PIP_TAKES are what its `pip install` does.
PYTHON = r"""#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
    *sys.version_info*) echo "${VERSION-3.12}" ;;
    *ensurepip*) exit "${ENSUREPIP_EXITS-0}" ;;
    "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *"pip index"*) echo "${INDEX-Available versions: 99.0, 2.13.0+cpu, 2.13.0}"; echo "${INDEX_FAILS-}" >&2 ;;
    *importlib.metadata*) exit 1 ;;
    *"pip install"*) printf '%b\n' "${PIP_SAYS-Installing collected packages: torch}"
                     sleep "${PIP_TAKES-0}"
                     exit "${PIP_EXITS-0}" ;;
esac
"""
UNPACKING = "Installing collected packages: torch"


@dataclass(frozen=True)
class Clone:
    """A clone of the three files that setup.sh reads, whose path has a space."""

    root: Path
    bin: Path

    def program(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        defaults = {"PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHON": str(self.bin / "python3.12")}
        return subprocess.Popen(
            [self.root / "tools/setup.sh", *arguments],
            env={"CALLS": str(self.bin / "calls"), **defaults, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def setup(self, *arguments: str, **environment: str) -> tuple[int, str]:
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def calls(self, what: str) -> list[str]:
        return [line for line in (self.bin / "calls").read_text().splitlines() if what in line]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    root = tmp_path / "a clone"
    (root / "tools").mkdir(parents=True)
    for name in ("tools/setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, root / name)
    made = Clone(root, tmp_path / "bin")
    made.bin.mkdir()
    made.program("python3.12", PYTHON)
    return made


def wait_until_unpacking(clone: Clone) -> None:
    log = clone.root / ".cache/setup.log"
    deadline = time.monotonic() + 30
    while not (log.exists() and UNPACKING in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_unknown_argument_is_refused_with_the_valid_ones(clone: Clone) -> None:
    status, output = clone.setup("everything")
    assert status == 1
    assert "unknown argument 'everything'" in output
    assert "base|all" in output


def test_another_system_than_linux_is_refused(clone: Clone) -> None:
    clone.program("uname", "#!/bin/sh\necho Darwin\n")
    status, output = clone.setup("base")
    assert status == 1
    assert "runs on Linux, and this is Darwin" in output
    assert not (clone.root / ".venv").exists()


@pytest.mark.parametrize(("version", "found"), [("3.10", "3.10"), ("3.13", "3.13"), ("", "does not run")])
def test_another_python_is_refused_with_what_was_found(clone: Clone, version: str, found: str) -> None:
    status, output = clone.setup("base", VERSION=version)
    assert status == 1
    assert f"no Python 3.11 or 3.12; tried {clone.bin}/python3.12 ({found})" in output
    assert not (clone.root / ".venv").exists()


def test_the_first_python_that_runs_is_taken(clone: Clone) -> None:
    clone.program("python3.11", PYTHON)
    clone.program("python3.12", "#!/bin/sh\nexit 127\n")  # what a version manager leaves for a version it has not
    status, output = clone.setup("base", PYTHON="", VERSION="3.11")
    assert status == 0
    assert f"making .venv with Python 3.11 ({clone.bin}/python3.11)" in output


def test_a_missing_venv_module_names_the_debian_package(clone: Clone) -> None:
    status, output = clone.setup("base", ENSUREPIP_EXITS="1")
    assert status == 1
    assert "apt-get install python3.12-venv" in output
    assert not (clone.root / ".venv").exists()


def test_the_cost_is_said_before_pip_starts(clone: Clone) -> None:
    cpu = clone.setup("base")[1]
    assert "about 310 MB to download" in cpu.split("unpacking")[0]
    assert "torch's CPU build" in cpu
    shutil.rmtree(clone.root / ".venv")
    assert "about 2850 MB to download" in clone.setup("base", INDEX="Available versions: 2.13.0, 2.12.1")[1]


def test_versions_come_from_the_constraints(clone: Clone) -> None:
    clone.program("python3.12", PYTHON.replace('echo "$*" >>', 'echo "$* with $PIP_CONSTRAINT" >>'))
    clone.setup("base")
    assert clone.calls("pip install") == ["-m pip install --no-input --no-compile -e . with constraints.txt"]
    assert clone.calls("compileall -q -j") != []


def test_a_second_run_is_up_to_date_and_asks_pip_nothing(clone: Clone) -> None:
    assert clone.setup("all")[0] == 0
    before = clone.calls("pip")
    for mode in ("all", "base"):
        status, output = clone.setup(mode)
        assert status == 0
        assert "setup: .venv is up to date" in output
    assert clone.calls("pip") == before


def test_the_extras_are_added_to_the_base(clone: Clone) -> None:
    clone.setup("base")
    status, output = clone.setup("all")
    assert status == 0
    assert "made anew" not in output
    assert "-e .[deepspeed,dev,docs,slurm,stream" in clone.calls("pip install")[-1]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(clone: Clone, name: str) -> None:
    clone.setup("base")
    with (clone.root / name).open("a") as file:
        file.write("\n# changed\n")
    assert "installing alignscale" in clone.setup("base")[1]
    assert "up to date" in clone.setup("base")[1]


def test_ffcv_is_left_out_with_the_reason_and_the_remedy(clone: Clone) -> None:
    clone.program("pkg-config", "#!/bin/sh\nexit 1\n")
    _, output = clone.setup("all")
    assert "FFCV is left out: it is built from source, which needs" in output
    assert "apt-get install" in output
    assert "libopencv-dev libturbojpeg0-dev" in output
    assert "ffcv" not in clone.calls("pip install")[-1]


def test_ffcv_is_installed_where_it_can_be_built(clone: Clone, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    clone.program("python3.12", PYTHON.replace("case", f'case "$*" in *sysconfig*) echo "{tmp_path}" ;; esac\ncase', 1))
    clone.program("pkg-config", "#!/bin/sh\nexit 0\n")
    clone.program("c++", "#!/bin/sh\nexit 0\n")
    _, output = clone.setup("all")
    assert "left out" not in output
    assert "ffcv" in clone.calls("pip install")[-1]


def test_an_index_out_of_reach_is_said_before_anything_changes(clone: Clone) -> None:
    status, output = clone.setup("base", INDEX="", INDEX_FAILS="NewConnectionError('connection refused')")
    assert status == 1
    assert "no package index could be reached" in output
    assert not clone.calls("pip install")


def test_a_failure_before_unpacking_keeps_what_works(clone: Clone) -> None:
    clone.setup("base")
    status, output = clone.setup("all", PIP_SAYS="ReadTimeoutError", PIP_EXITS="1")
    assert status == 1
    assert "no package index could be reached" in output
    assert "up to date" in clone.setup("base")[1]


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ("ERROR: [Errno 28] No space left on device", "the disk is full"),
        ("  ERROR: Failed building wheel for ffcv", "ffcv did not build"),
        ("ERROR: something new", "something new"),
    ],
)
def test_a_failure_is_explained_and_the_next_run_starts_afresh(clone: Clone, says: str, reason: str) -> None:
    status, output = clone.setup("base", PIP_SAYS=f"{UNPACKING}\n{says}", PIP_EXITS="1")
    assert status == 1
    assert reason in output
    assert ".cache/setup.log" in output or "disk" in output
    status, output = clone.setup("base")
    assert status == 0
    assert "made anew: an earlier set-up stopped half way" in output


def test_too_little_room_is_said_before_pip_starts(clone: Clone) -> None:
    clone.program("df", "#!/bin/sh\necho header\necho disk 1 1 512000 1% /\n")
    status, output = clone.setup("base")
    assert status == 1
    assert "500 MB free and needs 1400 MB" in output
    assert not clone.calls("pip install")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_is_repaired_by_the_next(clone: Clone, number: signal.Signals) -> None:
    process = clone.start("base", PIP_TAKES="60")
    wait_until_unpacking(clone)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert number is signal.SIGKILL or "stopped half way" in output
    status, output = clone.setup("base")
    assert status == 0
    assert "made anew: an earlier set-up stopped half way" in output


def test_two_runs_at_once_do_not_meet(clone: Clone) -> None:
    first = clone.start("base", PIP_TAKES="60")
    wait_until_unpacking(clone)
    assert "another set-up of this clone is running" in clone.setup("base")[1]
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=30)


@pytest.mark.parametrize("damage", ["moved", "broken", "other version"])
def test_an_environment_that_cannot_work_is_made_anew(clone: Clone, damage: str, tmp_path: Path) -> None:
    clone.setup("base")
    environment = {}
    reason = {"moved": f"it was made in {clone.root}", "broken": "its Python does not run"}.get(damage, "it has Python")
    if damage == "moved":
        clone = Clone(clone.root.rename(tmp_path / "moved"), clone.bin)
    elif damage == "broken":
        (clone.root / ".venv/bin/python").unlink()
    else:
        other = clone.program("python3.11", PYTHON.replace("VERSION-3.12", "OTHER-3.11"))
        environment["PYTHON"] = str(other)
    status, output = clone.setup("base", **environment)
    assert status == 0
    assert f"made anew: {reason}" in output
    assert "up to date" in clone.setup("base", **environment)[1]
