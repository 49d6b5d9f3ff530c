"""TensorFlow 1's Adam, as the recorded trajectories were made with; training here uses torch's."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


class TensorFlowAdam:
    """TensorFlow 1's Adam: eps outside the bias correction, and betas, eps and running powers held in float32."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        """Betas 0.9 and 0.999, eps 1e-8: TensorFlow's defaults."""
        self.parameters = list(parameters)
        self.lr = lr
        self.beta1, self.beta2, self.eps = (np.float32(value) for value in (0.9, 0.999, 1e-8))
        self.power1, self.power2 = self.beta1, self.beta2
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """One update; a parameter without a gradient stays."""
        beta1, beta2 = float(self.beta1), float(self.beta2)
        rate = self.lr * float(np.sqrt(1 - np.float64(self.power2))) / (1 - float(self.power1))
        for parameter, first, second in zip(self.parameters, self.first, self.second, strict=True):
            if parameter.grad is None:
                continue
            first.mul_(beta1).add_(parameter.grad, alpha=1 - beta1)
            second.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
            parameter.sub_(rate * first / (second.sqrt() + float(self.eps)))
        self.power1, self.power2 = self.power1 * self.beta1, self.power2 * self.beta2
