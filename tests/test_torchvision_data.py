"""Claims about CIFAR, MNIST and folders of images, on small files in their formats."""

import gzip
import hashlib
import os
import pickle
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_cases import (
    cifar_batch,
    error_of,
    idx,
    own,
    write_cifar10,
    write_cifar100,
    write_mnist,
)

from alignscale.choices import ArchiveConfig, ConfigError
from alignscale.data import load
from alignscale.data.torchvision import datasets

WRITERS: dict[str, Callable[[Path], Any]] = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "mnist": write_mnist,
    "kmnist": lambda root: write_mnist(root, "KMNIST"),
}
BATCH = "cifar-10-batches-py/data_batch_2"
IMAGES, LABELS = (f"MNIST/raw/train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
ROWS = np.arange(8 * 3072).astype(np.uint8).reshape(8, 3072)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A download would show."""

    def refuse(*_: object) -> None:
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def publish(monkeypatch: pytest.MonkeyPatch, name: str, root: Path) -> None:
    """Make the checksums of the small files below ``root`` the published ones."""
    kind = getattr(datasets(), name.upper())
    for table in ("train_list", "test_list") if name.startswith("cifar") else ("resources",):
        sums = [
            (file, hashlib.md5(next(root.rglob(file)).read_bytes()).hexdigest()) for file, _ in getattr(kind, table)
        ]
        monkeypatch.setattr(kind, table, sums)


@pytest.mark.parametrize("name", WRITERS)
def test_examples_are_those_that_were_written(name: str, tmp_path: Path) -> None:
    written = WRITERS[name](tmp_path)
    read = own(tmp_path, name)
    for split, (images, labels) in written.items():
        assert torch.equal(read[split].images, torch.from_numpy(images))
        assert read[split].labels.tolist() == labels
        assert (read[split].classes, read[split].shard) == (100 if name == "cifar100" else 10, f"{name}-{split}")
        assert (read[split].images.dtype, read[split].labels.dtype) == (torch.uint8, torch.int64)


@pytest.mark.parametrize("name", WRITERS)
def test_with_verify_only_the_published_files_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS[name](tmp_path)
    config = ArchiveConfig(name=name, root=str(tmp_path))
    error = error_of(lambda: load(config))
    assert re.search(
        r"expected the published file, MD5 \w{32}, found MD5 \w{32}; get it again .*data.verify=false", error
    )
    publish(monkeypatch, name, tmp_path)
    assert load(config)["train"].digest == own(tmp_path, name)["train"].digest
    file = next(path for path in sorted(tmp_path.rglob("t*")) if path.is_file())
    file.write_bytes(file.read_bytes() + b"\0")
    found = hashlib.md5(file.read_bytes()).hexdigest()
    assert all(part in error_of(lambda: load(config)) for part in (str(file), found))


def test_a_batch_is_what_pickle_reads(tmp_path: Path) -> None:
    content = pickle.loads(cifar_batch(ROWS, list(range(8))), encoding="bytes")
    assert np.array_equal(content[b"data"], ROWS)
    assert content[b"labels"] == list(range(8))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_of_ones_own_may_be_of_any_protocol(protocol: int, order: Any, tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    batch = {"data": np.array(ROWS, order=order), "labels": list(range(8))}
    (tmp_path / BATCH).write_bytes(pickle.dumps(batch, protocol=protocol))
    assert torch.equal(own(tmp_path)["train"].images[8:16].flatten(1), torch.from_numpy(ROWS))


def test_files_may_lie_in_root_itself(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "a")
    write_mnist(tmp_path / "b")
    deep = own(tmp_path / "a")["test"], own(tmp_path / "b", "mnist")["test"]
    flat = own(tmp_path / "a/cifar-10-batches-py")["test"], own(tmp_path / "b/MNIST/raw", "mnist")["test"]
    assert [x.digest for x in deep] == [x.digest for x in flat]


def test_unpacked_idx_files_do_where_nothing_is_verified(tmp_path: Path) -> None:
    write_mnist(tmp_path / "packed")
    write_mnist(tmp_path / "plain", packed=False)
    assert own(tmp_path / "plain", "mnist")["train"].digest == own(tmp_path / "packed", "mnist")["train"].digest
    error = error_of(lambda: load(ArchiveConfig(name="mnist", root=str(tmp_path / "plain"))))
    assert "train-images-idx3-ubyte has no published checksum, and wants data.verify=false" in error


def test_a_missing_file_is_named_with_where_it_was_looked_for(tmp_path: Path) -> None:
    error = error_of(lambda: own(tmp_path))
    assert str(tmp_path / "cifar-10-batches-py/data_batch_1") in error
    assert str(tmp_path / "data_batch_1") in error
    assert "docs/data.md" in error
    write_cifar10(tmp_path)
    (tmp_path / BATCH).unlink()
    assert f"expected {tmp_path / BATCH}, found no such file" in error_of(lambda: own(tmp_path))


def test_an_archive_that_is_still_packed_is_to_be_unpacked(tmp_path: Path) -> None:
    archive = tmp_path / "cifar-100-python.tar.gz"
    archive.touch()
    assert f"tar -xzf {archive} -C {tmp_path}" in error_of(lambda: own(tmp_path, "cifar100"))


def test_a_malicious_pickle_does_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    write_cifar10(tmp_path)
    for protocol in range(6):
        batch = pickle.dumps({"data": Malicious(), "labels": []}, protocol=protocol)
        (tmp_path / BATCH).write_bytes(batch)
        error = error_of(lambda: own(tmp_path))
        assert f"{tmp_path / BATCH}: expected numbers and arrays alone, found posix.mkdir, which was not run" in error
    assert not (tmp_path / "ran").exists()
    pickle.loads(batch)
    assert (tmp_path / "ran").exists()  # so it would have


def dumped(data: Any, labels: Any, key: str = "labels") -> bytes:
    return pickle.dumps({"data": data, key: labels})


GOOD = cifar_batch(ROWS, list(range(8)))
DAMAGED = {
    "empty": (b"", "expected a whole pickle, found a damaged or other file (EOFError"),
    "cut off": (GOOD[:-100], "expected a whole pickle, found a damaged or other file (UnpicklingError"),
    "text": (b"<html>not found</html>", "expected a whole pickle"),
    "a list": (pickle.dumps([1]), "expected a dict, found list"),
    "no array": (pickle.dumps({"data": b"1"}), "expected data: Array and labels: list in its dict, found data: bytes"),
    "other labels": (dumped(ROWS, [0], "fine_labels"), "found data: Array, fine_labels: list"),
    "an array of labels": (dumped(ROWS, np.arange(8)), "found data: Array, labels: Array"),
    "floats": (
        dumped(ROWS / 1, [0] * 8),
        "expected rows of 3072 uint8 as 'data', found 196608 bytes as rows of 3072 f8",
    ),
    "narrow rows": (dumped(ROWS[:, :1024], [0] * 8), "found 8192 bytes as rows of 1024 u1"),
    "images": (dumped(ROWS.reshape(8, 3, 32, 32), [0] * 8), "found an array of another shape"),
    "too few labels": (cifar_batch(ROWS, [0] * 7), "expected 8 labels, one for each image, found 7"),
    "label 10": (cifar_batch(ROWS, [0, 10] * 4), "whole numbers from 0 to 9, found 10 at index 1"),
    "label -1": (dumped(ROWS, [0] * 7 + [-1]), "whole numbers from 0 to 9, found -1 at index 7"),
    "a label in words": (dumped(ROWS, ["cat"] * 8), "whole numbers from 0 to 9, found 'cat' at index 0"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_batch_is_named_with_what_was_expected(case: str, tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    content, message = DAMAGED[case]
    (tmp_path / BATCH).write_bytes(content)
    error = error_of(lambda: own(tmp_path))
    assert error.startswith(f"{tmp_path / BATCH}: expected ")
    assert message in error
    assert error.endswith("get the published file again, or write your own as docs/data.md says")


PACKED = gzip.compress(idx(np.zeros((40, 28, 28), np.uint8)))
DAMAGED_IDX = {
    "cut off": (IMAGES, PACKED[:-9], "expected a whole gzip file, found a damaged one"),
    "not packed": (IMAGES, idx(np.zeros((40, 28, 28), np.uint8)), "expected a whole gzip file, found a damaged one"),
    "a flipped byte": (IMAGES, PACKED[:20] + b"\xff\xff\xff" + PACKED[23:], "expected a whole gzip file"),
    "empty": (IMAGES, gzip.compress(b""), "begins with 00000803, found 0 bytes that begin with nothing"),
    "labels": (IMAGES, gzip.compress(idx(np.zeros(40, np.uint8))), "begins with 00000803, found 48 bytes that begin"),
    "images": (
        LABELS,
        PACKED,
        "1 dimension(s), which begins with 00000801, found 31376 bytes that begin with 00000803",
    ),
    "short": (
        IMAGES,
        gzip.compress(gzip.decompress(PACKED)[:-5]),
        "expected 31360 bytes after the header, which says (40, 28, 28)",
    ),
    "wide": (IMAGES, gzip.compress(idx(np.zeros((40, 28, 32), np.uint8))), "images of (28, 28), found (28, 32)"),
    "few": (LABELS, gzip.compress(idx(np.zeros(39, np.uint8))), "expected 40 labels, one for each image, found 39"),
    "label 10": (LABELS, gzip.compress(idx(np.full(40, 10, np.uint8))), "from 0 to 9, found 10 at index 0"),
}


@pytest.mark.parametrize("case", DAMAGED_IDX)
def test_a_damaged_idx_file_is_named_with_what_was_expected(case: str, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    name, content, message = DAMAGED_IDX[case]
    (tmp_path / name).write_bytes(content)
    error = error_of(lambda: own(tmp_path, "mnist"))
    assert error.startswith(f"{tmp_path / name}: expected ")
    assert message in error
    assert error.endswith("get the published file again, or write your own as docs/data.md says")


def test_a_split_without_examples_is_refused(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "a", test=0)
    write_mnist(tmp_path / "b", train=0)
    assert "expected at least one test example of cifar10, found none" in error_of(lambda: own(tmp_path / "a"))
    assert "expected at least one train example of mnist" in error_of(lambda: own(tmp_path / "b", "mnist"))


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / BATCH).unlink()
    (tmp_path / BATCH).mkdir()
    assert f"{tmp_path / BATCH}: expected a readable file, found: Is a directory" in error_of(lambda: own(tmp_path))


def test_without_torchvision_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "pip install 'alignscale[stream]'" in error_of(lambda: own(tmp_path), ConfigError)


def test_docs_name_every_published_checksum() -> None:
    found = set(re.findall(r"\b[0-9a-f]{32}\b", (Path(__file__).parents[1] / "docs/data.md").read_text()))
    module = datasets()
    mnist = {checksum for kind in (module.MNIST, module.KMNIST) for _, checksum in kind.resources}
    assert found == mnist | {module.CIFAR10.tgz_md5, module.CIFAR100.tgz_md5}


def test_train_limit_and_validation_keep_the_keys_of_the_files(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    whole, read = own(tmp_path)["train"], own(tmp_path, train_limit=20, validation=10)
    for split in (read["train"], read["validation"]):
        assert torch.equal(split.images, whole.images[split.rows])
        assert torch.bincount(split.labels).tolist() == [len(split) // 10] * 10
