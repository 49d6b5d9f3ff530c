"""What touches DeepSpeed's internals: whole weights and optimizer states of any ZeRO stage. For DeepSpeed 0.19.8 alone.

It stands alone because it is the one place that another DeepSpeed can break, and part of the reason why Align moves a
third less under ZeRO 3: after the forward pass a layer's weight is not needed any more, so it is never gathered again.
The other part is the port of alignscale/nets/layers.py, which lends a released parameter its shape.
"""

import functools
import importlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from alignscale.choices import ConfigError
from alignscale.nets.network import Network
from alignscale.parallel import Mesh

__all__ = ["deepspeed"]

VERSION = "0.19.8"
for _call in ("all_gather_into", "reduce_scatter"):  # DeepSpeed's, which this torch has other names for
    warnings.filterwarnings("ignore", rf"`torch\.distributed\.{_call}_tensor` is deprecated", FutureWarning)


def make_ready(device: str) -> None:
    """Raise ConfigError for a DeepSpeed that is another one or not on ``device``, and skip what training does not use.

    That is what the first engine would compile on CPUs for inference (a minute, with a C++ compiler), and Inductor,
    which it would import (2 s) for its own optimizer Muon; who uses that in the same process has it not compiled.
    """
    found = deepspeed.__version__.partition("+")[0]
    if found != VERSION:
        raise ConfigError(
            f"engine=deepspeed: expected DeepSpeed {VERSION}, found {found}; pip install deepspeed=={VERSION}"
        )
    chosen = deepspeed.get_accelerator().device_name()
    if chosen != device:
        raise ConfigError(
            f"device={device}: expected {chosen}, which DeepSpeed has chosen in this process; unset DS_ACCELERATOR, or "
            "use another process"
        )
    backend = importlib.import_module("deepspeed.comm.torch")  # as an attribute of its package it is torch itself
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]
    importlib.import_module("deepspeed.runtime.compiler").compile = lambda: _itself  # type: ignore[attr-defined]


class Asked(dict[str, Any]):
    """Settings that keep the ``names`` that DeepSpeed has looked for: it ignores all others."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__(given)
        self.names: set[object] = set()

    def __contains__(self, name: object) -> bool:
        self.names.add(name)
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As a dictionary's."""
        self.names.add(name)
        return super().get(name, default)


def share_out(net: Network, mesh: Mesh) -> SimpleNamespace | None:
    """What DeepSpeed is to know of a mesh: it partitions over ``mesh.data``; norms are of all parts."""
    deepspeed.utils.groups.mpu = None  # an engine before may have left another one
    width, data = mesh.width.ranks, mesh.data
    if width.size == 1:
        return None
    shares = net.shares()
    for name, parameter in net.named_parameters():
        parameter.model_parallel = shares[name] is not None  # type: ignore[attr-defined]
    first = mesh.everyone.rank - width.rank
    found: dict[str, Any] = {"tensor_model_parallel_src_rank": first}
    for kind, ranks in (("model", width), ("tensor_model", width), ("data", data)):
        about = {"rank": ranks.rank, "world_size": ranks.size, "group": ranks.group}
        found |= {f"{kind}_parallel_{what}": value for what, value in about.items()}
    found["data_parallel_group_ranks"] = torch.distributed.get_process_group_ranks(data.group)
    return SimpleNamespace(**{f"get_{name}": functools.partial(_itself, value) for name, value in found.items()})


def _itself(value: Any) -> Any:
    return value


class Wide(dict[int, Tensor]):
    """Sums of gradients on the host in fp32, which DeepSpeed would make in the precision of the parameter."""

    def __setitem__(self, key: int, value: Tensor) -> None:
        """Not in half precision."""
        super().__setitem__(key, value.float().pin_memory() if value.is_pinned() else value.float())


def narrow(optimizer: Any, net: Network, dtype: torch.dtype, sums: torch.dtype, stage: int) -> None:
    """Have layers read weights in half precision ``dtype``: half the memory, and half the bytes between ranks.

    What the optimizer updates is fp32 as before; after each update DeepSpeed copies its fp32 weights into these, which
    rounds them. Gradients are what they are summed in over ranks, ``sums``, fp32 where a step adds to them many times.
    A collective of all ranks.
    """
    from deepspeed.runtime.torch_autocast import is_autocast_initialized  # another DeepSpeed may have none

    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    many = net.recurrent or net.width.overlap or (stage == 3 and optimizer.offload_param)
    gradients = torch.float32 if many else sums
    if stage < 3 and gradients == torch.bfloat16:
        # of its buffers; and in bf16 it looks for numbers that are not finite only where it is told to
        optimizer.dtype, optimizer.check_grad_overflow = gradients, True
        if not optimizer._grad_acc_hooks:  # without contiguous_gradients; they add up parts
            optimizer.create_gradient_handling_hooks()
    for parameter in trained:
        parameter.grad_dtype = gradients
        if is_autocast_initialized():  # by another's engine here: gradients would be summed as weights are
            parameter.comm_dtype = parameter.dtype  # type: ignore[attr-defined]
    if stage < 3:
        _narrow_whole(optimizer, dtype)
        return
    if not is_autocast_initialized():  # of what comes from the ranks; what that is copied or added to stays fp32
        optimizer.gradient_accumulation_dtype = sums
    if optimizer.offload_param:  # weights that are elsewhere stay fp32: they are rounded to be gathered
        for layer in net.layers:
            layer.rounds_again = True
        for parameter in trained if not is_autocast_initialized() else ():
            parameter.comm_dtype = dtype  # type: ignore[attr-defined]
    else:
        optimizer.lp_param_buffer = optimizer.lp_param_buffer.to(dtype)
        optimizer.fp16_partitioned_groups_flat.clear()
        optimizer._set_fp16_partitioned_groups_flat()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._unflatten_partitioned_parameters(group)
        for parameter in trained:
            parameter.data = parameter.data.to(dtype)


def keep_parts(optimizer: Any, several: bool) -> None:
    """Have ZeRO 1 and 2 add up the gradients of ``several`` parts of a batch in fp32, where they are bf16."""
    if getattr(optimizer, "dtype", None) == torch.bfloat16:
        optimizer.use_grad_accum_attribute = several and not optimizer.partition_gradients
        optimizer.gradient_accumulation_dtype = torch.float32 if several else torch.bfloat16


def drop(optimizer: Any, stage: int) -> None:
    """Forget what ZeRO 1 and 2 have of a step's gradients, to which those of the next one would be added."""
    if stage in (1, 2):
        optimizer.micro_step_id = -1
        for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            kept.update(dict.fromkeys(kept))  # the same dictionary, which others hold
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()


def _narrow_whole(optimizer: Any, dtype: torch.dtype) -> None:
    """``narrow`` where each rank has whole weights, which are let go of before there are others."""
    for group, parameters in enumerate(optimizer.bit16_groups):
        for parameter in parameters:
            parameter.data, parameter._hp_mapping = parameter.data.new_empty(0), None
        optimizer.parallel_partitioned_bit16_groups[group] = []
        size, device = optimizer.bit16_groups_flat[group].numel(), optimizer.bit16_groups_flat[group].device
        optimizer.bit16_groups_flat[group] = None
        optimizer.bit16_groups_flat[group] = flat = torch.zeros(size, dtype=dtype, device=device)
        optimizer._update_model_bit16_weights(group)
        optimizer.parallel_partitioned_bit16_groups[group] = optimizer.get_data_parallel_partitions(flat, group)
    if optimizer.cpu_offload:
        optimizer.accumulated_grads_in_cpu = Wide()
        copies = optimizer.param_buffer_of_bit16_for_cpu_offload_groups
        copies[:] = [one.to(dtype).pin_memory() if one.is_pinned() else one.to(dtype) for one in copies]
    optimizer.update_lp_params()
    optimizer._link_all_hp_params()


def attend(net: Network) -> None:
    """What ZeRO 3 needs to do for a network.

    A parameter that it has released, and the port has lent its shape, is empty again once it has its gradient. What
    ``net.current`` gives is whole and fp32, and all ranks have to ask for it together. A layer runs once a pass, on the
    whole batch, and gathers its weight each time.
    """

    def withdraw(parameter: Any) -> None:
        if parameter.ds_status.name == "NOT_AVAILABLE" and parameter.numel():
            parameter.data = parameter.data.new_empty(0)

    def current(index: int) -> tuple[Tensor, Tensor | None]:
        weight, bias = net.layers[index].held
        return whole_weight(weight, 3), None if bias is None else whole_weight(bias, 3)

    for parameter in net.parameters():
        if parameter.requires_grad:  # of another one the whole value is what is there, perhaps still from a pass
            parameter.register_post_accumulate_grad_hook(withdraw)
    for norm in net.norms:  # which have no parameter, and whose hooks take as long as a layer's
        norm._forward_pre_hooks.clear()
        norm._forward_hooks.clear()
    net.current, net.width = current, replace(net.width, overlap=False)


def partitions(engine: Any, stage: int) -> list[Tensor]:
    """The tensors that the optimizer updates: the parameters themselves, or this rank's parts of them."""
    if stage == 0:
        return [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    name = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
    return list(getattr(engine.optimizer, name))


def inner(engine: Any, stage: int) -> torch.optim.Optimizer:
    """torch's optimizer inside of DeepSpeed's."""
    return engine.optimizer if stage == 0 else engine.optimizer.optimizer


def whole_weight(parameter: nn.Parameter, stage: int) -> Tensor:
    """A parameter in fp32, whole. A collective of all ranks."""
    if stage and parameter.requires_grad:
        return deepspeed.utils.safe_get_full_fp32_param(parameter)
    with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
        return parameter.detach().clone()


def whole_state(engine: Any, parameter: nn.Parameter, key: str, stage: int) -> Tensor:
    """An optimizer's state of a parameter, whole. A collective of all ranks."""
    if stage == 0:
        return inner(engine, 0).state[parameter][key]
    return deepspeed.utils.safe_get_full_optimizer_state(parameter, key)


def set_weight(engine: Any, parameter: Any, value: Tensor, stage: int) -> None:
    """Set a parameter, whole on all ranks, and this rank's part of its fp32 copy; not one that stays as it began."""
    if not parameter.requires_grad:
        return
    if stage == 3:
        parameter.ds_tensor.data.copy_(_set_part(engine, parameter, value, None))
        parameter.ds_secondary_tensor = None  # hpZ's own copy, which DeepSpeed then makes anew
    elif stage:
        deepspeed.utils.safe_set_full_fp32_param(parameter, value)
    if parameter.numel():  # else released
        parameter.data.copy_(value)


def make_states(engine: Any, keys: Sequence[str], steps: float | None, stage: int) -> None:
    """The optimizer's states, which are made at its first step, as zeros; steps: how many it has made, for Adam."""
    optimizer = inner(engine, stage)
    for part in partitions(engine, stage):
        optimizer.state[part] = {key: torch.zeros_like(part) for key in keys}
        if steps is not None:
            optimizer.state[part]["step"] = torch.tensor(steps, dtype=torch.float32, device=part.device)
    if stage in (1, 2):  # DeepSpeed maps parameters to states after its first step
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def set_state(engine: Any, parameter: nn.Parameter, key: str, value: Tensor, stage: int) -> None:
    """Set an optimizer's state of a parameter from the whole of it."""
    if stage == 0:
        inner(engine, 0).state[parameter][key].copy_(value)
    elif stage == 3:
        _set_part(engine, parameter, value, key)
    else:
        deepspeed.utils.safe_set_full_optimizer_state(parameter, value, key)


def _set_part(engine: Any, parameter: Any, value: Tensor, key: str | None) -> Tensor:
    """Set this rank's part of a weight or state under ZeRO 3; DeepSpeed's own call fails where parts are unequal."""
    part, _ = engine.optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
    begin = part.numel() * engine.optimizer._get_param_partition_rank(parameter)
    own = value.flatten()[begin : begin + part.numel()]
    part.data.copy_(torch.nn.functional.pad(own, (0, part.numel() - own.numel())))
    return part
