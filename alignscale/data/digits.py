"""scikit-learn's handwritten digits (Alpaydin & Kaynak 1998): 1797 real images of 8x8, bundled with the library."""

import numpy as np
import torch

from alignscale.choices import DigitsConfig
from alignscale.data.examples import Examples

TRAIN = 1437


def digits(config: DigitsConfig) -> tuple[Examples, Examples]:
    """Training (1437) and test (360) examples, pixels in [0, 1]; the split is fixed and no run's seed changes it."""
    from sklearn.datasets import load_digits  # slow to import, and only this data set needs it

    data = load_digits()
    images = torch.from_numpy(data.images / 16).float()[:, None]
    labels = torch.from_numpy(data.target).long()
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))  # a stream that numpy never changes
    images, labels = images[order], labels[order]
    return (
        Examples.whole(images[:TRAIN], labels[:TRAIN], 10, "digits-train"),
        Examples.whole(images[TRAIN:], labels[TRAIN:], 10, "digits-test"),
    )
