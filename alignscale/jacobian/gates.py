"""relu's gates as packed bits: one bit a unit instead of a float.

Pure functions; they stand alone so that caches can store them.

With these bits, the frozen weights and the error, the pullback needs no frozen forward pass.
"""

import math

import numpy as np
import torch
from torch import Tensor


def pack(residue: Tensor) -> Tensor:
    """Residue or gate (B, *site) of relu -> uint8 (B, ceil(units / 8)); unit 8 i + k is bit k of byte i."""
    open_units = residue.flatten(1) > 0
    if residue.device.type == "cpu":
        return torch.from_numpy(np.packbits(open_units.numpy(), axis=1, bitorder="little"))
    bits = open_units.to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8))
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.view(len(bits), -1, 8) << places).sum(2, dtype=torch.uint8)


def unpack(packed: Tensor, site: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """uint8 (B, bytes) -> gates (B, *site) of 0 and 1 in ``dtype``.

    Raises ValueError if the bytes do not fit the site.
    """
    units, found = math.prod(site), packed.shape[1]
    if found != -(-units // 8):
        raise ValueError(f"packed gates: expected {-(-units // 8)} bytes an example for {units} units, found {found}")
    if packed.device.type == "cpu":
        plain = np.unpackbits(packed.numpy(), axis=1, count=units, bitorder="little")
        return torch.from_numpy(plain).to(dtype).view(len(packed), *site)
    bits = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    gates = bits.view(len(packed), -1)[:, :units].reshape(len(packed), *site)
    maps = len(site) == 3  # laid out as a GPU's convolutions give them
    return (gates.contiguous(memory_format=torch.channels_last) if maps else gates).to(dtype)
