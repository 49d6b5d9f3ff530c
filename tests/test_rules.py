"""Claims about the learning rules: each against its definition in float64, at the start and away from it."""

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import PUBLIC, RULE_NAMES, STEP, TABLE, Built, Case, close, make, shared, shared_world
from oracle_rules import ORACLES
from torch import Tensor

from alignscale.choices import ConfigError, RuleConfig
from alignscale.loss import MSE
from alignscale.rules import RULES, make_rule
from alignscale.rules.feedback import SignSymmetricConfig

Updates = list[tuple[Tensor | None, Tensor | None]]
LOCAL = [name for name in RULE_NAMES if name != "backprop"]
SHAPES = [Case("mlp"), Case("conv3", "batch"), Case("rnn", "batch"), Case("rnn_every")]


def updates(built: Built, rule: str, step: int = STEP) -> Updates:
    """Per layer, the gradients of weight and bias; none is left behind."""
    pairs = [(layer.weight, layer.bias) for layer in built.net.layers]
    flat = [parameter for pair in pairs for parameter in pair if parameter is not None]
    surrogate = built.rule(rule)(replace(built.batch, step=step)).surrogate
    found = iter(torch.autograd.grad(surrogate, flat, allow_unused=True))
    return [(next(found), None if bias is None else next(found)) for _, bias in pairs]


def close_updates(ours: Updates, theirs: Updates, tolerance: float = 1e-10) -> None:
    """The scale of a bias is that of its layer's weight too: before a batch norm its gradient is 0 but for rounding."""
    assert len(ours) == len(theirs)
    for our_pair, their_pair in zip(ours, theirs, strict=True):
        scale = 0.0 if their_pair[0] is None else their_pair[0].abs().max().item()
        for our, their in zip(our_pair, their_pair, strict=True):
            assert (our is None) == (their is None)
            if our is not None and their is not None:
                close(our, their, tolerance, scale)


def distance(first: Updates, second: Updates) -> float:
    """||first - second|| / ||second|| over the weights that both change."""
    pairs = [(a, b) for (a, _), (b, _) in zip(first, second, strict=True) if a is not None and b is not None]
    difference = sum((a - b).square().sum().item() for a, b in pairs)
    return (difference / sum(b.square().sum().item() for _, b in pairs)) ** 0.5


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_align_rules_equal_backprop_at_the_start(case: Case) -> None:
    built = shared(case, moved=False)
    backprop = updates(built, "backprop")
    for rule in ("align_ada", "align_zero", "align_prop"):
        close_updates(updates(built, rule), backprop)


@pytest.mark.parametrize("case", [*TABLE, *PUBLIC], ids=str)
def test_every_rule_equals_its_definition_away_from_the_start(case: Case) -> None:
    built, world = shared(case), shared_world(case)
    for rule in RULE_NAMES:
        close_updates(updates(built, rule), ORACLES[rule](world))


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_the_loss_and_logits_of_a_step_are_the_current_network_s(case: Case) -> None:
    built, world = shared(case), shared_world(case)
    for rule in RULE_NAMES:
        output = built.rule(rule)(built.batch)
        close(output.loss, world.loss.detach(), 1e-12)
        close(output.logits, world.now.logits, 1e-12)
        assert not output.loss.requires_grad
        assert not output.logits.requires_grad


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_away_from_the_start_the_rules_differ_from_each_other(case: Case) -> None:
    found = {rule: updates(shared(case), rule) for rule in RULE_NAMES if rule != "readout_only"}
    for first, second in itertools.combinations(found, 2):
        assert distance(found[first], found[second]) > 1e-2, f"{first} and {second}"


def test_the_public_blocks_change_align_ada_alone() -> None:
    for name in ("conv3", "rnn_every"):
        theory, public = (shared(Case(name, "batch", blocks=blocks)) for blocks in ("theory", "public"))
        for rule in RULE_NAMES:
            changed = distance(updates(public, rule), updates(theory, rule)) > 1e-3
            assert changed == (rule == "align_ada")


def test_every_registered_rule_has_a_definition_and_is_in_the_tables() -> None:
    registered = {name for name, rule in RULES.items() if rule.__module__.startswith("alignscale.")}
    assert {name.partition("/")[0] for name in RULE_NAMES} == registered
    assert ORACLES.keys() == set(RULE_NAMES)


def ports_of(surrogate: Tensor) -> list[Any]:
    """The nodes of the layers' ports: on every path down from the surrogate there is one."""
    ports, pending = [], [surrogate.grad_fn]
    while pending:
        node = pending.pop()
        assert node is not None
        if "WeightGradient" in node.name():
            ports.append(node)
        else:
            assert node.next_functions, f"a path ends at {node.name()} without a port"
            pending += [after for after, _ in node.next_functions]
    return ports


@pytest.mark.parametrize("rule", LOCAL)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_local_rules_keep_no_graph_between_layers(case: Case, rule: str) -> None:
    built = shared(case)
    ports = ports_of(built.rule(rule)(built.batch).surrogate)
    owned = [frozenset(id(after.variable) for after, _ in port.next_functions if after is not None) for port in ports]
    pairs = zip(built.net.layers, updates(built, rule), strict=True)
    learning = [frozenset(map(id, layer.parameters())) for layer, (weight, _) in pairs if weight is not None]
    assert Counter(owned) == Counter(learning)
    assert not any(tensor.requires_grad for port in ports for tensor in port.saved_tensors)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_local_rules_save_two_tensors_a_layer_and_no_weight(case: Case) -> None:
    built = shared(case)
    weights = {parameter.untyped_storage().data_ptr() for parameter in built.net.parameters()}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    def count(rule: str) -> tuple[int, int]:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            built.rule(rule)(built.batch)
        return len(saved), sum(tensor.untyped_storage().data_ptr() in weights for tensor in saved)

    assert count("backprop")[1] > 0
    for rule in LOCAL:
        learning = sum(weight is not None for weight, _ in updates(built, rule))
        assert count(rule) == (2 * learning, 0)


def test_a_surrogate_s_gradient_scales_with_what_backward_is_given() -> None:
    built = shared(Case("conv3", "batch"))
    weights = [layer.weight for layer in built.net.layers]
    once = torch.autograd.grad(built.rule("align_ada")(built.batch).surrogate, weights)
    scaled = torch.autograd.grad(built.rule("align_ada")(built.batch).surrogate * 4, weights)
    for first, second in zip(once, scaled, strict=True):
        close(second, 4 * first, 1e-14)


def test_readout_only_moves_the_readout_and_a_trained_state_alone() -> None:
    for case in SHAPES:
        built = shared(case)
        learning = {built.net.readout} if built.net.state is None else {built.net.readout, built.net.state}
        assert {i for i, (weight, _) in enumerate(updates(built, "readout_only")) if weight is not None} == learning


def test_batchwise_magnitudes_are_new_at_each_step_and_the_same_again() -> None:
    built = shared(Case("conv3", "batch"))
    kinds = ("batchwise", "fixed")
    steps = {kind: [updates(built, f"sign_symmetric/{kind}", step) for step in (0, 1, 0)] for kind in kinds}
    assert distance(steps["batchwise"][0], steps["batchwise"][1]) > 0.1
    close_updates(steps["batchwise"][0], steps["batchwise"][2], 0)
    close_updates(steps["fixed"][0], steps["fixed"][1], 0)
    assert distance(steps["batchwise"][0], steps["fixed"][0]) > 0.1


def test_an_unknown_rule_is_an_error_that_lists_the_known_ones() -> None:
    built = shared(Case("mlp"))
    with pytest.raises(ConfigError, match="rule=magic") as caught:
        make_rule(built.net, built.fixed, RuleConfig("magic"))
    assert all(name in str(caught.value) for name in RULES)


def test_an_unknown_magnitude_is_an_error_that_lists_the_known_ones() -> None:
    built = shared(Case("mlp"))
    with pytest.raises(ConfigError, match=r"rule\.magnitude=big: expected one of uniform, fixed, batchwise"):
        make_rule(built.net, built.fixed, SignSymmetricConfig(magnitude="big"))
    with pytest.raises(ConfigError, match=r"rule\.magnitude=\(absent\)"):
        make_rule(built.net, built.fixed, RuleConfig("sign_symmetric"))


def test_the_updates_of_parts_of_a_batch_add_up_to_the_batch_s() -> None:
    built = make(Case("conv3", "calibrated"))
    batch = built.batch
    for rule in RULE_NAMES:
        whole = updates(built, rule)
        parts = []
        for rows in (slice(0, 1), slice(1, None)):
            built.batch = replace(batch, images=batch.images[rows], targets=batch.targets[rows])
            parts.append(updates(built, rule))
        built.batch = batch
        for (first, _), (second, _), (total, _) in zip(*parts, whole, strict=True):
            if first is not None and second is not None and total is not None:
                close(first + second, total, 1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (4, 6, 3)], ids=["logits", "sequences"])
def test_the_error_is_the_gradient_of_the_loss_and_parts_add_up(shape: tuple[int, ...]) -> None:
    dice = torch.Generator().manual_seed(1)
    logits, targets = (torch.randn(shape, generator=dice, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    per_example = (logits - targets).square().mean(-1).flatten(1).sum(1) if len(shape) == 3 else None
    expected = (logits - targets).square().mean() if per_example is None else per_example.mean()
    close(MSE().value(logits, targets, 4), expected, 1e-14)
    close(MSE().error(logits, targets, 4), torch.autograd.grad(expected, logits)[0], 1e-14)
    close(MSE().value(logits[:1], targets[:1], 4) + MSE().value(logits[1:], targets[1:], 4), expected, 1e-14)


def test_updates_are_divided_by_the_global_batch() -> None:
    built = make(Case("mlp"))
    before = {rule: updates(built, rule) for rule in RULE_NAMES}
    built.batch = replace(built.batch, size=2 * built.batch.size)
    for rule in RULE_NAMES:
        for (first, _), (second, _) in zip(before[rule], updates(built, rule), strict=True):
            assert (first is None) == (second is None)
            if first is not None and second is not None:
                close(2 * second, first, 1e-14)
