"""How the recorded files are read, and the check of their alignment cases: for check_reference.py."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alignscale.analysis.alignment import Map, exact, moments

STRIDES = {"conv3": [1, 2, 2], "conv7": [1, 1, 1, 2, 1, 2, 1], "imagenet_conv7": [4, 2, 1, 2, 1, 2, 1]}
TRAINED = {"score": "normal", "control": "control_shuffled"}
"""The weights that each kind of score is of."""
Arrays = dict[str, np.ndarray]


class CaseError(ValueError):
    """A case that cannot be run; the message says what was expected and found."""


def tensor(array: np.ndarray) -> Tensor:
    """An array of any kind of number, in float64."""
    return torch.from_numpy(array.astype(np.float64))


def read(name: str, array: np.ndarray) -> Tensor:
    """A parameter in the layout of ours. Convolutions are HWIO, recurrent weights (in, out) or a vector."""
    values = tensor(array)
    if re.fullmatch(r"W(lin)?\d+", name):
        weight = values.permute(3, 2, 0, 1).contiguous()
        return weight[:, :, 0, 0] if weight.shape[2:] == (1, 1) else weight
    if name == "W_hh":
        return values.T
    return values.reshape({"W_ih": (-1, 1), "W_ho": (1, -1)}.get(name, values.shape))


def load(path: Path) -> Arrays:
    """All arrays of an .npz file; pickles are refused."""
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def check_alignment(entry: dict[str, Any], arrays: Arrays, folder: Path) -> float:
    """The largest error of an alignment case in units of what is allowed: 1e-5, or 5 standard errors of the mean.

    Every score that the file holds is compared; raises CaseError where it lacks what that takes. Where it stores no
    noise, the maps have the size of the folder's images.npz.
    """
    name = re.split(r"[:\s,]", entry["net"])[0]
    if name not in STRIDES:
        raise CaseError(f"net {entry['net']!r}: expected one of {', '.join(STRIDES)}")
    kinds = [kind for kind in TRAINED if {f"{kind}_mean", f"fixed_{kind}"} & arrays.keys()]
    if not kinds:
        raise CaseError("expected score_mean or fixed_score, found neither")
    errors = []
    bottom = arrays["fixed_noise0"] if "fixed_noise0" in arrays else load(folder / "images.npz")["images"]
    size: tuple[int, int] = bottom.shape[1:3]
    for layer, stride in enumerate(STRIDES[name]):
        at = Map.same(size, stride)
        size = at.outputs
        start = weight(arrays, f"init_W{layer}")
        target = weight(arrays, f"align_W{layer}") - start
        for kind in kinds:
            change = weight(arrays, f"{TRAINED[kind]}_W{layer}") - start
            if f"{kind}_mean" in arrays:
                error = exact(change, target, at).value - arrays[f"{kind}_mean"][layer]
                errors.append(abs(error) / (5 * standard_error(arrays, kind, layer)))
            if f"fixed_{kind}" in arrays:
                noise = tensor(needed(arrays, f"fixed_noise{layer}")).permute(0, 3, 1, 2)
                both, first, second = moments(change, target, noise, at).sum(0).tolist()
                errors.append(abs(both / (first * second) ** 0.5 - arrays[f"fixed_{kind}"][layer]) / 1e-5)
    if not np.isfinite(errors).all():
        raise CaseError("a score, of ours or of the file, is not a finite number")
    return float(max(errors))


def needed(arrays: Arrays, name: str) -> np.ndarray:
    """An array of the file. Raises CaseError where it has none of that name."""
    if name not in arrays:
        raise CaseError(f"expected {name} in the file, found none")
    return arrays[name]


def weight(arrays: Arrays, name: str) -> Tensor:
    """A convolution's weights in our layout, by their name in the file."""
    return read(name.rpartition("_")[2], needed(arrays, name))


def standard_error(arrays: Arrays, kind: str, layer: int) -> float:
    """Of the mean over the recorded Monte-Carlo runs, ten where the file does not hold them; at least rounding's."""
    runs = arrays.get(f"{kind}_runs", np.empty((10, 0)))
    spread = float(needed(arrays, f"{kind}_std_between_runs")[layer])
    return max(spread / len(runs) ** 0.5, 1e-7)
