"""Two machines on one: networks, host names and /etc/hosts of their own, and a link between them."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
ADDRESSES = ["10.94.0.1", "10.94.0.2"]


@contextmanager
def machines(folder: Path) -> Iterator[list[list[str]]]:
    """What to put before a command to run it on either; each takes its own name for 127.0.1.1, as Debian's do."""
    held: list[subprocess.Popen[str]] = []
    try:
        for _ in ADDRESSES:
            held.append(
                subprocess.Popen(
                    ["unshare", "--net", "--uts", "--mount", "sh", "-c", "echo; exec sleep infinity"],
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            assert held[-1].stdout is not None
            assert held[-1].stdout.readline() == "\n", "namespaces want root"
        enter = [["nsenter", f"--target={one.pid}", "--net", "--uts", "--mount", f"--wd={ROOT}"] for one in held]
        first = enter[0]
        _run([*first, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(held[1].pid)])
        for place, inside in enumerate(enter):
            hosts = folder / f"hosts.{place}"
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 machine{place}\n")
            _run([*inside, "hostname", f"machine{place}"])
            _run([*inside, "mount", "--bind", str(hosts), "/etc/hosts"])
            _run([*inside, "ip", "link", "set", "lo", "up"])
            _run([*inside, "ip", "address", "add", f"{ADDRESSES[place]}/24", "dev", "eth0"])
            _run([*inside, "ip", "link", "set", "eth0", "up"])
        yield enter
    finally:
        for one in held:
            one.kill()
            one.communicate()


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)
