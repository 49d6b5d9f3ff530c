"""GPU kernels in Triton where torch's own operations move several times the bytes.

They stand alone because they need a GPU and Triton, which torch brings where it finds one; everything else here runs
without. Each has the bits of the torch operations that it replaces, but for the order of sums: tests run them in
Triton's interpreter, tools/check_device.py on the GPU.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Units that one program works on."""
COUNTERS = 256
"""Of Philox, that one program works on; a counter gives eight numbers."""
GROUPS, CHANNELS = 8, 128
"""Of eight places, and of channels: the tile of maps whose gates one program applies."""
ROWS, COLUMNS = 8, 512
"""The tile of a matrix that one program rectifies."""


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
def _where_bit(signal, packed, rows, result, units, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    example = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < units
    row = tl.load(rows + example) if ROWS else example
    byte = tl.load(packed + row * size + unit // 8, mask=inside, other=0).to(tl.int32)
    value = tl.load(signal + example * units + unit, mask=inside, other=0.0)
    tl.store(result + example * units + unit, tl.where(((byte >> (unit % 8)) & 1) != 0, value, 0.0), mask=inside)


@triton.jit
def _where_bit_of_maps(  # type: ignore[no-untyped-def]
    signal, packed, rows, result, places, channels, size,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A channel's bits follow each other by place, and the signal's numbers by channel: a tile reads each bit once."""
    example = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    first = channel[None, :] * places + group[:, None] * 8  # unit of a group's first place, in a byte or across two
    inside = (channel[None, :] < channels) & (group[:, None] * 8 < places)
    byte = packed + (tl.load(rows + example) if ROWS else example) * size + first // 8
    low = tl.load(byte, mask=inside, other=0).to(tl.int32)
    high = tl.load(byte + 1, mask=inside & (first // 8 + 1 < size), other=0).to(tl.int32)
    bits = (low | (high << 8)) >> (first % 8)
    within = tl.arange(0, 8)
    place = group[:, None, None] * 8 + within[None, :, None]
    at = (example * places + place) * channels + channel[None, None, :]
    inside_too = (place < places) & (channel[None, None, :] < channels)
    value = tl.load(signal + at, mask=inside_too, other=0.0)
    is_open = (bits[:, None, :] >> within[None, :, None]) & 1
    tl.store(result + at, tl.where(is_open != 0, value, 0.0), mask=inside_too)


@triton.jit(do_not_specialize=["block", "first", "last", "draw", "layer", "stream", "seed"])
def _normal(upper, result, block, first, last, draw, layer, stream, seed, COUNTERS: tl.constexpr):  # type: ignore[no-untyped-def]
    start = block + tl.program_id(0).to(tl.int64) * COUNTERS
    counter = start + tl.arange(0, COUNTERS)
    zero = counter * 0
    others = ((zero + draw).to(tl.uint32), (zero + layer).to(tl.uint32), (zero + stream).to(tl.uint32))
    w0, w1, w2, w3 = tl.philox(seed, counter.to(tl.uint32), others[0], others[1], others[2])
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3)).permute(0, 2, 1)  # (counters, word's upper bit, its lower one)
    index = tl.join(words & 0xFFFF, words >> 16).reshape([COUNTERS * 8]).to(tl.int32)
    positive = index >= 32768  # the table is symmetric, and a half of it fits a multiprocessor's own memory
    value = tl.load(upper + tl.where(positive, index - 32768, 32767 - index))
    place = start * 8 + tl.arange(0, COUNTERS * 8)
    tl.store(result + place - first, tl.where(positive, value, -value), mask=(first <= place) & (place < last))


@triton.jit
def _rectified(z, bias, result, scale, rows, columns, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = row[:, None] * columns + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    value = tl.load(z + at, mask=inside, other=0.0).to(tl.float32) * scale
    if BIAS:
        value += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(result + at, tl.where(value < 0, 0.0, value), mask=inside)  # what is no number stays


def weighted_rows(values: Tensor, weights: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Values (N, classes, *site), weights (B, classes), rows (B,) int64 -> sums over classes (B, *site)."""
    classes, site = values.shape[1], values.shape[2:]
    result = torch.empty(len(rows), *site, dtype=dtype, device=values.device)
    units = site.numel()
    grid = (len(rows), triton.cdiv(units, BLOCK))
    with torch.cuda.device_of(values):  # which need not be the current one; so below
        _weighted_rows[grid](values.contiguous(), weights.contiguous(), rows, result, units, classes, BLOCK=BLOCK)
    return result


def where_bit(signal: Tensor, packed: Tensor, rows: Tensor | None = None) -> Tensor:
    """Signal (B, *site) where the bit of jacobian/gates.py is set, else 0.

    packed: (B, bytes) uint8, or of more examples, those of ``rows`` (B,) int64.
    """
    size, units = packed.shape[1], signal.shape[1:].numel()
    table = (packed, packed if rows is None else rows)
    if signal.dim() != 4:
        signal = signal.contiguous()
        result = torch.empty_like(signal)
        grid = (len(signal), triton.cdiv(units, BLOCK))
        with torch.cuda.device_of(signal):
            _where_bit[grid](signal, *table, result, units, size, ROWS=rows is not None, BLOCK=BLOCK)
        return result
    signal = signal.contiguous(memory_format=torch.channels_last)
    result = torch.empty_like(signal)
    channels = signal.shape[1]
    places = units // channels
    tiles = (len(signal), triton.cdiv(places, GROUPS * 8), triton.cdiv(channels, CHANNELS))
    how = {"ROWS": rows is not None, "GROUPS": GROUPS, "CHANNELS": CHANNELS, "num_warps": 8}
    with torch.cuda.device_of(signal):
        _where_bit_of_maps[tiles](signal, *table, result, places, channels, size, **how)
    return result


def normal(
    upper: Tensor, seed: int, stream: int, layer: int, draw: int, first: int, shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """As ``alignscale.initial.normal``: numbers from the ``first`` one on, in ``shape``; upper: half of its table."""
    result = torch.empty(shape, dtype=dtype, device=upper.device)
    last, block = first + math.prod(shape), first // 8
    if last > first:
        grid = (triton.cdiv(-(-last // 8) - block, COUNTERS),)
        with torch.cuda.device_of(upper):
            _normal[grid](upper, result, block, first, last, draw, layer, stream, seed, COUNTERS=COUNTERS)
    return result


def rectified(z: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """relu(scale * z + bias) of z (B, units) or maps (B, C, H, W); bias (units,) or (C,) in z's dtype."""
    z = z.contiguous(memory_format=torch.channels_last if z.dim() == 4 else torch.contiguous_format)
    result, columns = torch.empty_like(z), z.shape[1]
    rows = z.numel() // columns
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))
    tile = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    with torch.cuda.device_of(z):
        _rectified[grid](z, z if bias is None else bias, result, scale, rows, columns, BIAS=bias is not None, **tile)
    return result
