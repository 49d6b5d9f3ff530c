"""The table of networks that tests run over: nets x norms x activations x parameterisations, all small, in float64."""

import functools
import itertools
from dataclasses import dataclass, replace

import oracle
import torch
from oracle_rules import World
from torch import Tensor

from alignscale.choices import ConvConfig, MLPConfig, NetConfig, RNNConfig
from alignscale.frozen import Fixed, calibrate, initialise
from alignscale.nets import Network, build
from alignscale.rules import Rule, make_rule
from alignscale.rules.base import RULES
from alignscale.rules.feedback import SignSymmetricConfig
from alignscale.types import Batch

CLASSES, EXAMPLES, GLOBAL_BATCH, STEP, SEED = 3, 4, 5, 2, 11
"""A rank's part of a batch is smaller than the global batch, so that a division by the wrong one shows."""

NETS: dict[str, tuple[NetConfig, tuple[int, ...]]] = {
    "mlp": (MLPConfig(width=6), (2, 3, 2)),
    "conv3": (ConvConfig(name="conv3", width=4, strides=[1, 2, 2], gain=1.3), (2, 5, 6)),
    "conv_stride4": (ConvConfig(width=4, strides=[4, 2], gain=1.3), (3, 10, 9)),
    "conv7": (ConvConfig(name="conv7", width=3, strides=[1, 1, 1, 2, 1, 2, 1], gain=1.2), (1, 4, 5)),
    "rnn": (RNNConfig(width=5, gain=1.3), (2, 4, 3)),
    "rnn_every": (RNNConfig(width=5, readout="every", initial_state="trained", gain=1.3), (4, 3)),
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    net: str
    norm: str = "none"
    activation: str = "relu"
    parameterisation: str = "ntk"
    blocks: str = "theory"

    def __str__(self) -> str:
        public = ["public"] if self.blocks == "public" else []
        return "-".join([self.net, self.norm, self.activation, self.parameterisation, *public])


TABLE = [
    Case(*row)
    for row in itertools.product(
        NETS, ("none", "batch", "calibrated"), ("relu", "gelu", "tanh", "erf"), ("ntk", "standard")
    )
]
PUBLIC = [
    Case(net, norm, "relu", "ntk", "public") for net in ("conv3", "rnn", "rnn_every") for norm in ("none", "batch")
]
RULE_NAMES = [
    "backprop",
    "align_ada",
    "align_zero",
    "align_prop",
    "feedback_alignment",
    "direct_feedback_alignment",
    "sign_symmetric/uniform",
    "sign_symmetric/fixed",
    "sign_symmetric/batchwise",
    "readout_only",
]
"""Every rule, with the options that a case needs after a slash."""
SUMS = {"fp16": 4, "bf16": 2, "sum-fp32+bf16": 4, "sum-bf16+fp16": 2}
"""Half precisions of training on ranks, with the bytes of the numbers that gradients are summed in."""


@dataclass
class Built:
    """A case with its weights. initial: as set by the seed; the network may have moved since."""

    case: Case
    config: NetConfig
    shape: tuple[int, ...]
    net: Network
    fixed: Fixed
    batch: Batch
    calibration: Tensor
    initial: oracle.Weights

    @property
    def current(self) -> oracle.Weights:
        return weights_of(self.net)

    def rule(self, name: str) -> Rule:
        name, _, magnitude = name.partition("/")
        options = RULES[name].options(name) if not magnitude else SignSymmetricConfig(name, magnitude)
        return make_rule(self.net, self.fixed, options)

    def oracle(self) -> oracle.Net:
        return oracle.make_net(self.config, self.shape, self.initial, self.calibration)

    def world(self) -> World:
        batch, fixed = self.batch, self.fixed
        return World(
            self.oracle(), self.current, self.initial, batch.images, batch.targets, batch.size, batch.step,
            self.case.blocks == "public", fixed.feedback, fixed.direct, fixed.magnitude,
        )  # fmt: skip


def weights_of(net: Network) -> oracle.Weights:
    return [(x.weight.detach().clone(), None if x.bias is None else x.bias.detach().clone()) for x in net.layers]


def make(case: Case, moved: bool = True, dtype: torch.dtype = torch.float64, stored: bool = True) -> Built:
    """The case with its weights as they start, or moved by a third of their deviation, biases too."""
    config, shape = NETS[case.net]
    config = replace(
        config, norm=case.norm, activation=case.activation, parameterisation=case.parameterisation, blocks=case.blocks
    )
    net = build(config, shape, CLASSES, GLOBAL_BATCH).to(dtype)
    fixed = Fixed.from_seed(net, SEED, "stored" if stored else "regenerated")
    initialise(net, SEED)
    dice = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=dice, dtype=torch.float64).to(dtype)

    calibration = 0.3 + normal(7, *shape)
    if case.norm == "calibrated":
        calibrate(fixed.frozen, calibration)
    initial = weights_of(net)
    if moved:
        with torch.no_grad():
            for layer in net.layers:
                layer.weight.add_(normal(*layer.weight.shape), alpha=(layer.initial_std or 0.5) / 3)
                if layer.bias is not None:
                    layer.bias.add_(normal(*layer.bias.shape), alpha=0.2)
    targets = normal(EXAMPLES, *((shape[0],) if case.net == "rnn_every" else ()), CLASSES)
    batch = Batch(0.3 + normal(EXAMPLES, *shape), targets, [f"0/{row}" for row in range(EXAMPLES)], GLOBAL_BATCH, STEP)
    return Built(case, config, shape, net, fixed, batch, calibration, initial)


@functools.cache
def shared(case: Case, moved: bool = True) -> Built:
    """``make(case, moved)``, made once: for tests that change nothing in it."""
    return make(case, moved)


@functools.cache
def shared_world(case: Case) -> World:
    return shared(case).world()


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10, scale: float = 0.0) -> None:
    """Equal to ``tolerance`` relative to the largest number of theirs, or to ``scale`` where that is larger."""
    assert ours.numel() == theirs.numel(), f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
    largest = max(theirs.abs().max().item(), scale)
    error = (ours.reshape(theirs.shape) - theirs).abs().max().item()
    assert error <= tolerance * largest, f"off by {error:.1e} of {largest:.1e}, tolerance {tolerance:.0e}"


def gradients(rule: Rule, batch: Batch) -> list[Tensor | None]:
    """Of the parameters that the rule trains, which keep theirs."""
    before = [one.grad for one in rule.trained()]
    for parameter in rule.trained():
        parameter.grad = None
    rule(batch).surrogate.backward()
    found = [one.grad for one in rule.trained()]
    for parameter, gradient in zip(rule.trained(), before, strict=True):
        parameter.grad = gradient
    return found
