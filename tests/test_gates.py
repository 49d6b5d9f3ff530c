"""Claims about relu's gates as packed bits."""

import pytest
import torch
from cases import Case, make
from hypothesis import given, settings
from hypothesis import strategies as st

from alignscale.jacobian.gates import pack, unpack

CASES = [Case(net, norm, "relu") for net in ("mlp", "conv3", "rnn") for norm in ("none", "batch", "calibrated")]


@given(st.lists(st.integers(1, 7), min_size=2, max_size=4), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_bits_come_back_in_one_bit_a_unit(shape: list[int], seed: int) -> None:
    residue = torch.relu(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))
    packed = pack(residue)
    units = residue[0].numel()
    assert packed.dtype == torch.uint8
    assert packed.shape == (shape[0], -(-units // 8))
    assert torch.equal(unpack(packed, tuple(shape[1:]), torch.float32), (residue > 0).float())


def test_unit_is_the_documented_bit() -> None:
    residue = torch.zeros(1, 12)
    residue[0, 10] = 1.0
    assert pack(residue).tolist() == [[0, 1 << 2]]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pullback_from_bits_has_the_bits_of_the_live_one_and_equals_autograd(case: Case, dtype: torch.dtype) -> None:
    built = make(case, dtype=dtype)
    net, frozen = built.net, built.fixed.frozen
    trace = frozen.trace(built.batch.images)
    error = torch.randn(trace.logits.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gates = [unpack(pack(residue), tuple(residue.shape[1:]), dtype) for residue in trace.residues]
    live = frozen.pullback(error, trace)
    with torch.no_grad():
        cached = net.pullback(error, gates, trace.norms, frozen.weight)
    assert all(torch.equal(a, b) for a, b in zip(live, cached, strict=True) if a is not None and b is not None)
    weights = [frozen.weight(index).clone().requires_grad_() for index in range(len(net.layers))]
    logits = net.trace(built.batch.images, lambda index: (weights[index], frozen.parameters(index)[1])).logits
    expected = torch.autograd.grad(logits, weights, error)
    for index, (layer, site) in enumerate(zip(net.layers, net.sites, strict=True)):
        delta = cached[index]
        assert delta is not None
        delta = delta if site is None else net.norms[site].pullback(delta, trace.norms[site])
        found, _ = layer.weight_gradient(trace.inputs[index], delta)
        scale = expected[index].abs().max().item()
        torch.testing.assert_close(
            found, expected[index], rtol=0, atol=scale * (1e-12 if dtype == torch.float64 else 2e-5)
        )


def test_bytes_that_do_not_fit_the_site_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 2 bytes an example for 12 units, found 3"):
        unpack(torch.zeros(4, 3, dtype=torch.uint8), (12,), torch.float32)
