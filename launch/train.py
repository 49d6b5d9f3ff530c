"""Train one network with one rule: python launch/train.py rule=align_ada net=mlp net.width=1024 data=digits seed=1."""

from _hydra import FIRST, command_line, entry
from _report.series import summary
from _runs import train_and_report

from alignscale.config import TrainConfig


@entry("train", trains=True)
def main(config: TrainConfig) -> None:
    """Train, and end with a one-line result."""
    result = train_and_report(config, print, command_line("launch/train.py"))
    if FIRST:
        print(summary(result))


if __name__ == "__main__":
    main()
