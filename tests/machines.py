"""Machines on one machine: each with a network, a host name, an /etc/hosts and processes of its own."""

import subprocess
from contextlib import ExitStack
from pathlib import Path

from launches import children

ROOT = Path(__file__).parents[1]


class Machine(ExitStack):
    """One of some that a switch joins, which the first one has. Like Debian's it takes its own name for 127.0.1.1.

    ``enter`` goes before a command to run it there. All that runs there ends with the block, without a word.
    """

    def __init__(self, folder: Path, first: "Machine | None" = None, number: int = 1) -> None:
        """folder: for its /etc/hosts. number: of its address in 10.94.0.0/24."""
        super().__init__()
        self.address = f"10.94.0.{number}"
        if first is not None:  # the kernel takes its own time to unplug what has ended
            switch = ["nsenter", f"--target={first.pid}", "--net", "ip", "link"]
            self.callback(subprocess.run, [*switch, "delete", f"port{number}"], capture_output=True, check=False)
        kinds = ["--net", "--uts", "--mount", "--pid"]
        begin = ["unshare", *kinds, "--fork", "--kill-child", "--mount-proc", "sh", "-c", "echo; exec sleep infinity"]
        holder = subprocess.Popen(begin, stdout=subprocess.PIPE, text=True)
        self.callback(holder.communicate)
        self.callback(holder.kill)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "\n"
        (self.pid,) = children(holder.pid)
        self.enter = ["nsenter", f"--target={self.pid}", *kinds, f"--wd={ROOT}"]
        hosts = folder / f"hosts.{number}"
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 machine{number}\n")
        if first is None:
            self.run("ip link add eth0 type bridge")
        else:
            wire = f"add port{number} type veth peer name eth0 netns {self.pid}"
            subprocess.run([*switch, *wire.split()], check=True)
            subprocess.run([*switch, "set", f"port{number}", "master", "eth0", "up"], check=True)
        self.run(f"hostname machine{number}; mount --bind {hosts} /etc/hosts; ip link set lo up")
        self.run(f"ip address add {self.address}/24 dev eth0; ip link set eth0 up")

    def run(self, script: str) -> None:
        """Do what a shell's script says there."""
        subprocess.run([*self.enter, "sh", "-ec", script], check=True)
