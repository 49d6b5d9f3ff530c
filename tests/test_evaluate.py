"""Claims about accuracy and loss on a split."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignscale.choices import MLPConfig
from alignscale.data.examples import Examples
from alignscale.evaluate import evaluate, rank_of
from alignscale.learner import Learner


@given(st.integers(1, 37), st.integers(1, 40), st.integers(2, 8))
@settings(deadline=None, max_examples=30)
def test_every_measure_is_exact_to_the_last_partial_batch(count: int, most: int, classes: int) -> None:
    dice = torch.Generator().manual_seed(count)
    images, labels = torch.randn(count, 1, 2, 3, generator=dice), torch.randint(classes, (count,), generator=dice)
    learner = Learner(MLPConfig(width=5, activation="tanh"), (1, 2, 3), classes, precision="fp64")
    found = evaluate(learner.engine, Examples.whole(images, labels, classes, "x"), learner.encoding, most)
    with torch.no_grad():
        logits = learner.net(images.double())
    top = logits.topk(min(5, classes)).indices
    assert found["accuracy"] == (top[:, 0] == labels).double().mean().item()
    assert found["top5"] == (top == labels[:, None]).any(1).double().mean().item()
    targets = learner.loss.targets(labels, classes, torch.float64)
    assert abs(found["loss"] - (logits - targets).square().mean().item()) < 1e-12


def test_equal_logits_rank_in_the_order_of_classes_and_nan_comes_last() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [float("nan"), 0.0, 1.0]])
    assert rank_of(logits, torch.tensor([0, 1, 0])).tolist() == [0, 1, 5]
