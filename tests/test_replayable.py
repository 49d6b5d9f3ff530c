"""Claims about what a rule promises by being replayable: that a step reads the batch's tensors and nothing else."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import RULE_NAMES, Case, gradients, make
from torch.utils._python_dispatch import TorchDispatchMode

from alignscale.engine_graph import StepGraph
from alignscale.learner import Learner
from alignscale.loss import MSE
from alignscale.rules import make_rule
from alignscale.rules.align import AlignAda
from alignscale.rules.feedback import SignSymmetric, SignSymmetricConfig
from alignscale.types import Batch, Cached, StepOutput

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
