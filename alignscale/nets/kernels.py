"""Two GPU kernels in Triton for what is read from a cache of the Jacobian; torch's own move several times the bytes.

They stand alone because they need a GPU and Triton, which torch brings where it finds one; everything else here runs
without. tools/check_device.py compares what they compute with float64 on the CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Units that one program works on."""


@triton.jit
def _weighted_rows(values, weights, rows, result, units, classes: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    example = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < units
    start = values + tl.load(rows + example) * classes * units
    total = tl.zeros([BLOCK], tl.float32)
    for label in range(classes):
        weight = tl.load(weights + example * classes + label).to(tl.float32)
        total += weight * tl.load(start + at, mask=inside, other=0.0).to(tl.float32)
        start += units
    tl.store(result + example * units + at, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _where_bit(signal, packed, result, units, size, channels, places, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    example = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < units
    unit = (at % channels) * places + at // channels
    byte = tl.load(packed + example * size + unit // 8, mask=inside, other=0)
    value = tl.load(signal + example * units + at, mask=inside, other=0.0)
    bit = (byte.to(tl.int32) >> (unit % 8)) & 1
    tl.store(result + example * units + at, tl.where(bit != 0, value, 0.0).to(value.dtype), mask=inside)


def weighted_rows(values: Tensor, weights: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Values (N, classes, *site), weights (B, classes), rows (B,) int64 -> sums over classes (B, *site)."""
    classes, site = values.shape[1], values.shape[2:]
    result = torch.empty(len(rows), *site, dtype=dtype, device=values.device)
    units = site.numel()
    grid = (len(rows), triton.cdiv(units, BLOCK))
    _weighted_rows[grid](values.contiguous(), weights.contiguous(), rows, result, units, classes, BLOCK=BLOCK)
    return result


def where_bit(signal: Tensor, packed: Tensor) -> Tensor:
    """Signal (B, *site) where the bit of jacobian/gates.py is set, else 0; packed: (B, bytes) uint8."""
    maps = signal.dim() == 4
    signal = signal.contiguous(memory_format=torch.channels_last if maps else torch.contiguous_format)
    units = signal[0].numel()
    channels = signal.shape[1] if maps else units
    result = torch.empty_like(signal)
    grid = (len(signal), triton.cdiv(units, BLOCK))
    _where_bit[grid](signal, packed, result, units, packed.shape[1], channels, units // channels, BLOCK=BLOCK)
    return result
