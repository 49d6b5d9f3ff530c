import functools
import io
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from pathlib import Path

import make_shards
import numpy as np
import pytest
import simplejpeg
import torch
from data_cases import write_cifar10, write_mnist
from PIL import Image
from shard_cases import CLASSES, TOOL, content, contents, made, plant, refused
from stream_cases import jpeg, photograph
from webdataset.tariterators import group_by_keys, tar_file_expander

from alignscale.choices import DATA, MSEConfig, WebDatasetConfig
from alignscale.data import load
from alignscale.data.examples import Encoding
from alignscale.data.manifest import Manifest
from alignscale.loss import make_loss


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("tree"))


def test_every_image_is_in_one_shard_with_its_bytes_untouched_and_its_label(tree: Path, tmp_path: Path) -> None:
    made(tree, tmp_path)
    found: Counter[tuple[int, bytes]] = Counter()
    for path in tmp_path.glob("train-*.tar"):
        with path.open("rb") as file:  # by webdataset's own reading
            for sample in group_by_keys(tar_file_expander([{"stream": file, "url": path.name}])):
                found[int(sample["cls"]), sample.get("jpg") or sample["png"]] += 1
    assert found == Counter((number % 4, content(number)) for number in range(44))


def test_the_manifest_tells_offset_length_and_checksum_of_each_image(tree: Path, tmp_path: Path) -> None:
    made(tree, tmp_path)
    manifest = Manifest.read(str(tmp_path / "train.manifest.json"))
    assert (list(manifest.classes), len(manifest), [shard.count for shard in manifest.shards]) == (
        CLASSES, 44, [8, 9, 9, 9, 9],
    )  # fmt: skip
    for place in range(44):
        shard = manifest.shards[int(np.searchsorted(manifest.starts, place, side="right")) - 1]
        with tarfile.open(tmp_path / shard.file) as tar:
            member = next(
                one for one in tar if one.name.startswith(manifest.samples.key(place)) and "cls" not in one.name
            )
            file = tar.extractfile(member)
            assert file is not None
            inside = file.read()
        assert (member.offset_data, member.size) == (manifest.samples.offsets[place], manifest.samples.lengths[place])
        assert zlib.crc32(inside) == manifest.samples.crcs[place]


def test_training_reads_what_was_made(tree: Path, tmp_path: Path) -> None:
    made(tree, tmp_path)
    urls = {"urls": f"{tmp_path}/train-{{000000..000004}}.tar", "test_urls": f"{tmp_path}/val-000000.tar"}
    splits = load(WebDatasetConfig(**urls, size=24, resize=28))  # type: ignore[arg-type]
    assert {name: len(split) for name, split in splits.items()} == {"train": 44, "test": 9}


def test_the_bytes_do_not_depend_on_the_number_of_processes(tree: Path, tmp_path: Path) -> None:
    assert made(tree, tmp_path / "a", "--workers", "0") == made(tree, tmp_path / "b", "--workers", "3")


def test_another_seed_mixes_the_images_in_another_way(tree: Path, tmp_path: Path) -> None:
    first, second = made(tree, tmp_path / "a"), made(tree, tmp_path / "b", "--seed", "1")
    assert first["train-000000.tar"] != second["train-000000.tar"]


def test_a_killed_command_goes_on_with_whole_shards_kept_and_ends_with_the_same_bytes(
    tree: Path, tmp_path: Path
) -> None:
    want, out = made(tree, tmp_path / "want", "--shard-size", "1", "--resize", "30"), tmp_path / "out"
    command = ["--root", str(tree), "--out", str(out), "--shard-size", "1", "--resize", "30", "--quiet"]
    with subprocess.Popen([sys.executable, str(TOOL), *command, "--workers", "1"]) as process:
        while len(list((out / ".make_shards").glob("train-*.json"))) < 3:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    kept = sorted((out / ".make_shards").glob("train-*.json"))[0].stat().st_mtime_ns
    (out / ".train-000040.tar.partial").write_bytes(b"half")
    (out / "train-000001.tar").write_bytes(b"damaged")
    assert made(tree, out, "--shard-size", "1", "--resize", "30") == want
    assert sorted((out / ".make_shards").glob("train-*.json"))[0].stat().st_mtime_ns == kept


def test_output_of_other_settings_is_refused_with_the_difference(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = made(tree, tmp_path)
    assert "settings.quality: 0 -> 80" in refused(capsys, tree, tmp_path, "--quality", "80")
    assert contents(tmp_path) == before


def test_images_that_were_moved_are_other_images(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(tree, tmp_path / "tree")
    made(own, tmp_path / "out")
    first, second = sorted(path for path in (own / "train").iterdir())[:2]
    moved = next(iter(sorted(first.iterdir())))
    moved.rename(second / f"again-{moved.name}")
    assert "source.names_labels_sizes: " in refused(capsys, own, tmp_path / "out")


def test_shards_of_unknown_origin_are_not_written_over(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train-7.tar").write_bytes(b"someone's")
    assert "of other origin" in refused(capsys, tree, tmp_path)
    assert (tmp_path / "train-7.tar").read_bytes() == b"someone's"


@pytest.mark.parametrize(("name", "bad"), [("notes.txt", b"some text"), ("cut.JPEG", jpeg(0)[:-200]), ("no.JPEG", b"")])
def test_what_is_no_image_is_refused_by_name_or_left_out_and_counted(
    name: str, bad: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = plant(tmp_path / "tree", 12, 4)
    (root / "train/n01440764" / name).write_bytes(bad)
    assert f"n01440764/{name}: expected an image" in refused(capsys, root, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.partial")) + list((tmp_path / "out").glob("*.json"))
    made(root, tmp_path / "out", "--skip")  # what the message says, with the shards that there are
    capsys.readouterr()
    made(root, tmp_path / "skipped", "--skip")
    assert contents(tmp_path / "out") == contents(tmp_path / "skipped")
    said = capsys.readouterr().out
    assert f"left out: n01440764/{name}" in said
    assert "train: 1 files left out, 12 images" in said


def test_resizing_makes_jpegs_of_that_shorter_side_and_never_enlarges(tree: Path, tmp_path: Path) -> None:
    made(tree, tmp_path, "--resize", "50", "--quality", "70")
    short, before = [], [min(min(photograph(number).size), 50) for number in range(44)]
    for path in tmp_path.glob("train-*.tar"):
        with tarfile.open(path) as tar:
            files = (tar.extractfile(one) for one in tar if not one.name.endswith(".cls"))
            short += [min(simplejpeg.decode_jpeg_header(file.read())[:2]) for file in files if file]
    assert sorted(short) == sorted(before)


def test_classes_that_differ_between_splits_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = plant(tmp_path / "tree", 8, 8)
    (root / "val/n01440764").rename(root / "val/n0")
    assert "n0, n01440764" in refused(capsys, root, tmp_path / "out")


def test_digits_go_in_without_loss(tmp_path: Path) -> None:
    out = tmp_path / "a#b?"  # letters of a path
    made(tmp_path, out, "--source", "digits", "--shard-size", "400")
    digits = load(DATA["digits"])["train"]
    manifest = Manifest.read(str(out / "train.manifest.json"))
    found: Counter[tuple[bytes, int]] = Counter()
    for shard, start in zip(manifest.shards, manifest.starts, strict=False):
        whole = (out / shard.file).read_bytes()
        for place in range(start, start + shard.count):
            begin = int(manifest.samples.offsets[place])
            image = Image.open(io.BytesIO(whole[begin : begin + int(manifest.samples.lengths[place])]))
            found[(np.asarray(image).tobytes(), int(manifest.samples.labels[place]))] += 1
    images = np.rint(digits.images.numpy() * 255).astype(np.uint8)  # type: ignore[attr-defined]
    assert found == Counter((image.tobytes(), int(label)) for image, label in zip(images, digits.labels, strict=True))


@pytest.mark.parametrize("name", ["cifar10", "kmnist"])
def test_archives_are_read_back_from_their_shards_as_they_are_from_their_files(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write = write_cifar10 if name == "cifar10" else functools.partial(write_mnist, name="KMNIST")
    written = write(tmp_path / "data")
    given = ["--source", name, "--splits", "train,test"]
    assert "set --no-verify for files" in refused(capsys, tmp_path / "data", tmp_path / "out", *given)
    assert "found digits" in refused(capsys, tmp_path, tmp_path / "out", "--source", "digits", "--no-verify")
    made(tmp_path / "data", tmp_path / "out", *given, "--no-verify")
    channels, size = (3, 32) if name == "cifar10" else (1, 28)
    (several, one) = (f"{tmp_path}/out/train-{{000000..000003}}.tar", f"{tmp_path}/out/test-{{000000..000001}}.tar")
    data = WebDatasetConfig(
        urls=several, test_urls=one, size=size, resize=size, channels=channels, workers=0, normalisation="none"
    )
    for split, found in load(data).items():
        code = Encoding(make_loss(MSEConfig()), torch.float64, torch.float64, torch.device("cpu")).of(data, found)
        pixels = (code.batch(found, torch.arange(len(found)), 0).images * 255).round().to(torch.uint8)
        images, labels = written[split]
        read = Counter((image.numpy().tobytes(), int(label)) for image, label in zip(pixels, found.labels, strict=True))
        assert read == Counter((image.tobytes(), label) for image, label in zip(images, labels, strict=True))
        assert found.classes == 10


def test_a_full_disk_leaves_nothing_half_written_and_the_command_goes_on(tree: Path, tmp_path: Path) -> None:
    def limited() -> None:  # files of more than 20 kB cannot be written, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    command = [sys.executable, str(TOOL), "--root", str(tree), "--out", str(tmp_path), "--shard-size", "10", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited, check=False)
    assert (done.returncode, "nothing half written is left" in done.stderr) == (2, True)
    assert list(tmp_path.glob("*.tar")) + list(tmp_path.glob(".*.partial")) == []
    assert "val.manifest.json" in made(tree, tmp_path)


def test_a_wrong_value_is_refused_with_the_valid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    for option, value, told in (("--splits", "tset", "train, val, test"), ("--quality", "101", "1 to 100")):
        with pytest.raises(SystemExit):
            make_shards.parse([option, value])
        assert told in capsys.readouterr().err
