"""Claims about recorded steps that a machine without a GPU can test; tools/check_device.py trains with them on one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import RULE_NAMES, Case, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alignscale import engine_graph
from alignscale.choices import SGDConfig
from alignscale.engine import LocalEngine, make_optimizer
from alignscale.engine_graph import StepGraph, _copy, _moving
from alignscale.learner import Learner
from alignscale.loss import MSE
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
        chosen = args[1] if func is aten.index.Tensor else ()
        by_truth = any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in chosen)
        assert func not in READ_BY_PYTHON, func
        assert not by_truth, func
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


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["backprop", "align_ada", "align_zero"])
def test_so_it_does_in_half_precision_and_from_a_cache(name: str, precision: str) -> None:
    learner = Learner("mlp", (1, 4, 4), 3, name, precision=precision)
    examples = learner._examples(torch.rand(6, 1, 4, 4), torch.arange(6) % 3, "train", 6)
    batch = learner.encoding.batch(examples, torch.arange(6), 0)
    frozen = learner.fixed.frozen
    trace = frozen.trace(batch.images)
    cached = Cached(dict(enumerate(learner.net.gates(trace))), {}, trace.inputs)
    for one in (batch, replace(batch, cached=cached)):
        first = gradients(learner.rule, one)
        with NothingIsRead():
            second = gradients(learner.rule, replace(one, step=5))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None)


def test_what_reads_numbers_is_found() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingIsRead():
        torch.ones(1).item()
    with pytest.raises(AssertionError, match="index"), NothingIsRead():
        torch.ones(2)[torch.tensor([True, False])]


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

    class SignsByStep(SignSymmetric):
        """Promises nothing."""

    assert AlignAda.replayable
    assert not ByStep.replayable
    built = make(Case("mlp"))
    assert not SignsByStep(built.net, built.fixed, SignSymmetricConfig(), MSE()).replayable


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


class Recording:
    """Stands for what needs a GPU: makes the step, and keeps the gradients as a recorded one does."""

    def __init__(self, rule: Any, parameters: list[Any], batch: Batch, kind: object) -> None:
        self.rule, self.parameters, self.kind = rule, parameters, kind
        self.gradients: list[Tensor | None] = []

    def replay(self, batch: Batch) -> StepOutput:
        before = [one.grad for one in self.parameters]
        self.gradients = gradients(self.rule, batch)
        for one, gradient in zip(self.parameters, before, strict=True):
            one.grad = gradient
        output = self.rule(batch)
        return StepOutput(output.surrogate.detach(), output.loss, output.logits)


@pytest.fixture(params=["align_ada", "backprop"])
def engine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> LocalEngine:
    monkeypatch.setattr(engine_graph, "_Recorded", Recording)
    monkeypatch.setattr(engine_graph, "gpu_kernels", lambda: engine_graph)
    built = make(Case("mlp"))
    rule = built.rule(request.param)
    return LocalEngine(rule, make_optimizer(SGDConfig(lr=0.01), rule.trained()), cuda_graph=True)


def part_of(batch: Batch, examples: int) -> Batch:
    return replace(batch, images=batch.images[:examples], targets=batch.targets[:examples])


def test_the_third_of_a_kind_is_recorded_and_a_smaller_one_at_an_epoch_s_end_never(engine: LocalEngine) -> None:
    batch, graph = make(Case("mlp")).batch, engine.graph
    assert graph is not None
    replays = []
    for examples in ([4] * 5 + [3]) * 4:
        engine.backward(engine(part_of(batch, examples)).surrogate)
        engine.step()
        replays.append(graph.replays)
    assert replays == [0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 13, 13, 14, 15, 16, 17, 18, 18]


def test_replayed_parts_of_a_batch_add_up(engine: LocalEngine) -> None:
    batch, graph = make(Case("mlp")).batch, engine.graph
    assert graph is not None
    parts = [part_of(batch, 3), replace(batch, images=batch.images[-3:], targets=batch.targets[-3:])]
    for _ in range(2):
        for part in parts:
            engine.backward(engine(part).surrogate)
        engine.forget()
    expected = [gradients(engine.rule, part) for part in parts]
    engine.forget()
    before = graph.replays
    for part in parts:
        engine.backward(engine(part).surrogate)
    assert graph.replays == before + 2
    for one, *both in zip(engine.parameters, *expected, strict=True):
        torch.testing.assert_close(one.grad, sum(both), rtol=1e-12, atol=1e-15)


def test_a_step_is_not_recorded_while_the_graph_of_another_is_held(engine: LocalEngine) -> None:
    batch, graph = make(Case("mlp")).batch, engine.graph
    assert graph is not None
    output = None
    for _ in range(4):
        output = engine(batch)  # the one before is let go of after this one is made
        engine.backward(output.surrogate)
        engine.forget()
    assert graph.replays == 0
    del output
    engine(batch)
    assert graph.replays == 1


def test_a_replayed_step_takes_its_own_surrogate_alone(engine: LocalEngine) -> None:
    batch = make(Case("mlp")).batch
    for _ in range(3):
        output = engine(batch)
        del output
    first, second = engine(batch), engine(batch)
    for wrong in (first.surrogate, second.surrogate * 0.5, second.surrogate + engine.parameters[0].sum()):
        with pytest.raises(ValueError, match="expected the surrogate of the last batch as it was given"):
            engine.backward(wrong)
    engine.backward(second.surrogate)


def test_what_python_does_in_a_step_is_not_recorded(engine: LocalEngine) -> None:
    batch, graph = make(Case("mlp")).batch, engine.graph
    assert graph is not None

    def trained(steps: int) -> int:
        before = graph.replays
        for _ in range(steps):
            engine.backward(engine(batch).surrogate)
            engine.forget()
        return graph.replays - before

    assert trained(4) == 2
    with engine.rule.net.layers[0].register_forward_hook(lambda *call: None):
        assert trained(4) == 0
    assert trained(1) == 1
    with engine.parameters[0].register_post_accumulate_grad_hook(lambda one: None):
        assert trained(4) == 0
    engine.evaluate(batch)
    assert trained(2) == 2


def test_where_memory_is_too_small_steps_are_made_as_ever(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine_graph, "_Recorded", full)
    batch, graph = make(Case("mlp")).batch, engine.graph
    assert graph is not None
    expected = gradients(engine.rule, batch)
    engine.forget()
    for _ in range(2):
        engine.backward(engine(batch).surrogate)
        engine.forget()
    with pytest.warns(UserWarning, match="too little memory to record a step"):
        engine.backward(engine(batch).surrogate)
    assert all(torch.equal(a.grad, b) for a, b in zip(engine.parameters, expected, strict=True) if b is not None)  # type: ignore[arg-type]
    engine.backward(engine(batch).surrogate)
    assert graph.replays == 0


def test_a_learner_s_parts_are_replayed_as_often_as_check_device_expects(engine: LocalEngine) -> None:
    import check_device

    learner = Learner("mlp", (2, 4, 4), 10, "align_ada")
    own = LocalEngine(learner.rule, make_optimizer(SGDConfig(lr=0.01), learner.rule.trained()), cuda_graph=True)
    learner.engine, graph = own, own.graph
    assert graph is not None
    for step, parts in enumerate(check_device.PARTS):
        learner.update([check_device.batch_for(learner, part, step, sum(parts)) for part in parts], 0.01)
    assert graph.replays == check_device.REPLAYS
