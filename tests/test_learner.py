"""Claims about the library's entry: a network and its rule on a user's own tensors."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import close

from alignscale.choices import (
    ConfigError,
    CrossEntropyConfig,
    DigitsConfig,
    MLPConfig,
    MSEConfig,
    RNNConfig,
    SGDConfig,
)  # fmt: skip
from alignscale.data.examples import Examples
from alignscale.learner import Learner
from alignscale.loss import right
from alignscale.types import Batch

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


@pytest.mark.parametrize("where", ["cosines", "evaluate", "right"])
def test_training_goes_on_after_what_was_broken_off(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement, or an update that has its gradient: the same bits as if it had never begun."""

    def broken_off(*_: object) -> None:
        raise KeyboardInterrupt

    made, whole = learner(), learner()
    for one in (made, whole):
        one.fit(IMAGES, LABELS, 1, 25)
    calls = {"cosines": made.alignment, "evaluate": made.evaluate, "right": made.fit}
    with monkeypatch.context() as patch:
        patch.setattr(f"alignscale.learner.{where}", broken_off)
        with pytest.raises(KeyboardInterrupt):
            calls[where](IMAGES, LABELS)
    assert made.fit(IMAGES, LABELS, 2, 25) == whole.fit(IMAGES, LABELS, 2, 25)
    assert all(torch.equal(a, b) for a, b in zip(made.net.parameters(), whole.net.parameters(), strict=True))


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
        (IMAGES[:, :, :2], LABELS, r"images \(60, 1, 2, 4\): expected \('N', 1, 3, 4\)"),
        (IMAGES, LABELS[:5], r"labels \(5,\): expected \(60,\), one for each"),
        (IMAGES, LABELS.float(), "expected whole numbers from 0 to 2, found torch.float32"),
        ((IMAGES * 9).byte(), LABELS, "images: expected floating point, as the network reads them, found torch.uint8"),
        (IMAGES[:0], LABELS[:0], r"images \(0, 1, 3, 4\): expected"),
        (IMAGES, LABELS + 1, "expected whole numbers from 0 to 2, found torch.int64 from 1 to 3"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    for call in (learner().fit, learner().evaluate, learner().alignment):
        with pytest.raises(ConfigError, match=message):
            call(images, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"net": MLPConfig(width=0)}, "net.width=0: expected a whole number of at least 1"),
        ({"net": MLPConfig(width="64")}, "net.width='64': expected int, found str"),
        ({"net": MLPConfig(parameterisation="mup")}, "net.parameterisation=mup: expected one of ntk, standard"),
        ({"net": "resnet"}, "net=resnet: expected one of conv3, conv7"),
        ({"rule": "alignada"}, "rule=alignada: expected one of align_ada, align_prop"),
        ({"optim": SGDConfig(decay_towards="start")}, "optim.decay_towards=start: expected one of zero, initial"),
        ({"optim": SGDConfig(clip_norm=-1.0)}, "optim.clip_norm=-1.0: expected a finite number of at least 0"),
        ({"optim": SGDConfig(lr=0.0)}, "optim.lr=0.0: expected a finite number above 0"),
        ({"optim": torch.optim.SGD}, "optim=type: expected one of adam, adamw, sgd, or options of OptimConfig"),
        ({"loss": MSEConfig(reduction="average")}, "loss.reduction=average: expected one of mean, sum"),
        ({"loss": "hinge"}, "loss=hinge: expected one of cross_entropy, mse"),
        ({"precision": "fp8"}, "precision=fp8: expected one of fp32"),
        ({"seed": -1}, "seed=-1: expected a whole number from 0"),
        ({"frozen_weights": "recomputed"}, "frozen.weights=recomputed: expected one of stored, regenerated"),
        ({"device": "tpu"}, "device=tpu: expected auto or cpu, or a device of this machine"),
        ({"shape": (1, 0, 4)}, r"shape=\(1, 0, 4\): expected at least 2 classes, and sizes above 0"),
        ({"classes": 1}, "classes=1"),
        ({"net": RNNConfig(initial_state="trained")}, "state_rows=0: net.initial_state=trained wants"),
    ],
)
def test_a_wrong_option_is_refused_as_on_the_command_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Learner(**{"net": MLPConfig(), "shape": (1, 3, 4), "classes": 3} | options)


@pytest.mark.parametrize(
    ("net", "call", "message"),
    [
        ("mlp", lambda made: made.fit(IMAGES, LABELS, batch_size=0), "batch_size=0: expected a whole number"),
        ("mlp", lambda made: made.fit(IMAGES, LABELS, epochs=0), "epochs=0: expected a whole number"),
        ("mlp", lambda made: made.fit(IMAGES, LABELS, batch_size=61), "batch_size=61: expected at most the 60"),
        ("mlp", lambda made: made.evaluate(IMAGES, LABELS, 0), "batch_size=0: expected a whole number"),
        ("conv3", lambda made: made.fit(IMAGES, LABELS, batch_size=59), "make a batch of one example of 60"),
        ("conv3", lambda made: made.evaluate(IMAGES, LABELS, 1), "makes a batch of 1 of 60"),
        (MLPConfig(norm="calibrated"), lambda made: made.fit(IMAGES, LABELS), r"found none; call calibrate\(images\)"),
        (MLPConfig(norm="calibrated"), lambda made: made.calibrate(IMAGES[:, :, :2]), r"images \(60, 1, 2, 4\)"),
        (
            RNNConfig(readout="every"),
            lambda made: made.fit(IMAGES, LABELS),
            "net.readout=every, data=tensors: data=add has a target at each step",
        ),
        (RNNConfig(initial_state="trained"), lambda made: made.fit(IMAGES, LABELS, 1, 31), "at most state_rows=30"),
        (RNNConfig(initial_state="trained"), lambda made: made.evaluate(IMAGES, LABELS, 31), "at most state_rows=30"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(net: Any, call: Callable[[Learner], Any], message: str) -> None:
    made = Learner(net, (1, 3, 4), 3, state_rows=30)
    with pytest.raises(ConfigError, match=message):
        call(made)
    assert not made.trained


def test_moments_are_of_the_untrained_network() -> None:
    made = Learner(MLPConfig(width=8, norm="calibrated"), (1, 3, 4), 3)
    made.calibrate(IMAGES)
    made.fit(IMAGES, LABELS, 1)
    with pytest.raises(ConfigError, match="calibrate: expected an untrained network"):
        made.calibrate(IMAGES)


def test_arrays_lists_and_names_will_do() -> None:
    one = Learner("mlp", (1, 3, 4), 3, "align_ada", "sgd", "cross_entropy", device="auto")
    other = Learner(MLPConfig(), (1, 3, 4), 3, "align_ada", SGDConfig(), CrossEntropyConfig())
    expected = other.fit(IMAGES, LABELS, 1)
    assert one.fit(IMAGES.numpy(), LABELS.tolist(), 1) == expected


def test_an_epoch_that_is_broken_off_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    made, count = learner(), itertools.count()
    update = made.update

    def broken(batches: Any, lr: float) -> Any:
        if next(count) == 4:
            raise KeyboardInterrupt
        return update(batches, lr)

    monkeypatch.setattr(made, "update", broken)
    with pytest.raises(KeyboardInterrupt):
        made.fit(IMAGES, LABELS, 5, 20)
    assert made.epochs == 1


def test_an_update_counts_what_was_right_before_it() -> None:
    made = learner()
    batch = made.encoding.batch(made._examples(IMAGES, LABELS, "train", 60), torch.arange(60), 0)
    expected = round(60 * made.evaluate(IMAGES, LABELS)["accuracy"])
    assert 0 < expected < 60
    assert made.update([batch], 0.1)[1] == expected


def test_an_update_counts_the_share_of_a_sequence_that_was_right() -> None:
    made = Learner(RNNConfig(width=8, readout="every"), (6, 1), 1)
    images, targets = torch.rand(5, 6, 1, generator=torch.Generator().manual_seed(1)), torch.zeros(5, 6, 1)
    batch = Batch(images, targets, torch.arange(5), 5)
    expected = right(made.engine.evaluate(batch).logits, targets).item()
    assert expected % 1 > 0
    assert made.update([batch], 0.1)[1] == expected


def test_a_mean_loss_weighs_each_example_alike() -> None:
    made = learner(lr=1e-30)
    (mean,) = made.fit(IMAGES, LABELS, epochs=1, batch_size=50)
    assert mean == pytest.approx(made.evaluate(IMAGES, LABELS)["loss"], rel=1e-5)


def test_orders_go_on_from_one_fit_to_the_next() -> None:
    once, twice = learner(), learner()
    whole = once.fit(IMAGES, LABELS, epochs=5, batch_size=25)
    assert [loss for count in (2, 2, 1) for loss in twice.fit(IMAGES, LABELS, count, 25)] == whole


def test_a_lost_update_leaves_no_gradient_behind() -> None:
    made = learner()
    batch = made.encoding.batch(made._examples(IMAGES, LABELS, "train", 60), torch.arange(60), 0)
    made.update([dataclasses.replace(batch, images=batch.images * torch.nan)], 0.1)
    assert all(parameter.grad is None for parameter in made.net.parameters())


def test_a_negative_label_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"found torch\.int64 from -1 to 1"):
        learner().fit(IMAGES, LABELS - 1)


def test_regenerated_weights_are_not_kept() -> None:
    for kept, frozen_weights in ((True, "stored"), (False, "regenerated")):
        frozen = learner(frozen_weights=frozen_weights).fixed.frozen
        assert (frozen.weight(0) is frozen.weight(0)) == kept


def test_bf16_images_are_rounded_once_after_they_are_normalised() -> None:
    pixels = Examples.whole(torch.randint(256, (9, 3, 4, 4), dtype=torch.uint8), torch.zeros(9).long(), 2, "x")
    found = []
    for precision in ("fp32", "bf16"):
        made = Learner(MLPConfig(width=4), (3, 4, 4), 2, precision=precision)
        encoding = made.encoding.of(DigitsConfig(normalisation="channel"), pixels)
        found.append(encoding.images(pixels.images))
    assert torch.equal(found[0].to(torch.bfloat16), found[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": MSEConfig(centred="false")}, "loss.centred='false': expected bool, found str"),
        ({"net": MLPConfig(width=16.0)}, "net.width=16.0: expected int, found float"),
        ({"net": MLPConfig(width=True)}, "net.width=True: expected int, found bool"),
        ({"seed": 1.5}, "seed=1.5: expected int, found float"),
        ({"classes": 3.0}, "classes=3.0, .*: expected whole numbers"),
        ({"shape": 12}, "shape=12: expected whole numbers"),
    ],
)
def test_a_value_of_another_type_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Learner(**{"net": MLPConfig(), "shape": (1, 3, 4), "classes": 3} | options)


@pytest.mark.parametrize(
    "labels", [LABELS.numpy().astype("uint16"), LABELS.numpy()[::-1][::-1], LABELS.to(torch.uint8), LABELS.int()]
)
def test_labels_of_any_whole_type_will_do(labels: Any) -> None:
    assert learner().fit(IMAGES, labels, 1) == learner().fit(IMAGES, LABELS, 1)
    assert learner().fit(list(IMAGES.numpy()), labels, 1) == learner().fit(IMAGES, LABELS, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda made: made.fit(IMAGES, ["a"] * 60), "labels: expected a tensor or an array of numbers"),
        (lambda made: made.alignment(IMAGES, None), "labels: expected a tensor or an array of numbers"),
        (lambda made: made.fit(IMAGES, LABELS, 2.0), "epochs=2.0: expected int, found float"),
        (lambda made: made.evaluate(IMAGES, LABELS, 20.0), "batch_size=20.0: expected int, found float"),
        (lambda made: made.calibrate(IMAGES), "calibrate: expected net.norm=calibrated, found none"),
    ],
)
def test_what_is_no_number_is_refused(call: Callable[[Learner], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(learner())


def test_moments_are_of_two_finite_images_or_more() -> None:
    made = Learner(MLPConfig(norm="calibrated"), (1, 3, 4), 3)
    for images in (IMAGES[:1], IMAGES * torch.nan):
        with pytest.raises(ConfigError, match="calibrate: expected at least 2 images of finite numbers"):
            made.calibrate(images)


def test_a_trained_state_is_evaluated_with_the_rows_that_it_has() -> None:
    made = Learner(RNNConfig(width=4, initial_state="trained"), (1, 3, 4), 3, state_rows=20)
    assert made.evaluate(IMAGES, LABELS) == made.evaluate(IMAGES, LABELS, 20)


def test_it_trains_where_gradients_are_off() -> None:
    with torch.no_grad():
        found = learner("backprop").fit(IMAGES, LABELS, 1)
    assert found == learner("backprop").fit(IMAGES, LABELS, 1)
