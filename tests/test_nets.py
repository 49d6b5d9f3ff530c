"""Claims about networks: forward passes, pullbacks and their parts against float64 oracles and autograd."""

from dataclasses import replace

import pytest
import torch
from cases import CLASSES, NETS, PUBLIC, SEED, TABLE, Case, close, make, shared, shared_world, weights_of
from oracle import ACTIVATIONS as FORMULAS
from oracle import Chain
from oracle_rules import deltas_by_probes
from torch import Tensor

from alignscale import frozen
from alignscale.choices import ConfigError, ConvConfig, MLPConfig, NetConfig
from alignscale.nets import build
from alignscale.nets.activations import ACTIVATIONS
from alignscale.nets.layers import Conv, Layer, Linear
from alignscale.nets.norms import BatchNorm, CalibratedNorm, NoNorm, Norm, make_norm

CALIBRATED = [Case(net, "calibrated", activation) for net in NETS for activation in ("relu", "tanh")]


def normal(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(layer: Layer) -> Layer:
    """The layer in float64 with weights and biases that are not 0."""
    layer = layer.double()
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed))
    return layer


LAYERS = {
    "linear": (Linear((4, 3), True, 1.3, "ntk"), (5, 3)),
    "linear over time": (Linear((4, 3), True, 1.3, "standard"), (5, 2, 3)),
    "linear without bias": (Linear((4, 3), False, 1.3, "ntk"), (5, 3)),
    "conv": (Conv((2, 5, 4), 3, 1, 1.3, "ntk"), (5, 2, 5, 4)),
    "conv with a stride": (Conv((2, 6, 5), 3, 2, 1.3, "ntk"), (5, 2, 6, 5)),
    "conv that skips pixels": (Conv((2, 11, 8), 3, 4, 1.3, "standard"), (5, 2, 11, 8)),
}


@pytest.mark.parametrize("case", [*TABLE, *PUBLIC], ids=str)
def test_the_forward_pass_equals_the_oracle_s(case: Case) -> None:
    built, passed = shared(case), shared_world(case).now
    with torch.no_grad():
        trace = built.net.trace(built.batch.images)
        close(built.net(built.batch.images), passed.logits, 1e-12)
    close(trace.logits, passed.logits, 1e-12)
    for ours, theirs in zip(trace.inputs, passed.inputs, strict=True):
        if ours.numel():
            close(ours, theirs, 1e-12)


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_the_pullback_by_its_own_weights_is_autograd_s(case: Case) -> None:
    built, world = shared(case), shared_world(case)
    net = built.net
    with torch.no_grad():
        trace = net.trace(built.batch.images)
        ours = net.pullback(world.error, net.gates(trace), trace.norms, lambda index: net.layers[index].weight)
    theirs = deltas_by_probes(world.net, world.current, world.images, world.error)
    for our, their in zip(ours, theirs, strict=True):
        assert our is not None
        assert their is not None
        close(our, their)


@pytest.mark.parametrize("case", [Case("mlp"), Case("conv3", "batch"), Case("rnn_every", "calibrated")], ids=str)
def test_a_trace_under_given_weights_reads_none_of_the_net_s_own(case: Case) -> None:
    built = make(case)
    weights = weights_of(built.net)
    before = built.net.trace(built.batch.images, weights.__getitem__)
    with torch.no_grad():
        for index, layer in enumerate(built.net.layers):
            if index != built.net.state:  # an input, which every network reads
                layer.weight.add_(1)
    after = built.net.trace(built.batch.images, weights.__getitem__)
    assert torch.equal(before.logits, after.logits)


@pytest.mark.parametrize("stride", range(1, 5))
@pytest.mark.parametrize("height", range(1, 10))
def test_convolutions_pad_as_tensorflow_s_same(height: int, stride: int) -> None:
    width = 10 - height
    layer = filled(Conv((2, height, width), 3, stride, 1.0, "ntk"))
    a = normal(4, 2, height, width)
    oracle = Chain(ConvConfig(width=3, strides=[stride]), (2, height, width))
    ours = layer(a)
    assert layer.outputs == ours.shape[1:] == (3, -(-height // stride), -(-width // stride))
    close(ours, oracle.layer(0, layer.weight, layer.bias, a.flatten(1)), 1e-13)


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (1, 5), (13, 6)])
def test_a_network_for_maps_of_one_size_works_and_is_pulled_back_through_at_any(size: tuple[int, int]) -> None:
    options, shape = ConvConfig(width=3, strides=[2, 1, 3], norm="none"), (2, *size)
    grown, made = (build(options, of, 5, 1).double() for of in ((2, 10, 10), shape))
    for one in (grown, made):
        for number, parameter in enumerate(one.parameters()):
            parameter.data = normal(*parameter.shape, seed=number)
    images, error = normal(4, *shape), normal(4, 5, seed=9)
    grown.trace(normal(4, 2, 10, 10))
    found, wanted = ([one.trace(images), one] for one in (grown, made))
    assert torch.equal(found[0].logits, wanted[0].logits)
    deltas = [
        net.pullback(error, net.gates(trace), trace.norms, lambda index, net=net: net.layers[index].weight)
        for trace, net in (found, wanted)
    ]
    for ours, theirs in zip(*deltas, strict=True):
        assert torch.equal(ours, theirs)
    theirs = torch.autograd.grad((error * grown(images)).sum(), list(grown.parameters()))
    surrogate = grown.surrogate(found[0], deltas[0])
    grown.trace(normal(4, 2, 10, 10))  # a pass at another size between the step's two changes nothing
    ours = torch.autograd.grad(surrogate, list(grown.parameters()))
    for our, their in zip(ours, theirs, strict=True):
        close(our, their, 1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_s_transpose_is_the_adjoint_of_its_forward_map(name: str) -> None:
    layer, shape = LAYERS[name]
    layer = filled(layer)
    a = normal(*shape)
    other = normal(*layer.weight.shape, seed=8)
    out = layer.compute(a, other, None)
    delta = normal(*out.shape, seed=9)
    back = layer.transpose(delta, other)
    assert back.shape == a.shape
    close((back * a).sum(), (delta * out).sum(), 1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_s_weight_gradient_and_port_are_autograd_s(name: str) -> None:
    layer, shape = LAYERS[name]
    layer = filled(layer)
    a = normal(*shape)
    out = layer(a)
    delta = normal(*out.shape, seed=9)
    parameters = list(layer.parameters())
    theirs = torch.autograd.grad((delta * out).sum(), parameters)
    port = layer.port(a, delta)
    assert port.item() == 0
    found = [gradient for gradient in layer.weight_gradient(a, delta) if gradient is not None]
    for ours in (found, torch.autograd.grad(port, parameters)):
        for our, their in zip(ours, theirs, strict=True):
            assert our.shape == their.shape
            close(our, their, 1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gates_are_autograd_s(name: str) -> None:
    activation = ACTIVATIONS[name]
    x = torch.cat([torch.linspace(-4, 4, 41, dtype=torch.float64), torch.tensor([0.0, 1e-300, -1e-300, -12.0, 12.0])])
    leaf = x.clone().requires_grad_()
    value = FORMULAS[name](leaf)
    slope = torch.autograd.grad(value.sum(), leaf)[0]
    with torch.no_grad():
        ours, residue = activation.forward(x.clone())
        gate = activation.gate(residue)
    signal = normal(*x.shape)
    close(ours, value, 1e-14)
    close(activation.pullback(signal, gate), signal * slope, 1e-14)
    with torch.enable_grad():  # where a graph is built, x must survive
        graph, _ = activation.forward(leaf)
    close(torch.autograd.grad(graph.sum(), leaf)[0], slope, 1e-14)


@pytest.mark.parametrize("site", [(6,), (3, 2, 4)], ids=["flat", "maps"])
@pytest.mark.parametrize("name", ["none", "batch", "calibrated"])
def test_a_norm_s_pullback_is_autograd_s(name: str, site: tuple[int, ...]) -> None:
    norm: Norm = make_norm(name, site).double()
    if isinstance(norm, CalibratedNorm):
        norm.calibrate(normal(*site, seed=5), normal(*site, seed=6).square())
    z = (0.5 + 2 * normal(5, *site)).requires_grad_()
    delta = normal(5, *site, seed=4)
    x, state = norm(z)
    theirs = torch.autograd.grad((x * delta).sum(), z)[0]
    close(norm.pullback(delta, state), theirs, 1e-12)


def test_batch_moments_are_biased_and_of_each_position_alone() -> None:
    z = 0.5 + 2 * normal(5, 3, 2, 4)
    x, state = BatchNorm()(z)
    close(x, (z - z.mean(0)) / (z.var(0, correction=0) + 1e-6).sqrt(), 1e-12)
    with pytest.raises(ValueError, match="expected the state of a forward pass"):
        BatchNorm().pullback(x, None)
    assert state is not None
    assert torch.equal(NoNorm()(z)[0], z)


def test_batch_norm_has_the_same_moments_in_evaluation() -> None:
    built = make(Case("conv3", "batch"))
    training = built.net(built.batch.images)
    assert torch.equal(built.net.eval()(built.batch.images), training)


@pytest.mark.parametrize("case", CALIBRATED, ids=str)
def test_calibrated_moments_are_the_initial_network_s(case: Case) -> None:
    built = make(case)
    moments = built.oracle().moments
    assert moments is not None
    for norm, (mean, variance) in zip(built.net.norms, moments, strict=True):
        assert isinstance(norm, CalibratedNorm)
        close(norm.mean, mean, 1e-12)
        close(norm.inverse_std, (variance + 1e-6) ** -0.5, 1e-12)


@pytest.mark.parametrize("case", CALIBRATED, ids=str)
@pytest.mark.parametrize("size", [1, 3])
def test_calibration_does_not_depend_on_its_chunks(case: Case, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(case, moved=False).net.norms
    monkeypatch.setattr(frozen, "CALIBRATION_CHUNK", size)
    for first, second in zip(make(case, moved=False).net.norms, whole, strict=True):
        for ours, theirs in zip(first.buffers(), second.buffers(), strict=True):
            close(ours, theirs, 1e-12)


def test_calibration_sums_in_float64() -> None:
    built = make(Case("mlp", "calibrated"), dtype=torch.float32)
    with torch.no_grad():
        built.net.layers[0].bias.fill_(0)  # type: ignore[union-attr]
    images = 1000 + built.calibration  # a mean far above the deviation: float32 sums of squares would lose it
    frozen.calibrate(built.fixed.frozen, images)
    z = built.net.layers[0].compute(images.flatten(1), built.initial[0][0], None).double()
    close(built.net.norms[0].inverse_std.double(), (z.var(0, correction=0) + 1e-6) ** -0.5, 1e-6)


def test_a_norm_that_is_not_calibrated_gives_no_numbers() -> None:
    net = build(replace(NETS["mlp"][0], norm="calibrated"), (2, 3, 2), CLASSES)
    assert net(normal(2, 2, 3, 2).float()).isnan().all()


@pytest.mark.parametrize("norm", ["none", "batch", "calibrated"])
@pytest.mark.parametrize("name", NETS)
def test_parameterisations_are_one_function_at_the_start(name: str, norm: str) -> None:
    ntk, standard = (shared(Case(name, norm, parameterisation=kind), moved=False) for kind in ("ntk", "standard"))
    close(standard.net(ntk.batch.images), ntk.net(ntk.batch.images), 1e-12)
    for index, layer in enumerate(ntk.net.layers):
        other = standard.net.layers[index]
        assert (layer.initial_std, other.scale) == ((1, 1) if index != ntk.net.state else (0, 1))
        if index != ntk.net.state:
            assert other.initial_std == layer.scale
            assert layer.scale == pytest.approx((ntk.config.gain if index else 1) / layer.weight[0].numel() ** 0.5)


@pytest.mark.parametrize("kind", ["ntk", "standard"])
@pytest.mark.parametrize("name", ["mlp", "conv3"])
def test_gain_multiplies_each_layer_that_reads_an_activation(name: str, kind: str) -> None:
    config, shape = NETS[name]
    logits = []
    for gain in (1.0, 1.5):
        net = build(replace(config, norm="none", parameterisation=kind, gain=gain), shape, CLASSES).double()
        frozen.initialise(net, SEED)
        logits.append(net(normal(4, *shape)))
    close(logits[1], 1.5**3 * logits[0], 1e-12)  # relu is homogeneous, biases are 0, the first layer reads the image


def test_gain_sqrt_2_keeps_a_deep_relu_network_s_signal() -> None:
    net = build(MLPConfig(width=256, depth=12), (1, 8, 8), 256)
    frozen.initialise(net, SEED)
    ratio = net(normal(64, 1, 8, 8).float()).square().mean().item()
    assert 0.5 < ratio < 2


def test_a_trained_state_wants_batches_of_at_most_its_rows() -> None:
    built = shared(Case("rnn_every"))
    with pytest.raises(ValueError, match="a batch of 6 examples, but the state has 5 rows"):
        built.net(normal(6, *built.shape))


@pytest.mark.parametrize("config", [ConvConfig(), NetConfig("other", 4)], ids=["conv on sequences", "unknown net"])
def test_a_network_that_cannot_be_built_is_an_error(config: NetConfig) -> None:
    with pytest.raises(ConfigError, match=rf"net={config.name}: expected"):
        build(config, (4, 3), CLASSES)
