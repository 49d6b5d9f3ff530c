"""What a run ran on: versions, hardware and the state of the source, for versions.json and reports."""

import ctypes
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of glibc's mallopt
PACKAGES = ("alignscale", "torch", "numpy", "hydra-core", "safetensors")


def versions() -> dict[str, str]:
    """Python's and the packages' versions, and the commit of the source where it is a git checkout."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["torch"] = torch.__version__
    return {**found, "source": _commit()}


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads in use, device and memory (GiB)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "memory_gib": round(memory, 1),
    }


def keep_freed_memory() -> None:
    """Tell glibc to keep the memory that a step frees for the next step, instead of returning it to the kernel.

    A step frees and allocates the same large tensors again and again, and fresh pages cost up to a third of a step on
    a CPU. The process's memory then stays at its peak. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, -1)
        mallopt(MMAP_MAX, 0)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _commit() -> str:
    """Short commit, with ``+`` where tracked files differ from it; ``unknown`` outside a checkout."""
    try:
        command = [
            "git",
            "-C",
            str(Path(__file__).parent),
            "describe",
            "--always",
            "--dirty=+",
            "--abbrev=12",
            "--exclude=*",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
