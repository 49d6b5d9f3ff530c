"""Files of tensors that come one at a time, beside what safetensors itself reads and writes."""

import errno
import os
import re
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignscale.analysis.finite import all_finite
from alignscale.checkpoint import MANIFEST, CheckpointError, Coming, complete, read, read_manifest, save
from alignscale.tensor_file import TensorFile

ABOUT: dict[str, Any] = {"progress": {"best": None}}


class Asked(dict[str, Coming]):
    """What makes tensors, which were made, and how many of them were in memory when the next one was asked for."""

    def __init__(self, makers: dict[str, Callable[[], Tensor]]) -> None:
        super().__init__({name: coming(partial(self.make, name, maker)) for name, maker in makers.items()})
        self.asked, self.alive = list[str](), list[int]()
        self.made: list[weakref.ref[Tensor]] = []

    def make(self, name: str, maker: Callable[[], Tensor]) -> Tensor:
        self.alive.append(sum(one() is not None for one in self.made))
        self.asked.append(name)
        tensor = maker()
        self.made.append(weakref.ref(tensor))
        return tensor


def coming(make: Callable[[], Tensor]) -> Coming:
    return Coming(8, lambda _: make())


def ones(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.full(shape, 0.5)


def writing(folder: Path) -> Path:
    """Where the checkpoint after step 4 is written."""
    (partial,) = folder.glob(".step-000000004.*.partial")
    return partial


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    made = torch.Generator().manual_seed(1)
    tensors = {
        'a "long" name, in Ω' * 9: torch.randn(3, 5, generator=made, dtype=torch.float64),
        "scalar": torch.tensor(7.0, dtype=torch.float64),
        "count": torch.arange(3),
        "strided": torch.randn(4, 6, generator=made).T[1:],
        "empty": torch.empty(0, 3),
        "half": torch.randn(5, generator=made).bfloat16(),
        "other half": torch.randn(3, 1, 1, 1, generator=made).half(),
    }
    model = {name: Coming.at_hand(one) for name, one in tensors.items()}
    save(tmp_path, 3, {"model": model, "optimizer": {}}, ABOUT, 2)
    (path,) = complete(tmp_path)
    found = load_file(path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert read(path, read_manifest(path), "optimizer") == {}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs")
    assert all(torch.equal(theirs[name], found[name]) for name in tensors)


def test_a_tensor_is_in_memory_until_the_one_after_the_next_is_made(tmp_path: Path) -> None:
    model = Asked({f"layers.{index}": ones(index + 1, 2) for index in range(5)})
    optimizer = Asked({f"{index}.momentum": ones(index + 1, 2) for index in range(5)})
    save(tmp_path, 3, {"model": model, "optimizer": optimizer}, ABOUT, 2)
    assert model.asked == list(model)
    assert optimizer.asked == list(optimizer)
    assert max(model.alive + optimizer.alive) <= 1


@pytest.mark.parametrize("size", [10, 50_000], ids=["buffered", "at once"])
def test_a_full_disk_leaves_what_was_there_and_still_asks_for_the_rest(tmp_path: Path, size: int) -> None:
    """/dev/full in the place of the second file: a rank that stopped asking would leave all others waiting."""
    save(tmp_path, 3, {"model": {"weight": coming(ones(3))}}, ABOUT, 2)
    before = (complete(tmp_path)[0] / MANIFEST).read_bytes()

    def full() -> Tensor:
        (writing(tmp_path) / "other.safetensors").symlink_to("/dev/full")
        return torch.ones(2)

    model = Asked({**{f"a.{index}": ones(size) for index in range(3)}, "a.3": full})
    other = Asked({f"b.{index}": ones(size) for index in range(4)})
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        save(tmp_path, 4, {"model": model, "other": other}, ABOUT, 2)
    assert caught.value.filename == str(tmp_path / "step-000000004")
    assert model.asked + other.asked == [*model, *other]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000000003"]
    assert (tmp_path / "latest").read_text() == "step-000000003"
    assert (complete(tmp_path)[0] / MANIFEST).read_bytes() == before


def test_all_is_on_the_disk_before_latest_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3, {"model": {"weight": coming(ones(3))}}, ABOUT, 2)
    synced: dict[str, list[Path]] = {}

    def fsync(handle: int) -> None:
        real(handle)
        path = re.sub(r"(step-000000004)\.\w+", r"\1", str(Path(f"/proc/self/fd/{handle}").readlink()))
        synced.setdefault((tmp_path / "latest").read_text(), []).append(Path(path))

    real = os.fsync
    monkeypatch.setattr(os, "fsync", fsync)
    save(tmp_path, 4, {"model": {"weight": coming(ones(3))}, "other": {"a": coming(ones(2))}}, ABOUT, 2)
    before = [path.relative_to(tmp_path) for path in synced.pop("step-000000003")]
    partial, latest = Path(".step-000000004.partial"), Path(f".latest.{os.getpid()}.partial")
    sealed = partial / f".{MANIFEST}.{os.getpid()}.partial"
    assert before == [partial / "model.safetensors", partial / "other.safetensors", sealed, partial, Path(), latest]
    assert synced == {"step-000000004": [tmp_path]}


def test_bytes_that_the_disk_gives_back_otherwise_are_no_checkpoint(tmp_path: Path) -> None:
    """A byte of the first weight, which is written when the second one is, is another one on the disk then."""
    save(tmp_path, 3, {"model": {"weight": coming(ones(3))}}, ABOUT, 2)

    def spoil() -> Tensor:
        with (writing(tmp_path) / "model.safetensors").open("r+b") as file:
            file.seek(100_000)
            file.write(b"!")
        return torch.ones(2)

    with pytest.raises(OSError, match="expected to read back the bytes that were written, found others"):
        save(tmp_path, 4, {"model": Asked({"a": ones(50_000), "b": ones(2), "c": spoil})}, ABOUT, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000000003"]


def test_an_error_in_the_making_is_raised_as_it_is_and_nothing_more_is_asked_for(tmp_path: Path) -> None:
    def failing() -> Tensor:
        raise RuntimeError("connection closed by peer")

    model = Asked({"a": ones(2), "b": failing, "c": ones(2)})
    with pytest.raises(RuntimeError, match="connection closed by peer"):
        save(tmp_path, 4, {"model": model}, ABOUT, 2)
    assert model.asked == ["a", "b"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_is_not_written(tmp_path: Path, value: float) -> None:
    model = Asked({"a": ones(2), "b": lambda: torch.tensor([1.0, value]), "c": ones(2)})
    with pytest.raises(FloatingPointError, match="found others in b"):
        save(tmp_path, 4, {"model": model, "optimizer": {"0.state": Coming.at_hand(torch.tensor(value))}}, ABOUT, 2)
    assert model.asked == list(model)
    assert list(tmp_path.iterdir()) == []
    state = {"0.state": Coming.at_hand(torch.tensor(value))}
    save(tmp_path, 4, {"model": {"a": coming(ones(2))}, "optimizer": state}, ABOUT, 2)
    assert len(complete(tmp_path)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype) -> None:
    whole = torch.linspace(-3, 3, 70_001, dtype=dtype)
    assert all_finite([whole, whole[:0], whole.view(-1, 1)[::2].T, torch.arange(3), torch.ones(2, dtype=torch.uint8)])
    for place in (0, 7, 31_337, 70_000):
        for wrong in (float("nan"), float("inf"), -float("inf")):
            other = whole.clone()
            other[place] = wrong
            assert not all_finite([whole, other])


def test_what_is_raised_is_not_a_files_that_could_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    file = TensorFile(tmp_path / "full", "a")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        file.add("a", torch.ones(10))
    with pytest.raises(FloatingPointError), file:
        raise FloatingPointError


def test_a_part_that_is_not_there_is_said(tmp_path: Path) -> None:
    save(tmp_path, 4, {"model": {"a": coming(ones(2))}}, ABOUT, 2)
    (path,) = complete(tmp_path)
    with pytest.raises(CheckpointError, match="expected optimizer, found model; delete"):
        read(path, read_manifest(path), "optimizer")


def test_a_checkpoint_that_lacks_a_tensor_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3, {"model": {"a": coming(ones(2))}}, ABOUT, 1)
    monkeypatch.setattr(TensorFile, "add", lambda *_: None)  # as where ranks differ in who writes what
    with pytest.raises(RuntimeError, match=r"expected each tensor of model once, found \[\] of \['a'\]"):
        save(tmp_path, 4, {"model": {"a": coming(ones(2))}}, ABOUT, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000000003"]
