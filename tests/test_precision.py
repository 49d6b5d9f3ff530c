"""Claims about bf16: the computation is rounded, the weights are not, and the update keeps its direction."""

import dataclasses

import pytest
import torch
from cases import NETS, RULE_NAMES, Case

from alignscale.analysis.updates import cosines, weight_updates
from alignscale.choices import NETS as CONFIGS
from alignscale.choices import ConvConfig, MLPConfig, RNNConfig, SGDConfig
from alignscale.data.examples import Examples
from alignscale.learner import Learner
from alignscale.nets.layers import Conv
from alignscale.observe import changes
from alignscale.rules import RULES
from alignscale.rules.base import scaled
from alignscale.rules.feedback import SignSymmetricConfig
from alignscale.types import Batch, NormState, Trace

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


def updates(made: Learner, batch: Batch) -> list[torch.Tensor | None]:
    """The gradients that a step of training gives the weights, None where it gives none."""
    weights = [layer.weight for layer in made.net.layers if layer.weight.requires_grad]
    found = iter(torch.autograd.grad(made.rule(batch).surrogate, weights, allow_unused=True))
    return [next(found) if layer.weight.requires_grad else None for layer in made.net.layers]


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_a_half_precision_update_has_the_direction_of_the_fp32_update(case: Case, rule: str) -> None:
    dice = torch.Generator().manual_seed(0)
    images = torch.randn(40, *NETS[case.net][1], generator=dice)
    labels = torch.randint(3, (40,), generator=dice)
    exact = learner(case, rule, "fp32", images)
    truth = updates(exact, batch_of(exact, images, labels, 40))
    half = [("bf16", torch.bfloat16, 0.95), ("fp16", torch.float16, 0.99)]
    if case.net == "conv7" and case.norm != "none":
        half.pop()  # CPUs take a second for each: conv3 has these in fp16
    for precision, dtype, least in half:
        rounded = learner(case, rule, precision, images)
        batch = batch_of(rounded, images, labels, 40)
        assert batch.images.dtype == dtype
        found = updates(rounded, batch)
        assert all(x is None or x.dtype == torch.float32 for x in found)
        for expected, cosine in zip(truth, cosines(truth, found), strict=True):
            assert expected is None or cosine > least  # seven narrow layers of relu, whose gates flip near 0
        rounded.fit(images[:10], labels[:10], epochs=1, batch_size=5)
        assert {p.dtype for p in rounded.net.parameters()} == {torch.float32}


@pytest.mark.parametrize(("precision", "least"), [("fp16", 0.999), ("bf16", 0.99)])
@pytest.mark.parametrize("rule", ["backprop", "align_ada", "align_zero", "feedback_alignment"])
def test_small_errors_do_not_vanish_at_the_scale_of_imagenet(rule: str, precision: str, least: float) -> None:
    """Batch 100 and 1000 classes: errors of 1e-5 at the output, and weight gradients of 1e-6 below it."""
    dice = torch.Generator().manual_seed(0)
    images, labels = torch.randn(100, 3, 32, 32, generator=dice), torch.randint(1000, (100,), generator=dice)
    net = dataclasses.replace(CONFIGS["imagenet_conv7"], width=64, norm="none", gain=2**0.5)
    found = []
    for name in ("fp32", precision):
        made = Learner(net, (3, 32, 32), 1000, rule, precision=name)
        found.append(updates(made, batch_of(made, images, labels, 100)))
    flat = [[torch.cat([x.flatten() for x in one if x is not None])] for one in found]
    assert cosines(*flat)[0] > least  # type: ignore[arg-type]
    assert min(cosines(*found)) > 1 - 3 * (1 - least)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("height", "width", "stride"), [(1, 1, 2), (3, 1, 2), (9, 1, 2), (5, 2, 2), (7, 3, 4)])
def test_a_strided_convolution_to_one_column_has_numbers_of_its_own(
    height: int, width: int, stride: int, dtype: torch.dtype
) -> None:
    """Processors with AMX had others in bf16: each time what lay in memory that was freed before."""
    dice = torch.Generator().manual_seed(0)
    conv = Conv((48, height, width), 48, stride, 1.0, "ntk")
    a, delta = (torch.randn(40, *shape, generator=dice) for shape in ((48, height, width), conv.outputs))
    weight = torch.randn(conv.shape, generator=dice)
    for _ in range(20):
        junk = [torch.full((size,), torch.nan) for size in (64, 256, 1024, 4096, 16384)]
        del junk
        back = conv.transpose(delta.to(dtype), weight).float()
        torch.testing.assert_close(back, conv.transpose(delta, weight), rtol=0, atol=0.05)
        trained = weight.clone().requires_grad_()
        z = conv.compute(a.to(dtype), trained, None)
        assert z.dtype == dtype
        torch.testing.assert_close(z.float(), conv.compute(a, weight, None), rtol=0, atol=0.05)
        (by_autograd,) = torch.autograd.grad(z, trained, delta.to(dtype))
        expected = conv.weight_gradient(a, delta)[0]
        for found in (conv.weight_gradient(a.to(dtype), delta.to(dtype))[0].float(), by_autograd):
            assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_convolution_of_small_gain_adds_its_bias_in_half_precision(dtype: torch.dtype) -> None:
    """Whose bias over its scale is beyond fp16's range."""
    layer = Conv((64, 4, 4), 8, 1, 1e-4, "ntk")
    layer.weight.data.normal_()
    layer.held[1].data.fill_(1.0)  # type: ignore[union-attr]
    found = layer(torch.randn(2, 64, 4, 4).to(dtype))
    assert found.float().sub(1.0).abs().max() < 0.01


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("net", ["mlp", "conv3", "conv_stride4", "rnn"])
def test_backprop_that_rounds_weights_again_keeps_no_copy_and_has_the_same_gradient(net: str, precision: str) -> None:
    """As where ZeRO 3 keeps weights elsewhere; and by itself no copy of a recurrent weight for each step."""
    dice = torch.Generator().manual_seed(0)
    images = torch.randn(7, *NETS[net][1], generator=dice)
    labels = torch.randint(3, (7,), generator=dice)
    found, copies = [], []
    for again in (None, True, False):
        made = learner(Case(net, "none"), "backprop", precision, images)
        for layer in made.net.layers if again is not None else ():
            layer.rounds_again = again
        saved: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found.append(updates(made, batch_of(made, images, labels, 7)))
        shapes = [sorted(layer.shape) for layer in made.net.layers]
        copies.append(sum(not (one.is_leaf and one.requires_grad) and sorted(one.shape) in shapes for one in saved))
    kept = len(shapes) - (net == "mlp")  # whose first layer has an input without gradient
    assert copies == ([1, 0, 4] if net == "rnn" else [kept, 0, kept])  # 4 steps
    for one in zip(*found, strict=True):
        for other in one[1:]:
            torch.testing.assert_close(one[0], other, rtol=2e-2, atol=2e-2 * float(one[0].abs().max()))


@pytest.mark.parametrize(("precision", "least"), [("fp16", 0.9999), ("bf16", 0.999)])
@pytest.mark.parametrize("rule", ["backprop", "align_ada", "align_zero", "feedback_alignment"])
def test_with_norm_batch_no_direction_is_lost_on_the_way_back(
    rule: str, precision: str, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At that scale, in a trained network: fp32 from the half-precision forward pass, whose rounding flips gates."""
    dice = torch.Generator().manual_seed(0)
    images, labels = torch.rand(100, 3, 32, 32, generator=dice), torch.randint(1000, (100,), generator=dice)
    net = dataclasses.replace(CONFIGS["imagenet_conv7"], width=64)
    exact, half = (
        Learner(net, (3, 32, 32), 1000, rule, SGDConfig(lr=5.0), precision=one) for one in ("fp32", precision)
    )
    exact.fit(images, labels, epochs=2, batch_size=50)
    half.net.load_state_dict(exact.net.state_dict())
    batch = batch_of(half, images, labels, 100)
    found = list(weight_updates(half.net, *half.rule.local(batch)))
    frozen = half.fixed.frozen.parameters
    passes = {now: half.net.trace(batch.images, None if now else frozen) for now in (True, False)}
    monkeypatch.setattr(exact.net, "trace", lambda _, parameters=None: widened(passes[parameters is None]))
    truth = list(weight_updates(exact.net, *exact.rule.local(batch)))
    assert min(cosines(truth, found)) > least


def widened(trace: Trace) -> Trace:
    """A half-precision pass in fp32."""
    norms = [state and NormState(*(one.float() for one in state)) for state in trace.norms]
    inputs, residues = ([one.float() for one in some] for some in (trace.inputs, trace.residues))
    return Trace(inputs, residues, norms, trace.logits.float())


def test_the_scale_of_a_half_precision_error_is_a_power_of_two_and_taken_back() -> None:
    for factor in (1e-30, 3e-7, 1.0, 5e4):
        error = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * factor
        half, unscale = scaled(error, torch.float16)
        assert unscale is not None
        assert 8 <= half.abs().max() <= 16
        assert float(unscale).hex().split("p")[0] == "0x1.0000000000000"
        torch.testing.assert_close(half.float() * unscale, error, rtol=1e-3, atol=1e-5 * factor)
    assert scaled(torch.zeros(3, 2), torch.float16)[0].count_nonzero() == 0
    assert scaled(torch.zeros(0, 2), torch.float16)[0].shape == (0, 2)
    assert scaled(error, torch.float32) == (error, None)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_untrained_network_has_not_moved_and_its_update_is_backprops(precision: str) -> None:
    dice = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 3, 16, 16, generator=dice), torch.randint(1000, (8,), generator=dice)
    made = Learner(
        ConvConfig(width=32, strides=[1, 2], norm="none"), (3, 16, 16), 1000, "align_ada", precision=precision
    )
    assert all(one is not None and not one.any() for one in changes(made))
    batch = dataclasses.replace(batch_of(made, images, labels, 8), size=1000)  # a part of one
    assert made.cosines(batch) == pytest.approx([1, 1, 1], abs=1e-3)


@pytest.mark.parametrize("rule", ["backprop", "align_ada"])
def test_a_readout_at_every_time_does_not_overflow_in_fp16(rule: str) -> None:
    made = Learner(RNNConfig(width=16, readout="every"), (100, 2), 1, rule, precision="fp16")
    batch = Batch(torch.ones(256, 100, 2).half(), torch.ones(256, 100, 1), [], 256)
    made.rule(batch).surrogate.backward()
    assert all(bool(one.grad.isfinite().all()) for one in made.net.parameters() if one.grad is not None)


@pytest.mark.parametrize("rule", ["backprop", "align_ada"])
def test_a_large_batch_does_not_overflow_in_fp16(rule: str) -> None:
    dice = torch.Generator().manual_seed(0)
    images, labels = torch.rand(32768, 1, 4, 4, generator=dice), torch.zeros(32768).long()  # errors of one sign
    found = []
    for name in ("fp32", "fp16"):
        made = Learner(MLPConfig(width=64, depth=2), (1, 4, 4), 10, rule, precision=name)
        batch = batch_of(made, images, labels, len(images))
        made.rule(batch).surrogate.backward()
        found.append([one.grad for one in made.net.parameters()])
    assert all(cosine > 0.99 for cosine in cosines(*found))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("rule", ["backprop", "align_ada"])
def test_what_an_engine_multiplies_a_surrogate_by_takes_no_range_of_half_precision(rule: str, precision: str) -> None:
    """As an engine does that takes a mean over so many ranks."""
    dice = torch.Generator().manual_seed(0)
    images, labels = torch.rand(40, 1, 4, 4, generator=dice), torch.randint(10, (40,), generator=dice)
    found = []
    for ranks in (1, 2**14):
        made = Learner(MLPConfig(width=64, depth=2), (1, 4, 4), 10, rule, precision=precision)
        (made.rule(batch_of(made, images, labels, len(images))).surrogate * ranks).backward()
        found.append([one.grad / ranks for one in made.net.parameters() if one.grad is not None])
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


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
    ours = cosines(truth, updates(rounded, half))
    assert all(mine > other - 0.01 for mine, other in zip(ours, theirs, strict=True)), (ours, theirs)
