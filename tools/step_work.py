"""Clocks of bench_step.py, and what its steps are held against: the operations they make, and what a device makes.

A multiplication with its addition counts as two. Elementwise work, norms and the optimizer are left out, as they move
bytes and hardly compute.
"""

import functools
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

from alignscale.jacobian.plan import layer_flop
from alignscale.nets.network import Network

SIDES = {"cuda": 8192, "cpu": 512}
"""Of the square matrices whose product gives a device's rate."""
REPEATS = 10
WARM_UP = 3
IN_A_ROW = {"cpu": 1, "cuda": 10}
"""Steps that are timed together: a GPU's are short, and what is fetched for the next one must not be left out."""
Contender = tuple[str, str | None, str | None]
"""A rule, or the plain step; the form of the frozen Jacobian where it reads one, and the tier of a cache."""

Name = TypeVar("Name", bound=Hashable)


def clocked(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of ``work``, to the end of what it started on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def in_a_row(step: Callable[[], object], count: int) -> None:
    """Several steps, so that what one prepares for the next is inside of the measurement."""
    for _ in range(count):
        step()


def measure(
    steps: Mapping[Name, Callable[[], object]], repeats: int, device: torch.device, count: int = 1
) -> dict[Name, list[float]]:
    """Seconds of every contender in every round, in which each makes ``count`` steps in a row."""
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    contenders = list(steps)
    seconds: dict[Name, list[float]] = {name: [] for name in contenders}
    for number in range(repeats):
        turn = number % len(contenders)
        for name in contenders[turn:] + contenders[:turn]:
            row = functools.partial(in_a_row, steps[name], count)
            seconds[name].append(clocked(row, device) / count)
    return seconds


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
