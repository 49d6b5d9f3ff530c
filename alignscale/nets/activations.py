"""Activations with their gates (derivatives).

They stand alone because rules take gates from one network and use them in another.

The residue is the cheapest tensor that determines the gate. relu's gate is any tensor that is positive where the unit
is open, so its own output serves, and so do unpacked bits; the other gates are the derivative itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignscale.environment import gpu_kernels
from alignscale.types import Bits


@dataclass(frozen=True)
class Activation:
    """An elementwise function and its derivative, on tensors of any shape.

    function: may overwrite x when no graph is built. gate: residue -> the gate, in the form that ``pullback`` reads.
    pullback: signal after the activation, gate -> delta before it, signal * act'(x). of_output: whether the residue is
    the function's value, else x. binary: whether the gate is 0 or 1, for which a bit is enough.
    """

    function: Callable[[Tensor], Tensor]
    gate: Callable[[Tensor], Tensor]
    pullback: Callable[[Tensor, Any], Tensor] = torch.mul
    of_output: bool = False
    binary: bool = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x -> the activation of x, and the residue. May overwrite x when no graph is built."""
        a = self.function(x)
        return a, a if self.of_output else x


def _relu(x: Tensor) -> Tensor:
    return torch.relu(x) if torch.is_grad_enabled() else torch.relu_(x)


def _where_open(signal: Tensor, gate: Tensor | Bits) -> Tensor:
    """Signal where the gate is positive, else 0, in one pass: relu's derivative at 0 is 0."""
    if isinstance(gate, Bits):
        return gpu_kernels().where_bit(signal, gate.packed, gate.rows)
    return torch.ops.aten.threshold_backward(signal, gate, 0)


def _gelu_gate(residue: Tensor) -> Tensor:
    """Phi(x) + x * phi(x), Phi the normal distribution function and phi its density."""
    density = torch.exp(-residue.square() / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(residue) + residue * density


ACTIVATIONS = {
    "relu": Activation(_relu, lambda residue: residue, _where_open, of_output=True, binary=True),
    "gelu": Activation(torch.nn.functional.gelu, _gelu_gate),  # x * Phi(x), exact (Hendrycks & Gimpel 2016)
    "tanh": Activation(torch.tanh, lambda value: 1 - value.square(), of_output=True),
    # whose infinite-width kernel is known in closed form
    "erf": Activation(torch.erf, lambda x: torch.exp(-x.square()) * (2 / math.sqrt(math.pi))),
}
