"""What a run says while it runs: metrics.jsonl, TensorBoard events and a progress bar, from one call a step."""

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from alignscale.choices import ConfigError
from alignscale.config import LogConfig
from alignscale.files import write_atomic
from alignscale.results import finite

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Metrics(ExitStack):
    """Rows go to ``folder/metrics.jsonl``, one JSON object a line, and their numbers to TensorBoard and perhaps W&B."""

    def __init__(
        self, folder: Path, config: LogConfig, name: str, first: int, steps: int,
        counts: Sequence[float] = (0, 0, 0.0), options: dict[str, Any] | None = None, quiet: bool = False,
        measured: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """first: update to go on from; rows that a killed run wrote after it are dropped. counts: as they were there.

        options: shown by W&B. quiet: count, but show and write nothing, as all ranks but the first do.
        measured: the steps of evaluations that are not made again.
        """
        super().__init__()
        self.every, self.quiet, self.note = config.every_steps, quiet, ""
        self.counts = tuple(counts)
        """Examples since the last row, how many of them were right, seconds: for a run that goes on from here."""
        if quiet:
            return
        path = folder / "metrics.jsonl"
        write_atomic(path, _rows(path, first, measured).encode() if first else b"")
        self.wandb: Any = _wandb(config, folder, name, first, options) if config.wandb else None
        if self.wandb:
            self.push(self._end)
        self.file = path.open("a", buffering=1)
        self.push(partial(_close, self.file))
        self.events = self.enter_context(_Events(folder / "tensorboard", first)) if config.tensorboard else None
        self.bar = tqdm(total=steps, initial=first, dynamic_ncols=True, bar_format=BAR, disable=not config.progress)
        self.callback(self._draw, self.bar.close)

    def _draw(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BrokenPipeError:  # tee, say, died of the same Ctrl-C: no reason to lose the run
            self.bar.disable = True

    def _end(self, kind: object, *_: object) -> None:
        self.wandb.finish(exit_code=0 if kind is None else 1)

    def step(self, step: int, loss: float, right: float, examples: int, seconds: float, lr: float) -> None:
        """After update ``step``: advance the bar, and write a row when one is due.

        right: of this batch's examples. seconds: of the step with the data it waited for.
        """
        if not self.quiet:
            self._draw(self.bar.update)
        total, hits, took = (a + b for a, b in zip(self.counts, (examples, right, seconds), strict=True))
        self.counts = (total, hits, took)
        if step % self.every == 0:
            accuracy, rate = hits / total, total / took
            if not self.quiet:
                words = f"loss {loss:.4f}, accuracy {accuracy:.1%}, {rate:.0f} examples/s{self.note}"
                self.bar.set_postfix_str(words, refresh=False)
            self.row("train", step, {"loss": loss, "accuracy": accuracy, "lr": lr, "examples_per_second": rate})
            self.counts = (0, 0, 0.0)

    def align(self, step: int, values: dict[str, float | None]) -> None:
        """Write a row of the alignment score and what belongs to it; the bar shows the score from now on."""
        score = values.get("alignment")
        self.note = "" if score is None else f", alignment {score:.3f}"
        self.row("alignment", step, values)

    def row(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write one row; a number that is not finite is null in JSON, and absent elsewhere."""
        if self.quiet:
            return
        values = {key: finite(value) for key, value in values.items()}
        try:
            self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        except OSError as problem:
            problem.filename = self.file.name
            raise
        numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
        if self.events:
            tagged = [Summary.Value(tag=key, simple_value=value) for key, value in numbers.items()]
            self.events.write(step, summary=Summary(value=tagged))
        if self.wandb:
            self.wandb.log(numbers, step=step)


def _close(file: IO[Any], kind: object, *_: object) -> None:
    """Close the file at the end of a stack; what it cannot write then is no news where an error ends it."""
    try:
        file.close()
    except OSError:
        if kind is None:
            raise


class _Events(ExitStack):
    """A file of TensorBoard's, written at once: its own writer has a thread, in which errors are lost."""

    def __init__(self, folder: Path, first: int) -> None:
        super().__init__()
        folder.mkdir(exist_ok=True)
        path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = path.open("wb")
        self.push(partial(_close, self.file))
        self.records = RecordWriter(self.file)
        self.write(0, file_version="brain.Event:2")
        # makes TensorBoard forget what a killed run wrote after its last checkpoint
        self.write(first + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, **what: Any) -> None:
        try:
            self.records.write(Event(wall_time=time.time(), step=step, **what).SerializeToString())
            self.file.flush()
        except OSError as problem:
            problem.filename = self.file.name
            raise


def _wandb(config: LogConfig, folder: Path, name: str, first: int, options: Any) -> Any:
    """A run of W&B's with this run's name, which goes on when this run does and starts anew when it does."""
    import wandb  # an extra, and slow to import

    path = folder / "wandb.id"
    if first == 0 or not path.exists():
        write_atomic(path, secrets.token_hex(4).encode())
    settings = wandb.Settings(silent=not config.progress)
    project, identity = config.wandb_project, path.read_text()
    try:
        return wandb.init(
            project=project, name=name, id=identity, dir=folder, config=options, resume="allow", settings=settings
        )
    except wandb.Error as problem:
        found = " ".join(str(problem).split())
        raise ConfigError(
            f"log.wandb=true: expected a login, found: {found}; WANDB_MODE=offline needs none"
        ) from problem


def _rows(path: Path, last: int, measured: Sequence[int]) -> str:
    """Lines that are rows up to step ``last``, but of evaluations to come; a killed run may have left half of one."""
    kept = []
    for line in path.read_text(errors="replace").split("\n") if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        known = isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= last
        if known and (row.get("kind") != "epoch" or row["step"] in measured):
            kept.append(line + "\n")
    return "".join(kept)
