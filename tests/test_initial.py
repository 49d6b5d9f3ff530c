"""Claims about the counter-based generator: known answers, any rows on their own, the right distribution."""

import hashlib
import itertools
from statistics import NormalDist

import pytest
import torch
from cases import NETS, SEED
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignscale import initial
from alignscale.frozen import initial_weight
from alignscale.initial import Stream, normal, permutation, philox, quantiles
from alignscale.nets import build

CPU = torch.device("cpu")
ONES = 0xFFFFFFFF
# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, answer.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
words = st.integers(0, ONES)


def philox_by_hand(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Salmon et al. 2011, section 3.2, with Python's whole numbers."""
    x, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [second >> 32 ^ x[1] ^ k[0], second & ONES, first >> 32 ^ x[3] ^ k[1], first & ONES]
        k = [(k[0] + 0x9E3779B9) & ONES, (k[1] + 0xBB67AE85) & ONES]
    return tuple(x)


def ours(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    return tuple(int(word) for word in philox((c0, c1, c2, c3), key[0] | key[1] << 32))


def digest(numbers: Tensor) -> str:
    return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_random123_s_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    assert ours(counter, key) == philox_by_hand(counter, key) == answer


@given(counter=st.tuples(words, words, words, words), key=st.tuples(words, words))
@settings(deadline=None)
def test_philox_equals_arithmetic_in_whole_numbers(counter: tuple[int, ...], key: tuple[int, ...]) -> None:
    assert ours(counter, key) == philox_by_hand(counter, key)


def test_a_number_is_the_quantile_of_its_sixteen_bits() -> None:
    numbers = normal(SEED, Stream.FEEDBACK, 5, (3, 7), draw=4).flatten()
    bits: list[int] = []
    for block in range(3):
        for word in philox_by_hand((block, 4, 5, Stream.FEEDBACK), (SEED, 0)):
            bits += [word & 0xFFFF, word >> 16]
    assert torch.equal(numbers, quantiles(CPU)[bits[:21]])


@given(
    rows=st.integers(0, 9),
    rest=st.lists(st.integers(1, 5), max_size=3),
    bounds=st.tuples(st.integers(-12, 12), st.integers(-12, 12)),
    chunk=st.sampled_from([1, 2, 1 << 18]),
)
@settings(deadline=None)
def test_rows_have_the_bits_of_the_same_rows_of_the_whole(
    rows: int, rest: list[int], bounds: tuple[int, int], chunk: int
) -> None:
    part = slice(*bounds)
    whole = normal(3, Stream.WEIGHT, 1, (rows, *rest))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initial, "_CHUNK_BLOCKS", chunk)
        found = normal(3, Stream.WEIGHT, 1, (rows, *rest), part)
    assert found.shape == whole[part].shape
    assert torch.equal(found, whole[part])


def test_only_contiguous_rows_can_be_asked_for() -> None:
    with pytest.raises(ValueError, match="expected contiguous rows"):
        normal(0, Stream.WEIGHT, 0, (4, 4), slice(0, 4, 2))


def test_seeds_streams_layers_and_draws_share_no_numbers() -> None:
    seeds = (0, 1, 1 << 32, (1 << 63) - 1)
    rows = [
        normal(seed, stream, layer, (2000,), draw=draw)
        for seed, stream, layer, draw in itertools.product(seeds, Stream, (0, 1, 7), (0, 1))
    ]
    numbers = torch.stack(rows)
    correlation = (numbers @ numbers.T / 2000).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / 2000**0.5  # 144 x 143 pairs, each of deviation 1 / sqrt(2000)


def test_numbers_are_standard_normal_and_rows_uncorrelated() -> None:
    numbers = normal(SEED, Stream.WEIGHT, 0, (1000, 1000)).double()
    assert abs(numbers.mean().item()) < 4e-3
    assert numbers.var().item() == pytest.approx(1, abs=6e-3)
    assert numbers.pow(4).mean().item() == pytest.approx(3, abs=4e-2)
    assert 4 < numbers.abs().max() < 4.4
    for axis in (numbers, numbers.T):
        correlation = (axis @ axis.T / 1000).fill_diagonal_(0)
        assert correlation.abs().max() < 6 / 1000**0.5
        assert correlation.square().mean().item() == pytest.approx(1 / 1000, rel=0.02)


def test_the_table_is_the_normal_distribution_s_quantiles() -> None:
    upper = [NormalDist().inv_cdf((index + 0.5) / 65536) for index in range(32768, 65536)]
    scale = (sum(x * x for x in upper) / 32768) ** 0.5
    table = torch.tensor([x / scale for x in [*(-x for x in reversed(upper)), *upper]], dtype=torch.float32)
    found = quantiles(CPU)
    assert found.dtype == torch.float32
    assert (found - table).abs().max() <= 2.4e-7  # the last bit of a number of up to 4.3
    assert torch.equal(found, -found.flip(0))


def test_the_numbers_of_this_version_never_change() -> None:
    assert initial.VERSION == 1
    table = digest(quantiles(CPU))
    numbers = digest(normal(SEED, Stream.WEIGHT, 2, (33, 3, 3, 3)))
    assert table == "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"
    assert numbers == "38dd85c2e7d0cd7e50edcfe1cc9f96a4f46cee06ecb656c305456f8a90706dfa"
    assert permutation(SEED, Stream.ORDER, 0, 12).tolist() == [11, 6, 8, 5, 7, 10, 4, 9, 1, 2, 0, 3]


@given(seed=st.integers(0, 2**63 - 1), length=st.integers(0, 200), draw=st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_a_permutation_has_each_place_once(seed: int, length: int, draw: int) -> None:
    assert sorted(permutation(seed, Stream.ORDER, 0, length, draw).tolist()) == list(range(length))


def test_a_permutation_follows_from_seed_and_draw_alone() -> None:
    first = permutation(3, Stream.ORDER, 0, 1000, draw=2)
    torch.manual_seed(5)
    torch.rand(7)
    assert torch.equal(permutation(3, Stream.ORDER, 0, 1000, draw=2), first)
    for other in ((4, Stream.ORDER, 0, 1000, 2), (3, Stream.DATA, 0, 1000, 2), (3, Stream.ORDER, 0, 1000, 3)):
        assert (permutation(*other) == first).sum() < 10


def test_a_permutation_s_places_are_uniform() -> None:
    orders = torch.stack([permutation(3, Stream.ORDER, 0, 5, draw) for draw in range(2000)])
    counts = torch.stack([(orders == place).sum(0) for place in range(5)])
    assert (counts - 400).abs().max() < 5 * 320**0.5


@pytest.mark.parametrize("net", NETS)
def test_a_float64_network_starts_from_the_same_numbers(net: str) -> None:
    config, shape = NETS[net]
    single, double = (build(config, shape, 3, 5).to(dtype) for dtype in (torch.float32, torch.float64))
    for index in range(len(single.layers)):
        assert torch.equal(initial_weight(single, SEED, index).double(), initial_weight(double, SEED, index))
