"""Claims about the making of a cache, by its tool and its files: killed, out of room, twice at once."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jacobian_cases import ROOT, command, run

from alignscale.jacobian.files import Mapped, Writer
from alignscale.jacobian.form import Form
from alignscale.jacobian.identity import checked, claimed


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "cache").iterdir() if path.name != ".lock"}


def test_a_builder_that_is_killed_is_gone_on_with_to_the_same_files(tmp_path: Path) -> None:
    for place in ("whole", "killed"):
        (tmp_path / place).mkdir()
    assert run(command(tmp_path / "whole")).returncode == 0
    words = command(tmp_path / "killed", python=sys.executable)
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None
        assert any("view 3" in line for line in builder.stdout)
        builder.send_signal(signal.SIGKILL)
    before = files(tmp_path / "killed")
    assert len([name for name in before if name.endswith("safetensors") and "view" in name]) < 6
    done = run(command(tmp_path / "killed"))
    assert done.returncode == 0, done.stderr
    assert "6 files to make" not in done.stdout
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_builder_that_is_killed_before_its_manifest_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "norms.safetensors").write_bytes(b"of the one before")
    form, moments = Form(("gates",), "fp32", None), {"norms.0.mean": torch.ones(2)}
    claimed(tmp_path, {"seed": 0}, form, moments)
    assert checked(tmp_path, {"seed": 0}, moments) == form


def test_a_second_builder_is_refused_while_the_first_goes_on(tmp_path: Path) -> None:
    words = command(tmp_path, python=sys.executable)
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert any("caching" in line for line in first.stdout)
        first.send_signal(signal.SIGSTOP)
        second = run(command(tmp_path))
        first.send_signal(signal.SIGCONT)
        first.stdout.read()
    assert second.returncode == 2
    assert re.search(rf"expected no other builder, found process {first.pid} on .* at work", second.stderr)
    assert first.wait() == 0
    assert run(command(tmp_path)).returncode == 0


def test_a_full_disk_while_building_leaves_no_half_file(tmp_path: Path) -> None:
    words = " ".join(f"'{word}'" for word in command(tmp_path / "disk"))
    script = f"""
        mount -t tmpfs -o size=60m none {tmp_path}/disk
        head -c 1000000 /dev/zero > {tmp_path}/filler
        ( sleep 0; while sleep 0.05; do cat {tmp_path}/filler >> {tmp_path}/disk/filler 2>/dev/null || exit; done ) &
        {words} > /dev/null; echo "status $?"
        find {tmp_path}/disk -name '*.partial'
        rm {tmp_path}/disk/filler
    """
    (tmp_path / "disk").mkdir()
    done = run(["unshare", "-Urm", "sh", "-c", script])
    assert done.stdout.split("\n")[0] in ("status 1", "status 2"), done.stderr
    assert "partial" not in done.stdout
    assert re.search("No space left on device|GiB of free disk", done.stderr)
    assert "Traceback" not in done.stderr


def test_a_writer_that_has_no_room_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    script = """
import sys, torch, resource, signal
from pathlib import Path
from alignscale.jacobian.build import write_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
part = {"rows": torch.arange(100), "sums": torch.arange(100), "gates.0": torch.zeros(100, 1000, dtype=torch.uint8)}
try:
    write_file(Path(sys.argv[1]), {"gates.0": (torch.uint8, (1000,))}, 300, iter([part, part, part]), {})
except OSError as problem:
    print(problem.errno)
"""
    done = run([sys.executable, "-c", script, str(tmp_path / "file")])
    assert done.stdout.strip() == "27", done.stderr  # EFBIG
    assert list(tmp_path.iterdir()) == []


def test_plan_prints_every_form_and_makes_nothing(tmp_path: Path) -> None:
    done = run([*command(tmp_path, "jacobian=auto"), "--plan"])
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[3:5]] == ["backprop", "live"]
    forms = {tuple(line.split()[:2]) for line in done.stdout.splitlines()[5:11]}
    assert forms == {(form, tier) for form in ("gates", "explicit", "auto") for tier in ("host", "disk")}
    assert "width / classes: 26, 26, 26" in done.stdout
    assert not list(tmp_path.glob("cache/*.safetensors*"))


@pytest.mark.parametrize(("words", "message"), [
    (["rule=backprop"], "rule=backprop: reads no frozen Jacobian; expected one of align_ada, align_zero"),
    (["jacobian=live"], "jacobian=live: expected gates, explicit or auto"),
    (["jacobian=bits"], "expected one of auto, explicit, gates, live"),
])  # fmt: skip
def test_the_tool_refuses_mistakes(tmp_path: Path, words: list[str], message: str) -> None:
    done = run([*command(tmp_path), *words])
    assert done.returncode == 2
    assert message in done.stderr


def test_a_writer_puts_every_dtype_where_it_can_be_read(tmp_path: Path) -> None:
    layout = {"a": (torch.uint8, (3,)), "b": (torch.float64, (1,)), "c": (torch.bfloat16, (5,)), "d": (torch.int64, ())}
    writer = Writer(tmp_path / "x", layout, 7, {"about": "é"})
    parts = [{name: torch.ones(n, *shape).to(dtype) for name, (dtype, shape) in layout.items()} for n in (2, 4, 1)]
    for part in parts:
        writer.write(part)
    writer.close()
    found = Mapped(tmp_path / "x", "", True)
    assert found.about["about"] == "é"
    assert all(bool((one == 1).all()) and one.shape[0] == 7 for one in found.tensors.values())
