"""``train(config)``: the loop. It knows data, rule and engine by their interfaces alone, and never which rule runs."""

import math
import time
from collections.abc import Callable

from alignscale.analysis.updates import mean_cosine, weight_updates
from alignscale.config import TrainConfig
from alignscale.data.examples import stream
from alignscale.evaluate import evaluate
from alignscale.metrics import Metrics
from alignscale.results import Result
from alignscale.rules import Rule
from alignscale.rules.backprop import Backprop
from alignscale.run import Run, prepare


def train(config: TrainConfig, show: Callable[[str], None] = print, command: str = "alignscale.train.train") -> Result:
    """Train as ``config`` says and return the run's result, also found in its folder as result.json.

    show: is given each line for the user. command: shown in the report. Raises ConfigError before any work for a wrong
    option, CheckpointError for a checkpoint that cannot be used, Diverged when the loss is not finite.
    """
    run = prepare(config, show, command)
    if run.finished is not None:
        return run.finished
    per_epoch, stop = run.plan.steps_per_epoch, run.plan.steps_per_epoch * config.epochs
    timings: list[float] = []
    epoch_loss = 0.0
    with Metrics(run.folder, config.log, run.name, run.start, stop) as metrics:
        if run.start == 0:
            measure(run, metrics, 0, None)
        for batch in stream(run.train, run.plan, run.encoding, run.start, stop):
            begin = time.perf_counter()
            output = run.engine(batch)
            run.engine.backward(output.surrogate)
            run.engine.step()
            loss = output.loss.item()
            timings.append(time.perf_counter() - begin)
            done = batch.step + 1
            metrics.step(done, loss, batch.size, timings[-1])
            epoch_loss += loss * batch.size / len(run.train)
            if not math.isfinite(loss):
                run.diverge(done, timings, "loss")
            if done % per_epoch == 0:
                epoch = done // per_epoch
                due = epoch % config.evaluation.every_epochs == 0 or done == stop
                if due and not measure(run, metrics, done, epoch_loss):
                    run.diverge(done, timings, "test loss")
                if epoch % config.checkpoint.every_epochs == 0 or done == stop:
                    run.save(done, timings)
                epoch_loss = 0.0
    return run.finish(stop, timings)


def measure(run: Run, metrics: Metrics, step: int, train_loss: float | None) -> bool:
    """Evaluate on the test set and add a point to the run's curve. Returns whether the test loss is finite."""
    test = evaluate(run.net, run.test, run.encoding, run.config.evaluation.batch_size)
    point = {"train_loss": train_loss, "test_accuracy": test["accuracy"], "test_loss": test["loss"]}
    point["update_cosine"] = update_cosine(run, step) if run.config.log.update_cosine else None
    epoch = step // run.plan.steps_per_epoch
    run.curve.append({"epoch": epoch, "step": step, **point})
    metrics.row("epoch", step, {"epoch": epoch, **point})
    return math.isfinite(test["loss"])


def update_cosine(run: Run, step: int) -> float | None:
    """Cosine of the rule's update with backprop's, mean over layers, on the first training examples in key order."""
    rule: Rule = run.engine.rule
    if isinstance(rule, Backprop):
        return 1.0
    batch = run.encoding.batch(run.train, run.first_rows, step)
    backprop = Backprop(run.net, rule.fixed, rule.config)
    value = mean_cosine(weight_updates(rule, run.net, batch), weight_updates(backprop, run.net, batch))
    return value if math.isfinite(value) else None
