"""Claims about the initial network and all else that is fixed: from the seed, never trained, never a parameter."""

import math
from dataclasses import replace

import pytest
import torch
from cases import CLASSES, NETS, RULE_NAMES, SEED, Built, Case, make, shared, weights_of
from torch import Tensor

from alignscale.config import as_dict
from alignscale.frozen import Fixed, Frozen, calibrate, fingerprint, initialise
from alignscale.initial import Stream, normal
from alignscale.nets import Network, build

FIXED = [name for name in RULE_NAMES if name not in ("backprop", "readout_only", "sign_symmetric/uniform")]
CASES = [Case("mlp"), Case("conv3", "batch"), Case("rnn_every", "calibrated")]


def train(built: Built, rule: str, steps: int) -> list[Tensor]:
    """Plain gradient descent on one batch -> the parameters."""
    learner = built.rule(rule)
    optimizer = torch.optim.SGD(built.net.parameters(), 0.05)
    for step in range(steps):
        optimizer.zero_grad()
        learner(replace(built.batch, step=step)).surrogate.backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in built.net.parameters()]


def everything_fixed(built: Built) -> list[Tensor]:
    """The numbers of the initial network and of every kind of feedback."""
    layers = range(len(built.net.layers))
    found = [built.fixed.frozen.weight(index) for index in layers]
    found += [built.fixed.feedback(index) for index in layers]
    found += [built.fixed.magnitude(index, draw) for index in layers for draw in (0, 3)]
    found += [built.fixed.direct(site) for site in range(len(built.net.norms))]
    return [tensor.clone() for tensor in found]


@pytest.mark.parametrize("rule", FIXED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stored_and_regenerated_weights_train_to_the_same_bits(case: Case, rule: str) -> None:
    first, second = (train(make(case, False, torch.float32, stored), rule, 10) for stored in (True, False))
    start = make(case, False, torch.float32).net.parameters()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, start, strict=True))


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "regenerated"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_leaves_what_is_fixed_as_it_was(case: Case, stored: bool) -> None:
    built = make(case, moved=False, stored=stored)
    images, state = built.batch.images, built.net.state
    before, logits = everything_fixed(built), built.fixed.frozen.trace(images).logits
    for rule in RULE_NAMES:
        train(built, rule, 3)
    assert all(torch.equal(a, b) for a, b in zip(everything_fixed(built), before, strict=True))
    with torch.no_grad():
        assert not torch.allclose(built.net(images), logits)
        if state is not None:  # read by both networks, and trained
            built.net.layers[state].weight.zero_()
    assert torch.equal(built.fixed.frozen.trace(images).logits, logits)


def test_stored_weights_are_generated_once_and_regenerated_ones_at_each_use() -> None:
    stored, regenerated = (make(Case("mlp"), stored=stored).fixed for stored in (True, False))
    for read in (lambda fixed: fixed.frozen.weight(1), lambda fixed: fixed.feedback(1), lambda fixed: fixed.direct(1)):
        assert read(stored) is read(stored)
        assert read(regenerated) is not read(regenerated)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_frozen_network_is_the_net_at_the_start(case: Case) -> None:
    built, images = make(case, moved=False), make(case).batch.images
    with torch.no_grad():
        trace = built.net.trace(images)
    frozen = built.fixed.frozen.trace(images)
    assert torch.equal(frozen.logits, trace.logits)
    for index, layer in enumerate(built.net.layers):
        assert torch.equal(built.fixed.frozen.weight(index), layer.weight)
        assert layer.bias is None or not layer.bias.any()


def test_the_frozen_network_does_not_come_from_weights_that_were_trained_or_restored() -> None:
    config, shape = NETS["mlp"]
    net = build(config, shape, CLASSES)
    initialise(net, SEED)
    start = weights_of(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    late = Fixed.from_seed(net, SEED)
    assert all(torch.equal(late.frozen.weight(index), weight) for index, (weight, _) in enumerate(start))


def test_a_copy_has_the_biases_too_and_does_not_follow_the_net() -> None:
    built = make(Case("conv3"))
    images = built.batch.images
    frozen = Frozen.copy_of(built.net)
    with torch.no_grad():
        logits = built.net(images)
        for parameter in built.net.parameters():
            parameter.add_(1.0)
    assert torch.equal(frozen.trace(images).logits, logits)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fixed_weights_are_no_parameters_and_no_state(case: Case) -> None:
    built = shared(case)
    parameters, state = set(built.net.parameters()), built.net.state_dict()
    for name in RULE_NAMES:
        rule = built.rule(name)
        rule(built.batch)
        assert set(rule.parameters()) == parameters
        assert rule.state_dict().keys() == {f"net.{key}" for key in state}
        assert not any(tensor.requires_grad for tensor in everything_fixed(built))


@pytest.mark.parametrize("kind", ["ntk", "standard"])
@pytest.mark.parametrize("net", NETS)
def test_feedback_is_drawn_like_the_weights_from_streams_of_its_own(net: str, kind: str) -> None:
    built = shared(Case(net, parameterisation=kind))
    for index, layer in enumerate(built.net.layers):
        std = layer.initial_std
        shape = tuple(layer.weight.shape)
        for stream, found in (
            (Stream.WEIGHT, built.fixed.frozen.weight(index)),
            (Stream.FEEDBACK, built.fixed.feedback(index)),
        ):
            assert torch.equal(found, normal(SEED, stream, index, shape).double() * std)
        for draw in (0, 5):
            expected = normal(SEED, Stream.MAGNITUDE, index, shape, draw=draw).double() * std
            assert torch.equal(built.fixed.magnitude(index, draw), expected.abs())
    for site, shape in enumerate(built.net.direct_shapes):
        numbers = normal(SEED, Stream.DIRECT_FEEDBACK, site, (*shape, CLASSES)).double()
        torch.testing.assert_close(built.fixed.direct(site), numbers / math.sqrt(math.prod(shape)), rtol=1e-15, atol=0)


def print_of(net: Network, config: object, seed: int = SEED) -> str:
    return fingerprint(net, as_dict(config), seed)


def test_the_fingerprint_follows_from_seed_architecture_and_gain() -> None:
    config, shape = NETS["mlp"]
    variants = [
        config,
        replace(config, width=7),
        replace(config, gain=1.5),
        replace(config, activation="tanh"),
        replace(config, parameterisation="standard"),
        replace(config, norm="batch"),
    ]
    prints = [print_of(build(variant, shape, CLASSES), variant) for variant in variants]
    prints += [print_of(build(config, shape, CLASSES), config, SEED + 1), print_of(build(config, shape, 4), config)]
    assert len(set(prints)) == len(prints)
    assert print_of(build(config, shape, CLASSES), config) == prints[0]


def test_the_fingerprint_follows_from_the_norms_statistics() -> None:
    first, second = (make(Case("mlp", "calibrated")) for _ in range(2))
    assert print_of(first.net, first.config) == print_of(second.net, second.config)
    calibrate(second.fixed.frozen, second.calibration[:6])
    assert print_of(first.net, first.config) != print_of(second.net, second.config)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fingerprint_does_not_change_with_training(case: Case) -> None:
    built = make(case)
    before = print_of(built.net, built.config)
    train(built, "align_ada", 2)
    assert print_of(built.net, built.config) == before
