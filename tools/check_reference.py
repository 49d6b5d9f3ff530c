"""Check alignscale against trajectories recorded from the paper's public TensorFlow code.

Runs every training case of DIR/index.json in float64 from its stored initial weights, feedback and batches, prints one
line a case with the largest absolute error over the losses, logits and weights that the file holds, and exits 1 if one
exceeds 1e-9 (SGD) or 1e-6 (Adam; rnn_align_ada, whose public code has a read-after-update race) or could not be run.
Hidden biases before a norm have an exactly zero gradient and are left out.
"""

import argparse
import json
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tensorflow_adam import TensorFlowAdam

from alignscale.config import ConvConfig, RNNConfig
from alignscale.frozen import Fixed, Frozen
from alignscale.nets import Network, build
from alignscale.rules import RULES, make_rule
from alignscale.types import Batch

STRIDES = {"conv3": [1, 2, 2], "conv7": [1, 1, 1, 2, 1, 2, 1], "imagenet_conv7": [4, 2, 1, 2, 1, 2, 1]}
RNN_NAMES = ("W_ih", "W_hh", "W_ho", "init_state")
Arrays = dict[str, np.ndarray]
UNRUNNABLE = (ValueError, LookupError, TypeError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What a file or an entry that is not as expected raises, in our code or in numpy's."""


class CaseError(ValueError):
    """A case that cannot be run; the message says what was expected and found."""


def conv_weight(array: np.ndarray) -> Tensor:
    """TensorFlow's HWIO -> OIHW; the 1x1 readout -> (classes, width)."""
    weight = torch.from_numpy(array.astype(np.float64)).permute(3, 2, 0, 1)
    return (weight[:, :, 0, 0] if weight.shape[2:] == (1, 1) else weight).contiguous()


def conv_names(arrays: Arrays) -> list[str]:
    """The names of the weights, from the bottom up."""
    count = sum(bool(re.fullmatch(r"init_W\d+", key)) for key in arrays)
    return [f"W{index}" for index in range(count)]


def parameterisation(entry: dict[str, Any], weight: Tensor) -> str:
    """``standard`` if the entry says so, or if the weights have the deviation 1 / sqrt(fan_in) rather than 1."""
    if "standard" in entry.get("optimizer", ""):
        return "standard"
    fan_in = weight[0].numel()
    rms = weight.square().mean().sqrt().item()
    return "standard" if fan_in > 4 and rms < fan_in**-0.25 else "ntk"


def feedback_weight(array: np.ndarray, standard: bool) -> Tensor:
    """The feedback of one layer. Under the standard parameterisation nothing else divides it by sqrt(fan_in)."""
    weight = conv_weight(array)
    fan_in = weight[0].numel()
    drawn_at_one = weight.square().mean().sqrt().item() > fan_in**-0.25
    return weight / fan_in**0.5 if standard and drawn_at_one else weight


def conv_case(entry: dict[str, Any], arrays: Arrays, images: Arrays | None) -> tuple[Network, Fixed, list[Batch]]:
    """The network with its initial weights, what is fixed, and the batches."""
    name = re.split(r"[:\s,]", entry["net"])[0]
    strides = re.search(r"strides ([\d,]+)", entry["net"])
    if strides is None and name not in STRIDES:
        raise CaseError(f"net {entry['net']!r}: expected strides, or one of {', '.join(STRIDES)}, or an rnn")
    steps = [int(stride) for stride in strides[1].strip(",").split(",")] if strides else STRIDES[name]
    weights = [conv_weight(arrays[f"init_{name}"]) for name in conv_names(arrays)]
    if len(weights) != len(steps) + 1:
        raise CaseError(f"{len(steps)} strides want {len(steps) + 1} weights, found {len(weights)}")
    batches = list(conv_batches(arrays, images))
    kind = parameterisation(entry, weights[1])
    config = ConvConfig(
        name=name, width=len(weights[0]), strides=steps, norm="batch", blocks="public", parameterisation=kind
    )
    net = build(config, tuple(batches[0].images.shape[1:]), len(weights[-1])).double()
    with torch.no_grad():
        for index, (layer, weight) in enumerate(zip(net.layers, weights, strict=True)):
            layer.weight.copy_(weight)
            assert layer.bias is not None
            layer.bias.copy_(torch.from_numpy(arrays[f"init_b{index}"]))
    feedback = {
        index: feedback_weight(arrays[f"feedback_Wlin{index}"], kind == "standard")
        for index in range(len(weights))
        if f"feedback_Wlin{index}" in arrays
    }
    direct = {
        index: torch.from_numpy(arrays[f"feedback_B{index}"]).double().permute(2, 0, 1, 3)
        for index in range(len(steps))
        if f"feedback_B{index}" in arrays
    }
    return net, fixed_from(net, feedback, direct), batches


def conv_batches(arrays: Arrays, images: Arrays | None) -> Iterable[Batch]:
    """The stored batches, NHWC -> NCHW."""
    if "batch_x" in arrays:
        pairs: Iterable[tuple[np.ndarray, np.ndarray]] = zip(
            arrays["batch_x"].astype(np.float64), arrays["batch_y"].astype(np.float64), strict=True
        )
    elif "batch_idx" in arrays:
        if images is None:
            raise CaseError("batch_idx: expected images.npz beside the case, found none")
        pixels, labels = images["images"], images["labels"]
        classes = len(arrays["logits"][0, 0])
        pairs = (
            (pixels[index] / 256.0, np.eye(classes)[labels[index]] - 0.1) for index in arrays["batch_idx"].astype(int)
        )
    else:
        raise CaseError("expected batch_x and batch_y, or batch_idx, found neither")
    for step, (x, y) in enumerate(pairs):
        yield Batch(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y), [], len(x), step)


def rnn_case(entry: dict[str, Any], arrays: Arrays) -> tuple[Network, Fixed, list[Batch]]:
    """As ``conv_case``; every sequence has one feature and one output."""
    x, y = arrays["batch_x"].astype(np.float64)[..., None], arrays["batch_y"].astype(np.float64)[..., None]
    units = len(arrays["init_W_hh"])
    config = RNNConfig(width=units, gain=1.0, readout="every", initial_state="trained", blocks="public")
    net = build(config, (x.shape[2], 1), 1, x.shape[1]).double()
    with torch.no_grad():
        for layer, name in zip(net.layers, RNN_NAMES, strict=True):
            layer.weight.copy_(rnn_weight(name, arrays[f"init_{name}"]))
        for layer, name in ((net.layers[0], "b_h"), (net.layers[2], "b_o")):
            assert layer.bias is not None
            layer.bias.copy_(torch.from_numpy(arrays[f"init_{name}"]))
    batches = [
        Batch(torch.from_numpy(xs), torch.from_numpy(ys), [], len(xs), step)
        for step, (xs, ys) in enumerate(zip(x, y, strict=True))
    ]
    feedback = {
        index: rnn_weight(name, arrays[f"feedback_{name}"])
        for index, name in enumerate(RNN_NAMES)
        if f"feedback_{name}" in arrays
    }
    return net, fixed_from(net, feedback, {}), batches


def rnn_weight(name: str, array: np.ndarray) -> Tensor:
    """The public code multiplies rows by weights: (in, out) -> (out, in)."""
    weight = torch.from_numpy(array.astype(np.float64))
    return {"W_ih": lambda: weight[:, None], "W_hh": lambda: weight.T, "W_ho": lambda: weight[None]}.get(
        name, lambda: weight
    )()


def fixed_from(net: Network, feedback: dict[int, Tensor], direct: dict[int, Tensor]) -> Fixed:
    """The stored initial network and feedback."""

    def magnitude(index: int, draw: int) -> Tensor:
        raise CaseError("expected a rule whose random numbers are stored, found one with random magnitudes")

    return Fixed(Frozen.copy_of(net), feedback.__getitem__, direct.__getitem__, magnitude)


def check(entry: dict[str, Any], arrays: Arrays, images: Arrays | None) -> float:
    """The largest absolute error of one case. Raises CaseError, KeyError or ConfigError if it cannot be run."""
    recurrent = "rnn" in entry["net"]
    net, fixed, batches = rnn_case(entry, arrays) if recurrent else conv_case(entry, arrays, images)
    rule = make_rule(net, fixed, RULES[entry["rule"]].options(name=entry["rule"]))
    optimizer = entry.get("optimizer", "sgd").split(",")[0]
    if optimizer not in ("sgd", "adam"):
        raise CaseError(f"optimizer {optimizer!r}: expected sgd or adam")
    lr = entry["lr"]
    step = (
        TensorFlowAdam(net.parameters(), lr).step if optimizer == "adam" else torch.optim.SGD(net.parameters(), lr).step
    )
    compare = compare_rnn if recurrent else compare_conv
    stored = {int(m[1]) for key in arrays if (m := re.match(r"step(\d+)_", key))}
    errors = [0.0]
    for number, batch in enumerate(batches, 1):
        output = rule(batch)
        errors.append(abs(output.loss.item() - arrays["loss"][number - 1]))
        if "logits" in arrays:
            errors.append(distance(output.logits, arrays["logits"][number - 1]))
        net.zero_grad()
        output.surrogate.backward()
        step()
        if number in stored:
            errors += compare(net, arrays, f"step{number}_")
        key = f"logits_last_batch_after_step{number}"
        if key in arrays:
            errors.append(distance(net(batch.images), arrays[key]))
    return float(np.max(errors))  # np.max keeps a NaN


def compare_conv(net: Network, arrays: Arrays, prefix: str) -> list[float]:
    """Errors of every weight and of the readout's bias."""
    names = conv_names(arrays)
    errors = [
        distance(layer.weight, conv_weight(arrays[prefix + n]).numpy())
        for layer, n in zip(net.layers, names, strict=True)
    ]
    bias = net.layers[-1].bias
    assert bias is not None
    return [*errors, distance(bias, arrays[f"{prefix}b{len(names) - 1}"])]


def compare_rnn(net: Network, arrays: Arrays, prefix: str) -> list[float]:
    """Errors of every weight and bias."""
    errors = [
        distance(layer.weight, rnn_weight(n, arrays[prefix + n]).numpy())
        for layer, n in zip(net.layers, RNN_NAMES, strict=True)
    ]
    for layer, name in ((net.layers[0], "b_h"), (net.layers[2], "b_o")):
        assert layer.bias is not None
        errors.append(distance(layer.bias, arrays[prefix + name]))
    return errors


def distance(ours: Tensor, theirs: np.ndarray) -> float:
    """The largest absolute difference; raises CaseError where the shapes differ."""
    if tuple(ours.shape) != theirs.shape and ours.numel() != theirs.size:
        raise CaseError(f"expected shape {tuple(ours.shape)}, found {theirs.shape}")
    return float(np.abs(ours.detach().numpy().reshape(theirs.shape) - theirs).max())


def tolerance(entry: dict[str, Any]) -> float:
    """1e-9, or 1e-6 for Adam and for the recurrent align_ada."""
    loose = entry.get("optimizer", "sgd").startswith("adam") or ("rnn" in entry["net"] and entry["rule"] == "align_ada")
    return 1e-6 if loose else 1e-9


def load(path: Path) -> Arrays:
    """All arrays of an .npz file; pickles are refused."""
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def run(folder: Path, show: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Check every training case of a folder; one row a case."""
    index = json.loads((folder / "index.json").read_text())
    images = load(folder / "images.npz") if (folder / "images.npz").exists() else None
    rows = []
    for name, entry in index.items():
        if "rule" not in entry:
            continue
        row: dict[str, Any] = {"case": name, "tolerance": tolerance(entry), "error": None, "problem": None}
        try:
            row["error"] = check(entry, load(folder / f"{name}.npz"), images)
        except UNRUNNABLE as problem:
            row["problem"] = f"{type(problem).__name__}: {problem}"
        row["passed"] = row["error"] is not None and row["error"] <= row["tolerance"]
        rows.append(row)
        found = f"error {row['error']:.1e}" if row["problem"] is None else f"could not be run: {row['problem']}"
        show(f"{'ok  ' if row['passed'] else 'FAIL'} {name:45s} {found} (tolerance {row['tolerance']:.0e})")
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds index.json and one .npz file per case")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    try:
        rows = run(arguments.folder)
    except (OSError, ValueError) as problem:
        print(
            f"{arguments.folder}: expected a folder with index.json (see tests/data/reference): {problem}",
            file=sys.stderr,
        )
        return 1
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    failed = sum(not row["passed"] for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} cases within tolerance")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
