"""Claims about the index of shards that someone else wrote."""

import io
import tarfile
from pathlib import Path

import make_shards
import pytest
from shard_cases import CLASSES, made, plant
from stream_cases import jpeg, server

from alignscale.data.manifest import Manifest


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("tree"))


def foreign(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, value in members:
            member = tarfile.TarInfo(name)
            member.size = len(value)
            tar.addfile(member, io.BytesIO(value))
    return path


def indexed(url: Path | str, *options: str, status: int = 0) -> None:
    assert make_shards.main(["--index", str(url), "--quiet", "--workers", "0", *options]) == status


def test_the_index_of_our_own_shards_is_the_manifest_that_was_written_with_them(tree: Path, tmp_path: Path) -> None:
    made(tree, tmp_path / "out")
    (tmp_path / "names").write_text("\n".join(CLASSES))
    pattern = f"{tmp_path}/out/train-{{000000..000004}}.tar"
    indexed(pattern, "--out", str(tmp_path / "again"), "--classes", str(tmp_path / "names"))
    for name in ("train.manifest.json", "train.manifest.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_shards_behind_http_are_indexed(tree: Path, tmp_path: Path) -> None:
    made(tree, tmp_path)
    with server(tmp_path) as (host, faults):
        faults.add("dropped", "train-000001", 1)
        indexed(f"{host}/train-{{000000..000004}}.tar", "--out", str(tmp_path / "index"))
    arrays = "train.manifest.safetensors"
    assert (tmp_path / "index" / arrays).read_bytes() == (tmp_path / arrays).read_bytes()


def test_names_that_climb_are_keys_and_no_paths(tmp_path: Path) -> None:
    members = [("../../up/a.cls", b"1"), ("../../up/a.jpg", jpeg(0)), ("/b.jpg", jpeg(1)), ("/b.cls", b" 0\n")]
    folder = tmp_path / "x/y"
    folder.mkdir(parents=True)
    indexed(foreign(folder / "s.tar", members))
    manifest = Manifest.read(str(folder / "s.manifest.json"))
    assert [manifest.samples.key(place) for place in range(2)] == ["../../up/a", "/b"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "s.manifest.json", "s.manifest.safetensors", "s.tar", "x", "y",
    ]  # fmt: skip


def case(*members: tuple[str, bytes]) -> list[tuple[str, bytes]]:
    return [("ok.jpg", jpeg(0)), ("ok.cls", b"0"), *members]


@pytest.mark.parametrize(
    ("members", "told"),
    [
        (case(("a.jpg", b"x")), "key a: expected an image and a label (.cls), found no label"),
        (case(("a.cls", b"1")), "found no image"),
        (case(("a.jpg", b"x"), ("a.cls", b"-1")), "expected a whole number from 0 on as its label (.cls), found '-1'"),
        (case(("ok.png", b"x")), "key ok: expected one image, found another one"),
        (case(("a.jpg", b""), ("a.cls", b"1")), "key a: expected an image, found an empty file"),
        ([("readme.txt", b"x")], "expected images and labels (.cls) in it, found none"),
    ],
)
def test_what_is_wrong_in_a_shard_is_named_with_its_key(
    members: list[tuple[str, bytes]], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    indexed(foreign(tmp_path / "s.tar", members), status=2)
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["s.tar"]


@pytest.mark.parametrize("length", [0, 700, 2000, 10240 - 9000])
def test_a_shard_that_is_cut_short_is_refused(length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = foreign(tmp_path / "s.tar", case())
    path.write_bytes(path.read_bytes()[:length])
    indexed(path, status=2)
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_shard_that_is_not_there_is_named(workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    indexed(tmp_path / "no-{0..1}.tar", "--workers", workers, status=2)
    assert f"{tmp_path}/no-0.tar: expected a readable shard, found: No such file" in capsys.readouterr().err
