"""Claims about the library's entry: a network and its rule on a user's own tensors."""

import pytest
import torch
from cases import close

from alignscale.choices import ConfigError, CrossEntropyConfig, MLPConfig, SGDConfig
from alignscale.learner import Learner

IMAGES = torch.randn(60, 1, 3, 4, generator=torch.Generator().manual_seed(0))
LABELS = (IMAGES.flatten(1)[:, :3]).argmax(1)


def learner(rule: str = "align_ada", lr: float = 0.3, **options: object) -> Learner:
    return Learner(MLPConfig(width=128, depth=2), (1, 3, 4), 3, rule, SGDConfig(lr=lr), **options)  # type: ignore[arg-type]


def test_it_learns_the_users_tensors() -> None:
    made = learner(lr=2.0, loss=CrossEntropyConfig())
    losses = made.fit(IMAGES, LABELS, epochs=20, batch_size=20)
    assert losses[-1] < losses[0] / 2
    assert made.evaluate(IMAGES, LABELS)["accuracy"] > 0.9


def test_epochs_in_two_calls_are_those_of_one() -> None:
    once, twice = learner(), learner()
    whole = once.fit(IMAGES, LABELS, epochs=3, batch_size=25)
    assert twice.fit(IMAGES, LABELS, 1, 25) + twice.fit(IMAGES, LABELS, 2, 25) == whole
    assert all(torch.equal(a, b) for a, b in zip(once.net.parameters(), twice.net.parameters(), strict=True))


def test_align_ada_has_the_direction_of_backprop_at_the_start_and_a_rule_that_does_not_learn_has_none() -> None:
    assert learner().alignment(IMAGES, LABELS) == pytest.approx([1.0, 1.0, 1.0], abs=1e-6)
    assert learner("readout_only").alignment(IMAGES, LABELS) == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)
    assert learner("backprop").alignment(IMAGES, LABELS) == pytest.approx([1.0, 1.0, 1.0], abs=1e-6)


def test_a_loss_that_is_not_finite_leaves_the_weights_as_they_are() -> None:
    made = learner()
    before = [p.detach().clone() for p in made.net.parameters()]
    with pytest.raises(ArithmeticError, match=r"the loss is nan at step 0: expected a finite number; lower optim\.lr"):
        made.fit(torch.full_like(IMAGES, torch.nan), LABELS)
    for one, other in zip(before, made.net.parameters(), strict=True):
        close(one, other.detach(), 0.0)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[:, :, :2], LABELS, r"images \(60, 1, 2, 4\), labels \(60,\): expected \('N', 1, 3, 4\) and \(N,\)"),
        (IMAGES, LABELS[:5], r"labels \(5,\)"),
        (IMAGES, LABELS.float(), "expected int64 from 0 to 2, found torch.float32"),
        (IMAGES, LABELS + 1, "expected int64 from 0 to 2, found torch.int64 from 1 to 3"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    for call in (learner().fit, learner().evaluate, learner().alignment):
        with pytest.raises(ConfigError, match=message):
            call(images, labels)


def test_an_unknown_rule_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="rule=alignada: expected one of align_ada, align_prop"):
        learner("alignada")
