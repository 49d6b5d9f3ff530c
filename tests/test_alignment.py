"""Claims about the alignment score: against dense float64 matrices, recorded numbers and its own definition."""

import itertools
import math
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alignscale.analysis import alignment
from alignscale.analysis.alignment import POINT, Map, estimate, exact, moments, product_norm, shuffled

MAPS = [((8, 8), 1), ((8, 8), 2), ((5, 7), 2), ((1, 1), 1), ((2, 2), 2), ((16, 16), 4), ((1, 6), 1), ((3, 9), 3)]
RECORDED = Path(__file__).parent / "data/reference/alignment_w8.npz"


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return first, second + 0.5 * first


def dense(weight: Tensor, inputs: tuple[int, int], stride: int) -> Tensor:
    """The convolution as a matrix, column by column from its definition, in loops."""
    out, channels, kernel, _ = weight.shape
    size = [-(-n // stride) for n in inputs]
    before = [max((n - 1) * stride + kernel - m, 0) // 2 for n, m in zip(size, inputs, strict=True)]
    matrix = torch.zeros(out, *size, channels, *inputs, dtype=torch.float64)
    for r, c, y, x in itertools.product(range(size[0]), range(size[1]), range(kernel), range(kernel)):
        row, column = r * stride + y - before[0], c * stride + x - before[1]
        if 0 <= row < inputs[0] and 0 <= column < inputs[1]:
            matrix[:, r, c, :, row, column] = weight[:, :, y, x]
    return matrix.flatten(3).flatten(0, 2)


def cosine(first: Tensor, second: Tensor) -> float:
    one, other = first.T @ first, second.T @ second
    return ((one * other).sum() / (one.norm() * other.norm())).item()


@pytest.mark.parametrize(("inputs", "stride"), MAPS)
@pytest.mark.parametrize("block", [1, 1 << 22])
def test_a_convolution_s_score_is_that_of_its_dense_matrix(
    inputs: tuple[int, int], stride: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignment, "BLOCK", block)
    first, second = pair(5, 4, 3, 3)
    expected = cosine(dense(first, inputs, stride), dense(second, inputs, stride))
    assert abs(exact(first, second, Map.same(inputs, stride)).value - expected) < 1e-10


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (7, 7)])
def test_a_linear_layer_s_score_is_that_of_its_matrix(shape: tuple[int, int]) -> None:
    first, second = pair(*shape)
    assert abs(exact(first, second).value - cosine(first, second)) < 1e-10
    assert exact(first, first).value == pytest.approx(1, abs=1e-12)
    assert exact(first.float(), -2e-20 * first.float()).value == pytest.approx(1, abs=1e-12)


def test_no_change_has_no_direction() -> None:
    first, _ = pair(4, 4)
    assert math.isnan(exact(first, 0 * first).value)
    assert math.isnan(estimate(first, 0 * first).value)


@pytest.mark.parametrize(("inputs", "stride"), MAPS[:3])
def test_the_estimate_s_standard_error_is_true(inputs: tuple[int, int], stride: int) -> None:
    first, second = pair(6, 5, 3, 3)
    at = Map.same(inputs, stride)
    true = exact(first, second, at).value
    found = [estimate(first, second, at, probes=50, seed=seed) for seed in range(40)]
    aside = [(one.value - true) / one.error for one in found]
    assert 0.6 < statistics.stdev(aside) < 1.6
    assert abs(statistics.fmean(aside)) < 5 / math.sqrt(len(found))
    assert estimate(first, second, at, 50, 3) == found[3]


def test_a_layer_that_is_too_large_is_estimated() -> None:
    first, second = pair(8, 8)
    assert alignment.score(first, second).error == 0
    assert alignment.score(first, second, budget=100).error > 0


def recorded(name: str) -> Tensor:
    return torch.from_numpy(np.load(RECORDED)[name]).double().permute(3, 2, 0, 1)


def test_faster_than_the_public_estimator_even_without_its_framework() -> None:
    """Its 100 iterations of 10 inputs in torch, which takes a hundredth of TensorFlow's time; ours has no error."""
    first, second = (recorded(f"{kind}_W3") - recorded("init_W3") for kind in ("normal", "align"))
    at, noise = Map.same((16, 16), 2), torch.randn(10, 8, 16, 16, dtype=torch.float64)
    ratios = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(100):
            moments(first, second, noise, at).sum(0).tolist()
        middle = time.perf_counter()
        exact(first, second, at)
        ratios.append((middle - begin) / (time.perf_counter() - middle))
    assert statistics.median(ratios) > 4


@pytest.mark.parametrize("shape", [(96, 96, 3, 3), (600, 600), (700, 300), (300, 700)])
def test_it_takes_less_memory_than_three_times_the_layer(shape: tuple[int, ...]) -> None:
    first, second = (one.float() for one in pair(*shape))
    at = Map.same((16, 16), 1) if len(shape) == 4 else POINT
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        product_norm(first, second, at)
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak < 3 * first.numel() * first.element_size()


def test_a_shuffle_keeps_the_numbers_and_nothing_else() -> None:
    first, _ = pair(6, 6)
    mixed = shuffled(first, 0)
    assert torch.equal(mixed.flatten().sort().values, first.flatten().sort().values)
    assert not torch.equal(mixed, first)
    assert torch.equal(mixed, shuffled(first, 0))
    assert F.cosine_similarity(mixed.flatten(), first.flatten(), 0).abs() < 0.6
