"""Claims about what goes wrong with shards: on the disk, on the way from a real web server, in the cache."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stream_cases import ALL, batches, config, encoded, encoding, jpeg, photograph, same, server, write

from alignscale.choices import ConfigError, WebDatasetConfig
from alignscale.data import load
from alignscale.data.examples import DataError
from alignscale.data.manifest import Manifest, Samples, place_of


def images(data: WebDatasetConfig) -> int:
    return sum(len(part.keys) for step in batches(data, **ALL) for part in step)


@pytest.mark.parametrize("kind", ["refused", "dropped", "slow", "flipped"])
@pytest.mark.parametrize("cached", [False, True], ids=["range", "cache"])
def test_a_fault_that_passes_is_tried_again_and_changes_nothing(kind: str, cached: bool, tmp_path: Path) -> None:
    expected = batches(config(tmp_path), **ALL)
    cache = str(tmp_path / "cache") if cached else ""
    with server(tmp_path) as (url, faults):
        data = config(url, workers=0, cache=cache, timeout=0.5)
        train = load(data)
        faults.add(kind, r"train-.*\.tar", 2)
        assert same(batches(data, **ALL), expected)
        assert faults.left[kind][1] == 0
        assert len(train["train"]) == 23


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "found: status 404 Not Found; see that it is there"),
        ("refused", r"found: status 503 Service Unavailable \(tried 3 times"),
        ("dropped", r"found: .*(IncompleteRead|bytes of).* \(tried 3 times"),
        ("slow", r"found: .*timed out.* \(tried 3 times; data\.timeout=0\.2 s"),
        ("flipped", r"expected the CRC-32 \w{8} of its manifest, found \w{8}; .*data\.skip=N"),
    ],
)
def test_a_fault_that_stays_ends_with_shard_and_key(kind: str, message: str, tmp_path: Path) -> None:
    config(tmp_path)
    with server(tmp_path) as (url, faults):
        data = config(url, timeout=0.2)
        splits = load(data)
        faults.add(kind, r"train-002\.tar")
        with pytest.raises(DataError, match=rf"train-002\.tar, key n\d{{4}}: .*{message}"):
            list(splits["train"].of_shard("train-002", encoding(data, splits["train"])))


def test_a_shard_that_is_missing_or_cut_short_is_named_before_any_work(tmp_path: Path) -> None:
    data, shard = config(tmp_path), tmp_path / "train-001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1024])
    with server(tmp_path) as (url, _):
        for one in (data, config(url)):
            with pytest.raises(DataError, match=rf"train-001\.tar: expected {len(whole)} bytes, as its manifest says"):
                load(one)
        shard.unlink()
        with pytest.raises(DataError, match=r"train-001\.tar: expected a shard, found: No such file or directory"):
            load(data)
        with pytest.raises(DataError, match=r"train-001\.tar: expected bytes from the server, found: status 404"):
            load(config(url))


def test_a_shard_that_changes_under_a_run_is_an_error_that_names_shard_and_key(tmp_path: Path) -> None:
    data = config(tmp_path, workers=1)
    train = load(data)["train"]
    with (tmp_path / "train-000.tar").open("r+b") as file:
        file.truncate(2000)
    code = encoding(data, train)
    with pytest.raises(DataError, match=r"train-000\.tar, key n\d+: expected \d+ bytes from byte \d+ on, found"):
        list(train.of_shard("train-000", code))


def test_without_range_a_shard_is_read_again_and_skipped_which_is_announced(tmp_path: Path) -> None:
    expected = batches(config(tmp_path), 3, 5)
    with server(tmp_path) as (url, faults):
        faults.ranges = False
        with pytest.warns(RuntimeWarning, match="does not answer Range requests.*is skipped; data.cache=FOLDER"):
            found = batches(config(url), 3, 5)
        assert same(found, expected)
        assert same(batches(config(url, cache=str(tmp_path / "cache")), 3, 5), expected)  # without a warning


def test_a_read_asks_for_its_own_bytes_alone(tmp_path: Path) -> None:
    config(tmp_path)
    with server(tmp_path) as (url, faults):
        data = config(url, workers=0)
        train = load(data)["train"]
        faults.asked.clear()
        code = encoding(data, train)
        list(train.of_shard("train-002", code))
    manifest = Manifest.read(str(tmp_path / "train.manifest.json"))
    spans = [
        f"bytes={start}-{start + length - 1}"
        for start, length in zip(manifest.samples.offsets[14:], manifest.samples.lengths[14:], strict=True)
    ]
    assert sorted(faults.asked) == sorted(("/train-002.tar", span) for span in spans)


def damaged(numbers: set[int]) -> Callable[[int], bytes]:
    return lambda number: jpeg(number)[:300] if number in numbers else jpeg(number)


def test_a_damaged_image_is_an_error_and_left_out_and_counted_only_by_option(tmp_path: Path) -> None:
    write(tmp_path, "train", [13, 1, 9], damaged({2, 20}))
    write(tmp_path, "test", [7])
    with pytest.raises(
        DataError, match=r"train-00[02]\.tar, key n00(02|20): expected a whole image, found: .*; replace"
    ):
        images(config(tmp_path))
    data = config(tmp_path, skip=1)
    train = load(data)["train"]
    code = encoding(data, train)
    with pytest.warns(RuntimeWarning, match=r"left out: .*train-00\d\.tar, key n00"):
        found = [key for name, _ in train.shards for batch in train.of_shard(name, code) for key in batch.keys]
    assert train.missing.keys() == {"train-000/2", "train-002/6"}
    assert len(found) == 21
    assert not train.missing.keys() & set(found)


def test_a_whole_shard_is_never_left_out(tmp_path: Path) -> None:
    write(tmp_path, "train", [13, 1, 9], damaged({14, 15, 16, 17, 18, 19, 20, 21, 22}))
    write(tmp_path, "test", [7])
    with (
        pytest.warns(RuntimeWarning, match="left out"),
        pytest.raises(DataError, match=r"found 3 such in train-002, of which data\.skip=2 may be"),
    ):
        images(config(tmp_path, skip=2))


def test_checksums_find_a_flipped_bit_on_the_disk_when_asked_to(tmp_path: Path) -> None:
    data = config(tmp_path, checksums="always")
    manifest = Manifest.read(str(tmp_path / "train.manifest.json"))
    shard = tmp_path / "train-000.tar"
    content = bytearray(shard.read_bytes())
    content[int(manifest.samples.offsets[5]) + int(manifest.samples.lengths[5]) // 2] ^= 4
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"train-000\.tar, key n0005: expected the CRC-32"):
        images(data)


def test_labels_out_of_range_are_refused_with_shard_and_key(tmp_path: Path) -> None:
    write(tmp_path, "train", [4, 3], label=lambda number: 3 if number == 5 else 0)
    write(tmp_path, "test", [7])
    with pytest.raises(DataError, match=r"expected labels from 0 to 2, found 3 in train-001\.tar, key n0005 \(1 such"):
        load(config(tmp_path, counts=[4, 3]))


def test_nothing_of_a_tar_is_unpacked_or_unpickled(tmp_path: Path) -> None:
    """Members that climb out, links and pickles are bytes like others; only a manifest's places are read."""
    (folder := tmp_path / "inner" / "shards").mkdir(parents=True)
    link, pickle = tarfile.TarInfo("link"), tarfile.TarInfo("n0000.pickle")
    link.type, link.linkname = tarfile.SYMTYPE, "../../climbed"
    write(folder, "train", [13, 1, 9], key="../../climbed/n{:04}", others=[link, pickle])
    write(folder, "test", [7])
    assert same(batches(config(folder), **ALL), batches(config(tmp_path), **ALL))
    assert {path.name for path in folder.iterdir() if path.suffix != ".tar"} == {
        "train.manifest.json", "train.manifest.safetensors", "test.manifest.json", "test.manifest.safetensors"
    }  # fmt: skip
    assert not (tmp_path / "climbed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("train-001.tar", "../train-1"), "shards that are no names of files"),
        (lambda text: text.replace('"format": 1', '"format": 9'), "format 9, not 1"),
        (lambda text: text.replace('"count": 23', '"count": 22'), "of other than 22 examples"),
        (lambda text: text[:100], "expected a whole manifest, found"),
        (lambda text: text.replace('"sha256": "', '"sha256": "0'), "another train.manifest.safetensors"),
        (lambda text: text.replace('"bytes": ', '"bytes": -'), "an example that is not inside of its shard"),
    ],
)
def test_a_changed_manifest_is_refused(change: Callable[[str], str], message: str, tmp_path: Path) -> None:
    data, path = config(tmp_path), tmp_path / "train.manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message) as caught:
        load(data)
    assert "make it again with tools/make_shards.py --index" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"urls": "x/train-{000..002}.tar"},
            r"x/train\.manifest\.json: expected the shards' manifest .*: No such",
        ),
        ({"urls": "pipe:cat x.tar"}, r"data\.urls=pipe:cat x\.tar: expected a file, or a URL of http or https"),
        ({"urls": "s3://x/a.tar"}, r"data\.urls=s3://x/a\.tar: expected a file, or a URL of http or https, found s3"),
        ({"urls": "x/train.tar.gz"}, r"expected names that end in \.tar, without compression"),
        ({"urls": "{a,b}.tar"}, r"expected data\.manifest beside it"),
        ({"urls": "{a,a}.tar"}, r"expected each shard's file name once, found one again"),
        ({"urls": "x/a.tar::y/a.tar"}, r"expected each shard's file name once, found one again"),
    ],
)
def test_urls_that_cannot_be_read_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        load(config(tmp_path, **options))


def test_shards_behind_redirects_are_read(tmp_path: Path) -> None:
    config(tmp_path)
    with server(tmp_path) as (address, faults):
        faults.moved = "/elsewhere/"
        assert images(config(f"{address}/elsewhere")) == images(config(tmp_path)) > 0
        assert any(path.startswith("/elsewhere/") for path, _ in faults.asked)


def test_shards_that_the_manifest_does_not_have_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected the shard train-003\.tar in it, found 3 shards, train-000\.tar to"):
        load(config(tmp_path, urls=f"{tmp_path}/train-{{000..003}}.tar"))
    assert len(load(config(tmp_path, urls=f"{tmp_path}/train-{{002,000}}.tar"))["train"]) == 22


def test_a_manifest_is_found_beside_its_shards() -> None:
    assert place_of("a/train-{000000..000146}.tar") == "a/train.manifest.json"
    assert place_of("http://h/b/val-07.tar?x=1") == "http://h/b/val.manifest.json"
    with pytest.raises(ConfigError, match=r"expected data\.manifest"):
        place_of("{a,b}/train-0.tar")


def test_samples_come_back_from_parts_of_a_manifest() -> None:
    rows = [[(f"ä{shard}/{row}" * row, 1, 512 * row, 9, 2**32 - 1) for row in range(4)] for shard in range(3)]
    parts = [Samples.of(one) for one in rows]
    whole = Samples.joined(parts)
    assert [whole.key(place) for place in range(12)] == [row[0] for one in rows for row in one]
    assert [whole.part(5, 9).key(place) for place in range(4)] == [whole.key(place) for place in range(5, 9)]


def test_images_of_every_kind_go_through_a_stream(tmp_path: Path) -> None:
    kinds = [
        lambda image: encoded(image.convert("CMYK")),
        lambda image: encoded(image.convert("L")),
        lambda image: encoded(image, "PNG"),
    ]
    write(tmp_path, "train", [13, 1, 9], lambda number: kinds[number % 3](photograph(number)))
    write(tmp_path, "test", [7])
    assert images(config(tmp_path)) == 23
