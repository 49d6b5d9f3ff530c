"""What is cached of each example: gates or an explicit Jacobian at each site, and perhaps the layers' inputs.

It stands alone because files, builder, planner and training must agree on it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignscale.choices import ConfigError
from alignscale.config import JacobianConfig
from alignscale.environment import gpu_kernels
from alignscale.jacobian.explicit import encoded
from alignscale.jacobian.gates import pack, unpack
from alignscale.nets.network import Network
from alignscale.types import Bits, Cached, Jacobian, Trace

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
Layout = dict[str, tuple[torch.dtype, Any]]
"""Name -> dtype and shape of an example's row."""
Rows = dict[str, Tensor]
"""By name, ``gates.<site>``, ``jacobian.<site>``, ``scale.<site>``, ``inputs.<layer>``: a row for each example."""


@dataclass(frozen=True)
class Form:
    """sites: ``gates`` or ``explicit`` each. dtype: of what is no bits. inputs: dtype of layer inputs, or None.

    gathered: of the inputs a rank keeps its own units, and asks the others for theirs in each step.
    """

    sites: tuple[str, ...]
    dtype: str
    inputs: str | None
    gathered: bool = False

    @classmethod
    def of(cls, config: JacobianConfig, net: Network, inputs: bool) -> "Form":
        """As the options say for ``net``. inputs: whether the rule reads layer inputs. Raises ConfigError."""
        sites = tuple(config.layers or [config.name] * len(net.shapes))
        if len(sites) != len(net.shapes):
            raise ConfigError(
                f"jacobian.layers={config.layers}: expected one for each of the {len(net.shapes)} hidden layers"
            )
        return cls(sites, config.dtype, config.inputs if inputs and config.inputs != "recomputed" else None)

    def layout(self, net: Network, classes: int, inputs: list[tuple[int, ...]]) -> Layout:
        """What an example takes. inputs: per layer, the shape of what it reads of an example."""
        found: Layout = {}
        for site, (form, shape) in enumerate(zip(self.sites, net.shapes, strict=True)):
            if form == "explicit":
                found[f"jacobian.{site}"] = (DTYPES[self.dtype], (classes, *shape))
                if self.dtype in ("fp16", "fp8"):
                    found[f"scale.{site}"] = (torch.float32, (classes,))
            elif net.activation.binary:
                found[f"gates.{site}"] = (torch.uint8, (-(-math.prod(shape) // 8),))
            else:
                found[f"gates.{site}"] = (DTYPES[self.dtype], shape)
        for layer, shape in enumerate(inputs[1:] if self.inputs else [], 1):
            kept = net.own_input(layer).shape(shape) if self.gathered and layer != net.readout else shape
            found[f"inputs.{layer}"] = (DTYPES[self.inputs or ""], kept)
        return found

    def rows(self, net: Network, trace: Trace, jacobians: dict[int, Tensor]) -> Rows:
        """What is kept of a trace of the initial network. jacobians: site -> J, of the explicit sites."""
        found: Rows = {}
        for site, residue in enumerate(trace.residues):
            if site in jacobians:
                values, scale, _ = encoded(jacobians[site], DTYPES[self.dtype])
                found[f"jacobian.{site}"] = values
                if scale is not None:
                    found[f"scale.{site}"] = scale
            elif net.activation.binary:
                found[f"gates.{site}"] = pack(residue)
            else:
                found[f"gates.{site}"] = net.activation.gate(residue).to(DTYPES[self.dtype])
        for layer, a in enumerate(trace.inputs[1:] if self.inputs else [], 1):
            if self.gathered and layer != net.readout:
                a = net.own_input(layer, 1).of(a).contiguous()
            found[f"inputs.{layer}"] = a.to(DTYPES[self.inputs or ""])
        return found

    def cached(self, net: Network, rows: Rows, images: Tensor) -> Cached:
        """Rows as a rule reads them. images: the batch's own, which the first layer reads.

        Where rows are told by ``at``, (B,), explicit Jacobians are tables of more examples; by ``bits``, bits are.
        """
        gates: dict[int, Tensor | Bits] = {}
        jacobians: dict[int, Jacobian] = {}
        for site, shape in enumerate(net.shapes):
            if self.sites[site] == "explicit":
                jacobians[site] = Jacobian(rows[f"jacobian.{site}"], rows.get(f"scale.{site}"), rows.get("at"))
            elif net.activation.binary:
                packed = rows[f"gates.{site}"]
                as_they_are = packed.is_cuda and reads_bits(net)
                gates[site] = Bits(packed, rows.get("bits")) if as_they_are else unpack(packed, shape, images.dtype)
            else:
                gates[site] = rows[f"gates.{site}"].to(images.dtype)
        if not self.inputs:
            return Cached(gates, jacobians)
        others = [rows[f"inputs.{layer}"].to(images.dtype) for layer in range(1, len(net.layers))]
        if self.gathered:
            others[: net.readout - 1] = [net.whole_input(one) for one in others[: net.readout - 1]]
        return Cached(gates, jacobians, [net.first_input(images), *others])


def reads_bits(net: Network) -> bool:
    """Whether a GPU applies bits as they are, from a table of all examples."""
    return net.activation.binary and not net.recurrent and gpu_kernels() is not None


def bytes_of(layout: Layout) -> int:
    """Bytes that an example takes."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
