"""The paper's alignment score between two weight changes: exact, or estimated with its standard error.

cos(L1, L2) = tr(L1 L2) / sqrt(tr(L1^2) tr(L2^2)), L = D^T D, with D a layer's weight change as a matrix (Boopathy &
Fiete, ICML 2022). As tr(L1 L2) = |D1 D2^T|_F^2 this is |D1 D2^T|^2 / (|D1 D1^T| |D2 D2^T|). With D2 the change that the
frozen rule makes, L2 is Sigma = E[input(x1) q(x1, x2) input(x2)^T]: L2 is a Gram matrix of D2 by construction.

They stand alone as pure functions of weights. A convolution is a matrix on its unpadded map, where outputs at the
border see fewer inputs. That matrix is never built: the blocks of D1 D2^T, one for each pair of output positions that
share inputs, are sums of the k^4 products of kernel taps, and most pairs have the same sum.
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from alignscale.nets.layers import same_padding

BLOCK, LEAST = 1 << 22, 1 << 15
"""Numbers in the products that are held at once: at most, and where half of a layer's would be fewer."""
PROBES = 20
"""Random inputs at once."""
BUDGET = 2e12
"""Multiplications of a layer's score, up to which it is exact."""


@dataclass(frozen=True)
class Map:
    """Where a convolution is applied: per axis (rows, columns) the input's length, the output's, and what is padded."""

    inputs: tuple[int, int]
    outputs: tuple[int, int]
    stride: int = 1
    pads: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))

    @classmethod
    def same(cls, inputs: tuple[int, int], stride: int) -> "Map":
        """With TensorFlow's SAME padding, of 3x3 kernels."""
        outputs = (-(-inputs[0] // stride), -(-inputs[1] // stride))
        return cls(inputs, outputs, stride, (same_padding(inputs[0], stride), same_padding(inputs[1], stride)))


POINT = Map((1, 1), (1, 1))


@dataclass(frozen=True)
class Score:
    """A cosine and its standard error: 0 where it is exact."""

    value: float
    error: float = 0.0


def _shared(axis: int, at: Map, kernel: int) -> Counter[tuple[tuple[int, int], ...]]:
    """Along an axis: the pairs of taps by which two outputs see the same inputs -> how many pairs of outputs do so."""
    length, outputs, before = at.inputs[axis], at.outputs[axis], at.pads[axis][0]
    found: Counter[tuple[tuple[int, int], ...]] = Counter()
    reach = (kernel - 1) // at.stride
    for first in range(outputs):
        for second in range(max(0, first - reach), min(outputs, first + reach + 1)):
            starts = (at.stride * first - before, at.stride * second - before)
            low, high = max(*starts, 0), min(min(starts) + kernel, length)
            pairs = tuple((x - starts[0], x - starts[1]) for x in range(low, high))
            if pairs:
                found[pairs] += 1
    return found


def _patterns(at: Map, kernel: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """0/1 (patterns, k^4): which products of taps make a block; and how many blocks (patterns,) are made so."""
    rows, columns = (_shared(axis, at, kernel[axis]) for axis in (0, 1))
    taps = kernel[0] * kernel[1]
    chosen = torch.zeros(len(rows) * len(columns), taps * taps, dtype=torch.float64)
    counts = torch.zeros(len(chosen), dtype=torch.float64)
    for place, (row, column) in enumerate(itertools.product(rows, columns)):
        counts[place] = rows[row] * columns[column]
        for (r1, r2), (c1, c2) in itertools.product(row, column):
            chosen[place, (r1 * kernel[1] + c1) * taps + r2 * kernel[1] + c2] = 1
    return chosen, counts


def product_norm(first: Tensor, second: Tensor, at: Map = POINT) -> float:
    """|D1 D2^T|_F^2, float64. first, second: (out, in) or (out, in, k, k), of the same shape.

    In blocks of the rows of D1, whose products are few beside the numbers of D1.
    """
    if first.dim() == 2:
        first, second = first[..., None, None], second[..., None, None]
        if first.shape[0] > first.shape[1]:  # tr(D1^T D1 D2^T D2) is the smaller sum
            return _small_inputs(first[:, :, 0, 0], second[:, :, 0, 0])
    out, kernel = first.shape[0], (first.shape[2], first.shape[3])
    chosen, counts = (one.to(first.device) for one in _patterns(at, kernel))
    places = list(itertools.product(range(kernel[0]), range(kernel[1])))
    columns = max(64, out // 4)
    per_row = (2 * chosen.shape[1] + len(chosen)) * min(columns, out)
    rows = max(1, min(BLOCK, max(LEAST, first.numel() // 2)) // per_row)
    total = first.new_zeros((), dtype=torch.float64)
    for block in first.split(rows):
        left = block.permute(2, 3, 0, 1).flatten(0, 1).double()  # (taps, rows, in)
        for other in second.split(columns):
            products = torch.stack([left @ other[:, :, r, c].double().T for r, c in places], 1)
            total += (chosen @ products.flatten(0, 1).flatten(1)).square().sum(1) @ counts
    return total.item()


def _small_inputs(first: Tensor, second: Tensor) -> float:
    """<D1^T D1, D2^T D2>, by blocks of columns."""
    total = first.new_zeros((), dtype=torch.float64)
    columns = max(1, min(BLOCK // len(first), first.shape[1] // 8))
    for part, other in itertools.product(range(0, first.shape[1], columns), repeat=2):
        left, right = slice(part, part + columns), slice(other, other + columns)
        grams = [one[:, left].double().T @ one[:, right].double() for one in (first, second)]
        total += (grams[0] * grams[1]).sum()
    return total.item()


def operations(shape: tuple[int, ...]) -> float:
    """Multiplications of an exact score of a layer of this weight shape, of any map."""
    taps = math.prod(shape[2:])
    return 3.0 * taps * taps * min(shape[0], shape[1] if taps == 1 else shape[0]) * shape[0] * shape[1]


def exact(first: Tensor, second: Tensor, at: Map = POINT) -> Score:
    """The score of two changes, in float64; NaN where one of them is 0 and has no direction."""
    both, *own = (product_norm(a, b, at) for a, b in ((first, second), (first, first), (second, second)))
    return Score(both / math.sqrt(own[0] * own[1]) if min(own) > 0 else math.nan)


def estimate(first: Tensor, second: Tensor, at: Map = POINT, probes: int = 100, seed: int = 0) -> Score:
    """The score from ``probes`` random inputs z: sum of <u, v> / sqrt(sum of |u|^2 sum of |v|^2), u = D1^T D1 z.

    The standard error is that of a ratio of means, to first order. Seeded, the same on every device; float64.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (first.shape[1], *(at.inputs if first.dim() == 4 else ()))
    parts = torch.arange(probes).split(PROBES)
    noise = (torch.randn(len(part), *shape, generator=generator).to(first) for part in parts)
    sums = torch.cat([moments(first, second, z, at) for z in noise]).cpu()
    means = sums.mean(0)
    if means[1:].min() <= 0:
        return Score(math.nan)
    value = (means[0] / (means[1] * means[2]).sqrt()).item()
    relative = sums[:, 0] / means[0] - (sums[:, 1] / means[1] + sums[:, 2] / means[2]) / 2
    return Score(value, abs(value) * relative.std().item() / math.sqrt(probes))


def moments(first: Tensor, second: Tensor, noise: Tensor, at: Map = POINT) -> Tensor:
    """<u, v>, |u|^2 and |v|^2 for u = D1^T D1 z, v = D2^T D2 z and each z of noise (B, in) or (B, in, H, W): (B, 3)."""
    u, v = (_gram(weight, noise, at).flatten(1).double() for weight in (first, second))
    return torch.stack([(u * v).sum(1), u.square().sum(1), v.square().sum(1)], 1)


def _gram(weight: Tensor, z: Tensor, at: Map) -> Tensor:
    """D^T D z."""
    if weight.dim() == 2:
        return z @ weight.T @ weight
    pad = [*at.pads[1], *at.pads[0]]
    padded = F.pad(z, pad)
    back = conv2d_input(padded.shape, weight, F.conv2d(padded, weight, stride=at.stride), at.stride)
    return F.pad(back, [-n for n in pad])


def score(first: Tensor, second: Tensor, at: Map = POINT, budget: float = BUDGET, probes: int = 100) -> Score:
    """Exact up to ``budget`` multiplications, and an estimate beyond."""
    if operations(tuple(first.shape)) <= budget:
        return exact(first, second, at)
    return estimate(first, second, at, probes)


def shuffled(weight: Tensor, seed: int) -> Tensor:
    """The same numbers in a random order: a control, which keeps their distribution and nothing else."""
    order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))
    return weight.flatten()[order.to(weight.device)].view(weight.shape)
