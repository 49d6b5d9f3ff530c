"""A step with the frozen Jacobian from a temporary cache, as the training loop makes it, for bench_step.py."""

import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from step_work import clocked

from alignscale.choices import ENGINES, DataConfig, EngineConfig, MSEConfig, NetConfig, SGDConfig
from alignscale.config import JACOBIANS, CalibrationConfig, TrainConfig
from alignscale.data.examples import Examples
from alignscale.jacobian.build import chunks
from alignscale.jacobian.cache import Cache
from alignscale.learner import Learner
from alignscale.prepare import cache_of
from alignscale.rules import RULES
from alignscale.types import Batch

SETS = 2
"""Batches that the cache holds."""
ORDERS = 4
"""In which its examples are trained on, in turn. Batches are made before, as they are for a rule without a cache."""


def cached_step(
    config: NetConfig, rule: str, form: str, dtype: str, tier: str, batch: Batch, classes: int, held: ExitStack,
    fused: bool, precision: str = "fp32", lr: float = 1e-3, engine: EngineConfig = ENGINES["local"],
) -> tuple[Callable[[], None], Cache]:  # fmt: skip
    """One step, and the cache. held: is given the cache's folder, which ends with it."""
    folder = held.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
    options = TrainConfig(
        RULES[rule].options(name=rule), config, DataConfig("bench"), SGDConfig(lr=lr), MSEConfig(),
        jacobian=replace(JACOBIANS[form], dtype=dtype, tier=tier, dir=str(Path(folder) / "cache")),
        calibration=CalibrationConfig(2), batch_size=len(batch.images), precision=precision, engine=engine,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    count = SETS * len(batch.images)
    images = torch.rand(count, *batch.images.shape[1:], generator=generator)
    train = Examples.whole(images, torch.arange(count) % classes, classes, "bench")
    learner = Learner(
        config, train.shape, classes, options.rule, options.optim, precision=precision, device=batch.images.device,
        engine=engine,
    )  # fmt: skip
    for group in learner.engine.optimizer.param_groups:
        group["fused"] = fused
    cache = cache_of(options, learner, train)
    cache.make(lambda line: None)
    store = cache.open()
    batches = _batches(learner, train, len(batch.images), generator)
    steps: Iterator[tuple[int, list[Batch]]] = store.attached(batches) if store else batches

    def step() -> None:
        _, parts = next(steps)
        output = learner.engine(parts[0])
        learner.engine.backward(output.surrogate)
        learner.engine.step()

    return step, cache


def build_ratio(cache: Cache, batch: Batch, rounds: int) -> float | None:
    """What the making of a cache computes, over the initial network's own passes that it needs: the median of a few.

    That is a forward pass, and a pullback for each class where a layer is explicit; what it adds is what it keeps. None
    where there is nothing to make.
    """
    form, frozen = cache.chosen(), cache.frozen
    rows, device = torch.arange(len(batch.images)), batch.images.device
    if form.sites[0] == "live":
        return None

    def built() -> object:
        return list(chunks(frozen, form, iter([(batch, rows, rows)]), lambda: None))

    def passes() -> None:
        trace = frozen.trace(batch.images)
        for label in range(trace.logits.shape[1] if "explicit" in form.sites else 0):
            error = torch.zeros_like(trace.logits)
            error[:, label] = 1.0
            frozen.pullback(error, trace)

    pairs = [(clocked(built, device), clocked(passes, device)) for _ in range(rounds + 1)]
    return statistics.median(ours / needed for ours, needed in pairs[1:])


def _batches(
    learner: Learner, train: Examples, size: int, generator: torch.Generator
) -> Iterator[tuple[int, list[Batch]]]:
    places = [part for _ in range(ORDERS) for part in torch.randperm(len(train), generator=generator).split(size)]
    made = [learner.encoding.batch(train, part, step) for step, part in enumerate(places)]
    for step, batch in itertools.cycle(enumerate(made)):
        yield step, [batch]
