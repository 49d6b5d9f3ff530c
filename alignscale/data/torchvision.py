"""torchvision's data sets module, imported where it can be.

It stands alone because torchvision from PyPI is built for CUDA, and beside a CPU-only torch its import stops at two
compiled operators that nothing here calls.
"""

import sys
from importlib import import_module
from types import ModuleType

import torch


def datasets() -> ModuleType:
    """``torchvision.datasets``."""
    try:
        return import_module("torchvision").datasets  # slow to import, and only its data sets need it
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # the half that was imported
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return import_module("torchvision").datasets


def transforms() -> ModuleType:
    """``torchvision.transforms.v2``."""
    datasets()
    return import_module("torchvision.transforms.v2")  # slow to import, and only who names a transform needs it
