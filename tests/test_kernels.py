"""The claim that the GPU kernels compute what torch's operations do, on any machine: see kernel_cases.py."""

import os
import subprocess
import sys
from pathlib import Path


def test_the_gpu_kernels_compute_what_torch_does() -> None:
    cases = Path(__file__).with_name("kernel_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)]
    done = subprocess.run(
        command, cwd=cases.parents[1], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
