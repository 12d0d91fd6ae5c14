"""AdamW (or SGD) through megatron's optimizers, and the one place where their defects are repaired.

megatron-core 0.16.1 is written for the fused Adam of Transformer Engine or Apex, which keeps `step` in the parameter
group. Here torch's AdamW is used everywhere, also where those packages are installed, so that a checkpoint means the
same on every machine. With it `step` is a tensor per parameter, and four things in `DistributedOptimizer` go wrong
around checkpoints (the fifth and sixth are wrong with any Adam, the seventh without Adam):

1. `state_dict` asserts that exactly one `step` exists, which fails while the state is empty (a fresh optimizer that is
   about to load): `create_state` makes the state at construction.
2. `_set_main_param_and_optimizer_states` looks for `step` among the resharded tensors: `KeyError: 'step'`.
3. The same function copies into a view of a leaf that requires grad: `RuntimeError` wherever grad mode is on (its
   caller for our format, `fully_reshardable`, switches it off; the others do not).
4. `load_state_dict` gives every parameter the *same* `step` tensor. AdamW then advances it once per parameter, the bias
   correction is wrong and nothing says so: `unshare_steps` after every load.
5. `sharded_param_state_fully_reshardable` looks parameters up by their place in the padded buffer, in tensors that hold
   the buckets without their padding. With several buckets (tied embeddings over pipeline stages, or overlapped gradient
   reduction of a large model) everything after the first padded one is saved shifted, with a warning at most:
   `_sharded_state` gives it the places without padding.
6. `model_param_group_index_map` numbers a group's parameters as they lie in the buffers, but the group lists fp32 ones
   before the others: with an fp32 head in a bf16 model every look-up is wrong. `number_by_dtype` corrects it.
7. Its checkpoints know the state of Adam only, so it refuses SGD: `_adam_states` gives them SGD's under Adam's names,
   and SGD counts its steps too (`sgd.py`).

`Float16OptimizerWithFloat16Params` and `FP32Optimizer` share 1 (their state has no `step` before the first step).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer import distrib_optimizer as megatron_distributed
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from tulu_hpc.config.sections import OptimizerSection
from tulu_hpc.parallel.device import default_device
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.training import sgd

MEGATRON_SHARDED_STATE = megatron_distributed.DistributedOptimizer.sharded_param_state_fully_reshardable
MEGATRON_STATES = megatron_distributed.DistributedOptimizer._get_main_param_and_optimizer_states


def build_optimizer(
    chunks: list[DistributedDataParallel],
    section: OptimizerSection,
    groups: Groups,
    *,
    dtype: torch.dtype,
    distributed: bool,
) -> ChainedOptimizer:
    """Decoupled AdamW, or SGD, over the trainable parameters; norms and other vectors are not decayed.

    Args:
        chunks: megatron DDP modules (one per virtual pipeline chunk).
        dtype: of the parameters; below fp32, masters and state are fp32.
        distributed: shard state and masters over data-parallel (and context-parallel) ranks.
    """
    config = OptimizerConfig(
        optimizer="adam" if section.kind == "adamw" else "sgd",
        lr=section.lr,
        min_lr=0.0,
        weight_decay=section.weight_decay,
        decoupled_weight_decay=True,
        adam_beta1=section.betas[0],
        adam_beta2=section.betas[1],
        adam_eps=section.eps,
        sgd_momentum=0.9 if section.momentum is None else section.momentum,
        clip_grad=section.clip_grad,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_distributed_optimizer=distributed,
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
    )
    use_torch_optimizer()
    optimizer = get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=False, pg_collection=groups.pg)
    for inner in torch_optimizers(optimizer):
        for group in inner.param_groups:
            # megatron leaves the factor of norms, 0, to its own scheduler, which is not used here.
            group["weight_decay"] = section.weight_decay * group["wd_mult"]
            # One kernel per step on CPU and CUDA alike.
            group["fused"], group["foreach"] = isinstance(inner, torch.optim.AdamW), False
    number_by_dtype(optimizer)
    create_state(optimizer)
    for part in optimizer.chained_optimizers:
        part.init_state_fn = _state_exists
    return optimizer


def number_by_dtype(optimizer: ChainedOptimizer) -> None:
    """Number the parameters of a group as the group lists them: fp32, then the others (defect 6)."""
    for part in optimizer.chained_optimizers:
        if isinstance(part, megatron_distributed.DistributedOptimizer):
            for index, (fp32, others) in enumerate(zip(part.model_fp32_groups, part.model_float16_groups, strict=True)):
                for order, parameter in enumerate([*fp32, *others]):
                    part.model_param_group_index_map[parameter] = (index, order)


def torch_optimizers(optimizer: ChainedOptimizer) -> list[torch.optim.Optimizer]:
    """The torch optimizers below megatron's."""
    return [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]


@torch.no_grad()
def gradient_norm(optimizer: ChainedOptimizer, groups: Groups) -> float:
    """Global norm of the reduced gradients, the first half of megatron's `step`; bitwise equal on all ranks."""
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if groups.world_size == 1:
        return norm
    # Replicas compute it each for themselves, and what is decided by it must be decided alike. max() may drop a NaN.
    value = torch.tensor([norm, float(not math.isfinite(norm))], dtype=torch.float64, device=default_device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    largest, bad = value.tolist()
    return math.nan if bad and math.isfinite(largest) else largest


@torch.no_grad()
def update_parameters(optimizer: ChainedOptimizer, grad_norm: float) -> None:
    """Clip by `grad_norm` and update, the second half of megatron's `step`."""
    for part in optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False) or not part.config.clip_grad > 0:
            continue
        if parameters := part.get_parameters():
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()


def _parameters(inner: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in inner.param_groups:
        yield from group["params"]


def create_state(optimizer: ChainedOptimizer) -> None:
    """Give every parameter its state at step 0, as its first step would (defect 1)."""
    for inner in torch_optimizers(optimizer):
        empty = sgd.empty_state if isinstance(inner, torch.optim.SGD) else _empty_adam_state
        for parameter in _parameters(inner):
            if not inner.state[parameter]:
                inner.state[parameter] = empty(parameter)


def _empty_adam_state(parameter: Tensor) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }


def _state_exists(*_: Any) -> None:
    """megatron's hook to make the state before a load; for SGD it has none to call."""


def unshare_steps(optimizer: ChainedOptimizer) -> None:
    """Give every parameter a `step` tensor of its own again (defect 4)."""
    for inner in torch_optimizers(optimizer):
        for parameter, state in inner.state.items():
            if "step" in state:
                # On the parameter's device: the fused kernel refuses a counter on the host.
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device).clone()


def optimizer_step(optimizer: ChainedOptimizer) -> int:
    """Steps done according to the optimizer's own counters.

    Raises:
        RuntimeError: the parameters disagree (a shared or half-loaded `step`).
    """
    steps = {int(state["step"]) for inner in torch_optimizers(optimizer) for state in inner.state.values()}
    if len(steps) > 1:
        raise RuntimeError(f"optimizer state is inconsistent: parameters are at steps {sorted(steps)}")
    return steps.pop() if steps else 0


def use_torch_optimizer() -> None:
    """Make megatron build torch's optimizers whatever else is installed, and repair its checkpoints (2, 3, 5 and 7).

    The fused Adams of Transformer Engine and Apex keep no `step` per parameter: the state that `create_state` makes and
    the checkpoints of this module would not fit them.
    """
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = True
    megatron_optimizer.SGD = sgd.CountedSGD
    megatron_distributed.Adam = (torch.optim.AdamW, sgd.CountedSGD)  # what its constructor accepts
    megatron_distributed.HAVE_APEX_OR_TE = False
    megatron_distributed.USING_TE_OPTIMIZER = megatron_distributed.USING_APEX_OPTIMIZER = False
    distributed = megatron_distributed.DistributedOptimizer
    distributed._set_main_param_and_optimizer_states = _copy_into_state
    distributed._get_main_param_and_optimizer_states = _adam_states
    distributed.sharded_param_state_fully_reshardable = _sharded_state


def _adam_states(self: Any, model_param: Tensor) -> dict[str, Tensor]:
    """Master weight and state of a parameter's shard under the names that checkpoints know (defect 7)."""
    states = MEGATRON_STATES(self, model_param)
    return {"param": states.pop("param"), **sgd.under_adam_names(states)}


@torch.no_grad()
def _copy_into_state(self: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
    """Copy a parameter's shard of master weight and moments; `step` comes with the parameter groups instead.

    The master is missing where a checkpoint has none (`optimizer_form`): it is then a view of the loaded parameter.
    """
    group, order = self.model_param_group_index_map[model_param]
    main_param = self.optimizer.param_groups[group]["params"][order]
    for name, target in {"param": main_param, **self.optimizer.state[main_param]}.items():
        if name != "step" and not (name == "param" and name not in tensors):
            target.copy_(tensors["exp_avg" if name == "momentum_buffer" else name])


def _sharded_state(self: Any, *args: Any, **kwargs: Any) -> Any:
    """megatron's function, told where each parameter lies when every bucket has lost its padding (defect 5)."""
    padded = [buffer.param_index_map for buffer in self.buffers]
    for buffer in self.buffers:
        unpadded_starts = accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0)
        shifts = [bucket.offset - start for bucket, start in zip(buffer.buckets, unpadded_starts, strict=False)]
        buffer.param_index_map = {
            parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        return MEGATRON_SHARDED_STATE(self, *args, **kwargs)
    finally:
        for buffer, places in zip(self.buffers, padded, strict=True):
            buffer.param_index_map = places
