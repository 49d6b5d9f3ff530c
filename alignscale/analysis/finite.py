"""Where a network's numbers stop being finite: for the message of a run that is lost."""

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from alignscale.nets.network import Network


@torch.no_grad()
def first_not_finite(net: Network, images: Tensor) -> str:
    """The first weight or, in a forward pass of ``images``, layer output of ``net`` that is not finite, in words."""
    names = [f"layer {index} of {len(net.layers)} ({type(x).__name__})" for index, x in enumerate(net.layers, 1)]
    weights = [name for name, layer in zip(names, net.layers, strict=True) if not all_finite(layer.parameters())]
    if weights:
        return f"the weights of {weights[0]}"
    if not torch.isfinite(images).all():
        return "the images"
    found: list[str] = []

    def look(name: str, _: nn.Module, __: object, output: Tensor) -> None:
        if not torch.isfinite(output).all():
            found.append(name)

    with ExitStack() as hooks:
        for name, layer in zip(names, net.layers, strict=True):
            hooks.enter_context(layer.register_forward_hook(partial(look, name)))
        net(images)
    return f"the output of {found[0]}" if found else "the loss alone: all layers' outputs are finite"


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number in the tensors is NaN or infinite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
