"""Activations with their gates (derivatives).

They stand alone because rules take gates from one network and use them in another.

Each is three functions: ``forward(x) -> (a, residue)``, ``gate(residue)`` and ``pullback(signal, gate)``. The residue
is the cheapest tensor that determines the gate. relu's gate is any tensor that is positive where the unit is open, so
its own output serves, and so do unpacked bits; the other gates are the derivative itself.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Activation(ABC):
    """An elementwise function and its derivative, on tensors of any shape."""

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The activation of ``x`` and what its gate is computed from. May overwrite ``x`` when no graph is built."""

    @abstractmethod
    def gate(self, residue: Tensor) -> Tensor:
        """The gate, in the form that ``pullback`` reads."""

    @abstractmethod
    def pullback(self, signal: Tensor, gate: Tensor) -> Tensor:
        """Signal after the activation -> delta before it: signal * act'(x)."""


class Relu(Activation):
    """max(x, 0), with derivative 0 at 0."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """relu(x), twice: positive exactly where x is."""
        a = torch.relu(x) if torch.is_grad_enabled() else torch.relu_(x)
        return a, a

    def gate(self, residue: Tensor) -> Tensor:
        """The residue itself: its sign is the gate."""
        return residue

    def pullback(self, signal: Tensor, gate: Tensor) -> Tensor:
        """Signal where the gate is positive, else 0, in one pass."""
        return torch.ops.aten.threshold_backward(signal, gate, 0)


class Tanh(Activation):
    """tanh(x)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """tanh(x), twice: the derivative is a function of the value."""
        a = torch.tanh(x)
        return a, a

    def gate(self, residue: Tensor) -> Tensor:
        """1 - tanh(x)^2."""
        return 1 - residue.square()

    def pullback(self, signal: Tensor, gate: Tensor) -> Tensor:
        """Signal * gate."""
        return signal * gate


class Erf(Activation):
    """erf(x), whose infinite-width kernel is known in closed form."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """erf(x) and x."""
        return torch.erf(x), x

    def gate(self, residue: Tensor) -> Tensor:
        """2 / sqrt(pi) * exp(-x^2)."""
        return torch.exp(-residue.square()) * (2 / math.sqrt(math.pi))

    def pullback(self, signal: Tensor, gate: Tensor) -> Tensor:
        """Signal * gate."""
        return signal * gate


class Gelu(Activation):
    """x * Phi(x), Phi the normal distribution function (Hendrycks & Gimpel 2016, the exact form)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """gelu(x) and x."""
        return torch.nn.functional.gelu(x), x

    def gate(self, residue: Tensor) -> Tensor:
        """Phi(x) + x * phi(x)."""
        density = torch.exp(-residue.square() / 2) / math.sqrt(2 * math.pi)
        return torch.special.ndtr(residue) + residue * density

    def pullback(self, signal: Tensor, gate: Tensor) -> Tensor:
        """Signal * gate."""
        return signal * gate


ACTIVATIONS: dict[str, Activation] = {"relu": Relu(), "gelu": Gelu(), "tanh": Tanh(), "erf": Erf()}
