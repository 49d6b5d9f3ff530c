"""What the steps of bench_step.py are held against: operations that a step makes, and what a device makes at most.

A multiplication with its addition counts as two. Elementwise work, norms and the optimizer are left out, as they move
bytes and hardly compute.
"""

import statistics
import time
from collections.abc import Callable

import torch

from alignscale.jacobian.plan import layer_flop
from alignscale.nets.network import Network

SIDES = {"cuda": 8192, "cpu": 512}
"""Of the square matrices whose product gives a device's rate."""
REPEATS = 10


def clocked(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of ``work``, to the end of what it started on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large product of random matrices in ``dtype``, the median of a few."""
    side = SIDES[device.type]
    first, second = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    first @ second
    return 2 * side**3 / statistics.median(clocked(lambda: first @ second, device) for _ in range(REPEATS))


def operations(net: Network, images: torch.Tensor, rule: str, form: str | None, classes: int) -> float | None:
    """Of a step of ``rule`` on ``images`` (B, C, H, W); None for a rule whose passes are not counted here."""
    with torch.no_grad():
        inputs = [tuple(a.shape[1:]) for a in net.trace(images[:1]).inputs]
    layers = [layer_flop(layer, shape) for layer, shape in zip(net.layers, inputs, strict=True)]
    forward, explicit = sum(layers), 2.0 * classes * sum(torch.Size(shape).numel() for shape in net.shapes)
    pullback = forward - layers[0]
    passes = {
        "plain": 2 * forward + pullback,
        "backprop": 2 * forward + pullback,
        "align_ada": 3 * forward + pullback,
        "align_zero": 3 * forward + pullback,
        "align_prop": 2 * forward + pullback,
        "feedback_alignment": 2 * forward + pullback,
        "direct_feedback_alignment": 2 * forward + explicit,
        "readout_only": forward + layers[-1],
    }
    if form == "gates":
        passes |= dict.fromkeys(("align_ada", "align_zero"), 2 * forward + pullback)
    if form == "explicit":
        passes |= dict.fromkeys(("align_ada", "align_zero"), 2 * forward + explicit)
    return len(images) * passes[rule] if rule in passes and form != "auto" else None
