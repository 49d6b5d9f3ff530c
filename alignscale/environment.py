"""What a run ran on (versions, hardware, the state of the source), and torch's settings while it runs."""

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignscale.choices import ConfigError

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of glibc's mallopt
PACKAGES = ("alignscale", "numpy", "hydra-core", "safetensors")
SUMMED = {torch.float32, torch.bfloat16, torch.float16}
"""What the GPU kernels read and write; they sum in fp32."""


def versions() -> dict[str, str]:
    """Python's and the packages' versions, and the commit of the source where it is a git checkout."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "source": _git("describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*") or "unknown"}


def source() -> dict[str, Any]:
    """The checkout that the package is imported from: commit, branch and changed files; None outside of one."""
    changed = _git("status", "--porcelain")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "branch": _git("rev-parse", "--abbrev-ref", "HEAD"),
        "changed": None if changed is None else changed.splitlines(),
    }


def source_diff() -> str:
    """What tracked files of that checkout differ in from its commit, as git shows it; empty for nothing."""
    return _git("diff", "HEAD") or ""


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads in use, device and memory (GiB)."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": next(names, platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "memory_gib": round(memory, 1),
    }


def available_memory(device: torch.device) -> int:
    """Bytes that can be had without swapping, the kernel's file cache counted; on a GPU those that are free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].removesuffix("kB"))


def device_called(name: str) -> torch.device:
    """``auto`` (a GPU where there is one), or a device of torch's. Raises ConfigError where this machine has none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as problem:
        found = str(problem).splitlines()[0]
        raise ConfigError(f"device={name}: expected auto or cpu, or a device of this machine, found: {found}") from None
    return torch.device(name)


def gpu_kernels(*tensors: Tensor) -> Any:
    """alignscale/kernels.py where there is Triton, and all tensors are on a GPU in numbers that it reads; else None."""
    return _kernels() if all(one.is_cuda and one.dtype in SUMMED for one in tensors) else None


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("alignscale.kernels") if importlib.util.find_spec("triton") else None


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Of a GPU, to record on; caches have their own of another priority, which torch takes from others."""
    return torch.cuda.Stream(device)


def out_of_memory(problem: BaseException) -> bool:
    """Whether the memory of this machine, or of its GPU, was too small."""
    return isinstance(problem, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(problem)


def take_gpu(local: int, ranks: int) -> None:
    """Make a GPU that of this process, rank ``local`` of this machine's. Raises ConfigError on each if it sees too few.

    ranks: of this machine.
    """
    seen = torch.cuda.device_count()
    if max(local + 1, ranks) > seen:
        raise ConfigError(
            f"device=cuda: expected a GPU for each of the {ranks} ranks of this machine, found {seen} that rank "
            f"{local} sees; start as many ranks as GPUs, and let each see all of them (with SLURM --gpus-per-node)"
        )
    torch.cuda.set_device(local)


def keep_freed_memory() -> None:
    """Tell glibc to keep the memory that a step frees for the next step, instead of returning it to the kernel.

    A step frees and allocates the same large tensors again and again, and fresh pages cost up to a third of a step on
    a CPU. The process's memory then stays at its peak. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, -1)
        mallopt(MMAP_MAX, 0)


def _git(*arguments: str) -> str | None:
    """What git says of the package's checkout; None outside one."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip("\n")


@contextmanager
def torch_settings(threads: int, deterministic: bool) -> Iterator[None]:
    """torch's number of threads (0: its own), and with ``deterministic`` the same bits each time; as before after it.

    Deterministic: one thread unless ``threads`` says otherwise, only algorithms that always sum in the same order, no
    search for the fastest one, no TF32. On a GPU it has to be set before CUDA starts.
    """
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (torch.get_num_threads(), cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, cuda.allow_tf32)
    empty: Any = torch.utils.deterministic
    strict, filled = torch.are_deterministic_algorithms_enabled(), empty.fill_uninitialized_memory
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
        torch.use_deterministic_algorithms(True)
        empty.fill_uninitialized_memory = False  # DeepSpeed leaves gigabytes of it untouched
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, cuda.allow_tf32 = True, False, False, False
    else:
        cudnn.benchmark = True  # on a GPU each shape's fastest convolution, found when it is first met
    if threads or deterministic:
        torch.set_num_threads(threads or 1)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict)
        empty.fill_uninitialized_memory = filled
        count, cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, cuda.allow_tf32 = before
        torch.set_num_threads(count)
