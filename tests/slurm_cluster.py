"""A real SLURM of three small nodes on this machine, each with a network and a host name of its own.

All daemons and their jobs live in one PID namespace whose first process is ``unshare``: when that ends, however it
does, the kernel ends everything in it, and the network and mount namespaces go with their last process.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

CONF = """\
ClusterName=alignscale
SlurmctldHost=ctl(10.93.0.1)
SlurmctldPort=16917
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={base}/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
EnforcePartLimits=ALL
SlurmdParameters=config_overrides
KillWait=5
MinJobAge=3600
SlurmdTimeout=10
MessageTimeout=10
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd.%n.log
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
NodeName=DEFAULT Port=17101 CPUs=4 RealMemory=4000 Gres=gpu:1 Feature=small State=UNKNOWN
NodeName=node[1-{nodes}] NodeAddr=10.93.0.[11-{last}]
PartitionName=test Nodes=ALL Default=YES MaxTime=60 MaxNodes={nodes} PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""

START = r"""
set -eu
base=$1 nodes=$2
mount -t proc proc /proc
mount --make-rprivate /
mkdir -p /run/netns && mount -t tmpfs none /run/netns
mount --bind $base/hosts /etc/hosts
hostname ctl
ip link set lo up
ip link add br0 type bridge && ip addr add 10.93.0.1/24 dev br0 && ip link set br0 up
munged --key-file=$base/key --socket=$base/munge.sock --pid-file=$base/munged.pid --log-file=$base/log/munged \
    --seed-file=$base/seed --force
slurmctld
for i in $(seq $nodes); do
    ip netns add n$i
    ip -n n$i link set lo up
    ip link add veth$i type veth peer name eth0 netns n$i
    ip link set veth$i master br0 up
    ip -n n$i addr add 10.93.0.$((10 + i))/24 dev eth0
    ip -n n$i link set eth0 up
    unshare --uts nsenter --net=/run/netns/n$i sh -c "hostname node$i; slurmd -N node$i"
done
touch $base/started
exec sleep infinity
"""


class Cluster:
    """The cluster while it runs; ``environment`` makes SLURM's clients talk to it from inside its namespaces."""

    def __init__(self, base: Path, nodes: int = 3) -> None:
        self.base, self.nodes = base, nodes
        for name in ("log", "state", *(f"spool/node{i}" for i in range(1, nodes + 1))):
            (base / name).mkdir(parents=True)
        (base / "key").write_bytes(os.urandom(128))
        (base / "key").chmod(0o600)
        hosts = ["127.0.0.1 localhost", "10.93.0.1 ctl", *(f"10.93.0.{10 + i} node{i}" for i in range(1, nodes + 1))]
        (base / "hosts").write_text("\n".join(hosts) + "\n")
        (base / "gres.conf").write_text("Name=gpu File=/dev/null\n")  # to be asked for; no device is behind it
        (base / "slurm.conf").write_text(CONF.format(base=base, nodes=nodes, last=10 + nodes))
        self.environment = {**os.environ, "SLURM_CONF": str(base / "slurm.conf")}
        with (base / "log/start").open("w") as log:
            self.process = self._start(log)
        try:
            self.until(lambda: (base / "started").exists() and self.idle() == nodes, 60)
        except BaseException:
            self.stop()
            raise

    def _start(self, log: IO[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["unshare", "--fork", "--kill-child", "--pid", "--mount", "--uts", "--net", "--ipc",
             "bash", "-c", START, "cluster", str(self.base), str(self.nodes)],
            env=self.environment, stdout=log, stderr=subprocess.STDOUT, preexec_fn=end_with_parent,
        )  # fmt: skip

    @property
    def first(self) -> Path:
        """The first process of the namespaces, in /proc."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return Path("/proc", children[0])

    def inside(self, *command: str) -> list[str]:
        """The command as on the controller's machine."""
        spaces = ["--pid", "--mount", "--uts", "--net", "--ipc"]
        return ["nsenter", "--target", self.first.name, *spaces, f"--wdns={Path.cwd()}", *command]

    def run(self, *command: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.inside(*command), env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    def idle(self) -> int:
        return self.run("sinfo", "-h", "-N", "-p", "test", "-o", "%t").stdout.split().count("idle")

    def state(self, job: str, key: str = "JobState") -> str:
        words = self.run("scontrol", "-o", "show", "job", job).stdout.split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{key}=")), "")

    def until(self, true: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end or self.process.poll() is not None:
                logs = "\n".join(f"{path}:\n{path.read_text()[-1500:]}" for path in (self.base / "log").iterdir())
                raise TimeoutError(f"waited {seconds} s in vain\n{logs}")
            time.sleep(0.3)

    def processes(self) -> Iterator[Path]:
        """All of its processes, in /proc."""
        space = (self.first / "ns/pid").readlink()
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (path / "ns/pid").readlink() == space:
                    yield path

    def kill_node(self, name: str) -> None:
        """As a machine that loses its power: slurmd, its steps and their processes, all at once with -9."""
        inner = (self.base / f"slurmd.{name}.pid").read_text().strip()
        pids = {path: re.search(r"^NSpid:.*\s(\d+)$", (path / "status").read_text(), re.M) for path in self.processes()}
        (host,) = {(path / "ns/uts").readlink() for path, found in pids.items() if found and found[1] == inner}
        for path in self.processes():
            with suppress(OSError):
                if (path / "ns/uts").readlink() == host:
                    os.kill(int(path.name), signal.SIGKILL)

    def start_node(self, name: str) -> None:
        """Bring a node that was killed back."""
        start = f"hostname {name}; slurmd -N {name}"
        self.run("unshare", "--uts", "nsenter", f"--net=/run/netns/n{name[4:]}", "sh", "-c", start)
        self.until(lambda: self.idle() == self.nodes, 60)

    def stop(self) -> None:
        """End all of it; the kernel does the rest."""
        self.process.kill()
        self.process.wait()


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, be it by -9."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    cluster = Cluster(Path(sys.argv[1]))
    print(cluster.run("sinfo").stdout)
    time.sleep(float(sys.argv[2]))
    cluster.stop()
