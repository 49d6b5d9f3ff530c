"""Train one network with one rule: python launch/train.py rule=align_ada net=mlp net.width=1024 data=digits seed=1."""

import hydra
from _hydra import CONFIGS, command_line, guarded, register, typed
from omegaconf import DictConfig

from alignscale.results import summary
from alignscale.train import train


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(options: DictConfig) -> None:
    """Train, and end with a one-line result."""
    guarded(lambda: print(summary(train(typed(options), print, command_line("launch/train.py")))))


if __name__ == "__main__":
    register()
    main()
