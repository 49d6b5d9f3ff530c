"""Train one network with one rule: python launch/train.py rule=align_ada net=mlp net.width=1024 data=digits seed=1."""

from _hydra import command_line, entry
from _runs import train_and_report

from alignscale.config import TrainConfig
from alignscale.results import summary


@entry("train")
def main(config: TrainConfig) -> None:
    """Train, and end with a one-line result."""
    print(summary(train_and_report(config, print, command_line("launch/train.py"))))


if __name__ == "__main__":
    main()
