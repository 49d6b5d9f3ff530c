"""Claims about recorded steps that a machine without a GPU can test; tools/check_device.py trains with them on one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import RULE_NAMES, Case, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alignscale.engine_graph import StepGraph, _copy, _moving
from alignscale.rules import make_rule
from alignscale.rules.align import AlignAda
from alignscale.rules.feedback import SignSymmetric, SignSymmetricConfig
from alignscale.types import Batch, Bits, Cached, Jacobian, StepOutput

aten = torch.ops.aten
READ_BY_PYTHON = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.item.default}
REPLAYABLE = [name for name in RULE_NAMES if not name.endswith("batchwise")]
CASES = [Case(net, norm) for net in ("mlp", "conv3", "rnn_every") for norm in ("none", "batch", "calibrated")]


class NothingIsRead(TorchDispatchMode):
    """Fails where Python waits for a number of a tensor's, which no recorded step can."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READ_BY_PYTHON, func
        return func(*args, **(kwargs or {}))


def gradients(rule: Any, batch: Batch) -> list[Tensor | None]:
    for parameter in rule.trained():
        parameter.grad = None
    rule(batch).surrogate.backward()
    return [None if one.grad is None else one.grad.clone() for one in rule.trained()]


@pytest.mark.parametrize("name", REPLAYABLE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_replayable_rule_keeps_its_promise(case: Case, name: str) -> None:
    built = make(case)
    rule = built.rule(name)
    assert rule.replayable
    first = gradients(rule, built.batch)
    later = replace(built.batch, step=built.batch.step + 7, view=3, keys=["other"] * len(built.batch.images))
    with NothingIsRead():
        second = gradients(rule, later)
    pairs = zip(first, second, strict=True)
    assert all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def test_what_reads_numbers_is_found() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingIsRead():
        torch.ones(1).item()


def test_a_rule_whose_feedback_changes_each_step_promises_nothing() -> None:
    built = make(Case("mlp"))
    kept = make_rule(built.net, built.fixed, SignSymmetricConfig(magnitude="fixed"))
    drawn = make_rule(built.net, built.fixed, SignSymmetricConfig(magnitude="batchwise"))
    assert isinstance(kept, SignSymmetric)
    assert (kept.replayable, drawn.replayable) == (True, False)
    assert StepGraph(drawn, drawn.trained())(built.batch) is None


def test_a_subclass_does_not_inherit_the_promise() -> None:
    class ByStep(AlignAda):
        """Depends on the step."""

        def learn(self, batch: Batch) -> StepOutput:
            output = super().learn(batch)
            return output._replace(surrogate=output.surrogate * batch.step)

    assert AlignAda.replayable
    assert not ByStep.replayable


def cached_batch(rows: Tensor) -> Batch:
    """With bits and Jacobians that are told by ``rows``, and others that are the batch's own."""
    table, values = torch.randint(256, (9, 5), dtype=torch.uint8), torch.rand(9, 3, 40)
    gates: dict[int, Tensor | Bits] = {0: Bits(table, rows), 1: Bits(table[rows]), 2: torch.rand(2, 4)}
    jacobians = {3: Jacobian(values, torch.rand(9, 3), rows), 4: Jacobian(values[rows], torch.rand(2, 3))}
    inputs = [torch.rand(2, 6), torch.rand(2, 7)]
    return Batch(torch.rand(2, 1, 2, 3), torch.rand(2, 3), ["a/0", "a/1"], 2, cached=Cached(gates, jacobians, inputs))


def test_a_copy_shares_nothing_but_tables_and_takes_what_is_copied_into_it() -> None:
    torch.manual_seed(0)
    batch, other = cached_batch(torch.tensor([4, 1])), cached_batch(torch.tensor([0, 8]))
    own = _copy(batch)
    assert own.cached
    assert batch.cached
    bits, jacobian = own.cached.gates[0], own.cached.jacobians[3]
    assert isinstance(bits, Bits)
    assert bits.packed is batch.cached.gates[0].packed  # type: ignore[union-attr]
    assert jacobian.values is batch.cached.jacobians[3].values
    assert bits.rows is jacobian.rows  # one tensor, which is copied once
    before = [one.clone() for one in _moving(batch)]
    assert len(before) == len(_moving(own)) == 9
    for target, source in zip(_moving(own), _moving(other), strict=True):
        assert target.data_ptr() not in {one.data_ptr() for one in _moving(batch)}
        target.copy_(source)
    assert all(torch.equal(one, was) for one, was in zip(_moving(batch), before, strict=True))
    assert all(torch.equal(one, new) for one, new in zip(_moving(own), _moving(other), strict=True))
    assert other.cached
    assert torch.equal(own.cached.jacobians[4].values, other.cached.jacobians[4].values)
    assert torch.equal(own.cached.inputs[1], other.cached.inputs[1])  # type: ignore[index]
    assert bits.rows is not None
    assert bits.rows.tolist() == [0, 8]


def test_batches_are_of_a_kind_where_only_their_numbers_differ() -> None:
    built = make(Case("mlp"))
    rule = built.rule("align_ada")
    trained, batch = rule.trained(), built.batch
    kind = StepGraph(rule, trained)._kind
    assert kind(batch) == kind(replace(batch, images=batch.images + 1, step=9, keys=[]))
    others = [
        replace(batch, size=batch.size + 1),
        replace(batch, images=batch.images[:-1], targets=batch.targets[:-1]),
        replace(batch, images=batch.images.float()),
        replace(batch, cached=cached_batch(torch.tensor([0, 1])).cached),
    ]
    assert all(kind(one) != kind(batch) for one in others)
    first, second = cached_batch(torch.tensor([0, 1])), cached_batch(torch.tensor([0, 1]))
    assert kind(first) != kind(second)  # other tables
    assert kind(first) == kind(replace(first, images=first.images + 1))
    before = kind(batch)
    trained[0].requires_grad_(False)
    assert kind(batch) != before
