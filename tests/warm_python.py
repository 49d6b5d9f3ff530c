"""Starts of Python that take no seconds: a process that has imported what every run imports, and forks for each start.

What is imported is torch and other packages, never the code under test; a fork then runs the script as Python does:
arguments, environment, folder, file systems, streams, signals and exit status are those of the command.
"""

import array
import atexit
import contextlib
import ctypes
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

COMMON = ["torch", "torch._dynamo", "sklearn.datasets", "matplotlib.pyplot", "hydra", "omegaconf", "jinja2", "yaml"]
COMMON += ["tensorboard.summary.writer.record_writer"]
PACKAGES = {"run": [*COMMON, "torch.distributed.run"], "rank": [*COMMON, "deepspeed"]}
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1
SPACES = {"user": 0x10000000, "mnt": 0x00020000}
"""Namespaces of the command that a fork enters, so that it sees the same file systems, and their flags."""


def connect(server: socket.socket, words: list[str]) -> None:
    """Connect to the server that ``words`` start, when it has imported everything; the first client starts it."""
    place = Path(words[2])
    with contextlib.suppress(FileExistsError), place.with_name("log").open("xb") as log:
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    for _ in range(2400):
        try:
            return server.connect(str(place))
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.05)
    sys.exit(f"{place}: no server after two minutes: {place.with_name('log').read_text()[-2000:]}")


def client(words: list[str]) -> int:
    """Ask for a fork with this process's arguments, environment, folder and streams; end as it ends."""
    pid, waiting = 0, []
    if str(Path("/proc/self/ns/mnt").readlink()) != words[-1] and not Path(words[2]).exists():
        os.execv(words[0], [words[0], *sys.argv[1:]])  # a server that started here could serve no one elsewhere

    def forward(number: int, frame: Any) -> None:
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        else:
            waiting.append(number)

    for number in FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    request = {"argv": sys.argv[1:], "cwd": str(Path.cwd()), "env": dict(os.environ), "umask": os.umask(0)}
    request["ignored"] = [one for one in FORWARDED if signal.getsignal(one) is signal.SIG_IGN]
    with socket.socket(socket.AF_UNIX) as server:
        connect(server, words)
        spaces = [os.open(f"/proc/self/ns/{space}", os.O_RDONLY) for space in SPACES]
        server.sendmsg([b"+"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2, *spaces]))])
        server.sendall(json.dumps(request).encode() + b"\n")
        answers = server.makefile()
        pid = int(answers.readline())
        for number in waiting:
            os.kill(pid, number)
        status = int(answers.readline() or 1)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    return os.waitstatus_to_exitcode(status)


def serve(place: str, tests: int) -> dict[str, Any]:
    """Fork for each client until the process of the tests ends; returns the request in each fork."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen(64)
    events = selectors.DefaultSelector()
    events.register(listener, selectors.EVENT_READ, None)
    events.register(os.pidfd_open(tests), selectors.EVENT_READ, "end")
    clients: dict[int, tuple[socket.socket, int]] = {}  # of the process
    while True:
        for key, _ in events.select():
            if key.data == "end":
                sys.exit(0)
            if key.data is None:
                connection, _ = listener.accept()
                _, control, _, _ = connection.recvmsg(1, socket.CMSG_LEN((3 + len(SPACES)) * 4))
                files = array.array("i", control[0][2])
                request = json.loads(connection.makefile().readline())
                pid = os.fork()
                if pid == 0:
                    for stream, own in enumerate(files[:3]):
                        os.dup2(own, stream)
                    enter(files[3:])
                    events.close()
                    for one in (listener, connection, *(one for one, _ in clients.values())):
                        one.close()
                    os.closerange(3, 64)
                    return request
                for file in files:
                    os.close(file)
                connection.sendall(f"{pid}\n".encode())
                ended = os.pidfd_open(pid)
                clients[pid] = (connection, ended)
                events.register(connection, selectors.EVENT_READ, pid)
                events.register(ended, selectors.EVENT_READ, -pid)
            elif key.data > 0:  # the client has gone: killed, or it would wait
                os.kill(key.data, signal.SIGKILL)
                events.unregister(key.fileobj)
            else:
                connection, ended = clients.pop(-key.data)
                _, status = os.waitpid(-key.data, 0)
                with contextlib.suppress(OSError):
                    connection.sendall(f"{status}\n".encode())
                with contextlib.suppress(KeyError, ValueError):
                    events.unregister(connection)
                events.unregister(ended)
                connection.close()
                os.close(ended)


def enter(spaces: "array.array[int]") -> None:
    """Go to the namespaces of the command, where they are not those of the server."""
    libc = ctypes.CDLL(None, use_errno=True)
    for (space, flag), theirs in zip(SPACES.items(), spaces, strict=True):
        ours = Path(f"/proc/self/ns/{space}").stat()
        if ours.st_ino != os.fstat(theirs).st_ino and libc.setns(theirs, flag):
            raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}", space)


def run(request: dict[str, Any]) -> None:
    """Be the Python of a request."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setpgid(0, 0)  # signals to the client's group come by the client alone
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else signal.SIG_DFL)
    if signal.SIGINT not in request["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["env"])
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    argv = request["argv"]
    unbuffered = "PYTHONUNBUFFERED" in os.environ
    while argv[0] in ("-u", "-I"):
        unbuffered, argv = unbuffered or argv[0] == "-u", argv[1:]
    sys.stdout.reconfigure(write_through=unbuffered, line_buffering=unbuffered or os.isatty(1))  # type: ignore[union-attr]
    del sys.modules["__main__"].__file__
    if argv[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *argv[2:]], ""
        exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
    elif argv[0] == "-m":
        sys.argv, sys.path[0] = argv[1:], str(Path.cwd())
        sys.modules.pop(argv[1], None)  # or runpy warns of it
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = argv, str(Path(argv[0]).resolve().parent)
        runpy.run_path(argv[0], run_name="__main__")


def finish(request: dict[str, Any]) -> None:
    """``run``, and end as Python ends, but for taking apart what was imported, which takes seconds in a fork."""
    status, interrupted = 0, False
    try:
        run(request)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as problem:
        sys.excepthook(type(problem), problem, problem.__traceback__)
        status, interrupted = 1, isinstance(problem, KeyboardInterrupt)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    import importlib

    for package in PACKAGES[sys.argv[2]]:
        importlib.import_module(package)
    gc.freeze()  # so that a collection in a fork does not copy all of this
    finish(serve(sys.argv[1], int(sys.argv[3])))
