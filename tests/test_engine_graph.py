"""Claims about recorded steps that a machine without a GPU can test; tools/check_device.py trains with them on one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, gradients, make
from torch import Tensor

from alignscale import engine_graph
from alignscale.choices import SGDConfig
from alignscale.engine import LocalEngine, make_optimizer
from alignscale.engine_graph import StepGraph, _copy, _moving
from alignscale.learner import Learner
from alignscale.types import Batch, Bits, Cached, Jacobian


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


class Remade:
    """Stands for a CUDA graph, which needs a GPU: makes the step again, into the tensors of the first time."""

    def __init__(self, recorded: Any) -> None:
        self.recorded = recorded

    def replay(self) -> None:
        before = [one.grad for one in self.recorded.parameters]
        again = self.recorded._made()
        made = [one.grad for one in self.recorded.parameters]
        kept = self.recorded
        pairs = [*zip(kept.output, again, strict=True), *zip(kept.gradients, made, strict=True)]
        for own, new in pairs:
            if own is not None and new is not None:
                own.copy_(new)
        for one, gradient in zip(self.recorded.parameters, before, strict=True):
            one.grad = gradient


class Recorded(engine_graph._Recorded):
    """All of a recorded step but what a GPU does."""

    def warm_up(self) -> None:
        self._made()
        self.rule.zero_grad()

    def record(self) -> None:
        self.graph, self.output = Remade(self), self._made()
        self.gradients = [one.grad for one in self.parameters]

    def _replay(self) -> None:
        self.graph.replay()


@pytest.fixture(params=["align_ada", "backprop"])
def engine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> LocalEngine:
    monkeypatch.setattr(engine_graph, "_Recorded", Recorded)
    monkeypatch.setattr(engine_graph, "has_room", lambda device: True)
    rule = make(Case("mlp")).rule(request.param)
    return recording(rule)


def recording(rule: Any) -> LocalEngine:
    """An engine that records on the CPU."""
    made = LocalEngine(rule, make_optimizer(SGDConfig(lr=0.01), rule.trained()), cuda_graph=True)
    assert made.graph is None  # of weights that are not on a GPU
    made.graph = StepGraph(rule, made.parameters)
    return made


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
    with engine.parameters[0].register_hook(lambda gradient: None):
        assert trained(4) == 0
    with engine.rule.net.register_full_backward_pre_hook(lambda *call: None):
        assert trained(1) == 0
    output = engine(batch)
    engine.evaluate(batch)
    engine.backward(output.surrogate)
    assert trained(2) == 2


def test_where_memory_is_too_small_steps_are_made_as_ever(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_graph, "has_room", lambda device: False)
    batch, graph = make(Case("mlp")).batch, engine.graph
    assert graph is not None
    expected = gradients(engine.rule, batch)
    for _ in range(2):
        engine.forget()
        engine.backward(engine(batch).surrogate)
    engine.forget()
    with pytest.warns(UserWarning, match="too little memory to record a step"):
        engine.backward(engine(batch).surrogate)
    assert all(torch.equal(a.grad, b) for a, b in zip(engine.parameters, expected, strict=True))  # type: ignore[arg-type]
    engine.backward(engine(batch).surrogate)
    assert graph.replays == 0


def test_what_ends_a_recording_says_how_to_go_without_and_leaves_the_gradients(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Recorded) -> None:
        self._made()
        raise RuntimeError("the capture is invalid")

    monkeypatch.setattr(Recorded, "record", fails)
    batch = make(Case("mlp")).batch
    for _ in range(2):
        engine.forget()
        engine.backward(engine(batch).surrogate)
    before = [one.grad for one in engine.parameters]
    with pytest.raises(RuntimeError, match="the capture is invalid") as caught:
        engine(batch)
    assert caught.value.__notes__ == ["while a step was recorded; engine=local engine.cuda_graph=false records none"]
    assert before[0] is not None
    assert all(one.grad is gradient for one, gradient in zip(engine.parameters, before, strict=True))


def test_a_learner_s_parts_are_replayed_as_often_as_check_device_expects(engine: LocalEngine) -> None:
    import check_device

    learner = Learner("mlp", (2, 4, 4), 10, engine.rule.config.name)
    own = recording(learner.rule)
    learner.engine, graph = own, own.graph
    assert graph is not None
    for step, parts in enumerate(check_device.PARTS):
        learner.update([check_device.batch_for(learner, part, step, sum(parts)) for part in parts], 0.01)
    assert graph.replays == check_device.REPLAYS
