"""Claims about tests/warm_python.py: to the command that starts it, it is Python."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from warm import PYTHON, program

SCRIPT = """
import os, sys
print(sys.argv, os.getcwd(), os.environ["X"], sys.stdin.read(), __name__, sys.path[0])
print("wrong", file=sys.stderr)
"""


def both(*words: str, **options: object) -> list[tuple[int, str, str]]:
    """Status, output and errors of Python and of what stands for it."""
    found = []
    for python in (sys.executable, PYTHON):
        done = subprocess.run([python, *words], capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload]
        found.append((done.returncode, done.stdout, done.stderr.splitlines()[-1:]))
    return found


def test_a_script_has_its_arguments_environment_folder_and_streams(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    for words in (("-c", SCRIPT), (str(path),), ("-u", "script.py")):
        own, warm = both(*words, "a", "b c", cwd=tmp_path, env={**os.environ, "X": "5"}, input="given")
        assert own == warm
        assert "given __main__" in own[1]


@pytest.mark.parametrize(
    "code",
    [
        "raise SystemExit(3)", "raise SystemExit('why')", "raise SystemExit", "1 / 0", "raise KeyboardInterrupt",
        "import os; os.kill(os.getpid(), 9)", "import atexit; atexit.register(print, 'last')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()",
    ],
)  # fmt: skip
def test_it_ends_as_python_does(code: str) -> None:
    own, warm = both("-c", code)
    assert own == warm


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGKILL])
def test_signals_to_the_command_reach_the_script_and_a_kill_takes_it_along(number: signal.Signals) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with subprocess.Popen(
        [PYTHON, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        script = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(30) == -number
    deadline = time.monotonic() + 10
    while Path(f"/proc/{script}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_sees_the_file_systems_of_the_command(tmp_path: Path) -> None:
    code = "import os, sys; print(os.listdir(sys.argv[1]))"
    script = f'mount -t tmpfs none "$1" && touch "$1/inside" && exec "$0" -c "{code}" "$1"'
    fresh = program("run")
    for python in (sys.executable, PYTHON, fresh):
        given = ["unshare", "-Urm", "sh", "-c", script, python, str(tmp_path)]
        assert subprocess.run(given, capture_output=True, text=True, check=True).stdout == "['inside']\n"
    assert not list(tmp_path.iterdir())
    # a server that had started in there could serve no one out here
    assert subprocess.run([fresh, "-c", "print(1)"], capture_output=True, text=True, check=True).stdout == "1\n"


def test_the_code_under_test_is_not_imported_before() -> None:
    code = "import sys; print([name for name in sys.modules if name.startswith(('alignscale', '_options'))])"
    assert both("-c", code)[1][1] == "[]\n"
