"""Claims about bf16: the computation is rounded, the weights are not, and the update keeps its direction."""

import dataclasses

import pytest
import torch
from cases import NETS, RULE_NAMES, Case

from alignscale.analysis.updates import cosines, weight_updates
from alignscale.choices import SGDConfig
from alignscale.data.examples import Examples
from alignscale.learner import Learner
from alignscale.rules import RULES
from alignscale.rules.feedback import SignSymmetricConfig
from alignscale.types import Batch

TABLE = [Case(net, norm) for net in NETS if net != "rnn_every" for norm in ("none", "batch", "calibrated")]
TABLE += [Case("conv3", "none", activation) for activation in ("gelu", "tanh", "erf")]


def learner(case: Case, rule: str, precision: str, images: torch.Tensor) -> Learner:
    config, shape = NETS[case.net]
    name, _, magnitude = rule.partition("/")
    options = SignSymmetricConfig(magnitude=magnitude) if magnitude else RULES[name].options(name=name)
    net = dataclasses.replace(config, width=48, norm=case.norm, activation=case.activation)
    made = Learner(net, shape, 3, options, SGDConfig(lr=0.1), seed=1, precision=precision)
    if case.norm == "calibrated":
        made.calibrate(images)
    return made


def batch_of(made: Learner, images: torch.Tensor, labels: torch.Tensor, count: int) -> Batch:
    return made.encoding.batch(Examples.whole(images, labels, made.classes, "x"), torch.arange(count), 0)


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_bf16_update_has_the_direction_of_the_fp32_update(case: Case, rule: str) -> None:
    dice = torch.Generator().manual_seed(0)
    images = torch.randn(40, *NETS[case.net][1], generator=dice)
    labels = torch.randint(3, (40,), generator=dice)
    exact, rounded = (learner(case, rule, precision, images) for precision in ("fp32", "bf16"))
    updates = [weight_updates(one.rule, one.net, batch_of(one, images, labels, 40)) for one in (exact, rounded)]
    assert all(x is None or x.dtype == torch.float32 for x in updates[1])
    for expected, cosine in zip(updates[0], cosines(*updates), strict=True):
        assert expected is None or cosine > 0.95  # seven narrow layers of relu, whose gates flip near 0
    rounded.fit(images, labels, epochs=1, batch_size=20)
    assert {p.dtype for p in rounded.net.parameters()} == {torch.float32}
    assert batch_of(rounded, images, labels, 2).images.dtype == torch.bfloat16


@pytest.mark.parametrize("net", ["mlp", "conv7"])
def test_bf16_rounds_backprop_no_more_than_torch_autocast_does(net: str) -> None:
    dice = torch.Generator().manual_seed(0)
    images, labels = torch.randn(40, *NETS[net][1], generator=dice), torch.randint(3, (40,), generator=dice)
    exact, rounded = (learner(Case(net), "backprop", precision, images) for precision in ("fp32", "bf16"))
    weights = [layer.weight for layer in exact.net.layers]
    batch = batch_of(exact, images, labels, 40)
    truth = list(torch.autograd.grad(exact.rule(batch).surrogate, weights))
    with torch.autocast("cpu", torch.bfloat16):
        loss = (exact.net(images).float() - batch.targets).square().mean()
    theirs = cosines(truth, list(torch.autograd.grad(loss, weights)))
    half = batch_of(rounded, images, labels, 40)
    ours = cosines(truth, weight_updates(rounded.rule, rounded.net, half))
    assert all(mine > other - 0.01 for mine, other in zip(ours, theirs, strict=True)), (ours, theirs)
