"""Claims about learning rates, against torch's schedulers."""

import math

import pytest
import torch

from alignscale.choices import ConstantConfig, CosineConfig, ScheduleConfig, StepConfig
from alignscale.schedule import factor

PER_EPOCH, EPOCHS = 7, 10
STOP = PER_EPOCH * EPOCHS


def ours(config: ScheduleConfig) -> list[float]:
    return [factor(config, step, PER_EPOCH, STOP) for step in range(STOP)]


def theirs(make: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    scheduler = make(optimizer)  # type: ignore[operator]
    rates = []
    for _ in range(STOP):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_constant_is_one() -> None:
    assert ours(ConstantConfig()) == [1.0] * STOP


def test_step_is_torchs() -> None:
    milestones = [3 * PER_EPOCH, 8 * PER_EPOCH]
    expected = theirs(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones, 0.2))
    assert ours(StepConfig(milestones=[3, 8], factor=0.2)) == pytest.approx(expected)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_is_torchs(final: float) -> None:
    expected = theirs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STOP, final))
    assert ours(CosineConfig(final=final)) == pytest.approx(expected)


@pytest.mark.parametrize("config", [ConstantConfig(warmup=2), StepConfig(warmup=2), CosineConfig(warmup=2)])
def test_warm_up_rises_in_equal_steps_to_one(config: ScheduleConfig) -> None:
    rates = ours(config)
    assert rates[:14] == pytest.approx([(step + 1) / 14 for step in range(14)])
    assert max(rates) == 1.0


def test_cosine_after_a_warm_up_is_the_cosine_of_what_is_left() -> None:
    shifted = [factor(CosineConfig(), step, PER_EPOCH, STOP - 14) for step in range(STOP - 14)]
    assert ours(CosineConfig(warmup=2))[14:] == pytest.approx(shifted)


def test_a_rate_that_overflows_is_infinite_and_no_error() -> None:
    assert factor(StepConfig(factor=3e38, milestones=[0.0] * 9), 5, 10, 100) == math.inf


def test_half_epochs_count() -> None:
    assert ours(StepConfig(milestones=[0.5]))[3:5] == [1.0, pytest.approx(0.1)]


def test_a_warm_up_of_half_a_step_changes_nothing_and_one_as_long_as_training_is_all_there_is() -> None:
    assert factor(ConstantConfig(warmup=0.05), 0, PER_EPOCH, STOP) == 1.0
    assert factor(CosineConfig(warmup=10), STOP - 1, PER_EPOCH, STOP) == pytest.approx(1.0)
    assert factor(CosineConfig(warmup=9.8), STOP - 1, PER_EPOCH, STOP) == pytest.approx(
        (1 + math.cos(math.pi * 2 / 7)) / 2
    )
