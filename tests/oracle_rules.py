"""The learning rules by their definitions, on the networks of ``oracle.py``: whose Jacobian carries e to what."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from oracle import Deltas, Net, Pass, Recurrent, Updates, Weights
from torch import Tensor


def nothing(*index: int) -> Tensor:
    raise AssertionError(f"this rule has no random weights, but {index} were asked for")


@dataclass
class World:
    """All that a rule may read. feedback: per layer; direct: per site; magnitude: per layer and draw."""

    net: Net
    current: Weights
    initial: Weights
    images: Tensor
    targets: Tensor
    size: int
    step: int = 0
    public: bool = False
    feedback: Callable[[int], Tensor] = nothing
    direct: Callable[[int], Tensor] = nothing
    magnitude: Callable[[int, int], Tensor] = nothing
    now: Pass = field(init=False)
    error: Tensor = field(init=False)
    loss: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.now = self.net.forward(self.current, self.images)
        logits = self.now.logits.detach().requires_grad_()
        self.loss = squared_error(logits, self.targets, self.size)
        self.error = torch.autograd.grad(self.loss, logits)[0]

    @property
    def frozen(self) -> Weights:
        """The initial weights; a trained state is an input of the initial network too, hence the current one."""
        return [*self.initial[:3], *self.current[3:]] if isinstance(self.net, Recurrent) else self.initial


def squared_error(logits: Tensor, targets: Tensor, size: int) -> Tensor:
    """Mean over the global batch's examples and over classes, sum over time."""
    return ((logits - targets) ** 2).sum() / size / logits.shape[-1]


def deltas_by_probes(net: Net, weights: Weights, images: Tensor, error: Tensor) -> Deltas:
    """J^T e of one network, by autograd."""
    probes = net.probes(net.forward(weights, images))
    logits = net.forward(weights, images, probes).logits
    return net.by_layer(torch.autograd.grad(logits, probes, error), error)


def deltas_by_tangent(net: Net, at: Pass, weights: Sequence[Tensor], error: Tensor) -> Deltas:
    """J^T e with the gates and moments of ``at`` and these connections."""
    probes = net.probes(at)
    return net.by_layer(torch.autograd.grad(net.tangent(at, weights, probes), probes, error), error)


def updates(net: Net, weights: Weights, inputs: list[Tensor], deltas: Deltas) -> Updates:
    leaves = [
        (w.detach().clone().requires_grad_(), None if b is None else b.detach().clone().requires_grad_())
        for w, b in weights
    ]
    return gradients(net.local(leaves, [a.detach() for a in inputs], deltas), leaves)


def gradients(scalar: Tensor, leaves: Weights) -> Updates:
    flat = [leaf for pair in leaves for leaf in pair if leaf is not None]
    found = iter(torch.autograd.grad(scalar, flat, allow_unused=True))
    return [(next(found), None if bias is None else next(found)) for _, bias in leaves]


def backprop(world: World) -> Updates:
    leaves = [
        (w.detach().clone().requires_grad_(), None if b is None else b.detach().clone().requires_grad_())
        for w, b in world.current
    ]
    return gradients(squared_error(world.net.forward(leaves, world.images).logits, world.targets, world.size), leaves)


def align_ada(world: World) -> Updates:
    deltas = deltas_by_probes(world.net, world.frozen, world.images, world.error)
    if world.public:
        deltas = public_deltas(world, deltas)
    return updates(world.net, world.current, world.now.inputs, deltas)


def public_deltas(world: World, deltas: Deltas) -> Deltas:
    """The paper's public code: the last layer's block holds the last gate; a recurrent block leaves out y_t <- h_t."""
    net = world.net
    frozen = net.forward(world.frozen, world.images)
    taps = [torch.zeros_like(a, requires_grad=True) for a in frozen.a]
    signals = torch.autograd.grad(net.forward(world.frozen, world.images, None, taps).logits, taps, world.error)
    if isinstance(net, Recurrent):
        direct = torch.zeros_like(signals[0])
        at = slice(None) if world.error.dim() == 3 else -1
        direct[:, at] = net.scale(world.initial[2][0], False) * world.error @ world.initial[2][0]
        hidden = net.gate(world.now.x[0]) * (signals[0] - direct)
        return [hidden, hidden, *deltas[2:]]
    return [*deltas[:-2], net.gate(world.now.x[-1]) * signals[-1], world.error]


def align_zero(world: World) -> Updates:
    start = world.net.forward(world.frozen, world.images)
    deltas = deltas_by_probes(world.net, world.frozen, world.images, world.error)
    return updates(world.net, world.frozen, start.inputs, deltas)


def with_feedback(world: World, weights: Sequence[Tensor]) -> Updates:
    deltas = deltas_by_tangent(world.net, world.now, weights, world.error)
    return updates(world.net, world.current, world.now.inputs, deltas)


def align_prop(world: World) -> Updates:
    return with_feedback(world, [weight for weight, _ in world.initial])


def feedback_alignment(world: World) -> Updates:
    first = torch.zeros_like(world.current[0][0])  # nothing lies below the first layer
    return with_feedback(world, [first, *(world.feedback(index) for index in range(1, len(world.current)))])


def sign_symmetric(world: World, magnitude: Callable[[int], Tensor]) -> Updates:
    return with_feedback(world, [weight.sign() * magnitude(index) for index, (weight, _) in enumerate(world.current)])


def uniform(world: World) -> Updates:
    def deviation(index: int) -> Tensor:
        weight = world.current[index][0]
        if world.net.config.parameterisation == "ntk":
            return torch.ones_like(weight)
        gain = world.net.config.gain if index else 1.0
        return torch.full_like(weight, gain / weight[0].numel() ** 0.5)

    return sign_symmetric(world, deviation)


def direct_feedback_alignment(world: World) -> Updates:
    deltas = readout_deltas(world)
    each_step = world.error.dim() == 3
    signals = []
    for site, x in enumerate(world.now.x):
        signal = torch.einsum("btc,uc->btu" if each_step else "bc,...c->b...", world.error, world.direct(site))
        signals.append(signal.reshape(x.shape) * world.net.gate(x))
    hidden = [signals[0], signals[0]] if isinstance(world.net, Recurrent) else signals
    return updates(world.net, world.current, world.now.inputs, [*hidden, *deltas[len(hidden) :]])


def readout_deltas(world: World) -> Deltas:
    """None but the readout's error and the true gradient of a trained state."""
    true = deltas_by_probes(world.net, world.current, world.images, world.error)
    hidden = 2 if isinstance(world.net, Recurrent) else len(true) - 1
    return [*[None] * hidden, *true[hidden:]]


def readout_only(world: World) -> Updates:
    return updates(world.net, world.current, world.now.inputs, readout_deltas(world))


ORACLES: dict[str, Callable[[World], Updates]] = {
    "backprop": backprop,
    "align_ada": align_ada,
    "align_zero": align_zero,
    "align_prop": align_prop,
    "feedback_alignment": feedback_alignment,
    "direct_feedback_alignment": direct_feedback_alignment,
    "sign_symmetric/uniform": uniform,
    "sign_symmetric/fixed": lambda world: sign_symmetric(world, lambda index: world.magnitude(index, 0)),
    "sign_symmetric/batchwise": lambda world: sign_symmetric(
        world, lambda index: world.magnitude(index, world.step + 1)
    ),
    "readout_only": readout_only,
}
