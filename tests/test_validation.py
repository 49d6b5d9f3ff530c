"""Each wrong option is refused with its name, the value found and the valid values."""

import dataclasses
from collections.abc import Callable

import pytest

from alignscale.choices import (
    NETS,
    AdamConfig,
    ConfigError,
    CrossEntropyConfig,
    DeepSpeedConfig,
    ImageFolderConfig,
    RNNConfig,
    RuleConfig,
    SGDConfig,
    StepConfig,
    SyntheticConfig,
    WebDatasetConfig,
)
from alignscale.config import ParallelConfig, TrainConfig, difference, digest, run_name
from alignscale.distributed import check_launched, launched
from alignscale.validation import validate


def config() -> TrainConfig:
    nets = dataclasses.replace(NETS["conv3"])
    return TrainConfig(rule=RuleConfig(name="backprop"), net=nets, data=SyntheticConfig(), optim=SGDConfig())


def change(path: str, value: object) -> Callable[[TrainConfig], None]:
    def apply(options: TrainConfig) -> None:
        *groups, leaf = path.split(".")
        place: object = options
        for group in groups:
            place = getattr(place, group)
        setattr(place, leaf, value)

    return apply


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("net.norm", "layer", "net.norm=layer: expected one of none, batch, calibrated"),
        ("net.activation", "swish", "net.activation=swish: expected one of relu, gelu, tanh, erf"),
        ("net.parameterisation", "mup", "expected one of ntk, standard"),
        ("net.blocks", "all", "expected one of theory, public"),
        ("net.gain", float("nan"), "net.gain=nan: expected a finite number above 0"),
        ("net.gain", 1e300, r"net.gain=1e\+300: expected a number of at most 3.4e\+38 in size"),
        ("run.root", "", "run.root=: expected a folder, found nothing"),
        ("net.width", 0, "net.width=0: expected a whole number of at least 1"),
        ("net.strides", [], "at least one stride"),
        ("data.shape", [3, 4], r"expected \[channels, height, width\]"),
        ("data.classes", 1, "data.classes=1"),
        ("optim.lr", -1.0, "optim.lr=-1.0: expected a finite number above 0"),
        ("optim.momentum", 1.0, "optim.momentum=1.0"),
        ("optim", AdamConfig(beta2=1.0), "optim.beta2=1.0"),
        ("frozen.weights", "lost", "expected one of stored, regenerated"),
        ("precision", "fp8", "precision=fp8: expected one of fp32, fp16, bf16, fp64"),
        ("resume", "yes", "resume=yes: expected one of auto, never"),
        ("seed", -1, "seed=-1: expected a whole number from 0"),
        ("epochs", 0, "epochs=0"),
        ("checkpoint.keep", 0, "checkpoint.keep=0"),
        ("threads", 100_000, "threads=100000: expected at most"),
        ("name", "../../x", "name=../../x: expected letters"),
        ("net", RNNConfig(initial_state="trained"), "evaluation.batch_size=120: expected at most batch_size=50"),
        ("net", dataclasses.replace(NETS["mlp"], blocks="public"), "net.blocks=public"),
        ("net.strides", [1, 0], r"net.strides=\[1, 0\]: expected a whole number of at least 1"),
        ("optim.nesterov", True, "optim.nesterov=true: expected optim.momentum above 0"),
        ("optim.weight_decay", -0.1, "optim.weight_decay=-0.1: expected a finite number of at least 0"),
        ("optim.decay_towards", "one", "optim.decay_towards=one: expected one of zero, initial"),
        ("optim.clip_norm", float("inf"), "optim.clip_norm=inf: expected a finite number of at least 0"),
        ("loss.reduction", "max", "loss.reduction=max: expected one of mean, sum"),
        ("loss", CrossEntropyConfig(label_smoothing=1.0), "loss.label_smoothing=1.0: expected a number from 0"),
        ("schedule.warmup", 11, "schedule.warmup=11: expected at most epochs=10"),
        ("schedule", StepConfig(milestones=[-1]), r"schedule.milestones=\[-1\]: expected a whole number of at least 0"),
        ("schedule", StepConfig(factor=0), "schedule.factor=0: expected a finite number above 0"),
        ("accumulation", 51, "accumulation=51: expected at most batch_size=50"),
        ("data.views", 2, "data.views=2, data.shift=0, data.flip=False: .* expected both, or neither"),
        ("data.shift", 2, "data.views=1, data.shift=2"),
        ("data.normalisation", "pixel", "data.normalisation=pixel: expected one of none, channel"),
        ("data", ImageFolderConfig(channels=4), "data.channels=4: expected one of 1, 3"),
        ("data", ImageFolderConfig(size=0), "data.size=0: expected a whole number of at least 1"),
        ("evaluation.splits", ["dev"], r"evaluation.splits=\['dev'\]: expected one of train, validation, test"),
        ("evaluation.splits", ["validation"], "validation needs data.validation above 0"),
        ("checkpoint.best", "train", "checkpoint.best=train: expected a split that is evaluated, one of test"),
        ("checkpoint.every_minutes", -1.0, "checkpoint.every_minutes=-1.0"),
        ("engine", DeepSpeedConfig(zero_stage=0, offload=True), "engine.zero_stage from 1 to 3, found 0"),
        ("parallel", ParallelConfig(overlap=True), "parallel.width above 1, .* found 1, "),
        ("parallel", ParallelConfig(2, overlap="yes"), "parallel.overlap=.yes.: expected bool, found str"),  # type: ignore[arg-type]
    ],
)
def test_wrong_value_is_named_with_the_valid_ones(path: str, value: object, message: str) -> None:
    options = config()
    change(path, value)(options)
    with pytest.raises(ConfigError, match=message):
        validate(options)


@pytest.mark.parametrize(
    ("data", "other", "message"),
    [
        ({"first_size": 230}, {}, "expected data.first_size from 1 to data.size=224"),
        ({"first_size": 0}, {}, "expected data.first_size from 1 to data.size=224"),
        (
            {"growth": [3, 3]},
            {},
            r"data.growth=\[3, 3\]: expected data.growth=\[from, to\], 0 <= from < to < epochs=10",
        ),
        ({"growth": [3, 10]}, {}, r"data.growth=\[3, 10\]: expected .* < to < epochs=10"),
        ({"growth": [3]}, {}, r"data.growth=\[3\]: expected"),
        ({"growth": [], "first_size": 0}, {}, r"data.growth=\[\]: expected data.growth=\[from, to\]"),
        ({"views": 2}, {}, "expected data.views=0, as each epoch's view has a size, found 2"),
        ({}, {"net": NETS["mlp"]}, "expected a convolutional network, found net=mlp"),
        ({}, {"net.norm": "calibrated"}, "expected net.norm=none or batch"),
        (
            {},
            {"rule": RuleConfig(name="direct_feedback_alignment")},
            "expected a rule whose feedback is made for any size",
        ),
        ({}, {"analysis.track_errors": True}, "data.views=0, form=primal: .* expected data.views=1"),
    ],
)
def test_images_that_grow_are_refused_where_something_is_made_for_one_size(
    data: dict[str, object], other: dict[str, object], message: str
) -> None:
    grown = {"urls": "a.tar", "test_urls": "b.tar", "first_size": 128, "growth": [2, 8], **data}
    options = config()
    options.data = WebDatasetConfig(urls="a.tar", test_urls="b.tar", first_size=128, growth=[2, 8])
    validate(options)
    options.data = WebDatasetConfig(**grown)  # type: ignore[arg-type]
    for path, value in other.items():
        change(path, value)(options)
    with pytest.raises(ConfigError, match=message):
        validate(options)


def test_defaults_of_every_net_are_valid() -> None:
    for net in NETS.values():
        options = config()
        options.net = net
        validate(options)


def test_folder_follows_from_what_defines_the_run() -> None:
    first, second = config(), config()
    second.log.every_steps, second.run.root, second.checkpoint.keep = 3, "elsewhere", 9
    assert run_name(first) == run_name(second)
    second.optim.lr = 3.0
    assert digest(first) != digest(second)


def test_difference_names_each_option_that_differs() -> None:
    assert difference({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}}) == ["a.c: 2 -> 4", "d: 3 -> (absent)"]


@pytest.mark.parametrize(
    "given",
    ["RANK=a WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=here MASTER_PORT=1", "RANK=1 WORLD_SIZE=4", "RANK=0 WORLD_SIZE="],
)
def test_a_part_of_torchruns_variables_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for word in given.split():
        monkeypatch.setenv(*word.split("="))
    with pytest.raises(ConfigError, match=f"expected RANK, WORLD_SIZE, .*found {given.replace(' ', ', ')}; start with"):
        check_launched()


@pytest.mark.parametrize("given", ["", "RANK=3", "RANK=0 WORLD_SIZE=1", "MASTER_ADDR=here WORLD_SIZE=8"])
def test_variables_of_no_launcher_leave_a_process_alone(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for word in given.split():
        monkeypatch.setenv(*word.split("="))
    check_launched()
    assert launched() is None
