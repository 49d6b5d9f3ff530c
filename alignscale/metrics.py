"""What a run says while it runs: metrics.jsonl, TensorBoard events and a progress bar, from one call a step."""

import json
import math
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tqdm import tqdm

from alignscale.config import LogConfig
from alignscale.files import write_atomic


class Metrics:
    """Rows go to ``folder/metrics.jsonl``, one JSON object a line, and their numbers to TensorBoard."""

    def __init__(self, folder: Path, config: LogConfig, name: str, first: int, steps: int) -> None:
        """first: update to go on from; rows that a killed run wrote at or after it are dropped."""
        path = folder / "metrics.jsonl"
        kept = [line for line in _rows(path) if json.loads(line)["step"] <= first] if first else []
        write_atomic(path, "".join(line + "\n" for line in kept).encode())
        self.every = config.every_steps
        self.file = path.open("a", buffering=1)
        self.events = EventFileWriter(str(folder / "tensorboard")) if config.tensorboard else None
        if self.events:  # makes TensorBoard forget what a killed run wrote after its last checkpoint
            self.events.add_event(Event(step=first + 1, session_log=SessionLog(status=SessionLog.START)))
        self.bar = tqdm(
            total=steps,
            initial=first,
            desc=name,
            unit="step",
            dynamic_ncols=True,
            disable=not config.progress,
            file=sys.stderr,
        )

    def __enter__(self) -> "Metrics":
        """The metrics, to be closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files and the bar."""
        self.bar.close()
        self.file.close()
        if self.events:
            self.events.close()

    def step(self, step: int, loss: float, examples: int, seconds: float) -> None:
        """After update ``step``: advance the bar, and write a row when one is due."""
        self.bar.update()
        if step % self.every == 0:
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self.row("train", step, {"loss": loss, "examples_per_second": examples / seconds})

    def row(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write one row; a number that is not finite is null in JSON, and absent from TensorBoard."""
        values = {key: finite(value) for key, value in values.items()}
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self.events:
            numbers = [
                Summary.Value(tag=f"{kind}/{k}", simple_value=v)
                for k, v in values.items()
                if isinstance(v, int | float)
            ]
            self.events.add_event(Event(step=step, summary=Summary(value=numbers)))


def finite(value: Any) -> Any:
    """The value, or None for a float that is NaN or infinite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows(path: Path) -> list[str]:
    """The lines that are rows: a killed run may have left half of one."""
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return [line for line in lines if _is_row(line)]


def _is_row(line: str) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and isinstance(row.get("step"), int)
