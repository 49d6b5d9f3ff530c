"""Where a network's numbers stop being finite: for the message of a run that is lost."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from alignscale.nets.network import Network

LOSS_ALONE = "it alone: all layers' outputs are finite"
IMAGES = "the images"


def first_not_finite(net: Network, weights: Mapping[str, Callable[[], Tensor]], forward: Callable[[], object]) -> str:
    """The first of ``weights`` or, in ``forward``, of the layers' outputs of ``net`` that is not finite, in words."""
    where = None
    names = [f"layer {index} of {len(net.layers)} ({type(x).__name__})" for index, x in enumerate(net.layers, 1)]
    for name, make in weights.items():
        kind, place, *_ = *name.split("."), ""
        if not all_finite([make()]) and (kind == "layers" or not place):
            where = where or (f"the weights of {names[int(place)]}" if place else f"the {kind}")
    found: list[str] = []

    def look(name: str, _: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        if not all_finite([output]):
            found.append(f"the output of {name}" if all_finite(given) or name != names[0] else IMAGES)

    with ExitStack() as hooks:
        for name, layer in zip(names, net.layers, strict=True):
            hooks.enter_context(layer.register_forward_hook(partial(look, name)))
        forward()  # in any case: other ranks take part in it
    return where or (found[0] if found else LOSS_ALONE)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number in the tensors is NaN or infinite."""
    ends = (end for tensor in tensors if tensor.numel() for end in tensor.aminmax())  # which are NaN if one number is
    return all(bool(torch.isfinite(end)) for end in ends)
