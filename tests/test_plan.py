"""Claims about the order of examples."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignscale.data.plan import Plan, even_batches


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 9))
@settings(deadline=None)
def test_each_example_comes_once_an_epoch(examples: int, batch: int, seed: int) -> None:
    plan = Plan(examples, batch, seed)
    rows = torch.cat([rows for _, rows in plan.batches(plan.steps_per_epoch, 2 * plan.steps_per_epoch)])
    assert torch.equal(rows.sort().values, torch.arange(examples))


@given(st.integers(1, 40), st.integers(1, 15), st.integers(0, 30), st.integers(0, 30))
@settings(deadline=None)
def test_a_resumed_stream_is_the_rest_of_the_whole(examples: int, batch: int, first: int, more: int) -> None:
    plan = Plan(examples, batch, 3)
    whole = [(step, rows.tolist()) for step, rows in plan.batches(0, first + more)]
    assert [(step, rows.tolist()) for step, rows in plan.batches(first, first + more)] == whole[first:]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    plan = Plan(100, 10, 0)
    assert not torch.equal(plan.epoch(0), plan.epoch(1))
    assert not torch.equal(plan.epoch(0), Plan(100, 10, 1).epoch(0))
    assert torch.equal(plan.epoch(1), Plan(100, 33, 0).epoch(1))


@given(st.integers(1, 500), st.integers(1, 130))
@settings(deadline=None)
def test_even_batches_cover_everything_in_order(examples: int, most: int) -> None:
    parts = even_batches(examples, most)
    assert [row for part in parts for row in range(examples)[part]] == list(range(examples))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-examples // most)
