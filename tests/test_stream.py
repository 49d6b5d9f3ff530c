"""Claims about data that is streamed: each example once, in the plan's order, whoever reads it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from stream_cases import CLASSES, batches, config, encoded, encoding, jpeg, photograph, same, server, write

from alignscale.choices import WebDatasetConfig
from alignscale.config import digest
from alignscale.data import decode, load
from alignscale.data.plan import Layout, Plan, even_batches
from alignscale.data.torchvision import datasets
from alignscale.data.views import ATTEMPTS, Crops
from alignscale.distributed import Ranks

LAYOUTS = st.builds(
    Layout, st.lists(st.integers(1, 20), min_size=1, max_size=9).map(tuple), st.integers(1, 12), st.integers(1, 30)
)
RANKS = st.integers(1, 6)


@given(
    LAYOUTS, st.integers(1, 25), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99), st.integers(1, 4), st.data()
)
@settings(deadline=None)
def test_ranks_see_each_example_once_an_epoch_and_go_on_from_any_step_on_any_number_of_them(
    layout: Layout, batch: int, first: int, second: int, seed: int, parts: int, data: st.DataObject
) -> None:
    examples = sum(layout.shards)
    plan = Plan(examples, batch, seed, layout)
    steps = plan.steps_per_epoch
    stop = steps + data.draw(st.integers(0, steps))

    def seen(ranks: int, begin: int, end: int) -> list[list[int]]:
        """Of each step, what all ranks see, in the order of parts and ranks; a rank has a turn in each."""
        given = []
        for _, places in plan.batches(begin, end):
            pieces = [places[part] for part in even_batches(len(places), -(-len(places) // parts))]
            given.append(
                [one for piece in pieces for r in range(ranks) for one in piece[Ranks(r, ranks).part(len(piece))]]
            )
        return [[int(one) for one in step] for step in given]

    whole = seen(first, steps, stop) + seen(second, stop, 2 * steps)
    assert len(whole) == steps
    assert sorted(place for step in whole for place in step) == list(range(examples))
    assert [place for step in whole for place in step] == plan.epoch(1).tolist()


@given(LAYOUTS, st.integers(0, 9))
@settings(deadline=None)
def test_each_stream_reads_its_shards_in_turn_and_mixes_within_blocks(layout: Layout, seed: int) -> None:
    order = layout.epoch(seed, 3)
    total, streams = len(order), min(layout.streams, len(order))
    lengths = [total * (index + 1) // streams - total * index // streams for index in range(streams)]
    starts = torch.tensor([0, *layout.shards]).cumsum(0)
    turns = [(turn, piece) for turn in range(max(lengths)) for piece in range(streams) if turn < lengths[piece]]
    for piece in range(streams):
        own = order[torch.tensor([of == piece for _, of in turns])]
        shards = torch.searchsorted(starts, own, right=True).tolist()
        for block in range(0, len(own), layout.block):  # neighbours in the shards' order, mixed
            here = shards[block : block + layout.block]
            rest = set(shards[block + layout.block :])
            assert len(set(here) & rest) <= 1


def test_orders_differ_by_seed_and_epoch_and_mix_all_parts_of_the_data() -> None:
    layout = Layout((100,) * 10, 10, 50)
    orders = [layout.epoch(0, 0), layout.epoch(0, 1), layout.epoch(1, 0)]
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert torch.equal(orders[0], layout.epoch(0, 0))
    for batch in orders[0].split(100):
        assert len(set((batch // 100).tolist())) == 10


def test_workers_ranks_and_places_of_storage_change_no_bit(tmp_path: Path) -> None:
    alone = batches(config(tmp_path, workers=0))
    assert [key for step in alone[:5] for part in step for key in part.keys] != sorted(
        key for step in alone[:5] for part in step for key in part.keys
    )
    assert same(batches(config(tmp_path, workers=3)), alone)
    with server(tmp_path) as (url, _):
        assert same(batches(config(url, workers=1)), alone)
        assert same(batches(config(url, workers=2, cache=str(tmp_path / "cache"))), alone)
    two = [batches(config(tmp_path, workers=1), ranks=Ranks(rank, 2), parts=2) for rank in range(2)]
    halves = batches(config(tmp_path, workers=0), parts=2)
    for step, whole in enumerate(halves):
        for part, (low, high) in zip(whole, zip(two[0][step], two[1][step], strict=True), strict=True):
            assert part.keys == [*low.keys, *high.keys]
            assert torch.equal(part.images, torch.cat([low.images, high.images]))


def test_a_stream_begins_at_any_step_with_the_rest(tmp_path: Path) -> None:
    whole = batches(config(tmp_path, workers=0))
    for start in (0, 3, 4, 7):
        assert same(batches(config(tmp_path, workers=1), start), whole[start:])


def test_more_ranks_than_examples_all_take_part(tmp_path: Path) -> None:
    write(tmp_path, "train", [2])
    write(tmp_path, "test", [1])
    data = config(tmp_path, counts=[2], workers=1)
    keys = [[part.keys for step in batches(data, 0, 2, Ranks(rank, 4)) for part in step] for rank in range(4)]
    assert [len(steps) for steps in keys] == [2] * 4
    assert sorted(key for steps in keys for key in steps[0]) == ["train-000/0", "train-000/1"]


def test_a_shard_is_read_in_row_order_in_a_view(tmp_path: Path) -> None:
    data = config(tmp_path, workers=1, validation=2)
    train = load(data)["train"]
    code = encoding(data, train)
    assert sum(count for _, count in train.shards) == len(train) == 21
    for name, count in train.shards:
        found = list(train.of_shard(name, code, view=2, most=4))
        keys = [key for batch in found for key in batch.keys]
        assert keys == sorted(keys, key=lambda key: int(key.partition("/")[2]))
        assert len(keys) == count
        assert {key.partition("/")[0] for key in keys} == {name}
        assert {batch.view for batch in found} == {2}
        place = torch.tensor([train.keys(torch.arange(21)).index(keys[0])])
        assert torch.equal(code.batch(train, place, 0, view=2).images, found[0].images[:1])


def test_epochs_have_views_of_their_own_and_view_0_is_the_central_square(tmp_path: Path) -> None:
    found = batches(config(tmp_path, workers=0), 0, 10)
    assert [parts[0].view for parts in found] == [1] * 5 + [2] * 5
    assert [parts[0].view for parts in batches(config(tmp_path, workers=0, views=1), 0, 10)] == [0] * 10
    data = config(tmp_path, workers=0, normalisation="none", size=28)
    test = load(data)["test"]
    ours = encoding(data, test).batch(test, torch.tensor([0]), 0).images[0]
    image = np.asarray(Image.open(write_one(tmp_path, jpeg(0))).convert("RGB"))
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    edges = np.arange(29) * side / 28  # each pixel is the mean of what it covers
    pixel = np.arange(side)
    cover = np.clip(np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel), 0, 1)
    mean = cover / cover.sum(1, keepdims=True)
    theirs = np.einsum("ij,jkc,lk->cil", mean, image[top : top + side, left : left + side] / 255, mean)
    assert np.abs(ours.numpy() - theirs).max() < 1.5 / 255


def test_images_grow_with_the_epochs_and_are_those_of_the_size_that_they_have(tmp_path: Path) -> None:
    grown = {"size": 112, "resize": 128, "first_size": 40, "growth": [1, 3]}
    data = config(tmp_path, workers=0, **grown)
    assert [data.pixels(view) for view in range(7)] == [112, 40, 40, 72, 112, 112, 112]
    for first, size in ((112, 224), (48, 224), (90, 100), (224, 224)):
        sizes = [WebDatasetConfig(size=size, first_size=first, growth=[2, 8]).pixels(epoch + 1) for epoch in range(12)]
        assert sizes == sorted(sizes)
        assert sizes[:3] == [first] * 3
        assert sizes[8:] == [size] * 4
        assert all((one - first) % 32 == 0 or one == size for one in sizes)
    found = batches(data, 0, 20)
    assert [parts[0].images.shape[-2:] for parts in found] == [(n, n) for n in (40, 40, 72, 112) for _ in range(5)]
    assert same(batches(config(tmp_path, workers=2, **grown), 3), batches(data, 3, 10))
    for epoch, size in enumerate((40, 40, 72, 112)):
        fixed = config(tmp_path, workers=0, size=size, resize=128)
        assert same(batches(fixed, 5 * epoch, 5 * epoch + 5), found[5 * epoch :][:5])
    test = load(data)["test"]
    assert encoding(data, test).batch(test, torch.tensor([0]), 0).images.shape[-1] == 112


def write_one(folder: Path, content: bytes) -> Path:
    path = folder / "one.img"
    path.write_bytes(content)
    return path


def test_crops_have_the_areas_and_shapes_that_torchvision_draws() -> None:
    crops = Crops((0.08, 1.0), True, 0.875)
    draws = crops.of(torch.arange(4000), 5)
    assert draws.shape == (4000, ATTEMPTS + 1, 4)
    boxes = [crops.box(one, 300, 400, 5) for one in draws.tolist()]
    for top, left, high, wide, _ in boxes:
        assert 0 <= top <= top + high <= 300
        assert 0 <= left <= left + wide <= 400
    datasets()  # imports torchvision where it can be
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.zeros(3, 300, 400)
    theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    ours_area, their_area = (np.mean([box[2] * box[3] for box in found]) / 120000 for found in (boxes, theirs))
    assert ours_area == pytest.approx(their_area, abs=0.02)
    assert np.mean([box[4] for box in boxes]) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(crops.of(torch.tensor([17]), 5), draws[[17]])


@pytest.mark.parametrize(
    ("kind", "image", "options"),
    [
        ("JPEG", photograph(1).convert("CMYK"), {}),
        ("JPEG", photograph(1).convert("L"), {}),
        ("PNG", photograph(1), {}),
        ("PNG", photograph(1).convert("P"), {}),
        ("JPEG", photograph(1), {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"}),
    ],
    ids=["cmyk", "grey", "png", "palette", "rotated"],
)
def test_unusual_images_are_decoded_as_pil_does_without_turning_them(
    kind: str, image: Image.Image, options: dict[str, Any], tmp_path: Path
) -> None:
    content = encoded(image, kind, **options)
    with Image.open(write_one(tmp_path, content)) as opened:
        theirs = np.asarray(opened.convert("RGB"), np.int16)
    ours = decode.decode(content, 3)
    assert ours.shape == (image.height, image.width, 3)
    assert np.abs(ours - theirs).max() <= 2
    assert decode.decode(content, 1).shape == (image.height, image.width, 1)


def test_how_data_is_read_is_no_part_of_what_a_run_is(tmp_path: Path) -> None:
    from run_cases import config as run

    plain, other = (
        digest(run(tmp_path, data=config(tmp_path, **options)))
        for options in ({}, {"workers": 7, "cache": "x", "retries": 9, "checksums": "always"})
    )
    assert plain == other
    assert digest(run(tmp_path, data=config(tmp_path, size=23))) != plain
    assert load(config(tmp_path))["train"].digest == load(config(tmp_path, workers=0))["train"].digest
    assert len(CLASSES) == load(config(tmp_path))["train"].classes
