"""Claims about updates: decay, clipping and accumulation, against torch's optimizers on the same gradients."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import RULE_NAMES, Case, close, make
from torch import Tensor

from alignscale import checkpoint
from alignscale.choices import AdamConfig, ConfigError, OptimConfig, SGDConfig
from alignscale.engine import LocalEngine, make_optimizer
from alignscale.types import Batch

TORCH: dict[str, tuple[OptimConfig, Callable[[list[Tensor], float], torch.optim.Optimizer]]] = {
    "sgd": (SGDConfig(lr=0.1), lambda p, decay: torch.optim.SGD(p, 0.1, weight_decay=decay)),
    "momentum": (
        SGDConfig(lr=0.1, momentum=0.9, nesterov=True),
        lambda p, decay: torch.optim.SGD(p, 0.1, 0.9, weight_decay=decay, nesterov=True),
    ),
    "adam": (
        AdamConfig(lr=0.1, beta1=0.8),
        lambda p, decay: torch.optim.Adam(p, 0.1, (0.8, 0.999), weight_decay=decay),
    ),
    "adamw": (
        AdamConfig(name="adamw", lr=0.1),
        lambda p, decay: torch.optim.AdamW(p, 0.1, weight_decay=decay),
    ),
}


def gradients(step: int, shapes: list[torch.Size]) -> list[Tensor]:
    dice = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=dice, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("towards", ["zero", "initial"])
@pytest.mark.parametrize("clip", [0.0, 0.7])
@pytest.mark.parametrize("name", TORCH)
def test_updates_are_torchs(name: str, towards: str, clip: float) -> None:
    """Decay towards the initial weights is decay towards 0 of the distance from them."""
    config, theirs = TORCH[name]
    config = type(config)(**{**vars(config), "weight_decay": 0.3, "decay_towards": towards, "clip_norm": clip})
    built = make(Case("mlp"))
    parameters = list(built.net.parameters())
    start = [p.detach().clone() for p in parameters]
    origin = start if towards == "initial" else [torch.zeros_like(p) for p in start]
    expected = [(p - o).requires_grad_() for p, o in zip(start, origin, strict=True)]
    optimizer = theirs(expected, 0.3)
    rule = built.rule("align_ada")
    engine = LocalEngine(rule, make_optimizer(config, parameters), config)
    for step in range(4):
        for mine, other, gradient in zip(
            parameters, expected, gradients(step, [p.shape for p in parameters]), strict=True
        ):
            mine.grad, other.grad = gradient.clone(), gradient.clone()
        if clip:
            torch.nn.utils.clip_grad_norm_(expected, clip)
        optimizer.step()
        engine.step()
    for mine, other, o in zip(parameters, expected, origin, strict=True):
        close(mine.detach(), other.detach() + o, 1e-13)


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("net", ["mlp", "conv3", "rnn"])
def test_a_batch_in_parts_gives_the_update_of_the_whole(net: str, rule: str) -> None:
    whole, parts = make(Case(net)), make(Case(net))
    batch = whole.batch
    for built, cuts in ((whole, [slice(0, 4)]), (parts, [slice(0, 1), slice(1, 4)])):
        engine = LocalEngine(built.rule(rule), make_optimizer(SGDConfig(lr=0.1), built.net.parameters()))
        for cut in cuts:
            part = Batch(batch.images[cut], batch.targets[cut], batch.keys[cut], batch.size, batch.step)
            engine.backward(engine(part).surrogate)
        engine.step()
    for one, other in zip(whole.net.parameters(), parts.net.parameters(), strict=True):
        close(one.detach(), other.detach(), 1e-12)


def test_a_forgotten_gradient_leaves_no_trace() -> None:
    built = make(Case("mlp"))
    before = [p.detach().clone() for p in built.net.parameters()]
    engine = LocalEngine(built.rule("align_ada"), make_optimizer(SGDConfig(momentum=0.9), built.net.parameters()))
    engine.backward(engine(built.batch).surrogate)
    engine.forget()
    engine.step()
    assert all(torch.equal(a, b) for a, b in zip(before, built.net.parameters(), strict=True))


@pytest.mark.parametrize("name", TORCH)
def test_what_a_checkpoint_holds_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """torch has Adam's float32 count of steps before its float64 states, which must not begin within 8 bytes."""
    built = [make(Case("mlp")) for _ in range(2)]
    engines = [
        LocalEngine(one.rule("align_ada"), make_optimizer(TORCH[name][0], one.net.parameters())) for one in built
    ]

    def step(engine: LocalEngine) -> None:
        engine.backward(engine(built[0].batch).surrogate)
        engine.step()

    step(engines[0])
    checkpoint.save(tmp_path, 1, engines[0].state(), {"progress": {"best": None}}, 1)
    (path,) = checkpoint.complete(tmp_path)
    manifest = checkpoint.read_manifest(path)
    engines[1].load({part: checkpoint.read(path, manifest, part) for part in ("model", "optimizer")})
    for engine in engines:
        step(engine)
    for one, other in zip(built[0].net.parameters(), built[1].net.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [name for name in TORCH if name != "sgd"])
def test_a_state_that_is_read_lies_as_its_weight_does(name: str) -> None:
    """On a GPU weights of convolutions lie channels last, files do not, and a fused step takes no mixture."""
    built = make(Case("conv3"))
    for layer in built.net.layers[:-1]:
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    engine = LocalEngine(built.rule("align_ada"), make_optimizer(TORCH[name][0], built.net.parameters()))
    engine.backward(engine(built.batch).surrogate)
    engine.step()
    made = {part: {name: one.make(0).clone() for name, one in own.items()} for part, own in engine.state().items()}
    plain = {part: {name: one.contiguous() for name, one in own.items()} for part, own in made.items()}
    engine.load(plain)
    read = {name: one.make(0) for name, one in engine.state()["optimizer"].items()}
    assert all(torch.equal(read[name], one) for name, one in made["optimizer"].items())
    for weight, own in engine.optimizer.state.items():
        states = [one for one in own.values() if one.shape == weight.shape]
        assert states
        assert all(one.stride() == weight.stride() for one in states)


def test_an_optimizer_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="optim=lion: expected an SGDConfig or AdamConfig, found OptimConfig"):
        make_optimizer(OptimConfig("lion", 0.1), [])


@pytest.mark.parametrize("name", TORCH)
def test_a_step_uses_the_rate_that_it_is_given(name: str) -> None:
    config, _ = TORCH[name]
    moved = []
    for rate in (0.0, 0.05, None):
        built = make(Case("mlp"))
        before = [p.detach().clone() for p in built.net.parameters()]
        engine = LocalEngine(built.rule("align_ada"), make_optimizer(config, built.net.parameters()), config)
        engine.backward(engine(built.batch).surrogate)
        engine.step(rate)
        moved.append((before[0] - built.net.layers[0].weight).norm().item())
    assert moved[0] == 0
    assert moved[1] == pytest.approx(moved[2] / 2, rel=1e-9)


def test_weights_that_a_rule_does_not_train_are_not_pulled_to_their_start() -> None:
    built = make(Case("mlp"))
    hidden = built.net.layers[0].weight
    config = SGDConfig(lr=0.1, weight_decay=0.5, decay_towards="initial")
    rule = built.rule("readout_only")
    engine = LocalEngine(rule, make_optimizer(config, rule.trained()), config)
    before = hidden.detach().clone()
    engine.backward(engine(built.batch).surrogate)
    engine.step()
    assert torch.equal(hidden, before)
