"""Random numbers from a counter: any rows of any layer, bit-identical on their own, from (seed, stream, layer).

It stands alone because the initial network must be the same everywhere and always: on every device, for any sharding,
before and after a resume. Philox4x32-10 (Salmon et al., SC 2011) in int64 lanes gives 32-bit words from a counter
(block, draw, layer, stream) under the seed as key; each word gives two numbers by looking 16 bits up in a table of
normal quantiles, which is exact on every device, unlike a Box-Muller transform.
"""

import functools
import math
from enum import IntEnum

import torch
from torch import Tensor

from alignscale.environment import SUMMED, gpu_kernels

VERSION = 1
"""Of the generator: part of an initial network's fingerprint. Numbers never change within a version."""

_PER_BLOCK = 8
_CHUNK_BLOCKS = 1 << 15  # at once: a core's cache holds them
_WORD = 0xFFFFFFFF


class Stream(IntEnum):
    """What the numbers are for: kinds of numbers that share a seed never share numbers."""

    WEIGHT = 0
    FEEDBACK = 1
    DIRECT_FEEDBACK = 2
    MAGNITUDE = 3
    ORDER = 4
    DATA = 5
    VIEW = 6
    SUBSET = 7


def philox(counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], seed: int) -> list[Tensor]:
    """Philox4x32-10: four words of counter (int64 tensors of values below 2^32, or numbers) -> four words.

    seed: 64 bits, low word first in the key. Source: Salmon et al. 2011; tested against Random123's known answers.
    """
    first = next((word for word in counter if isinstance(word, Tensor)), torch.zeros((), dtype=torch.int64))
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64, device=first.device) for word in counter)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a 64-bit product, in signed lanes: split one factor so that nothing overflows."""
    low_half = a * (constant & 0xFFFF)
    high_half = a * (constant >> 16) + (low_half >> 16)
    return high_half >> 16, ((high_half & 0xFFFF) << 16) | (low_half & 0xFFFF)


@functools.cache
def quantiles(device: torch.device) -> Tensor:
    """The 65,536 mid-point quantiles of N(0, 1), scaled to variance 1, float32; symmetric about 0."""
    upper = torch.special.ndtri((torch.arange(32768, 65536, dtype=torch.float64) + 0.5) / 65536)
    table = torch.cat([-upper.flip(0), upper])
    return (table / table.square().mean().sqrt()).float().to(device)


def normal(
    seed: int, stream: Stream, layer: int, shape: tuple[int, ...],
    rows: slice | None = None, draw: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Standard normal numbers: ``rows`` (all by default) of the tensor of ``shape`` at (stream, layer, draw).

    They are float32's, rounded to ``dtype``. A slice of rows has the bits of the same rows of the whole. 16 bits a
    number: the largest is 4.3.
    """
    start, stop, step = (rows or slice(None)).indices(shape[0])
    if step != 1:
        raise ValueError(f"rows={rows}: expected contiguous rows")
    width = math.prod(shape[1:])
    first, last = start * width, max(stop, start) * width
    device = torch.device(device)
    table = quantiles(device)
    if kernels := gpu_kernels(table):
        size = (max(stop - start, 0), *shape[1:])
        upper, made = table[len(table) // 2 :], dtype if dtype in SUMMED else torch.float32
        return kernels.normal(upper, seed, int(stream), layer, draw, first, size, made).to(dtype)
    begin = first // _PER_BLOCK
    end = -(-last // _PER_BLOCK)
    flat = table.new_empty((end - begin, _PER_BLOCK))
    for low in range(begin, end, _CHUNK_BLOCKS):
        blocks = torch.arange(low, min(low + _CHUNK_BLOCKS, end), device=device)
        words = torch.stack(philox((blocks, draw, layer, int(stream)), seed), 1)
        places = torch.stack([words & 0xFFFF, words >> 16], 2)
        torch.take(table, places.flatten(1), out=flat[low - begin : low - begin + len(blocks)])
    own = flat.flatten()[first - begin * _PER_BLOCK : last - begin * _PER_BLOCK]
    return own.view(max(stop - start, 0), *shape[1:]).to(dtype)


def permutation(seed: int, stream: Stream, layer: int, length: int, draw: int = 0) -> Tensor:
    """A random order of range(length), int64: the places sorted by 62 random bits, ties by place."""
    words = philox((torch.arange(length), draw, layer, int(stream)), seed)
    return torch.argsort((words[0] << 30) ^ words[1], stable=True)
