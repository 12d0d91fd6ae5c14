"""Reading an optimizer state that was saved in the other form: with the distributed optimizer, or without it.

Both hold the moments as `optimizer.state.exp_avg.NAME` and `exp_avg_sq.NAME` in the shapes of the model. They differ in

    SGD's momentum     `optimizer.state.exp_avg.NAME` (distributed: `sgd.under_adam_names`) or `momentum_buffer.NAME`
    the fp32 masters   `optimizer.state.param.NAME` (distributed) or `optimizer.state.fp32_param.NAME` (bf16 without);
                       an fp32 model without the distributed optimizer has none, the parameters are their own masters
    the step           `step` in every parameter group (distributed) or one `common_step` beside the state
    the nesting        `optimizer.param_groups` (distributed, and bf16 without it) or `param_groups`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys

DISTRIBUTED_MARK = "param_state_sharding_type"
_MASTER, _MASTER_BF16 = "optimizer.state.param.", "optimizer.state.fp32_param."
_MOMENT, _MOMENTUM = "optimizer.state.exp_avg.", "optimizer.state.momentum_buffer."


def is_distributed(optimizer: ChainedOptimizer) -> bool:
    return isinstance(optimizer.chained_optimizers[0], DistributedOptimizer)


def saved_by_distributed(path: Path) -> bool:
    """Whether the checkpoint was written with the distributed optimizer."""
    return DISTRIBUTED_MARK in dist_checkpointing.load_common_state_dict(str(path))["optimizer"]


def is_sgd(optimizer: ChainedOptimizer) -> bool:
    return isinstance(optimizer.chained_optimizers[0].optimizer, torch.optim.SGD)


def ask_for_other(request: dict[str, Any], *, distributed: bool, bf16: bool, sgd: bool) -> None:
    """Change what the optimizer asks the checkpoint for to the names of the other form.

    Args:
        request: the optimizer's part of the sharded state, for loading; changed in place.
        distributed: the form that the optimizer has.
        bf16: the model is not its own master.
        sgd: the state is SGD's momentum, not Adam's moments.
    """
    if distributed:
        for tensors in request["param_state"].values():
            if bf16:
                tensors["param"] = _renamed(tensors["param"], _MASTER, _MASTER_BF16)
            else:
                del tensors["param"]  # a view of the model's own, which is loaded anyway
            if sgd:
                tensors["exp_avg"] = _renamed(tensors["exp_avg"], _MOMENT, _MOMENTUM)
                del tensors["exp_avg_sq"]  # zeros that nothing reads
        return
    if bf16:
        masters = request["fp32_from_fp16_params"]
        request["fp32_from_fp16_params"] = [
            [_renamed(each, _MASTER_BF16, _MASTER) for each in group] for group in masters
        ]
    if sgd:
        for state in (request["optimizer"] if bf16 else request)["state"].values():
            if isinstance(state, dict):  # beside them lies the step
                state["momentum_buffer"] = _renamed(state["momentum_buffer"], _MOMENTUM, _MOMENT)


def convert(loaded: dict[str, Any], optimizer: ChainedOptimizer, *, bf16: bool) -> None:
    """Give what was loaded after `ask_for_other` the nesting that `optimizer.load_state_dict` expects; in place."""
    if is_distributed(optimizer):
        inner = loaded if "param_groups" in loaded else loaded["optimizer"]
        step = float(inner.pop("state")["common_step"])
        groups = [{**group, "step": step} for group in inner.pop("param_groups")]
        loaded["optimizer"] = {"param_groups": groups}
        loaded[DISTRIBUTED_MARK] = "fully_reshardable"
        return
    del loaded[DISTRIBUTED_MARK]
    groups = loaded["optimizer"]["param_groups"] if bf16 else loaded.pop("optimizer")["param_groups"]
    inner = loaded["optimizer"] if bf16 else loaded
    saved = {_identity(group): group for group in groups}
    numbers = optimizer.chained_optimizers[0].optimizer.state_dict()["param_groups"]
    inner["state"]["common_step"] = torch.tensor(groups[0]["step"], dtype=torch.float32)
    inner["param_groups"] = [
        {**{key: value for key, value in saved[_identity(own)].items() if key != "step"}, "params": own["params"]}
        for own in numbers
    ]


def _renamed(tensor: ShardedTensor | ShardedTensorFactory, old: str, new: str) -> ShardedTensor | ShardedTensorFactory:
    assert tensor.key.startswith(old), tensor.key
    tensor.key = new + tensor.key.removeprefix(old)
    return tensor


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group[key] for key in param_group_identifier_keys)
