"""Bytes that torch.distributed's collectives move in this process, counted from outside of the program under test.

Imported before DeepSpeed, which keeps references to the functions. A size is that of the whole tensor, gathered or to
be scattered, on this rank; of gather and scatter, which move none here, this rank's part. A collective that is made of
another one is counted once.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

COUNTED: Counter[str] = Counter()
LOG: list[tuple[str, int, Any]] = []
"""Of each collective: its name, the bytes, and the process group, None for that of all ranks."""
WHOLE = {
    "all_gather": ("tensor_list",),
    "all_gather_into_tensor": ("output_tensor",),
    "all_gather_single": ("output_tensor", "output"),
    "all_reduce": ("tensor",),
    "all_reduce_coalesced": ("tensors",),
    "all_to_all": ("output_tensor_list",),
    "all_to_all_single": ("output",),
    "broadcast": ("tensor",),
    "gather": ("tensor",),
    "isend": ("tensor",),
    "reduce": ("tensor",),
    "reduce_scatter": ("input_list",),
    "reduce_scatter_single": ("input_tensor", "input"),
    "reduce_scatter_tensor": ("input",),
    "scatter": ("tensor",),
    "send": ("tensor",),
}
"""Of each collective, the argument that holds the whole tensor, under the names that versions of torch give it."""
_inside = False


def size(value: Any) -> int:
    """Bytes of a tensor or of a list of them."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(size(part) for part in value)


def counting(name: str, names: tuple[str, ...], collective: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(collective)

    @functools.wraps(collective)
    def counted(*arguments: Any, **options: Any) -> Any:
        global _inside
        if _inside:
            return collective(*arguments, **options)
        given = signature.bind(*arguments, **options).arguments
        moved = size(next(given[one] for one in names if one in given))
        COUNTED[name] += moved
        LOG.append((name, moved, given.get("group")))
        _inside = True
        try:
            return collective(*arguments, **options)
        finally:
            _inside = False

    return counted


for _name, _names in WHOLE.items():
    if hasattr(dist, _name):
        _counted = counting(_name, _names, getattr(dist, _name))
        setattr(dist, _name, _counted)
        setattr(distributed_c10d, _name, _counted)


def reset() -> None:
    COUNTED.clear()
    LOG.clear()


def within(group: Any) -> dict[str, tuple[int, int]]:
    """Messages and bytes in a process group since the reset: of all-gathers, reduce-scatters and sums."""
    found = dict.fromkeys(("all_gather", "reduce_scatter", "all_reduce"), (0, 0))
    for name, moved, where in LOG:
        kind = next((kind for kind in found if name.startswith(kind)), None)
        if kind and where is group:
            messages, total = found[kind]
            found[kind] = messages + 1, total + moved
    return found


def moved(kind: str) -> int:
    """Bytes of all collectives whose names begin with ``kind`` since the reset."""
    return sum(count for name, count in COUNTED.items() if name.startswith(kind))
