"""Claims about splits and about how examples become batches."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from alignscale.choices import ConfigError, DataConfig, DigitsConfig, MLPConfig, MSEConfig, SyntheticConfig
from alignscale.data import balanced_order, load, split
from alignscale.data.examples import Encoding, Examples, stream
from alignscale.data.plan import Plan
from alignscale.learner import Learner
from alignscale.loss import make_loss

ANY_LABELS = st.lists(st.integers(0, 5), min_size=2, max_size=60).map(torch.tensor)


def some(labels: Tensor, shard: str = "train", skipped: int = 0) -> Examples:
    images = torch.arange(len(labels) * 12).view(-1, 3, 2, 2) % 256
    return replace(Examples.whole(images.byte(), labels, 6, shard), skipped=skipped)


def splits(labels: Tensor, limit: int = 0, validation: int = 0) -> dict[str, Examples]:
    return split(DataConfig("some", train_limit=limit, validation=validation), some(labels), some(labels, "test"))


def keys(examples: Examples) -> list[int]:
    return examples.rows.tolist()


def encoding(train: Examples, normalisation: str = "none", **options: Any) -> Encoding:
    data = DataConfig("some", normalisation=normalisation, **options)
    return Encoding(make_loss(MSEConfig()), torch.float64, torch.float64, torch.device("cpu")).of(data, train)


@given(ANY_LABELS)
@settings(deadline=None)
def test_every_beginning_of_the_order_has_the_classes_as_equal_as_they_go(labels: Tensor) -> None:
    order = balanced_order(labels)
    assert order.sort().values.tolist() == list(range(len(labels)))
    whole = torch.bincount(labels, minlength=6)
    for length in range(1, len(labels)):
        rest = whole - torch.bincount(labels[order[:length]], minlength=6)
        taken = (whole - rest)[whole > 0]
        unfinished = (whole - rest)[rest > 0]
        assert taken.max() - unfinished.min() <= 1


@given(ANY_LABELS, st.data())
@settings(deadline=None)
def test_splits_are_nested_disjoint_and_in_order_at_any_limit(labels: Tensor, data: st.DataObject) -> None:
    validation = data.draw(st.integers(0, len(labels) - 1))
    larger = data.draw(st.integers(1, len(labels) - validation))
    smaller = data.draw(st.integers(1, larger))
    full, large, small = (splits(labels, limit, validation) for limit in (0, larger, smaller))
    assert (len(large["train"]), len(small["train"])) == (larger, smaller)
    assert set(keys(small["train"])) <= set(keys(large["train"])) <= set(keys(full["train"]))
    for found in (full, large, small):
        assert found["test"].digest == some(labels, "test").digest
        assert keys(found["train"]) == sorted(keys(found["train"]))
        assert ("validation" in found) == (validation > 0)
        if validation:
            assert found["validation"].digest == full["validation"].digest
            assert len(found["validation"]) == validation
            assert not set(keys(found["validation"])) & set(keys(full["train"]))


def test_classes_stay_within_one_after_a_validation_split() -> None:
    labels = torch.arange(600) % 6
    for validation in (0, 1, 45, 300):
        for limit in (1, 7, 100, 250):
            found = splits(labels, limit, validation)
            for name in found.keys() - {"test"}:
                counts = torch.bincount(found[name].labels, minlength=6)
                assert counts.max() - counts.min() <= 1


def test_a_part_keeps_its_examples_keys_and_what_was_skipped() -> None:
    whole = some(torch.arange(6), skipped=2)
    part = whole.part(torch.tensor([1, 4])).part(torch.tensor([1]))
    assert (keys(part), part.labels.tolist(), part.skipped, part.shard, part.classes) == ([4], [4], 2, "train", 6)
    assert torch.equal(part.images, whole.images[4:5])


def test_what_was_skipped_is_counted_once() -> None:
    train = some(torch.arange(6), skipped=2)
    found = split(DataConfig("some", validation=2, train_limit=3), train, some(torch.arange(6), "test", skipped=1))
    assert {name: part.skipped for name, part in found.items()} == {"train": 2, "validation": 0, "test": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 2000}, "data.validation=2000: expected less than the 1437 training examples"),
        ({"shift": 8, "views": 2}, "data.shift=8: expected less than the images' 8 pixels"),
        ({"train_limit": 1438}, "data.train_limit=1438: expected at most the 1437 training examples"),
        ({"train_limit": 1000, "validation": 500}, "data.train_limit=1000: expected at most the 937 training examples"),
    ],
)
def test_more_examples_than_there_are_is_an_error(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(DigitsConfig(**options))


def test_a_config_of_no_known_kind_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"data=else: expected one of alignscale\.choices\.DATA, found DataConfig"):
        load(DataConfig("else"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_moments_equal_numpys_in_float64(dtype: torch.dtype) -> None:
    dice = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2345, 3, 4, 5), generator=dice).to(dtype)
    images[:, 1] //= 5
    pixels = images.numpy().astype(np.float64) / (255 if dtype == torch.uint8 else 1)
    mean, std = Examples.whole(images, torch.zeros(len(images), dtype=torch.int64), 2, "train").moments()
    np.testing.assert_allclose(mean.numpy(), pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std.numpy(), pixels.std((0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("value", [0, 37, 127, 254, 255])
def test_a_constant_channel_has_deviation_1_and_is_encoded_as_0(value: int) -> None:
    images = torch.full((777, 1, 13, 13), value, dtype=torch.uint8)
    train = Examples.whole(images, torch.zeros(777, dtype=torch.int64), 2, "train")
    assert train.moments()[1].item() == 1
    assert encoding(train, "channel").images(images).abs().max() < 1e-15


def test_the_training_set_is_encoded_with_mean_0_and_deviation_1() -> None:
    train = load(SyntheticConfig(shape=[2, 5, 5], train=300, test=9, noise=3))["train"]
    stored = (train.images * 30 + 120).clamp(0, 255).byte()
    for images in (stored, train.images):
        encoded = encoding(replace(train, images=images), "channel").images(images)
        assert encoded.mean((0, 2, 3)).abs().max() < 1e-12
        assert (encoded.square().mean((0, 2, 3)) - 1).abs().max() < 1e-12


def test_without_normalisation_pixels_are_in_0_to_1_and_floats_stay() -> None:
    train = some(torch.arange(6))
    assert_close(encoding(train).images(train.images), train.images.double() / 255, rtol=1e-15, atol=0)
    floats = train.images / 7
    assert torch.equal(encoding(replace(train, images=floats)).images(floats), floats.double())


def test_a_batch_has_the_keys_targets_and_moved_images_of_its_examples() -> None:
    train = some(torch.arange(6)).part(torch.tensor([0, 2, 5]))
    code = encoding(train, views=3, shift=1, flip=True)
    batch = code.batch(train, torch.tensor([2, 0]), step=7, size=5, view=1)
    assert (batch.keys, batch.size, batch.step, batch.view) == (["train/5", "train/0"], 5, 7, 1)
    assert torch.allclose(batch.targets, torch.eye(6, dtype=torch.float64)[[5, 0]] - 1 / 6)
    still = code.batch(train, torch.tensor([2, 0]), step=7)
    assert_close(still.images, train.images[[2, 0]].double() / 255, rtol=1e-15, atol=0)


def test_a_batch_comes_in_no_more_parts_than_asked_for() -> None:
    learner = Learner(MLPConfig(width=4), (1, 8, 8), 10)
    train = load(DigitsConfig(train_limit=47))["train"]
    found = [batches for _, batches in stream(train, Plan(47, 10, 0), learner.encoding, 0, 5, parts=4)]
    assert [[len(part.images) for part in parts] for parts in found] == [[2, 3, 2, 3]] * 4 + [[1, 2, 2, 2]]
    assert [parts[0].size for parts in found] == [10, 10, 10, 10, 7]
