"""The initial network: its weights from the seed, its trace and its pullback.

It stands alone because a wrong initial network is the worst silent error here: it is always made from the seed and
the architecture, never copied from a network that may have been trained or restored.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignscale.distributed import ALONE, Ranks
from alignscale.initial import VERSION, Stream, normal, quantiles
from alignscale.nets.functions import laid_out
from alignscale.nets.network import Deltas, Network
from alignscale.nets.norms import ALL, CalibratedNorm
from alignscale.parallel import Mesh, Share
from alignscale.types import Cached, Parameters, Trace, Weight

CALIBRATION_CHUNK = 250
WHOLE = Mesh()


def initialise(net: Network, seed: int) -> None:
    """Set every weight of ``net`` to its initial value and every bias to 0."""
    with torch.no_grad():
        for index, layer in enumerate(net.layers):
            weight, bias = layer.held
            weight.copy_(initial_weight(net, seed, index))
            if bias is not None:
                bias.zero_()


def initial_weight(
    net: Network, seed: int, index: int, stream: Stream = Stream.WEIGHT, draw: int = 0, dtype: torch.dtype | None = None
) -> Tensor:
    """The initial weight of layer ``index``, or random numbers of that shape and scale from another stream or draw.

    In the precision of the network's weights, rounded to ``dtype`` if one is given.
    """
    layer, weight = net.layers[index], net.layers[index].held[0]
    dtype, plain = dtype or layer.precision, layer.initial_std == 1.0
    made = dtype if plain else layer.precision
    numbers = _own(layer.share, seed, stream, index, layer.whole, draw, weight.device, made)
    return numbers if plain else numbers.mul_(layer.initial_std).to(dtype)


def _own(
    share: Share | None, seed: int, stream: Stream, index: int, whole: tuple[int, ...], draw: int,
    device: torch.device, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """This rank's part of random numbers of shape ``whole``, with the bits that it has there."""
    rows = share.place if share is not None and share.axis == 0 else None
    numbers = normal(seed, stream, index, whole, rows, draw, device, dtype)
    return numbers if share is None or rows is not None else share.of(numbers).contiguous()


@dataclass(frozen=True)
class Frozen:
    """A network as it was at the start: the structure and norms of ``net`` with other weights, which never change.

    parameters: layer -> (weight, bias) of the initial network. Not a Module and without parameters of its own, so that
    no engine partitions, restores or updates it.
    """

    net: Network
    parameters: Parameters

    @classmethod
    def copy_of(cls, net: Network) -> "Frozen":
        """A copy of ``net`` as it is now. For networks whose start is not a seed; call it before any training."""
        copies = [
            (weight.detach().clone(), None if bias is None else bias.detach().clone())
            for weight, bias in (layer.held for layer in net.layers)
        ]
        return cls(net, copies.__getitem__)

    def weight(self, index: int) -> Tensor:
        """The initial weight of layer ``index``."""
        return self.parameters(index)[0]

    @torch.no_grad()
    def trace(self, images: Tensor) -> Trace:
        """The initial network's forward pass; no graph."""
        return self.net.trace(images, self.parameters)

    @torch.no_grad()
    def pullback(self, error: Tensor, at: Trace | Cached, local_gates: list[Tensor] | None = None) -> Deltas:
        """Error at the output -> delta at each layer, by the initial Jacobian at the examples of a trace or a cache."""
        if isinstance(at, Trace):
            return self.net.pullback(error, self.net.gates(at), at.norms, self.weight, local_gates)
        none = [None] * len(self.net.norms)
        return self.net.pullback(error, at.gates, none, self.weight, local_gates, at.jacobians)


@dataclass(frozen=True)
class Fixed:
    """All that a rule may use besides the current network: fixed from the start, by the seed.

    feedback: per layer, a random weight of its shape and scale. direct: per site, (*site, classes), from the error
    straight to the site. magnitude: per layer and draw, |N(0, 1)| times the layer's initial deviation.
    """

    frozen: Frozen
    feedback: Weight
    direct: Weight
    magnitude: Callable[[int, int], Tensor]

    @classmethod
    def from_seed(
        cls, net: Network, seed: int, keeping: str = "stored", dtype: torch.dtype | None = None, ranks: Ranks = ALONE
    ) -> "Fixed":
        """As ``initialise(net, seed)`` sets the net, in ``dtype`` or else that of its weights.

        keeping: ``stored`` (kept from first use), ``regenerated`` (at each use) or ``partitioned`` (of the initial
        weights each rank keeps its part, and all ask for a layer together).
        """
        keep = (lambda function: function) if keeping == "regenerated" else functools.cache

        def weights(stream: Stream) -> Weight:
            def weight(index: int) -> Tensor:
                return laid_out(initial_weight(net, seed, index, stream, dtype=dtype))

            return keep(weight)

        initial = weights(Stream.WEIGHT)
        if keeping == "partitioned" and ranks.size > 1:
            initial = _partitioned(net, lambda index: initial_weight(net, seed, index), dtype, ranks)

        def direct(site: int) -> Tensor:
            shape, readout = net.direct_shapes[site], net.layers[net.readout]
            whole, weight = (*shape, readout.shape[0]), readout.held[0]
            share = net.width.share(len(shape) - 1 if net.recurrent else 0)
            numbers = _own(share, seed, Stream.DIRECT_FEEDBACK, site, whole, 0, weight.device, readout.precision)
            return numbers.div_(math.sqrt(math.prod(shape))).to(dtype or readout.precision)

        def magnitude(index: int, draw: int) -> Tensor:
            return initial_weight(net, seed, index, Stream.MAGNITUDE, draw).abs_()

        frozen = Frozen(net, lambda index: (initial(index), None))
        return cls(frozen, weights(Stream.FEEDBACK), keep(direct), magnitude)


def _partitioned(net: Network, whole: Weight, dtype: torch.dtype | None, ranks: Ranks) -> Weight:
    """Weights of which each rank keeps its part, padded to equal lengths, and which are gathered at each use."""

    @functools.cache
    def part(index: int) -> Tensor:
        flat = whole(index).to(dtype or net.layers[index].precision).flatten()
        length = -(-len(flat) // ranks.size)
        own = flat[ranks.rank * length : (ranks.rank + 1) * length]
        return torch.nn.functional.pad(own, (0, length - len(own)))

    def gathered(index: int) -> Tensor:
        shape = net.layers[index].shape
        return ranks.gather(part(index))[: math.prod(shape)].view(shape)

    return gathered


def calibrate(frozen: Frozen, images: Tensor) -> None:
    """Set the calibrated norms from the initial network over ``images`` (K, C, H, W), in float64 sums.

    Site by site, as each site's moments depend on the norms below it. The chunks are fixed, so the result depends on
    the examples and their order alone.
    """
    net = frozen.net
    chunk_size = CALIBRATION_CHUNK if net.state is None else min(CALIBRATION_CHUNK, net.layers[net.state].shape[0])
    for norm in net.norms:
        if not isinstance(norm, CalibratedNorm):
            continue
        # A recurrent site is calibrated step by step, as each step depends on the one before.
        for at in range(len(norm.mean)) if net.recurrent else [ALL]:
            sums = norm.mean.new_zeros(2, *norm.mean[at].shape, dtype=torch.float64)
            for chunk in images.split(chunk_size):
                z = _input_of(norm, at, frozen, chunk).double()
                sums += torch.stack([z.sum(0), z.square().sum(0)])
            mean, square = sums / len(images)
            norm.calibrate(mean, (square - mean.square()).clamp(min=0), at)


def _input_of(norm: CalibratedNorm, at: int | slice, frozen: Frozen, images: Tensor) -> Tensor:
    """What the norm is given; what the norms above it make of it, not being calibrated yet, is not looked at."""
    caught: list[Tensor] = []

    def keep(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments[1:] in ((), (at,)):
            caught.append(arguments[0])

    with norm.register_forward_pre_hook(keep):
        frozen.trace(images)
    return torch.cat(caught)


def fingerprint(
    net: Network, architecture: dict[str, object], seed: int, mesh: Mesh = WHOLE, moments: bool = True
) -> str:
    """A digest of the initial network: generator, seed, architecture, gain and norm statistics; 16 hex digits.

    The same however the network is shared out; a collective of all ranks of ``mesh``. moments: with the bits of the
    norm statistics, which other threads may round otherwise.
    """
    digest = hashlib.sha256(json.dumps([VERSION, seed, architecture], sort_keys=True).encode())
    digest.update(quantiles(torch.device("cpu")).numpy().tobytes())
    for layer in net.layers:
        digest.update(repr((layer.whole, layer.scale, layer.initial_std)).encode())
    shares = net.shares()
    for name, buffer in net.named_buffers() if moments else ():
        digest.update(mesh.whole(buffer, shares[name]).double().cpu().numpy().tobytes())
    return mesh.everyone.of_first(digest.hexdigest)[:16]
