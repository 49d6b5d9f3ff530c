"""Claims about the Add task: its targets against loops, the public code's variant, and what it is trained with."""

from pathlib import Path

import numpy as np
import pytest
import torch
from run_cases import config, silent

from alignscale.choices import AddConfig, ConfigError, CrossEntropyConfig, MSEConfig, RNNConfig, SGDConfig
from alignscale.data import load
from alignscale.loss import right
from alignscale.run import Diverged
from alignscale.train import train

NET = RNNConfig(width=16, readout="every")


def bit(bits: np.ndarray, example: int, step: int) -> float:
    return float(bits[example, step]) if step >= 0 else 0.0


def test_targets_add_the_bits_of_two_earlier_steps() -> None:
    examples = load(AddConfig(train=30, test=5, steps=9, delays=[2, 5]))["train"]
    bits = examples.images[:, 0, :, 0].numpy()
    assert set(np.unique(bits)) == {0.0, 1.0}
    for n in range(30):
        for t in range(9):
            assert examples.labels[n, t, 0] == 0.5 + 0.5 * bit(bits, n, t - 2) - 0.25 * bit(bits, n, t - 5)


def test_the_public_variant_zeroes_examples_and_wraps_in_time() -> None:
    examples = load(AddConfig(train=30, test=5, steps=9, delays=[2, 5], public=True))["train"]
    bits = examples.images[:, 0, :, 0].numpy()
    for n in range(30):
        for t in range(9):
            first, second = (bits[n, (t - d) % 9] if n >= d else 0.0 for d in (2, 5))
            assert examples.labels[n, t, 0] == 0.5 + 0.5 * first - 0.25 * second


def test_an_output_is_right_within_an_eighth() -> None:
    targets = torch.tensor([[[0.25], [0.5]], [[1.0], [0.75]]])
    assert right(targets + 0.12, targets) == 2
    assert right(targets + torch.tensor([[[0.0], [0.13]], [[0.2], [0.2]]]), targets) == 0.5


def test_backprop_learns_it(tmp_path: Path) -> None:
    options = config(tmp_path / "run", "backprop", net=NET, data=AddConfig(train=400, test=100, steps=10))
    options.optim, options.epochs = SGDConfig(lr=0.01), 30
    first, *_, last = train(options, silent)["runs"][0]["curve"]
    assert last["test_loss"] < first["test_loss"] / 5
    assert last["test_accuracy"] > 0.5


def test_weights_that_are_not_finite_when_they_are_saved_end_the_run_as_diverged(tmp_path: Path) -> None:
    data = AddConfig(train=40, test=10, steps=6, delays=[2, 5])
    options = config(tmp_path / "run", "backprop", net=NET, data=data, batch_size=40)
    options.optim, options.checkpoint.every_steps, options.evaluation.every_epochs = SGDConfig(lr=3e38), 1, 9
    with pytest.raises(Diverged, match="weight is not finite at step 1"):
        train(options, silent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"net": RNNConfig(width=8)}, "data=add has a target at each step"),
        ({"data": AddConfig(delays=[2, 20])}, r"data.delays=\[2, 20\]: expected two of at least 0"),
        ({"loss": CrossEntropyConfig()}, "loss=cross_entropy: data=add has numbers for targets"),
    ],
)
def test_what_does_not_fit_the_task_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    options = config(tmp_path / "run", "backprop", **{"net": NET, "data": AddConfig(), "loss": MSEConfig()} | changes)
    with pytest.raises(ConfigError, match=message):
        train(options, silent)
    assert not (tmp_path / "run").exists()
