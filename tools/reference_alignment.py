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


def check_alignment(entry: dict[str, Any], arrays: Arrays) -> float:
    """The largest error of an alignment case in units of what is allowed: 1e-5, or 5 standard errors of the mean."""
    name = re.split(r"[:\s,]", entry["net"])[0]
    if name not in STRIDES:
        raise CaseError(f"net {entry['net']!r}: expected one of {', '.join(STRIDES)}")
    if "score_mean" not in arrays and "fixed_score" not in arrays:
        raise CaseError("expected score_mean or fixed_score, found neither")
    errors = []
    size: tuple[int, int] = arrays["fixed_noise0"].shape[1:3] if "fixed_noise0" in arrays else (16, 16)
    for layer, stride in enumerate(STRIDES[name]):
        at = Map.same(size, stride)
        size = at.outputs
        start = read(f"W{layer}", arrays[f"init_W{layer}"])
        target = read(f"W{layer}", arrays[f"align_W{layer}"]) - start
        for what, trained in (("score", f"normal_W{layer}"), ("control", f"control_shuffled_W{layer}")):
            if trained not in arrays:
                continue
            change = read(f"W{layer}", arrays[trained]) - start
            if f"{what}_mean" in arrays:
                allowed = 5 * arrays[f"{what}_std_between_runs"][layer] / len(arrays[f"{what}_runs"]) ** 0.5
                errors.append(abs(exact(change, target, at).value - arrays[f"{what}_mean"][layer]) / allowed)
            if f"fixed_{what}" in arrays:
                noise = tensor(arrays[f"fixed_noise{layer}"]).permute(0, 3, 1, 2)
                both, first, second = moments(change, target, noise, at)
                errors.append(abs(both / (first * second) ** 0.5 - arrays[f"fixed_{what}"][layer]) / 1e-5)
    if not np.isfinite(errors).all():
        raise CaseError("a score, of ours or of the file, is not a finite number")
    return float(max(errors))
