"""Builds a cache of the initial network's Jacobian: what is missing of it, file by file, on all ranks.

It stands alone because a cache is made once, before training and with other resources, and must be whole or refused.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from alignscale.files import held
from alignscale.frozen import Frozen
from alignscale.jacobian.explicit import jacobians
from alignscale.jacobian.files import CacheError, Writer
from alignscale.jacobian.form import Form, Layout, Rows
from alignscale.jacobian.identity import file_of
from alignscale.parallel import Mesh
from alignscale.types import Batch

QUEUE = 2
"""Chunks that may wait to be written, while the next is computed."""

Source = Callable[[str, int], Iterator[tuple[Batch, Tensor, Tensor]]]
"""Shard and view -> its examples in batches in row order, with their rows and checksums (B,) int64."""


def build(
    folder: Path, missing: list[tuple[str, int, int]], frozen: Frozen, form: Form, layout: Layout, source: Source,
    mesh: Mesh, show: Callable[[str], None], seal: str,
) -> None:  # fmt: skip
    """Write the files of ``missing``, shard, view and number of examples of each; ``mesh.data`` divides them.

    seal: of the cache that they belong to.

    Raises CacheError where another builder is at work, OSError (a full disk, say) with no half file left.
    """
    ranks = mesh.data

    def own(turn: int) -> None:
        for shard, view, count in missing[turn + ranks.rank : turn + ranks.rank + 1]:
            path = folder / file_of(shard, view)
            show(f"caching {count} examples of {shard}, view {view}: {path}")
            parts = chunks(frozen, form, source(shard, view), mesh.everyone.still)
            try:
                write_file(path, layout, count, parts, {"cache": seal, "shard": shard, "view": str(view)})
            except Exception:
                for _ in parts if mesh.width.ranks.size > 1 else ():
                    pass  # the ranks that have the other units wait for these
                raise

    with _alone(folder, mesh):
        for turn in range(0, len(missing), ranks.size):
            mesh.everyone.together(functools.partial(own, turn))


def chunks(
    frozen: Frozen, form: Form, batches: Iterator[tuple[Batch, Tensor, Tensor]], alive: Callable[[], None]
) -> Iterator[Rows]:
    """What is kept of each batch, with its rows and checksums. alive: called for each."""
    explicit = [site for site, kind in enumerate(form.sites) if kind == "explicit"]
    for batch, rows, sums in batches:
        alive()
        trace = frozen.trace(batch.images)
        found = form.rows(frozen.net, trace, jacobians(frozen, trace, explicit))
        yield {"rows": rows, "sums": sums, **found}


def write_file(path: Path, layout: Layout, count: int, parts: Iterator[Rows], about: Mapping[str, str]) -> None:
    """One file of ``count`` examples; a thread writes a part while the next is computed. about: for its header."""
    whole = {"rows": (torch.int64, ()), "sums": (torch.int64, ()), **layout}
    writer = Writer(path, whole, count, about)
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting: list[Future[None]] = []
            for part in parts:
                waiting.append(pool.submit(writer.write, part))
                if len(waiting) > QUEUE:
                    waiting.pop(0).result()
            for one in waiting:
                one.result()
        writer.close()
    except BaseException:
        writer.discard()
        raise


@contextmanager
def _alone(folder: Path, mesh: Mesh) -> Iterator[None]:
    """Hold the folder against another builder, and clear away what a killed one left half written."""
    with ExitStack() as hold:

        def take() -> None:
            if not mesh.data.first:
                return
            try:
                hold.enter_context(held(folder))
            except BlockingIOError as problem:
                raise CacheError(
                    f"{folder}: expected no other builder, found {problem.strerror} at work; wait for it to end, then "
                    "give the same command, which makes what is still missing"
                ) from problem
            for partial in folder.glob(".*.partial"):
                partial.unlink()

        mesh.everyone.together(take)
        yield
