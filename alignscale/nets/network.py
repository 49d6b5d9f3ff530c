"""What a learning rule may know of a network: its trace, its pullback, its weight-gradient ports.

It stands alone because rules are written against it, never against an architecture. A *site* is a place before an
activation (after its norm); a feed-forward network has one per hidden layer, a recurrent network one in all. Layers are
numbered in order, ``sites[l]`` is the site that layer l writes to, None for the readout (and for a trained state).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignscale.choices import NetConfig
from alignscale.distributed import Made
from alignscale.environment import gpu_kernels
from alignscale.nets.activations import ACTIVATIONS
from alignscale.nets.layers import Layer, Linear
from alignscale.nets.norms import BatchNorm, Norm, make_norm
from alignscale.parallel import ALL_UNITS, Share, Turns, Width, in_turn
from alignscale.types import Jacobian, NormState, Parameters, Trace, Weight

Gates = Sequence[Tensor] | Mapping[int, Any]
"""By site, in the form that the activation's pullback reads."""
Jacobians = Mapping[int, Jacobian]
NO_JACOBIANS: Jacobians = {}
States = Sequence[NormState | None]
WIDER = {torch.float8_e4m3fn: torch.bfloat16, torch.float16: torch.float32}
"""What values are widened to, exactly, where their own range is too narrow for weighted sums."""
Deltas = list[Tensor | None]
"""Per layer: delta at its output, after its norm (B, *outputs); None for a layer that does not learn."""


def contract(jacobian: Jacobian, error: Tensor) -> Tensor:
    """delta = J^T e: J (B, classes, *site) and error (B, classes) -> (B, *site) in the error's dtype.

    In one pass over J where it lies: each delta is a weighted sum of the rows (example, class) of a table.
    """
    values, scale, rows = jacobian
    classes, site = values.shape[1], values.shape[2:]
    at = torch.arange(len(error), device=error.device) if rows is None else rows
    weights = error if scale is None else error * scale[at]
    if kernels := gpu_kernels(values, error):
        return kernels.weighted_rows(values, weights, at, error.dtype)
    if values.dtype in WIDER:
        values = values if rows is None else values.view(torch.uint8)[rows].view(values.dtype)
        values, at = values.to(WIDER[values.dtype]), torch.arange(len(error), device=error.device)
    places = at[:, None] * classes + torch.arange(classes, device=error.device)
    table = values.reshape(-1, math.prod(site))
    delta = F.embedding_bag(places, table, per_sample_weights=weights.to(table.dtype), mode="sum")
    return delta.view(len(error), *site).to(error.dtype)


def _joined(parts: Sequence[list[Tensor]]) -> list[Tensor]:
    """Layer by layer one tensor from those of the parts of a batch, which are let go of."""
    return [torch.cat([one.pop(0) for one in parts]) for _ in range(len(parts[0]))]


def _once(make: Callable[[int], Made], keep: bool) -> Callable[[int], Made]:
    """``make``, which may take long or ask other ranks, once for all parts and steps; keep: also what came before."""
    kept: dict[int, Made] = {}

    def made(index: int) -> Made:
        if index not in kept:
            if not keep:
                kept.clear()
            kept[index] = make(index)
        return kept[index]

    return made


def _part(gates: Gates, part: slice) -> Gates:
    """Of some of the examples."""
    pairs = gates.items() if isinstance(gates, Mapping) else enumerate(gates)
    return {site: gate[part] for site, gate in pairs}


class Network(nn.Module, ABC):
    """Layers, norms and an activation, and how they are connected."""

    layers: Sequence[Layer]
    norms: Sequence[Norm]
    sites: Sequence[int | None]
    readout: int
    """Index of the layer that writes the logits."""
    state: int | None = None
    """Index of a trained initial state, which the initial network reads too, like an input."""
    direct_shapes: Sequence[tuple[int, ...]]
    """Per site: the shape that direct feedback of one error vector (classes,) has there, on all ranks of ``width``."""
    units_axis = 0
    """Of a site's shape."""

    recurrent = False
    """Whether a site's first axis is time, normalised one step after another."""

    def __init__(
        self, config: NetConfig, layers: list[Layer], shapes: list[tuple[int, ...]], width: Width = ALL_UNITS
    ) -> None:
        """shapes: per site, of one example there. Subclasses set ``sites``, ``readout`` and ``direct_shapes``.

        width: the ranks that have the other units of each site.
        """
        super().__init__()
        self.width = width
        self.share = share = width.share(self.units_axis)  # this rank's units of a site
        self.shapes = shapes = shapes if share is None else [share.shape(shape) for shape in shapes]
        for layer in layers:
            if isinstance(layer, Linear) and layer.share is not None and layer.share.axis == 1:
                layer.total, layer.first = width.sum, width.ranks.first
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norms = nn.ModuleList([make_norm(config.norm, shape) for shape in shapes])  # type: ignore[assignment]
        self.activation = ACTIVATIONS[config.activation]
        self.public = config.blocks == "public"  # whether ``local_gates`` are wanted
        self.current: Parameters = lambda index: self.layers[index].held  # an engine may fetch them from other ranks

    def trace(self, images: Tensor, parameters: Parameters | None = None) -> Trace:
        """A forward pass under the network's own weights, or under others of the same shapes.

        images: (B, C, H, W) or (B, T, F). Builds autograd's graph only where gradients are enabled.
        """
        parts = self._parts(len(images))
        if parameters is not None and (self.recurrent or len(parts) > 1):
            parameters = _once(parameters, self.recurrent)
        traces = in_turn([self.tracing(images[part], parameters) for part in parts])
        if len(traces) == 1:
            return traces[0]
        logits = torch.cat([one.logits for one in traces])
        if torch.is_grad_enabled():  # which is all that is read then
            return Trace([], [], [], logits)
        inputs, residues = _joined([one.inputs for one in traces]), _joined([one.residues for one in traces])
        return Trace(inputs, residues, traces[0].norms, logits)

    def _parts(self, examples: int) -> list[slice]:
        """The parts of a batch that take turns: halves, if there is an exchange to overlap and they do not mix."""
        mixed = self.state is not None or any(isinstance(norm, BatchNorm) for norm in self.norms)
        if mixed or not self.width.overlap or self.width.ranks.size == 1 or examples < 2:
            return [slice(examples)]
        return [slice(examples // 2), slice(examples // 2, examples)]

    @abstractmethod
    def tracing(self, images: Tensor, parameters: Parameters | None) -> Turns[Trace]:
        """``trace``, of a batch or a part of one."""

    @abstractmethod
    def first_input(self, images: Tensor) -> Tensor:
        """What the first layer reads of ``images``."""

    def pullback(
        self, error: Tensor, gates: Gates, norms: States, feedback: Weight, local_gates: Gates | None = None,
        jacobians: Jacobians = NO_JACOBIANS,
    ) -> Deltas:  # fmt: skip
        """The error at the output -> delta at every layer.

        error: dLoss/dlogits, shape of the logits. gates, norms: per site, of the network whose Jacobian this is.
        feedback: the weight whose transpose carries the signal through layer l. local_gates: per site, of the network
        that is updated; given where ``public`` puts the boundary of a block before a gate. jacobians: of the sites
        whose delta they give at once, instead of the gate and the layer above.
        """
        parts = [slice(len(error))] if jacobians else self._parts(len(error))
        if len(parts) > 1:
            feedback = _once(feedback, self.recurrent)
        local = [local_gates and _part(local_gates, part) for part in parts]
        works = zip(parts, local, strict=True)
        found = in_turn(
            [self.pulling(error[at], _part(gates, at), norms, feedback, own, jacobians) for at, own in works]
        )
        if len(found) == 1:
            return found[0]
        return [None if own[0] is None else torch.cat(own) for own in zip(*found, strict=True)]

    @abstractmethod
    def pulling(
        self, error: Tensor, gates: Gates, norms: States, feedback: Weight, local_gates: Gates | None,
        jacobians: Jacobians,
    ) -> Turns[Deltas]:  # fmt: skip
        """``pullback``, of a batch or a part of one."""

    @property
    def size(self) -> int:
        """The number of weights and biases, wherever they are kept."""
        biases = sum(layer.whole[0] for layer in self.layers if layer.held[1] is not None)
        return sum(math.prod(layer.whole) for layer in self.layers) + biases

    def shares(self) -> dict[str, Share | None]:
        """What this rank has of each weight, bias and buffer, by its name in ``state_dict``; None: all of it."""
        found = {}
        for name in self.state_dict():
            kind, index, part = name.split(".", 2)
            share = self.layers[int(index)].share if kind == "layers" else self.share
            found[name] = None if part == "bias" and share is not None and share.axis > 0 else share
        return found

    def own_input(self, layer: int, batch: int = 0) -> Share:
        """What this rank's units are of the input of a layer above the first; batch: axes before the site's."""
        share = self.width.share(self.units_axis + batch)
        assert share is not None, f"layer {layer} reads all units here"
        return share

    def whole_input(self, own: Tensor) -> Tensor:
        """A layer's input from the units of it that each rank has."""
        return self.width.begin_gather(own.movedim(1 + self.units_axis, 1))().movedim(1, 1 + self.units_axis)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) or (B, T, F) -> logits."""
        return self.trace(images).logits

    def gates(self, trace: Trace) -> list[Tensor]:
        """Per site: act'(x) in the form that the activation's pullback reads."""
        return [self.activation.gate(residue) for residue in trace.residues]

    def surrogate(self, trace: Trace, deltas: Deltas, unscale: Tensor | None = None) -> Tensor:
        """Sum over layers of <delta, the layer's weight-gradient port>: a scalar whose gradient is the update.

        The deltas meet the layer inputs of ``trace``; no graph runs from one layer to another. unscale: see Layer.port.
        """
        local = zip(self.layers, trace.inputs, self.through_norms(trace, deltas), strict=True)
        return torch.stack([layer.port(a, delta, unscale) for layer, a, delta in local if delta is not None]).sum()

    @torch.no_grad()
    def through_norms(self, trace: Trace, deltas: Deltas) -> Deltas:
        """The deltas before each layer's norm, by the moments of ``trace``."""
        pulled: dict[int, Tensor] = {}
        for site, delta in zip(self.sites, deltas, strict=True):
            if site is not None and delta is not None and site not in pulled:
                pulled[site] = self.norms[site].pullback(delta, trace.norms[site])
        pairs = zip(self.sites, deltas, strict=True)
        return [delta if site is None or delta is None else pulled[site] for site, delta in pairs]

    def readout_deltas(self, error: Tensor, trace: Trace) -> Deltas:
        """The error at the readout and no other delta, but for a trained initial state: it has its true gradient."""
        deltas: Deltas = [None] * len(self.layers)
        if self.state is not None:
            whole = self.pullback(error, self.gates(trace), trace.norms, lambda index: self.current(index)[0])
            deltas[self.state] = whole[self.state]
        deltas[self.readout] = error
        return deltas

    def run_layer(self, index: int, a: Tensor, parameters: Parameters | None) -> Tensor:
        """Layer ``index`` under its own weight (a module call, so that an engine's hooks see it) or under another."""
        layer = self.layers[index]
        return layer(a) if parameters is None else layer.compute(a, *parameters(index))
