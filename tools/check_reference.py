"""Check alignscale against trajectories recorded from the paper's public TensorFlow code.

Runs every training case of DIR/index.json in float64 from its stored initial weights, feedback and batches, prints one
line a case with the largest absolute error over the losses, logits and weights that the file holds, and exits 1 if one
exceeds 1e-9 (SGD) or 1e-6 (Adam; rnn_align_ada, whose public code has a read-after-update race) or could not be run.
Hidden biases before a norm have an exactly zero gradient and are left out.

Of an alignment case, the stored noise must give the stored score to 1e-5, and the exact score must lie within 5
standard errors of the mean of the Monte-Carlo runs; so must the controls'.
"""

import argparse
import json
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from argument_types import ended, new_file, write_json
from reference_alignment import STRIDES, Arrays, CaseError, check_alignment, load, read, tensor
from tensorflow_adam import TensorFlowAdam

from alignscale.choices import ConvConfig, RNNConfig
from alignscale.frozen import Fixed, Frozen
from alignscale.nets import Network, build
from alignscale.rules import RULES, make_rule
from alignscale.types import Batch

Named = dict[str, Tensor]
"""Parameters by their names in a file."""
UNRUNNABLE = (ValueError, LookupError, TypeError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What a file or an entry that is not as expected raises, in our code or in numpy's."""


@dataclass
class Case:
    """A network with its initial weights, what is fixed, the batches, and the parameters that a file holds."""

    net: Network
    fixed: Fixed
    batches: list[Batch]
    named: Named


def conv_weights(arrays: Arrays) -> list[Tensor]:
    """The initial weights, from the bottom up."""
    count = sum(bool(re.fullmatch(r"init_W\d+", key)) for key in arrays)
    return [read(f"W{index}", arrays[f"init_W{index}"]) for index in range(count)]


def parameterisation(entry: dict[str, Any], weights: list[Tensor]) -> str:
    """``standard`` or ``ntk``: as the entry says, else by the weights."""
    said = re.findall(r"\b(standard|ntk)\b", json.dumps(entry).lower())
    return said[0] if said else "ntk" if drawn_at_one(weights) else "standard"


def drawn_at_one(weights: list[Tensor]) -> bool:
    """Whether weights were drawn with deviation 1 rather than 1 / sqrt(fan_in), by the one where these differ most."""
    largest = max(weights, key=lambda weight: weight[0].numel())
    fan_in = largest[0].numel()
    return fan_in <= 4 or largest.square().mean().sqrt().item() > fan_in**-0.25  # too few numbers to tell below that


def conv_case(entry: dict[str, Any], arrays: Arrays, folder: Path) -> Case:
    """A convolutional network with batch norm."""
    name = re.split(r"[:\s,]", entry["net"])[0]
    strides = re.search(r"strides?\W*(\d[\d, ]*)", entry["net"])
    if strides is None and name not in STRIDES:
        raise CaseError(f"net {entry['net']!r}: expected strides, or one of {', '.join(STRIDES)}, or an rnn")
    steps = [int(stride) for stride in re.findall(r"\d+", strides[1])] if strides else STRIDES[name]
    weights = conv_weights(arrays)
    if len(weights) != len(steps) + 1:
        raise CaseError(f"{len(steps)} strides want {len(steps) + 1} weights, found {len(weights)}")
    batches = list(conv_batches(arrays, folder, len(weights[-1])))
    kind = parameterisation(entry, weights)
    config = ConvConfig(
        name=name, width=len(weights[0]), strides=steps, norm="batch", blocks="public", parameterisation=kind
    )
    net = build(config, tuple(batches[0].images.shape[1:]), len(weights[-1])).double()
    named: Named = {}
    for index, layer in enumerate(net.layers):
        assert layer.bias is not None
        named |= {f"W{index}": layer.weight, f"b{index}": layer.bias}
    fixed = fixed_from(net, named, arrays, [f"Wlin{index}" for index in range(len(weights))], kind)
    for index in range(len(steps)):
        del named[f"b{index}"]  # a norm follows: no gradient but rounding
    return Case(net, fixed, batches, named)


def conv_batches(arrays: Arrays, folder: Path, classes: int) -> Iterable[Batch]:
    """The stored batches, NHWC -> NCHW."""
    if "batch_x" in arrays:
        pairs: Iterable[tuple[Tensor, Tensor]] = zip(tensor(arrays["batch_x"]), tensor(arrays["batch_y"]), strict=True)
    elif "batch_idx" in arrays:
        images = load(folder / "images.npz")
        pixels, one_hot = tensor(images["images"]) / 256, np.eye(classes)[images["labels"]]
        pairs = ((pixels[index], tensor(one_hot[index]) - 0.1) for index in arrays["batch_idx"].astype(int))
    else:
        raise CaseError("expected batch_x and batch_y, or batch_idx, found neither")
    for step, (x, y) in enumerate(pairs):
        yield Batch(x.permute(0, 3, 1, 2).contiguous(), y, [], len(x), step)


def rnn_case(entry: dict[str, Any], arrays: Arrays) -> Case:
    """A recurrent network; every sequence has one feature and one output."""
    x, y = tensor(arrays["batch_x"])[..., None], tensor(arrays["batch_y"])[..., None]
    names = ["W_ih", "W_hh", "W_ho", "init_state"]
    kind = parameterisation(entry, [read(name, arrays[f"init_{name}"]) for name in names[1:3]])
    config = RNNConfig(
        width=len(arrays["init_W_hh"]),
        gain=1.0,
        readout="every",
        initial_state="trained",
        blocks="public",
        parameterisation=kind,
    )
    net = build(config, (x.shape[2], 1), 1, x.shape[1]).double()
    named: Named = {name: layer.weight for name, layer in zip(names, net.layers, strict=True)}
    for name, layer in (("b_h", net.layers[0]), ("b_o", net.layers[2])):
        assert layer.bias is not None
        named[name] = layer.bias
    fixed = fixed_from(net, named, arrays, names[:3], kind)
    batches = [Batch(xs, ys, [], len(xs), step) for step, (xs, ys) in enumerate(zip(x, y, strict=True))]
    return Case(net, fixed, batches, named)


@torch.no_grad()
def fixed_from(net: Network, named: Named, arrays: Arrays, feedback_names: list[str], kind: str) -> Fixed:
    """Set the initial weights; the initial network and the feedback that the file holds."""
    for name, parameter in named.items():
        initial = read(name, arrays[f"init_{name}"])
        if initial.shape != parameter.shape:
            raise CaseError(f"init_{name}: expected {tuple(parameter.shape)}, found {tuple(initial.shape)}")
        parameter.copy_(initial)
    feedback = {
        index: read(name, arrays[f"feedback_{name}"])
        for index, name in enumerate(feedback_names)
        if f"feedback_{name}" in arrays
    }
    if kind == "standard" and feedback and drawn_at_one(list(feedback.values())):
        # Nothing else divides it by sqrt(fan_in).
        feedback = {index: weight / weight[0].numel() ** 0.5 for index, weight in feedback.items()}
    direct = {
        index: tensor(arrays[f"feedback_B{index}"]).permute(2, 0, 1, 3)
        for index in range(len(net.norms))
        if f"feedback_B{index}" in arrays
    }

    def stored(name: str, weights: dict[int, Tensor], index: int) -> Tensor:
        if index not in weights:
            raise CaseError(f"expected the feedback {name} of layer {index} in the file, found {sorted(weights)}")
        return weights[index]

    def magnitude(index: int, draw: int) -> Tensor:
        raise CaseError("expected a rule whose random numbers are stored, found one with random magnitudes")

    return Fixed(Frozen.copy_of(net), partial(stored, "W", feedback), partial(stored, "B", direct), magnitude)


def check(entry: dict[str, Any], arrays: Arrays, folder: Path) -> float:
    """The largest absolute error of one case. Raises CaseError or another of UNRUNNABLE if it cannot be run."""
    if entry["rule"] not in RULES:
        raise CaseError(f"rule {entry['rule']!r}: expected one of {', '.join(sorted(RULES))}")
    case = rnn_case(entry, arrays) if "rnn" in entry["net"] else conv_case(entry, arrays, folder)
    rule = make_rule(case.net, case.fixed, RULES[entry["rule"]].options(name=entry["rule"]))
    parameters, lr, kind = list(case.net.parameters()), float(entry["lr"]), optimizer(entry)
    if kind not in ("sgd", "adam"):
        raise CaseError(f"optimizer {entry['optimizer']!r}: expected sgd or adam")
    step = (TensorFlowAdam(parameters, lr) if kind == "adam" else torch.optim.SGD(parameters, lr)).step
    check_lengths(arrays, len(case.batches))
    errors = []
    for number, batch in enumerate(case.batches, 1):
        output = rule(batch)
        errors.append(distance(output.loss, arrays["loss"][number - 1]))
        if "logits" in arrays:
            errors.append(distance(output.logits, arrays["logits"][number - 1]))
        case.net.zero_grad()
        output.surrogate.backward()
        step()
        if any(key.startswith(f"step{number}_") for key in arrays):
            errors += [distance(p, read(n, arrays[f"step{number}_{n}"]).numpy()) for n, p in case.named.items()]
        last = f"logits_last_batch_after_step{number}"
        if last in arrays:
            errors.append(distance(case.net(batch.images), arrays[last]))
    if not np.isfinite(errors).all():
        raise CaseError("a loss, logit or weight, of ours or of the file, is not a finite number")
    return max(errors)


def check_lengths(arrays: Arrays, batches: int) -> None:
    """Raise CaseError if a file holds numbers that no batch would be compared with."""
    last = max((int(found[1]) for key in arrays if (found := re.search(r"step(\d+)", key))), default=0)
    if last > batches:
        raise CaseError(f"expected batches up to step {last}, found {batches}")
    for key in ("loss", "logits"):
        if key in arrays and len(arrays[key]) != batches:
            raise CaseError(f"expected {key} of each of {batches} batches, found {len(arrays[key])}")


def distance(ours: Tensor, theirs: np.ndarray) -> float:
    """The largest absolute difference; raises CaseError where the shapes differ."""
    if tuple(ours.shape) != theirs.shape and ours.numel() != theirs.size:
        raise CaseError(f"expected shape {tuple(ours.shape)}, found {theirs.shape}")
    return float(np.abs(ours.detach().numpy().reshape(theirs.shape) - theirs).max())


def optimizer(entry: dict[str, Any]) -> str:
    """The optimizer's name, without what the entry says besides."""
    return re.split(r"\W", str(entry.get("optimizer", "sgd")).lower())[0]


def tolerance(entry: dict[str, Any]) -> float:
    """1e-9, or 1e-6 for Adam and for the recurrent align_ada."""
    loose = optimizer(entry) == "adam" or ("rnn" in entry["net"] and entry["rule"] == "align_ada")
    return 1e-6 if loose else 1e-9


def run(folder: Path, show: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Check every case of a folder; one row a case."""
    index = json.loads((folder / "index.json").read_text())
    if not isinstance(index, dict):
        raise ValueError(f"index.json: expected an object of cases by name, found {type(index).__name__}")
    rows = []
    for name, entry in index.items():
        alignment = "rule" not in entry
        if alignment and "align" not in f"{name} {entry.get('what', '')}".lower():
            continue
        entry = {"net": "conv7" if alignment else name.partition("_")[0], **entry}
        allowed = 1.0 if alignment else tolerance(entry)
        row: dict[str, Any] = {"case": name, "tolerance": allowed, "error": None, "problem": None}
        try:
            arrays = load(folder / f"{name}.npz")
            row["error"] = check_alignment(entry, arrays, folder) if alignment else check(entry, arrays, folder)
        except UNRUNNABLE as problem:
            row["problem"] = f"{type(problem).__name__}: {problem}"
        row["passed"] = row["error"] is not None and row["error"] <= row["tolerance"]
        rows.append(row)
        unit = " of what is allowed" if alignment else ""
        found = f"error {row['error']:.1e}{unit}" if row["problem"] is None else f"could not be run: {row['problem']}"
        show(f"{'ok  ' if row['passed'] else 'FAIL'} {name:45s} {found} (tolerance {row['tolerance']:.0e})")
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds index.json and one .npz file per case")
    parser.add_argument("--json", type=new_file, help="write the rows to this file")
    arguments = parser.parse_args()
    try:
        rows = run(arguments.folder)
    except (OSError, ValueError) as problem:
        print(
            f"{arguments.folder}: expected a folder with index.json (see tests/data/reference): {problem}",
            file=sys.stderr,
        )
        return 1
    write_json(arguments.json, rows)
    failed = sum(not row["passed"] for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} cases within tolerance")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    ended(main)
