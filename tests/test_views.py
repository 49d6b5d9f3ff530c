"""Claims about views."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from alignscale.choices import DataConfig, MSEConfig
from alignscale.data import split
from alignscale.data.examples import Encoding, Examples
from alignscale.data.views import Moves, moved
from alignscale.loss import make_loss

ROWS = torch.arange(3000)
MOVES = Moves(shift=2, flip=True)


def examples(count: int = 40) -> Examples:
    images = torch.randint(1, 256, (count, 2, 5, 6), generator=torch.Generator().manual_seed(0))
    return Examples.whole(images.byte(), torch.arange(count) % 4, 4, "some")


def images_of(data: Examples, places: Tensor, view: int) -> Tensor:
    config = DataConfig("some", views=4, shift=2, flip=True)
    code = Encoding(make_loss(MSEConfig()), torch.float64, torch.float64, torch.device("cpu")).of(config, data)
    return code.batch(data, places, 0, view=view).images


def rolled(image: np.ndarray, down: int, right: int, mirrored: bool) -> np.ndarray:
    """(C, H, W) with zeros around it, mirrored, then rolled: what comes from outside is 0."""
    around = np.pad(image[:, :, ::-1] if mirrored else image, ((0, 0), (9, 9), (9, 9)))
    return np.roll(around, (down, right), (1, 2))[:, 9:-9, 9:-9]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_pixels_move_as_numpys_roll_with_zeros_from_outside(dtype: torch.dtype) -> None:
    images = examples(98).images.to(dtype)
    cases = [(down, right, flip) for down in range(-3, 4) for right in range(-3, 4) for flip in (False, True)]
    down, right, mirrored = (torch.tensor(column) for column in zip(*cases, strict=True))
    ours = moved(images, down, right, mirrored)
    theirs = np.stack([rolled(image, *case) for image, case in zip(images.numpy(), cases, strict=True)])
    assert torch.equal(ours, torch.from_numpy(theirs))


def test_moves_further_than_the_image_leave_nothing() -> None:
    far = torch.full((3,), 8)
    assert not moved(examples(3).images, far, far * 0, torch.ones(3, dtype=torch.bool)).any()


def test_view_0_is_the_example_itself() -> None:
    data = examples()
    assert_close(images_of(data, ROWS[:40], 0), data.images.double() / 255, rtol=1e-15, atol=0)


def test_a_view_is_the_same_in_whatever_batch_and_subset_it_is_asked_for() -> None:
    data = examples()
    whole = images_of(data, ROWS[:40], 3)
    assert torch.equal(images_of(data, torch.tensor([31, 2, 7]), 3), whole[[31, 2, 7]])
    part = split(DataConfig("some", train_limit=9, validation=5), data, data)["train"]
    assert torch.equal(images_of(part, torch.tensor([8, 0]), 3), whole[part.rows[[8, 0]]])


def test_views_differ_from_each_other_and_from_example_to_example() -> None:
    draws = [torch.stack(MOVES.of(ROWS, view, ROWS)) for view in (1, 2)]
    assert not torch.equal(*draws)
    assert len(draws[0].unique(dim=1).T) == 5 * 5 * 2


def test_every_move_up_to_shift_is_as_frequent_as_any_other() -> None:
    down, right, mirrored = MOVES.of(ROWS, 1, ROWS)
    for move in (down, right):
        counts = torch.bincount(move + 2)
        assert len(counts) == 5
        assert (counts - 600).abs().max() < 5 * (600 * 0.8) ** 0.5  # five deviations
    assert abs(int(mirrored.sum()) - 1500) < 5 * (3000 * 0.25) ** 0.5


def test_without_shift_and_flip_nothing_moves() -> None:
    down, right, mirrored = Moves(shift=0, flip=False).of(ROWS, 5, ROWS)
    assert not torch.stack([down, right, mirrored]).any()


def test_draws_of_a_view_never_change() -> None:
    """Cached Jacobians belong to them."""
    down, right, mirrored = Moves(2, True).of(torch.arange(6), 1, torch.arange(6))
    assert (down.tolist(), right.tolist()) == ([-1, -2, 2, 2, -1, 2], [0, -1, -2, 2, -2, -2])
    assert mirrored.tolist() == [True, False, True, False, True, True]
