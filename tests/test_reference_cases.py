"""Claims about the check on folders that the public code did not record: other widths, rates, rules and optimizers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check_reference
import numpy as np
import pytest
from reference_cases import Recording, record, record_alignment

CONV_RULES = [
    "backprop",
    "align_ada",
    "align_zero",
    "align_prop",
    "feedback_alignment",
    "direct_feedback_alignment",
    "readout_only",
]
RNN_RULES = ["backprop", "align_ada", "align_zero", "align_prop", "feedback_alignment", "readout_only"]
STANDARD = "adam, standard parameterisation"
RECORDINGS = [
    *(Recording("conv3", rule, width=5, lr=0.7) for rule in CONV_RULES),
    *(Recording("conv3", rule, STANDARD, lr=0.003) for rule in CONV_RULES),
    *(Recording("conv7", rule, lr=0.3) for rule in ("align_ada", "align_prop", "direct_feedback_alignment")),
    *(Recording("conv7", rule, STANDARD, lr=0.01) for rule in ("align_ada", "align_zero", "feedback_alignment")),
    *(Recording("rnn", rule, width=7, lr=0.01, steps=4) for rule in RNN_RULES),
    *(Recording("rnn", rule, STANDARD, width=6, lr=0.01) for rule in ("backprop", "align_ada", "feedback_alignment")),
    Recording("conv3", "align_ada", "sgd, standard parameterisation"),
    Recording("conv3", "align_ada", "adam", lr=0.01),
    Recording("conv3", "feedback_alignment", STANDARD, lr=0.003, drawn="scaled"),
]
Arrays = dict[str, np.ndarray]


def quiet(line: str) -> None:
    """Swallow the line of a case."""


def check(folder: Path) -> dict[str, Any]:
    (row,) = check_reference.run(folder, quiet)
    assert row["problem"] is None
    return row


@pytest.mark.parametrize("what", RECORDINGS, ids=str)
def test_the_oracle_s_trajectory_is_reproduced(what: Recording, tmp_path: Path) -> None:
    record(tmp_path, what)
    row = check(tmp_path)
    assert row["error"] < (1e-10 if "adam" in what.optimizer else 1e-12)
    loose = "adam" in what.optimizer or (what.net, what.rule) == ("rnn", "align_ada")
    assert row["tolerance"] == (1e-6 if loose else 1e-9)


@pytest.mark.parametrize("what", [r for r in RECORDINGS if "feedback" in r.rule or "align" in r.rule], ids=str)
def test_another_rule_s_trajectory_is_not(what: Recording, tmp_path: Path) -> None:
    record(tmp_path, what)
    index = json.loads((tmp_path / "index.json").read_text())
    for entry in index.values():
        entry["rule"] = "backprop"
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert not check(tmp_path)["passed"]


def drop(*names: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {key: value for key, value in arrays.items() if not key.startswith(names)}


def single(arrays: Arrays) -> Arrays:
    """Initial weights, batches and feedback in float32, which holds them exactly."""
    return {k: v.astype(np.float32) if k.startswith(("init", "feedback", "batch_x")) else v for k, v in arrays.items()}


VARIANTS: dict[str, tuple[Callable[[Arrays], Arrays], dict[str, Any]]] = {
    "without logits": (drop("logits"), {}),
    "without the last logits": (drop("logits_last"), {}),
    "without weights after training": (drop("step"), {}),
    "weights after one step alone": (drop("step3"), {}),
    "float32": (single, {}),
    "without the first layer's feedback": (drop("feedback_Wlin0"), {}),
    "more arrays": (lambda arrays: arrays | {"note": np.array("from elsewhere"), "feedback_W9": np.zeros(3)}, {}),
    "spaced strides": (drop(), {"net": "conv3: 3x3 filters, strides 1, 2, 2"}),
    "a network of its own": (drop(), {"net": "small: strides [1, 2, 2]"}),
    "net from the name": (drop(), {"net": None}),
    "rate as text": (drop(), {"lr": "0.5"}),
    "capital letters": (drop(), {"optimizer": "SGD"}),
    "no optimizer": (drop(), {"optimizer": None}),
    "standardised images": (drop(), {"input": "standardised digits", "width": 4, "steps": 3, "batch": 6}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_may_hold_less_or_more_or_say_it_otherwise(variant: str, tmp_path: Path) -> None:
    change, options = VARIANTS[variant]
    what = Recording("conv3", "feedback_alignment")
    record(tmp_path, what)
    path, index = tmp_path / f"{what.name}.npz", json.loads((tmp_path / "index.json").read_text())
    np.savez(path, **change(check_reference.load(path)))
    entry = {key: value for key, value in (index[what.name] | options).items() if value is not None}
    (tmp_path / "index.json").write_text(
        json.dumps({what.name: entry, "notes": {"net": "conv7", "what": "something else"}})
    )
    assert check(tmp_path)["error"] < 1e-12


def cut(name: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: arrays | {name: arrays[name][:-1]}


DAMAGES: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "no loss": (drop("loss"), "loss"),
    "fewer losses than batches": (cut("loss"), "expected loss of each of 3 batches, found 2"),
    "fewer batches than steps": (
        lambda arrays: cut("loss")(cut("logits")(cut("batch_x")(cut("batch_y")(arrays)))),
        "expected batches up to step 3, found 2",
    ),
    "batches without targets": (drop("batch_y"), "batch_y"),
    "no batches": (drop("batch"), "expected batch_x and batch_y, or batch_idx, found neither"),
    "no bias": (drop("init_b3"), "init_b3"),
    "a weight after training is missing": (drop("step3_W1"), "step3_W1"),
    "a weight of another shape": (lambda arrays: arrays | {"init_W1": arrays["init_W1"][:, :, :1]}, "init_W1"),
    "feedback is missing": (drop("feedback_Wlin2"), "expected the feedback W of layer 2 in the file"),
    "not a number": (lambda arrays: arrays | {"step3_W0": arrays["step3_W0"] * np.nan}, "not a finite number"),
    "a layer too many": (lambda arrays: arrays | {"init_W4": arrays["init_W3"]}, "3 strides want 4 weights, found 5"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_cannot_be_run_and_says_why(damage: str, tmp_path: Path) -> None:
    change, reason = DAMAGES[damage]
    what = Recording("conv3", "feedback_alignment")
    record(tmp_path, what)
    path = tmp_path / f"{what.name}.npz"
    np.savez(path, **change(check_reference.load(path)))
    lines: list[str] = []
    (row,) = check_reference.run(tmp_path, lines.append)
    assert not row["passed"]
    assert reason in row["problem"]
    assert lines[0].startswith(f"FAIL {what.name}")


def test_an_unknown_rule_is_named_with_the_known_ones(tmp_path: Path) -> None:
    record(tmp_path, Recording("rnn", "backprop"))
    index = (tmp_path / "index.json").read_text()
    (tmp_path / "index.json").write_text(index.replace('"rule": "backprop"', '"rule": "magic"'))
    (row,) = check_reference.run(tmp_path, quiet)
    assert "'magic': expected one of align_ada, align_prop" in row["problem"]


def test_images_that_are_missing_are_named(tmp_path: Path) -> None:
    record(tmp_path, Recording("conv7", "backprop", steps=1))
    (tmp_path / "images.npz").unlink()
    (row,) = check_reference.run(tmp_path, quiet)
    assert "images.npz" in row["problem"]


@pytest.mark.parametrize("text", ["[]", "{", '"cases"'])
def test_an_index_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"expected an object|Expecting"):
        check_reference.run(tmp_path, quiet)


@pytest.mark.parametrize(("width", "side"), [(5, 16), (16, 8)])
def test_alignment_of_another_width_is_reproduced_and_another_score_is_not(
    width: int, side: int, tmp_path: Path
) -> None:
    record_alignment(tmp_path, width, side)
    assert check(tmp_path)["passed"]
    (path,) = tmp_path.glob("*.npz")
    recorded = check_reference.load(path)
    for name, shift in (("fixed_score", 1e-7), ("fixed_score", 1e-4), ("control_mean", 0.1)):
        np.savez(path, **{**recorded, name: recorded[name] + shift})
        assert check(tmp_path)["passed"] is (shift == 1e-7)


def test_alignment_without_noise_is_of_the_images_size(tmp_path: Path) -> None:
    record_alignment(tmp_path, 4, 16)
    path, images = tmp_path / "alignment_w4.npz", tmp_path / "images.npz"
    np.savez(path, **drop("fixed")(check_reference.load(path)))
    np.savez(images, images=np.zeros((1, 16, 16, 3)))
    assert check(tmp_path)["passed"]
    np.savez(images, images=np.zeros((1, 5, 5, 3)))
    assert not check(tmp_path)["passed"]
    for damage in (lambda: images.write_bytes(b"no archive"), images.unlink):
        damage()
        (row,) = check_reference.run(tmp_path, quiet)
        assert row["problem"] is not None


@pytest.mark.parametrize("name", ["normal_W3", "align_W0", "control_shuffled_W6", "fixed_noise2", "score_std"])
def test_an_alignment_file_without_what_its_scores_are_of_is_refused(name: str, tmp_path: Path) -> None:
    record_alignment(tmp_path, 3, 8)
    path = tmp_path / "alignment_w3.npz"
    np.savez(path, **drop(name)(check_reference.load(path)))
    (row,) = check_reference.run(tmp_path, quiet)
    assert f"expected {name}" in row["problem"]
