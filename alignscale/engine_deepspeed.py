"""The DeepSpeed engine: the same rule, the same three calls, on one rank or on many, with ZeRO 0 to 3.

It stands alone because it is loaded only where it runs. The weights that the optimizer has are fp32, and what layers
read of these is in the precision that they compute in; gradients are what ``engine.reduce_dtype`` says.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alignscale import engine_zero as zero
from alignscale.checkpoint import Coming, Makers, Tensors
from alignscale.choices import AdamConfig, ConfigError, DeepSpeedConfig, OptimConfig, SGDConfig
from alignscale.engine import Engine, make_optimizer, pull_to_start
from alignscale.environment import out_of_memory
from alignscale.parallel import Mesh
from alignscale.rules import Rule

OURS = {
    "train_batch_size": "batch_size", "train_micro_batch_size_per_gpu": "batch_size", "optimizer": "optim",
    "gradient_accumulation_steps": "accumulation", "gradient_clipping": "optim.clip_norm", "scheduler": "schedule",
    "zero_optimization.stage": "engine.zero_stage", "zero_optimization.cpu_offload": "engine.offload",
    "communication_data_type": "engine.reduce_dtype",
    **dict.fromkeys(("fp16", "bf16", "bfloat16", "amp", "torch_autocast", "data_types"), "precision"),
}  # fmt: skip
"""DeepSpeed's settings that options of ours decide."""
OTHERS = {
    "gradient_allreduce_op", "sequence_parallel_size", "data_parallel_size", "tensor_parallel", "elasticity",
    "managed_gradient_accumulation", "progressive_layer_drop", "curriculum_learning", "data_efficiency",
    "compression_training", *(f"zero_optimization.{name}" for name in (
        "zenflow", "zero_quantized_gradients", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
        "compute_grad_norm", "leaf_module", "stage3_module_granularity_threshold",
    )),
}  # fmt: skip
"""Its settings under which a step would be another one: other gradients, other batches, another network, no look at
whether a gradient is finite, or weights that layers do not gather one by one."""


def deepspeed_config(config: DeepSpeedConfig, clip_norm: float, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """DeepSpeed's configuration. Raises ConfigError where ``engine.extra`` sets what another option decides.

    dtype: what layers compute in; to DeepSpeed, which is not to scale an error or to round weights, all is fp32.

    Micro-batch and accumulation are 1: parts of a batch differ in size, so the engine is told which one is the last.
    """
    inside = config.extra.get("zero_optimization", {})
    if not isinstance(inside, Mapping):
        raise ConfigError(f"engine.extra: zero_optimization: expected settings by name, found {inside!r:.40}")
    for name in (*config.extra, *(f"zero_optimization.{name}" for name in inside)):
        if name in OURS:
            raise ConfigError(f"engine.extra: {name}: expected {OURS[name]}, the option that decides it")
        if name in OTHERS:
            raise ConfigError(f"engine.extra: {name}: expected settings that leave a step's numbers as they are")
        if name == "zero_optimization.round_robin_gradients" and inside["round_robin_gradients"]:
            # DeepSpeed's own calls for whole weights then mix up the parts
            raise ConfigError(f"engine.extra: {name}: expected false, as whole weights cannot be read under it")
    offloaded = inside.get("offload_optimizer")
    if isinstance(offloaded, Mapping) and offloaded.get("device") in ("none", "cpu"):
        raise ConfigError("engine.extra: offload_optimizer.device: expected engine.offload, the option that decides it")
    optimization: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload:
        optimization["offload_optimizer"] = {"device": "cpu"}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": clip_norm,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "zero_optimization": optimization,
    }  # fmt: skip
    if config.reduces_in_bf16(dtype == torch.bfloat16):
        ours["communication_data_type"] = "bf16"
    return _merged(ours, config.extra)


def _merged(ours: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for name, value in extra.items():
        inside = merged.get(name)
        merged[name] = _merged(inside, value) if isinstance(inside, dict) and isinstance(value, Mapping) else value
    return merged


class DeepSpeedEngine(Engine):
    """Many processes. What a checkpoint holds is whole, so other ranks or another stage go on from it."""

    def __init__(self, rule: Rule, optim: OptimConfig, config: DeepSpeedConfig, mesh: Mesh, dtype: torch.dtype) -> None:
        """Partitions the parameters of ``rule``, which computes in ``dtype``, as ``config`` says.

        Raises ConfigError for an option of DeepSpeed's.
        """
        zero.make_ready(next(rule.net.parameters()).device.type)
        zero.deepspeed.utils.logger.setLevel(logging.ERROR)
        self.mesh, self.stage = mesh, config.zero_stage
        self.bf16_sums = config.reduces_in_bf16(dtype == torch.bfloat16)
        self.shares, self.first, self.inside = rule.net.shares(), True, False
        optimizer = make_optimizer(optim, rule.trained())
        settings = zero.Asked(deepspeed_config(config, optim.clip_norm, dtype))
        mesh_of = zero.share_out(rule.net, mesh)
        try:
            self.engine, *_ = zero.deepspeed.initialize(
                model=rule, optimizer=optimizer, config=settings, dist_init_required=False, mpu=mesh_of
            )
        except Exception as problem:
            unlike = type(problem) is RuntimeError and "JIT load" not in str(problem)
            machine = out_of_memory(problem) or isinstance(problem, (torch.distributed.DistError, OSError))
            if not config.extra or unlike or machine:  # want of memory, of another rank, or a disk
                raise
            found = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
            raise ConfigError(f"engine.extra: expected settings that DeepSpeed takes, found: {found}") from problem
        for name in config.extra.keys() - settings.names:
            raise ConfigError(f"engine.extra: {name}: expected a setting of DeepSpeed's, found one it never looks for")
        super().__init__(rule, self.engine, self.engine.optimizer)
        self.counts = isinstance(optim, AdamConfig)
        momentum = ["momentum_buffer"] if isinstance(optim, SGDConfig) and optim.momentum else []
        self.keys = ["exp_avg", "exp_avg_sq"] if self.counts else momentum
        if self.stage and dtype.itemsize == 2:
            sums = torch.bfloat16 if self.bf16_sums else torch.float32
            zero.narrow(self.engine.optimizer, rule.net, dtype, sums, self.stage)
        if self.stage == 3:
            zero.attend(rule.net)
        if optim.weight_decay and optim.decay_towards == "initial":
            pull_to_start(zero.inner(self.engine, self.stage), zero.partitions(self.engine, self.stage), optim)

    def backward(self, surrogate: Tensor, last: bool = True) -> None:
        """Add to the gradient; DeepSpeed, which takes the mean over ranks, sums them over ranks with the last part."""
        self.engine.set_gradient_accumulation_boundary(last)
        if self.first:
            zero.keep_parts(self.engine.optimizer, not last)
        self.first, self.inside = last, True
        self.engine.backward(surrogate * self.mesh.data.size, scale_wrt_gas=False)
        self.inside = False
        if not last:
            self.engine.step()  # counts the part, and no more

    def step(self, lr: float | None = None) -> None:
        """Apply the update on all ranks."""
        self._set_rate(lr)
        self.engine.step()
        if getattr(self.engine.optimizer, "overflow", False):  # ZeRO left it out, on all ranks
            self.forget()
            raise FloatingPointError("the gradient is not finite")

    def forget(self) -> None:
        """Of all parts; also what DeepSpeed keeps. Raises RuntimeError where a backward pass was broken off."""
        if self.inside and self.stage:
            found = "found one that was broken off, from where DeepSpeed cannot go on"
            raise RuntimeError(f"expected a backward pass that has ended, {found}; make a new Learner")
        super().forget()
        zero.drop(self.engine.optimizer, self.stage)
        self.first = True

    def weight(self, index: int) -> Tensor:
        """In fp32, also where layers have it rounded."""
        layer = self.rule.net.layers[index]
        rounded = layer.held[0].dtype != layer.precision
        return zero.whole_weight(layer.held[0], self.stage) if rounded else super().weight(index)

    def state(self) -> Makers:
        """Whole on the rank that asks for it, gathered then; each is a collective of all ranks."""
        net, whole = self.rule.net, partial(zero.whole_weight, stage=self.stage)
        model = {name: self._coming(name, own, partial(whole, own)) for name, own in net.named_parameters()}
        model |= {name: self._coming(name, own, own.detach) for name, own in net.named_buffers()}
        optimizer = {
            f"{name}.{key}": self._coming(name, own, partial(zero.whole_state, self.engine, own, key, self.stage))
            for own, name in self._trained()
            for key in self.keys
        }
        if self.counts:
            steps = next(iter(zero.inner(self.engine, self.stage).state.values()), {"step": torch.zeros(())})["step"]
            optimizer |= {f"{name}.step": Coming.at_hand(steps) for _, name in self._trained()}
        return {"model": model, "optimizer": optimizer}

    def _trained(self) -> Iterator[tuple[nn.Parameter, str]]:
        return ((parameter, self.names[parameter]) for parameter in self.rule.trained())

    def _coming(self, name: str, like: Tensor, own: Callable[[], Tensor]) -> Coming:
        share, shape = self.shares[name], getattr(like, "ds_shape", like.shape)  # of a parameter that may be released
        size = 4 * math.prod(share.whole(shape) if share else shape)
        return Coming(size, lambda to: self.mesh.whole(own().detach(), share, to))

    def load(self, tensors: Tensors) -> None:
        """Set everything from the first rank's tensors; a collective of all.

        Raises ValueError for a weight that is not among them. States that are not are 0, as before the first step.
        """
        if missing := self.mesh.everyone.of_first(lambda: sorted(self.shares.keys() - tensors["model"].keys())):
            raise ValueError(f"expected all weights and norms of the network, found none of {', '.join(missing)}")
        for name, parameter in self.rule.net.named_parameters():
            value = self._shared(tensors["model"].get(name), parameter, name)
            zero.set_weight(self.engine, parameter, value, self.stage)
        for name, buffer in self.rule.net.named_buffers():
            buffer.copy_(self._shared(tensors["model"].get(name), buffer, name))
        first = f"{next(self._trained())[1]}.step"
        steps = self.mesh.everyone.of_first(lambda: tensors["optimizer"].get(first, torch.zeros(())).item())
        zero.make_states(self.engine, self.keys, steps if self.counts else None, self.stage)
        for parameter, name in self._trained():
            for key in self.keys:
                value = self._shared(tensors["optimizer"].get(f"{name}.{key}"), parameter, name)
                zero.set_state(self.engine, parameter, key, value, self.stage)

    def _shared(self, whole: Tensor | None, like: Tensor, name: str) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)  # layers may have it rounded
        own = like.new_empty(getattr(like, "ds_shape", like.shape), dtype=dtype)
        return self.mesh.part(whole, self.shares[name], own)
