"""A cost model of a step: which form of the frozen Jacobian, kept where, is fastest at each layer, and what it costs.

It stands alone because sizes and times must be known, and what does not fit refused, before any work. Operations are
timed on this machine at the shapes of the network, for as many examples and rows as make a moment's work, and scaled;
what moves bytes is counted and divided by measured bandwidths. Thread scheduling, caches and overlap are left out.
"""

import copy
import math
import os
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from alignscale.distributed import Ranks
from alignscale.environment import recording_stream
from alignscale.jacobian.form import DTYPES, Form, bytes_of, reads_bits
from alignscale.nets.functions import laid_out
from alignscale.nets.layers import Conv, Layer, Linear
from alignscale.nets.network import Network

SAMPLE_FLOP, SAMPLE_BYTES, REPEATS = {"cpu": 2e10, "cuda": 4e12}, {"cpu": 2**26, "cuda": 2**29}, 5
"""Operations and bytes that are timed at once: enough that starting them, and a GPU's cache, do not count."""
NETWORK_BYTES = 2**24
PASSES = {"forward": 2.0, "pullback": 3.0, "unpacked": 2.0, "bits": 2.0}
"""Bytes that elementwise work moves, in units of a site: activation in place; signal, gate and delta; bits made a gate;
a pullback through bits as they are."""
IN_A_ROW = 10
"""Times that a GPU's operation is replayed in one measurement, so that starting it does not count."""
LOOK_UP = 6e-4
"""Seconds that Python takes for a batch's rows in a cache, beside a GPU's step."""


@dataclass(frozen=True)
class Machine:
    """Bytes a second: memory (read or written), disk (read, and written to stay), link (host to device), network.

    network: past each rank's card in a gather of all ranks; without end for one. beside: whether what is kept elsewhere
    is fetched beside the step, as for a GPU, or by what makes the step.
    """

    memory: float
    disk: float
    disk_write: float
    link: float
    beside: bool = False
    network: float = math.inf

    @classmethod
    def measured(cls, device: torch.device, folder: Path) -> "Machine":
        """This machine's, with a file of 64 MiB in ``folder`` for the disk."""
        size, on_disk = SAMPLE_BYTES[device.type], SAMPLE_BYTES["cpu"]
        source, target = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
        memory = 2 * size / timed(lambda: target.copy_(source), torch.device("cpu"))
        link, gpu = memory, device.type == "cuda"
        if gpu:
            pinned, there = source.pin_memory(), source.to(device)
            sent = timed(lambda: there.copy_(pinned, non_blocking=True), device)
            link = 1 / (sent / size + 2 / memory)  # rows are gathered in host memory first
            memory = 2 * size / timed(lambda: there.clone(), device)
        write, read = _disk(folder, source[:on_disk])
        return cls(memory, on_disk / read, on_disk / write, link, gpu)

    def bandwidth(self, tier: str) -> float:
        """Of reading what is kept in ``tier``."""
        return {"device": self.memory, "host": self.link, "disk": min(self.disk, self.link)}[tier]


@dataclass(frozen=True)
class Costs:
    """Seconds that a batch takes in each layer: compute, transpose and weight gradient; and of an update.

    cast: of all weights to half precision, which they do not have. rectified: compute has the activation in it.
    """

    compute: tuple[float, ...]
    transpose: tuple[float, ...]
    gradient: tuple[float, ...]
    update: float
    cast: float
    flop_rate: float
    rectified: bool = False

    @classmethod
    def measured(
        cls, net: Network, inputs: Sequence[tuple[int, ...]], batch: int, device: torch.device, dtype: torch.dtype,
        machine: Machine, recorded: bool = False,
    ) -> "Costs":  # fmt: skip
        """inputs: per layer, the shape of what it reads of an example. batch: examples in a step on this rank.

        recorded: steps are replayed on a GPU, and no time goes by to start an operation.
        """
        pairs = [*zip(net.layers, inputs, strict=True)]
        keys = [(layer.shape, shape, getattr(layer, "stride", 0), layer.rectifies) for layer, shape in pairs]
        kinds, flop = dict(zip(keys, pairs, strict=True)), sum(batch * layer_flop(*pair) for pair in pairs)
        clock = _replayed if recorded else timed
        every = [*kinds.items()] * 2  # a process is slower in its first seconds
        timings = [(key, _layer_times(*pair, batch, device, dtype, clock)) for key, pair in every]
        rounds = [dict(timings[: len(kinds)]), dict(timings[len(kinds) :])]
        times = [[min(pair) for pair in zip(*(found[key] for found in rounds), strict=True)] for key in keys]
        compute, transpose, gradient = zip(*times, strict=True)
        parameters = sum(one.numel() for layer in net.layers for one in layer.held if one is not None)
        update = 4 * 4 * parameters / machine.memory  # weight and gradient read, weight written, gradient written
        cast = (4 + dtype.itemsize) * parameters / machine.memory if dtype.itemsize < 4 else 0.0
        rectified = net.layers[0].rectifies and device.type == "cuda"
        return cls(compute, transpose, gradient, update, cast, flop / max(sum(compute), 1e-12), rectified)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a few repetitions after a warm one."""

    def whole() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return statistics.median(timeit.repeat(whole, number=1, repeat=REPEATS + 1)[1:])


def _replayed(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of ``work`` on a GPU without the time to start it, which a recorded step saves."""
    work()  # looks for fast algorithms, and compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        with torch.cuda.graph(graph, stream=recording_stream(device), capture_error_mode="thread_local"):
            for _ in range(IN_A_ROW):
                work()
        return timed(graph.replay, device) / IN_A_ROW


def network_speed(ranks: Ranks, device: torch.device) -> float:
    """Bytes a second that pass a rank's card while all gather a part of each; the first rank's figure."""
    if ranks.size == 1:
        return math.inf
    part = torch.ones(NETWORK_BYTES // ranks.size, dtype=torch.uint8, device=device)
    moved = len(part) * (ranks.size - 1)
    return ranks.objects(moved / timed(lambda: ranks.gather(part), device))[0]


def _disk(folder: Path, content: Tensor) -> tuple[float, float]:
    """Seconds to write and to read ``content``, past the kernel's memory of it."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        begin = time.perf_counter()
        file.write(content.numpy().data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        file.read()
        return written - begin, time.perf_counter() - written


def layer_flop(layer: Layer, inputs: tuple[int, ...]) -> float:
    """Of one example's forward pass through a layer. inputs: the shape of what it reads, (T, F) for a sequence."""
    places = layer.outputs[1] * layer.outputs[2] if isinstance(layer, Conv) else _steps(layer, inputs)
    return 2.0 * layer.shape[0] * layer.fan_in * places


def _steps(layer: Layer, inputs: tuple[int, ...]) -> int:
    return inputs[0] if isinstance(layer, Linear) and len(inputs) > 1 else 1


def _layer_times(
    layer: Layer, inputs: tuple[int, ...], batch: int, device: torch.device, dtype: torch.dtype,
    clock: Callable[[Callable[[], object], torch.device], float],
) -> tuple[float, float, float]:  # fmt: skip
    """Seconds of compute, transpose and weight gradient of ``batch`` examples, scaled from what fits a moment.

    clock: seconds of an operation.
    """
    if isinstance(layer, Linear):
        layer = copy.copy(layer)
        layer.total = None  # the other ranks are not here to sum with
    steps = _steps(layer, inputs)
    rows = max(1, min(layer.shape[0], SAMPLE_BYTES[device.type] // (layer.fan_in * dtype.itemsize)))
    part = layer.shape[0] / rows
    examples = max(1, min(batch, int(SAMPLE_FLOP[device.type] * part / layer_flop(layer, inputs))))
    weight = laid_out(torch.randn(rows, *layer.shape[1:], device=device, dtype=dtype))
    shape = (examples * steps, inputs[-1]) if isinstance(layer, Linear) else (examples, *inputs)
    a = laid_out(torch.randn(shape, device=device, dtype=dtype))
    delta = torch.randn_like(layer.compute(a, weight, None))
    scale = batch / examples * part
    compute = scale * clock(lambda: layer.compute(a, weight, None), device)
    transpose = scale * clock(lambda: layer.transpose(delta, weight), device)
    return compute, transpose, scale * clock(lambda: layer.weight_gradient(a, delta), device)


@dataclass(frozen=True)
class Planner:
    """Predicts steps and caches of a network; inputs: per layer, the shape of what it reads of an example."""

    net: Network
    inputs: Sequence[tuple[int, ...]]
    classes: int
    batch: int
    machine: Machine
    costs: Costs
    itemsize: int
    reads_inputs: bool
    wires: Mapping[str, float]
    """Bytes that pass a rank's network card in a step of backprop, and of the rule with each form."""

    def _exchanged(self, what: str) -> float:
        """Seconds of what ranks tell each other, not overlapped."""
        return self.wires[what] / self.machine.network

    def _sites(self, passes: float) -> float:
        """Seconds of elementwise work at all sites."""
        units = sum(torch.Size(shape).numel() for shape in self.net.shapes)
        return passes * units * self.batch * self.itemsize / self.machine.memory

    @property
    def forward(self) -> float:
        """Seconds of a forward pass."""
        return sum(self.costs.compute) + (0.0 if self.costs.rectified else self._sites(PASSES["forward"]))

    @property
    def pullback(self) -> float:
        """Seconds of a pullback through all layers but the first."""
        return sum(self.costs.transpose[1:]) + self._sites(PASSES["pullback"])

    @property
    def backprop(self) -> float:
        """Seconds of a step of backprop."""
        return self._own + self.costs.cast + self.pullback + self._exchanged("backprop")

    @property
    def _own(self) -> float:
        """Seconds of what every step makes: a forward pass of the current network, weight gradients and the update."""
        return self.forward + self.costs.cast + sum(self.costs.gradient) + self.costs.update

    def step(self, form: Form | None, tier: str) -> float:
        """Seconds of a step with a cache in this form and tier; None: live."""
        own = self._own
        if form is None:
            return own + self.forward + self.pullback + self._exchanged("live")
        size = self.size(form)
        seconds = own if form.inputs or not self.reads_inputs else own + self.forward
        seconds += sum(self._site(form, site) for site in range(len(self.net.shapes))) + self._moved(size, tier)
        explicit = all(site == "explicit" for site in form.sites)
        seconds += self._exchanged("explicit" if explicit else "gates")
        if not self.machine.beside:
            return seconds
        fetched = 0.0 if tier == "device" else self.batch * size / self.machine.bandwidth(tier)
        return max(seconds, LOOK_UP + fetched)

    def _moved(self, size: int, tier: str) -> float:
        """Seconds to fetch so many bytes an example, unless beside the step, and to read what was fetched."""
        fetch = 0.0 if self.machine.beside else 1 / self.machine.bandwidth(tier)
        return self.batch * size * (fetch + (1 if self.machine.beside else 2) / self.machine.memory)

    def _site(self, form: Form, site: int) -> float:
        """Seconds of what is made of a site's rows, once they are read."""
        units = torch.Size(self.net.shapes[site]).numel()
        if form.sites[site] == "explicit":
            as_it_is = DTYPES[form.dtype].itemsize == self.itemsize or (self.machine.beside and form.dtype != "fp8")
            wide = 0 if as_it_is else 2 * self.classes * units * self.itemsize
            return self.batch * wide / self.machine.memory
        lifted = sum(self.costs.transpose[1:3]) if self.net.recurrent else self.costs.transpose[site + 1]
        as_bits = self.machine.beside and reads_bits(self.net)
        passes = PASSES["bits"] if as_bits else PASSES["pullback"] + PASSES["unpacked"]
        return lifted + passes * self.batch * units * self.itemsize / self.machine.memory

    def best(self, options: Form, tier: str, capacity: float, examples: int) -> Form:
        """Site by site the faster of gates and explicit, with as many explicit as fit ``capacity`` bytes."""
        chosen = gates = replace(options, sites=("gates",) * len(options.sites))

        def explicit(form: Form, site: int) -> Form:
            return replace(form, sites=(*form.sites[:site], "explicit", *form.sites[site + 1 :]))

        def gain(site: int) -> float:
            one = explicit(gates, site)
            saved = self.size(gates) - self.size(one)
            return self._site(gates, site) - self._site(one, site) + self._moved(saved, tier)

        for site in sorted(range(len(options.sites)), key=gain, reverse=True):
            more = explicit(chosen, site)
            faster = self.step(more, tier) < self.step(chosen, tier)
            if faster and examples * self.size(more) <= capacity:
                chosen = more
        return chosen

    def size(self, form: Form) -> int:
        """Bytes that an example takes."""
        return bytes_of(form.layout(self.net, self.classes, list(self.inputs)))
