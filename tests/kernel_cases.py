"""The GPU kernels in Triton's interpreter, which runs them on CPU tensors: test_kernels.py calls pytest on this file.

A process of its own, because TRITON_INTERPRET=1 has to be there before Triton is imported, and holds to its end.
"""

import itertools

import pytest
import torch
from torch import Tensor

from alignscale import kernels
from alignscale.initial import Stream, normal, quantiles
from alignscale.jacobian.gates import pack
from alignscale.nets.functions import rectified
from alignscale.nets.network import contract
from alignscale.types import Jacobian

UPPER = quantiles(torch.device("cpu"))[32768:]
SHAPES = [(101, 33), (7, 3, 5, 3), (2, 4099), (5,), (1, 1), (3, 0)]
SITES = [(1,), (37,), (8,), (2050,), (12, 5, 7), (40, 8, 8), (130, 9, 9), (7, 1, 1), (3, 2, 41)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, 7, 16, 2**31, 2**63 + 5, 2**64 - 1])
def test_numbers_have_the_cpu_s_bits(shape: tuple[int, ...], seed: int) -> None:
    for stream, layer, draw in ((Stream.WEIGHT, 0, 0), (Stream.SUBSET, 3, 2), (Stream.MAGNITUDE, 16, 2**20)):
        found = kernels.normal(UPPER, seed, int(stream), layer, draw, 0, shape)
        expected = normal(seed, stream, layer, shape, draw=draw)
        assert torch.equal(found, expected)
        half = kernels.normal(UPPER, seed, int(stream), layer, draw, 0, shape, torch.float16)
        assert torch.equal(half, expected.half())  # bf16 the interpreter cuts off; a GPU rounds it: check_device.py


@pytest.mark.parametrize("rows", [slice(0, 1), slice(3, 70), slice(69, 101), slice(5, 5)], ids=str)
def test_rows_of_the_numbers_have_the_bits_of_the_whole(rows: slice) -> None:
    whole = normal(7, Stream.FEEDBACK, 2, (101, 33))
    size = (rows.stop - rows.start, 33)
    assert torch.equal(kernels.normal(UPPER, 7, int(Stream.FEEDBACK), 2, 0, rows.start * 33, size), whole[rows])


def test_numbers_past_two_to_the_34_have_the_cpu_s_bits() -> None:
    """Where a part of a weight lies across that place, counters do not fit 32 bits with a sign."""
    shape, rows = (2**25, 1024), slice(2**24 - 2, 2**24 + 2)
    found = kernels.normal(UPPER, 7, 0, 0, 0, rows.start * 1024, (4, 1024))
    assert torch.equal(found, normal(7, Stream.WEIGHT, 0, shape, rows))


def test_no_examples_are_no_error() -> None:
    assert kernels.where_bit(torch.rand(0, 3, 4, 4), torch.zeros(0, 6, dtype=torch.uint8)).shape == (0, 3, 4, 4)
    rows = torch.zeros(0, dtype=torch.int64)
    assert kernels.weighted_rows(torch.rand(3, 4, 5), torch.rand(0, 4), rows, torch.float32).shape == (0, 5)
    assert kernels.rectified(torch.rand(0, 5), 0.5, None).shape == (0, 5)


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bits_open_what_relu_opens(site: tuple[int, ...], dtype: torch.dtype) -> None:
    residue, signal = random(3, *site), random(3, *site, seed=1).to(dtype)
    found = kernels.where_bit(signal, pack(residue))
    assert found.dtype == dtype
    assert torch.equal(found, torch.where(residue > 0, signal, 0))
    rows = torch.tensor([2, 2, 0])
    assert torch.equal(kernels.where_bit(signal, pack(residue), rows), torch.where(residue[rows] > 0, signal, 0))


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_scale_bias_and_relu_are_those_of_torch(site: tuple[int, ...], biased: bool) -> None:
    z, bias = random(4, *site).requires_grad_(), random(site[0], seed=1).requires_grad_() if biased else None
    apart = None if bias is None else bias.view(-1, *[1] * (len(site) - 1))
    expected = torch.relu(z * 0.37 if apart is None else z * 0.37 + apart)
    found = rectified(z, bias, 0.37)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    wanted = [one for one in (z, bias) if one is not None]
    gradients = [torch.autograd.grad(one, wanted, random(4, *site, seed=2)) for one in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)  # sums in another order


def test_what_is_no_number_stays_one() -> None:
    assert bool(kernels.rectified(torch.full((2, 3), float("nan")), 0.5, None).isnan().all())


@pytest.mark.parametrize("site", SITES[:6], ids=str)
def test_weighted_rows_are_the_contraction(site: tuple[int, ...]) -> None:
    error, rows = random(4, 10), torch.tensor([5, 0, 5, 2])
    for dtype, with_scale in itertools.product((torch.float32, torch.float16), (True, False)):
        values = random(6, 10, *site, seed=1).to(dtype)
        scale = random(6, 10, seed=2).abs() if with_scale else None
        weights = error if scale is None else error * scale[rows]
        expected = contract(Jacobian(values.double(), scale, rows), error.double())
        found = kernels.weighted_rows(values, weights, rows, torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
