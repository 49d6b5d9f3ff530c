"""A step on a GPU as a CUDA graph: recorded once, then replayed with one call where each kernel had one of its own.

It stands alone because all that it knows of a rule is that it is ``replayable``. A step of a small network is over
before Python has started its kernels; replayed, it takes the time that they take.
"""

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alignscale.environment import recording_stream
from alignscale.rules import Rule
from alignscale.types import Batch, Bits, Cached, Jacobian, StepOutput

WARM_UP = 2
"""Batches of a kind in a row that are trained on before one is recorded: fastest convolutions are looked for, kernels
compiled and fixed weights made, and a last and smaller batch of an epoch is never recorded."""


class StepGraph:
    """Forward pass, deltas and weight gradients of a rule, for one kind of batch at a time.

    What a recorded step needs stays in the GPU's memory from then on; where there is too little, none is recorded.
    replays: how many there were.
    """

    def __init__(self, rule: Rule, parameters: list[nn.Parameter]) -> None:
        """Parameters: that the rule trains."""
        self.rule, self.parameters = rule, parameters
        self.wanted = True
        self.kind: object = None
        self.seen = self.replays = 0
        self.recorded: _Recorded | None = None

    def __call__(self, batch: Batch) -> StepOutput | None:
        """A replayed step's output, whose gradients ``add_gradients`` gives; None where it has to be made as ever."""
        if not self.wanted or not torch.is_grad_enabled() or not self._can():
            return None
        kind = self._kind(batch)
        if self.recorded is None or kind != self.recorded.kind:
            self.seen = self.seen + 1 if kind == self.kind else 1
            self.kind = kind
            if self.seen <= WARM_UP or any(map(_in_use, self.parameters)) or not self._record(batch, kind):
                return None
        assert self.recorded is not None
        self.kind, self.replays = None, self.replays + 1
        return self.recorded.replay(batch)

    def add_gradients(self) -> None:
        """Add those of the last replay to the parameters', as a backward pass does."""
        assert self.recorded is not None
        for parameter, own in zip(self.parameters, self.recorded.gradients, strict=True):
            if own is not None:
                parameter.grad = own if parameter.grad is None else parameter.grad.add_(own)

    def _can(self) -> bool:
        """Hooks are Python's, and would not be called again."""
        names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        watched = any(getattr(module, name) for module in self.rule.modules() for name in names)
        others = any(
            len(one._backward_hooks or ()) > self.rule.own_hooks or getattr(one, "_post_accumulate_grad_hooks", None)
            for one in self.parameters
        )
        return self.rule.replayable and not watched and not others

    def _kind(self, batch: Batch) -> object:
        """What a recorded step depends on, but for the numbers in ``_moving``."""
        moving, staying = _tensors(batch)
        shapes = [(one.shape, one.dtype) for one in moving]
        places = [one.data_ptr() for one in (*staying, *self.rule.buffers())]
        weights = [(one.data_ptr(), one.requires_grad) for one in self.parameters]
        return batch.size, shapes, places, weights

    def _record(self, batch: Batch, kind: object) -> bool:
        """Whether there was room for it; where there is too little, none is recorded from now on."""
        self.recorded = None  # whose memory the next one may need
        before = [parameter.grad for parameter in self.parameters]  # of earlier parts of the batch
        try:
            made = self._warmed_up(batch, kind)
            if made is None:
                self.wanted = False
                warnings.warn("too little memory to record a step: the GPU makes it kernel by kernel", stacklevel=2)
            else:
                made.record()
        except RuntimeError as problem:
            problem.add_note("while a step was recorded; engine=local engine.cuda_graph=false records none")
            raise
        finally:
            for parameter, gradient in zip(self.parameters, before, strict=True):
                parameter.grad = gradient
        self.recorded = made
        return self.wanted

    def _warmed_up(self, batch: Batch, kind: object) -> "_Recorded | None":
        """What can be recorded, if a batch of its own and a step beside those so far fit into the memory."""
        if not has_room(self.parameters[0].device):
            return None
        try:
            made = _Recorded(self.rule, self.parameters, batch, kind)
            made.warm_up()
        except torch.OutOfMemoryError:  # nothing is under way yet that it could break
            return None
        return made


def has_room(device: torch.device) -> bool:
    """Whether there is room for a recorded step, which keeps what it needs, and for one that is made beside it."""
    kept = torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - kept
    return free > 2 * (torch.cuda.max_memory_allocated(device) - kept)


class _Recorded:
    """A step, with a batch of its own that each batch is copied into."""

    graph: Any
    """Makes the step again when it is replayed."""
    output: StepOutput
    gradients: list[Tensor | None]

    def __init__(self, rule: Rule, parameters: list[nn.Parameter], batch: Batch, kind: object) -> None:
        self.rule, self.parameters, self.kind, self.batch = rule, parameters, kind, _copy(batch)
        self.device = parameters[0].device

    def warm_up(self) -> None:
        """Once more, on the stream to record on: what autograd keeps of a stream must not be the current one's."""
        with torch.cuda.device(self.device):
            aside, current = recording_stream(self.device), torch.cuda.current_stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                self._made()
            current.wait_stream(aside)
        self.rule.zero_grad()

    def record(self) -> None:
        """From here on ``output`` and ``gradients`` are where a replay writes them."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            aside = recording_stream(self.device)
            capture = torch.cuda.graph(self.graph, stream=aside, capture_error_mode="thread_local")  # a cache goes on
            with torch.cuda.stream(aside), capture:  # the first so that a failure too leaves the stream
                self.output = self._made()
        self.gradients = [parameter.grad for parameter in self.parameters]

    def replay(self, batch: Batch) -> StepOutput:
        """The output for a batch; the gradients are where they always are."""
        for own, one in zip(_moving(self.batch), _moving(batch), strict=True):
            own.copy_(one, non_blocking=True)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if gradient is not None and parameter.grad is gradient:  # an earlier part's, which would be written over
                parameter.grad = gradient.clone()
        self._replay()
        surrogate, loss, logits = self.output
        return StepOutput(surrogate.detach(), loss.clone(), logits.clone())

    def _replay(self) -> None:
        with torch.cuda.device(self.device):
            self.graph.replay()

    def _made(self) -> StepOutput:
        self.rule.zero_grad()
        surrogate, loss, logits = self.rule(self.batch)
        surrogate.backward()
        return StepOutput(surrogate.detach(), loss.detach(), logits.detach())


def _in_use(parameter: nn.Parameter) -> bool:
    """Whether the graph of an earlier step is still there, of which autograd would take the current stream."""

    def node() -> Any:
        view = parameter.view_as(parameter)
        return view.grad_fn.next_functions[0][0] if view.grad_fn is not None else None

    if not parameter.requires_grad:
        return False
    node().metadata["seen"] = True  # and gone with it, unless somebody holds it
    return "seen" in node().metadata


def _tensors(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Those of a batch that are its own, each once and in a fixed order, and the tables of more examples."""
    moving: list[Tensor | None] = [batch.images, batch.targets]
    staying: list[Tensor | None] = []
    if batch.cached:
        tables = [(gate.packed, None, gate.rows) for gate in batch.cached.gates.values() if isinstance(gate, Bits)]
        for values, scale, rows in (*tables, *batch.cached.jacobians.values()):
            (moving if rows is None else staying).extend((values, scale))
            moving.append(rows)
        moving += [gate for gate in batch.cached.gates.values() if isinstance(gate, Tensor)]
        moving += batch.cached.inputs or ()
    moving = list({id(one): one for one in moving}.values())
    return [one for one in moving if one is not None], [one for one in staying if one is not None]


def _moving(batch: Batch) -> list[Tensor]:
    return _tensors(batch)[0]


def _copy(batch: Batch) -> Batch:
    """A batch with the same numbers in memory of its own; tables of more examples are not copied."""
    copies = {id(one): one.clone() for one in _moving(batch)}

    def own(one: Any) -> Any:
        if isinstance(one, Bits):
            return Bits(own(one.packed), own(one.rows))
        return Jacobian(*map(own, one)) if isinstance(one, Jacobian) else copies.get(id(one), one)

    if cached := batch.cached:
        gates, jacobians = ({site: own(one) for site, one in part.items()} for part in (cached.gates, cached.jacobians))
        cached = Cached(gates, jacobians, None if cached.inputs is None else [own(one) for one in cached.inputs])
    return replace(batch, images=own(batch.images), targets=own(batch.targets), cached=cached)
