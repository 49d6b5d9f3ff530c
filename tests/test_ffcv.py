"""Each loader compiles for seconds, so all read the same two files with the same crops."""

import re
import signal
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import make_shards
import numpy as np
import pytest
import torch
from data_cases import write_cifar10, write_mnist
from stream_cases import encoded, jpeg, photograph

from alignscale.choices import ConfigError, FFCVConfig, MLPConfig, MSEConfig, SGDConfig, WebDatasetConfig
from alignscale.config import CheckpointConfig, EvaluationConfig, LogConfig, RunConfig, TrainConfig
from alignscale.data import Split, load
from alignscale.data.examples import DataError, Encoding, Wanted, stream
from alignscale.data.plan import Plan
from alignscale.data.views import Crops
from alignscale.interrupts import Interrupted
from alignscale.learner import Learner
from alignscale.loss import make_loss
from alignscale.rules import RULES
from alignscale.train import train
from alignscale.types import Batch

needs_ffcv = pytest.mark.ffcv
ENCODING = Encoding(make_loss(MSEConfig()), torch.float32, torch.float32, torch.device("cpu"))
SIZES = {"size": 24, "resize": 28, "streams": 3, "block": 4}
TRAIN, TEST = 37, 10


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs as shards and as FFCV files: among them a grey one, a CMYK one and a PNG."""
    root = tmp_path_factory.mktemp("ffcv")
    unusual = {4: ("L", "JPEG"), 5: ("CMYK", "JPEG"), 6: ("RGB", "PNG")}
    for split, count in (("train", TRAIN), ("val", TEST)):
        for number in range(count):
            path = root / "tree" / split / f"class{number % 3}" / f"{number:03}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            mode, kind = unusual.get(number, ("", ""))
            path.write_bytes(encoded(photograph(number).convert(mode), kind) if mode else jpeg(number))
    command = ["--root", str(root / "tree"), "--out", str(root), "--shard-size", "13", "--ffcv", "--quiet"]
    assert make_shards.main([*command, "--workers", "1"]) == 0
    return root


def config(folder: Path, **options: object) -> FFCVConfig:
    paths = {"path": str(folder / "train.beton"), "test_path": str(folder / "val.beton")}
    return FFCVConfig(**{**paths, **SIZES, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def split(folder: Path) -> Split:
    return load(config(folder))["train"]


def images(split: Split, *views: int, places: torch.Tensor | None = None) -> list[torch.Tensor]:
    places = torch.arange(len(split)) if places is None else places
    wanted = [Wanted(places, 0, len(places), view) for view in views]
    return [batch.images for batch in split.batches(wanted, ENCODING)]


@needs_ffcv
def test_every_view_of_every_image_shows_what_the_same_view_of_the_shards_does(folder: Path, split: Split) -> None:
    urls = {"urls": f"{folder}/train-{{000000..000002}}.tar", "test_urls": f"{folder}/val-000000.tar"}
    other = load(WebDatasetConfig(**urls, **SIZES, workers=0))["train"]  # type: ignore[arg-type]
    for ours, theirs in zip(images(split, 0, 1, 2), images(other, 0, 1, 2), strict=True):
        apart = (ours - theirs).abs()
        assert apart.mean(dim=(1, 2, 3)).max() < 12  # of 255: another way to enlarge
        assert apart.mean(dim=(1, 2, 3)).median() < 2  # another DCT
    assert (images(split, 1)[0] - images(split, 2)[0]).abs().mean(dim=(1, 2, 3)).median() > 12
    assert torch.equal(split.labels, other.labels)


@needs_ffcv
def test_images_grow_with_the_epochs_and_show_what_the_shards_do(folder: Path) -> None:
    urls = {"urls": f"{folder}/train-{{000000..000002}}.tar", "test_urls": f"{folder}/val-000000.tar"}
    grown = {**SIZES, "first_size": 16, "growth": [0, 1]}
    other = load(WebDatasetConfig(**urls, **grown, workers=0))["train"]  # type: ignore[arg-type]
    split = load(config(folder, first_size=16, growth=[0, 1]))["train"]
    places = torch.tensor([5, 0, 9])
    wanted = (2, 1, 1, 0, 1)
    for ours, theirs in zip(images(split, *wanted, places=places), images(other, *wanted, places=places), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().mean(dim=(1, 2, 3)).max() < 12
    assert [one.shape[-1] for one in images(split, *wanted, places=places)] == [24, 16, 16, 24, 16]


@needs_ffcv
def test_a_view_is_the_same_in_any_batch_and_at_any_time(split: Split) -> None:
    first, again = images(split, 3, 3)
    order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(0))
    (mixed,) = images(split, 3, places=order)
    assert torch.equal(first, again)
    assert torch.equal(mixed, first[order])


@needs_ffcv
@pytest.mark.parametrize("view", [0, 1, 7])
def test_crops_are_those_of_the_other_loaders(view: int) -> None:
    from alignscale.data.ffcv import box

    crops, rows = Crops((0.08, 1.0), True, 24 / 28), torch.tensor([0, 1, 2**20 + 3, 1_281_166])
    draws = crops.of(rows, view).tolist()
    for row, draw in zip(rows.tolist(), draws, strict=True):
        for height, width in ((375, 500), (500, 333), (40, 900), (3, 3)):
            top, left, tall, wide, coin = box(row, view, height, width, 0.08, 1.0, 24 / 28)
            assert (top, left, tall, wide, coin < 0.5) == crops.box(draw, height, width, view)


@needs_ffcv
@pytest.mark.parametrize(("ranks", "parts", "stop"), [(1, 1, 2), (2, 1, 5), (3, 2, 3), (5, 1, 1)])
def test_each_example_is_seen_once_an_epoch_over_all_ranks_also_after_a_resume(
    split: Split, ranks: int, parts: int, stop: int
) -> None:
    plan = Plan(len(split), 9, 5, split.layout)

    def keys(start: int, end: int, rank: int) -> list[list[str]]:
        def share(count: int) -> slice:
            return slice(count * rank // ranks, count * (rank + 1) // ranks)

        found = stream(split, plan, ENCODING, start, end, parts, 0, share)
        return [[key for part in step for key in part.keys] for _, step in found]

    before = [keys(0, stop, rank) for rank in range(ranks)]
    after = keys(stop, plan.steps_per_epoch, 0) if ranks == 1 else []
    seen = [keys(0, plan.steps_per_epoch, rank) for rank in range(ranks)]
    assert {len(steps) for steps in seen} == {plan.steps_per_epoch} == {5}
    assert Counter(key for steps in seen for step in steps for key in step) == Counter(
        f"train/{n}" for n in range(TRAIN)
    )
    assert before == [steps[:stop] for steps in seen]
    assert after == (seen[0][stop:] if ranks == 1 else [])


@needs_ffcv
def test_a_batch_of_no_examples_and_the_partial_last_one_are_given(split: Split) -> None:
    wanted = [Wanted(torch.arange(low, high), 0, 9) for low, high in ((0, 9), (9, 9), (9, 11))]
    assert [len(batch.images) for batch in split.batches(wanted, ENCODING)] == [9, 0, 2]


@needs_ffcv
def test_reading_that_is_broken_off_leaves_no_thread_and_torch_its_own_number_of_threads(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ffcv.loader.epoch_iterator import EpochIterator

    decoded, run = [], EpochIterator.run_pipeline
    monkeypatch.setattr(
        EpochIterator, "run_pipeline", lambda self, number, *rest: decoded.append(number) or run(self, number, *rest)
    )
    before, threads = threading.active_count(), torch.get_num_threads()
    found = split.batches((Wanted(torch.arange(9), step, 9) for step in range(50)), ENCODING)
    next(found)
    found.close()
    assert (threading.active_count(), torch.get_num_threads()) == (before, threads)
    assert 0 < len(decoded) < 25


@needs_ffcv
def test_the_file_holds_the_jpegs_untouched_and_what_ffcv_cannot_decode_as_pixels(folder: Path) -> None:
    from ffcv.reader import Reader

    reader, whole = Reader(str(folder / "train.beton")), (folder / "train.beton").read_bytes()
    image, _ = reader.metadata.dtype.names
    sizes = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    stored = [(mode, whole[place : place + sizes[place]]) for mode, _, _, place in reader.metadata[image].tolist()]
    jpegs = Counter(content for mode, content in stored if mode == 0)
    assert jpegs == Counter(
        path.read_bytes() for path in (folder / "tree/train").rglob("*.JPEG") if path.stem not in ("005", "006")
    )
    assert np.asarray(photograph(6)).tobytes() in [content for mode, content in stored if mode == 1]


@needs_ffcv
@pytest.mark.parametrize("name", ["cifar10", "kmnist"])
def test_archives_are_read_back_from_ffcv_files_as_they_are_from_their_own(name: str, tmp_path: Path) -> None:
    written = write_cifar10(tmp_path) if name == "cifar10" else write_mnist(tmp_path, "KMNIST")
    command = ["--source", name, "--root", str(tmp_path), "--out", str(tmp_path / "out"), "--splits", "train,test"]
    assert make_shards.main([*command, "--no-verify", "--ffcv", "--quiet", "--workers", "1"]) == 0
    size = written["train"][0].shape[-1]
    paths = {"path": f"{tmp_path}/out/train.beton", "test_path": f"{tmp_path}/out/test.beton"}
    split = load(FFCVConfig(**paths, size=size, resize=size, normalisation="none"))["test"]
    (pixels,) = images(split, 0)
    pixels = pixels.round().to(torch.uint8)
    grey = written["test"][0].shape[1] == 1
    assert not grey or torch.equal(pixels, pixels[:, :1].expand(-1, 3, -1, -1))
    found = Counter(
        (image[: 1 if grey else 3].numpy().tobytes(), int(label))
        for image, label in zip(pixels, split.labels, strict=True)
    )
    assert found == Counter((image.tobytes(), label) for image, label in zip(*written["test"], strict=True))


@needs_ffcv
def test_ffcvs_own_loader_reads_the_file(folder: Path) -> None:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader

    pipelines = {"image": [CenterCropRGBImageDecoder((24, 24), 24 / 28)], "label": [IntDecoder()]}
    threads = torch.get_num_threads()
    found = list(Loader(str(folder / "train.beton"), 10, 1, drop_last=False, pipelines=pipelines))
    torch.set_num_threads(threads)
    ours = images(load(config(folder))["train"], 0)[0].permute(0, 2, 3, 1).numpy()
    theirs = np.concatenate([pixels.copy() for pixels, _ in found[-1:]])
    assert np.abs(ours[30:].astype(float) - theirs.astype(float)).mean() < 3  # the crop is a pixel off at times


@needs_ffcv
def test_a_run_that_is_stopped_and_resumed_ends_with_the_bits_of_one_that_was_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TrainConfig(
        rule=RULES["align_ada"].options(name="align_ada"), net=MLPConfig(width=16, depth=1), data=config(folder),
        optim=SGDConfig(lr=0.1), evaluation=EvaluationConfig(batch_size=8), epochs=2, batch_size=9, threads=1,
        log=LogConfig(every_steps=1, progress=False, tensorboard=False), checkpoint=CheckpointConfig(every_steps=1),
    )  # fmt: skip
    whole = train(replace(options, run=RunConfig(dir=str(tmp_path / "whole"))), lambda line: None)
    stopped = replace(options, run=RunConfig(dir=str(tmp_path / "stopped")))
    update = Learner.update

    def signalled(self: Learner, parts: list[Batch], *arguments: object) -> object:
        if parts[0].step == 2:
            signal.raise_signal(signal.SIGTERM)
        return update(self, parts, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "update", signalled)
        with pytest.raises(Interrupted, match=r"after step [2-4] of 10"):
            train(stopped, lambda line: None)
    assert train(stopped, lambda line: None)["runs"][0]["curve"] == whole["runs"][0]["curve"]


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "alignscale.data.ffcv", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    with pytest.raises(ConfigError, match=r"data=ffcv: expected the package ffcv.*alignscale\[ffcv\]"):
        load(config(tmp_path))


@needs_ffcv
def test_a_file_that_is_missing_cut_short_or_another_is_named(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "train.beton").read_bytes()
    for content, told in (
        (None, "No such file"),
        (whole[:-100], "cut short"),
        (whole[:9000], ""),
        (jpeg(0), ""),
        (b"", ""),
    ):
        path = tmp_path / "bad.beton"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=re.escape(str(path)) + f".*{told}"):
            load(config(folder, path=str(path)))


@needs_ffcv
@pytest.mark.parametrize("options", [{"transform": "RandAugment"}, {"channels": 1}])
def test_options_that_ffcv_cannot_do_are_refused(options: dict[str, object], folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"data.{next(iter(options))}=.*data=ffcv"):
        load(config(folder, **options))


@needs_ffcv
def test_labels_of_the_test_file_that_training_does_not_have_are_refused(folder: Path, tmp_path: Path) -> None:
    content = bytearray((folder / "val.beton").read_bytes())
    from ffcv.reader import Reader

    reader = Reader(str(folder / "val.beton"))
    begin = 24 + reader.field_descriptors.nbytes + reader.metadata.dtype.fields[reader.metadata.dtype.names[1]][1]
    content[begin] = 9
    (tmp_path / "val.beton").write_bytes(content)
    with pytest.raises(DataError, match=r"expected labels from 0 to 2.*found 9"):
        load(config(folder, test_path=str(tmp_path / "val.beton")))
