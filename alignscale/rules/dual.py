"""align_zero in dual form: coefficients of the training examples in place of trained weights.

Under align_zero an update of layer l is a sum over examples of J_l(x)^T e(x) input_l0(x)^T, of which only the error e
changes in training. So W_l(t) = W_l(0) + scale sum_x J_l(x)^T a(x) input_l0(x)^T with a -= lr e, for any number of
steps and with momentum: the state is a, (N, classes), and a layer adds scale^2 (input input_l0^T) (J_l^T a) to what it
gives under its initial weights. It stands alone because no weight is ever written.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from alignscale.choices import ConfigError, RuleConfig
from alignscale.frozen import Fixed
from alignscale.jacobian.store import Store
from alignscale.loss import Loss
from alignscale.nets.network import Deltas, Network, contract
from alignscale.rules.base import Rule
from alignscale.types import Batch, Jacobian, Parameters, StepOutput, Trace


class DualAlignZero(Rule):
    """The network keeps its initial weights, which are fixed; hooks add what was learned to each layer's output.

    coefficients: a, (N, classes). inputs, jacobians: per layer, of all N examples, set by ``attach``.
    """

    reads_jacobian = reads_inputs = True

    def __init__(self, net: Network, fixed: Fixed, config: RuleConfig, loss: Loss, examples: int) -> None:
        """Starts at coefficients of 0."""
        super().__init__(net, fixed, config, loss)
        weight = net.layers[net.readout].held[0]
        self.coefficients = nn.Parameter(weight.new_zeros(examples, net.layers[net.readout].shape[0]))
        self.inputs: list[Tensor] = []
        self.jacobians: list[Tensor] = []
        self.learned: list[Tensor] = []
        self.seen: Tensor | None = None
        net.current = self.primal
        for index, layer in enumerate(net.layers):
            layer.rectifies = False  # what was learned is added before relu
            layer.register_forward_hook(lambda _, read, z, index=index: z + self._addition(index, read[0]))

    def attach(self, store: Store, images: Tensor) -> None:
        """Use what a cache holds of all examples; images: theirs, (N, C, H, W), as the network reads them."""
        layers, tables = range(len(self.net.layers)), store.tables
        wanted = [f"inputs.{layer}" for layer in layers[1:]] + [f"jacobian.{layer}" for layer in layers[:-1]]
        if any(name not in tables or tables[name].device != self.coefficients.device for name in wanted):
            raise ConfigError(
                f"form=dual: expected all of the cache in the memory of {self.coefficients.device}, found a part of it "
                "elsewhere; free memory, or use form=primal or fewer examples (data.train_limit)"
            )
        self.inputs = [self.net.first_input(images), *(store.tables[f"inputs.{layer}"] for layer in layers[1:])]
        self.jacobians = [store.tables[f"jacobian.{layer}"] for layer in layers[:-1]]

    def trained(self) -> list[nn.Parameter]:
        """The coefficients alone."""
        self.net.requires_grad_(False)
        return [self.coefficients]

    def learn(self, batch: Batch) -> StepOutput:
        """The error of the batch is the gradient of its examples' coefficients."""
        with torch.no_grad():
            logits = self.net.trace(batch.images).logits
            loss = self.loss.value(logits, batch.targets, batch.size)
            error = self.loss.error(logits, batch.targets, batch.size)
        return StepOutput((error * self.coefficients[self._rows(batch)]).sum(), loss, logits)

    @torch.no_grad()
    def local(self, batch: Batch, parameters: Parameters | None = None) -> tuple[Trace, Deltas]:
        """Those of align_zero."""
        logits = self.net.trace(batch.images).logits
        error, rows = self.loss.error(logits, batch.targets, batch.size), self._rows(batch)
        deltas: Deltas = [*(contract(Jacobian(one, rows=rows), error) for one in self.jacobians), error]
        return Trace([one[rows] for one in self.inputs], [], [None] * len(self.net.norms), logits), deltas

    @torch.no_grad()
    def primal(self, index: int) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of layer ``index`` that the coefficients stand for."""
        layer, learned = self.net.layers[index], self._through_norm(index)
        weight, bias = layer.held
        whole = torch.addmm(weight, learned.T, self.inputs[index], alpha=layer.scale)
        return whole, None if bias is None else bias + learned.sum(0)

    def saved(self) -> dict[str, Tensor]:
        """The weights that the coefficients stand for, as any tool reads them, and the coefficients."""
        found = self.net.state_dict()
        for index in range(len(self.net.layers)):
            weight, bias = self.primal(index)
            found[f"layers.{index}.weight"] = weight
            if bias is not None:
                found[f"layers.{index}.bias"] = bias
        return {**found, COEFFICIENTS: self.coefficients.detach()}

    @torch.no_grad()
    def restore(self, model: Mapping[str, Tensor]) -> None:
        """Set the coefficients; the initial weights come from the seed."""
        self.coefficients.copy_(model[COEFFICIENTS])

    @staticmethod
    def _rows(batch: Batch) -> Tensor:
        rows = batch.cached.jacobians[0].rows if batch.cached else None
        if rows is None:
            raise ValueError("dual form: expected a batch with the places of its examples in the cache, found none")
        return rows

    def _through_norm(self, index: int) -> Tensor:
        """sum over classes of J^T a before layer ``index``'s norm, (N, units), made anew when coefficients moved."""
        if self.seen is None or not torch.equal(self.seen, self.coefficients):  # a fused step leaves no version behind
            every = torch.arange(len(self.coefficients), device=self.coefficients.device)
            tables = [contract(Jacobian(one, rows=every), self.coefficients) for one in self.jacobians]
            through = [norm.pullback(one, None) for norm, one in zip(self.net.norms, tables, strict=True)]
            self.seen = self.coefficients.detach().clone()
            self.learned = [*through, self.seen]
        return self.learned[index]

    @torch.no_grad()
    def _addition(self, index: int, read: Tensor) -> Tensor:
        layer = self.net.layers[index]
        weights = read @ self.inputs[index].T * layer.scale**2
        return (weights if layer.held[1] is None else weights + 1) @ self._through_norm(index)


COEFFICIENTS = "coefficients"
"""The name of the coefficients in a checkpoint."""


def check_size(net: Network, examples: int, shape: tuple[int, ...], classes: int) -> None:
    """Raises ConfigError where the dual form holds more than the weights and gradients that it does without."""
    units = sum(site[0] for site in net.shapes)
    dual, primal = examples * (classes * (units + 1) + math.prod(shape) + units), 2 * net.size
    if dual > primal:
        raise ConfigError(
            f"form=dual: expected less to hold than the {primal:,} numbers of weights and their gradients, found "
            f"{dual:,} for {examples:,} examples (Jacobians, layer inputs and coefficients); use form=primal, fewer "
            "examples (data.train_limit), or a wider net"
        )
