"""A model that trains: megatron DDP around the chunks, optimizer, schedule. `step.train_step` moves it one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from torch import nn

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.sections import ModelSection, OptimizerSection, ParallelSection
from tulu_hpc.models.build import build_model
from tulu_hpc.models.scalar_head import Head
from tulu_hpc.models.transformer_engine import TransformerEngineOptions
from tulu_hpc.parallel.device import default_device
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.telemetry.step_clock import StepClock, device_clock
from tulu_hpc.training.non_finite import NonFiniteWatch
from tulu_hpc.training.optimizer import build_optimizer
from tulu_hpc.training.runner import Runner
from tulu_hpc.training.schedule import Schedule
from tulu_hpc.training.spike import SpikeGuard
from tulu_hpc.training.weights import load_pretrained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Trainer:
    """State of training. `step` counts optimizer steps done.

    Attributes:
        chunks: megatron DDP modules, one per virtual pipeline chunk of this rank; `models` are the modules inside.
        spikes: judges each step's gradient norm. watch: how a step that is not finite is traced.
        clock: told what a step does, if somebody starts it.
        metric_names: agreed on by all ranks at the first step (only the last pipeline stage computes metrics).
    """

    runner: Runner
    chunks: list[DistributedDataParallel]
    optimizer: ChainedOptimizer
    schedule: Schedule
    groups: Groups
    architecture: Architecture
    spikes: SpikeGuard
    watch: NonFiniteWatch = field(default_factory=NonFiniteWatch)
    clock: StepClock = field(default_factory=device_clock)
    step: int = 0
    metric_names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runner.use_clock(self.clock)

    def use_clock(self, clock: StepClock) -> None:
        """Tell this clock what a step does, e.g. one that several trainers share."""
        self.clock = clock
        self.runner.use_clock(clock)

    @property
    def models(self) -> list[Any]:
        return [chunk.module for chunk in self.chunks]

    def state_dict(self) -> dict[str, Any]:
        """Plain values beside parameters and optimizer that the next steps depend on; equal on all ranks."""
        return {"spikes": self.spikes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.spikes.load_state_dict(state["spikes"])

    def zero_grad(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def synchronise_parameters(self) -> None:
        """Complete the parameters on every rank (overlap_param_gather leaves that to the next forward pass)."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def build_trainer(
    *,
    model: ModelSection,
    parallel: ParallelSection,
    optimizer: OptimizerSection,
    recompute: Literal["none", "selective", "full"],
    total_steps: int,
    groups: Groups,
    architecture: Architecture,
    load_weights: bool = True,
    head: Head = "logprobs",
    new_head_seed: int | None = None,
) -> Trainer:
    """Build, load `model.path` (unless a checkpoint follows: `load_weights=False`), wrap.

    Args:
        total_steps: optimizer steps of the whole run; the schedule ends there.
        head, new_head_seed: as in `load_model`.

    Raises:
        ValueError: gradients of lower precision than the model's, or an fp32 head without the distributed optimizer;
            megatron has neither.
    """
    if optimizer.gradient_dtype == "bfloat16" and model.dtype != "bfloat16":
        raise ValueError(f"optimizer.gradient_dtype is bfloat16 but model.dtype is {model.dtype}")
    if model.precision != model.dtype and not parallel.distributed_optimizer:
        # megatron's other optimizer for bf16 writes no checkpoint of a model with fp32 parameters in it.
        raise ValueError("model.fp32_head in a bfloat16 model needs parallel.distributed_optimizer")
    chunks = load_model(
        model,
        groups,
        architecture,
        recompute=recompute,
        load_weights=load_weights,
        head=head,
        new_head_seed=new_head_seed,
    )
    wrapped = wrap_data_parallel(chunks, parallel, optimizer, groups)
    schedule = Schedule(
        lr=optimizer.lr,
        total_steps=total_steps,
        kind=optimizer.schedule,
        warmup_ratio=optimizer.warmup_ratio,
        final_ratio=optimizer.final_lr_ratio,
    )
    return Trainer(
        runner=Runner.create(
            wrapped, groups, architecture, split=parallel.context_split, strategy=model.attention_strategy
        ),
        chunks=wrapped,
        optimizer=build_optimizer(
            wrapped, optimizer, groups, dtype=DTYPES[model.dtype], distributed=parallel.distributed_optimizer
        ),
        schedule=schedule,
        groups=groups,
        architecture=architecture,
        spikes=SpikeGuard(optimizer.spike),
    )


def load_model(
    model: ModelSection,
    groups: Groups,
    architecture: Architecture,
    *,
    recompute: Literal["none", "selective", "full"] = "none",
    load_weights: bool = True,
    head: Head = "logprobs",
    new_head_seed: int | None = None,
) -> list[Any]:
    """This rank's model chunks with the weights of `model.path` (a policy to be wrapped, or a reference).

    Args:
        head: `value` for reward and value models: with `Runner.values` the start of PPO's value model is the export of
            a reward model, read here with `head="value"`.
        new_head_seed: draw a scalar head by this seed where `model.path` is a language model; None: it must have one.
    """
    chunks = build_model(
        architecture,
        groups,
        dtype=DTYPES[model.dtype],
        recompute=recompute,
        vocab_multiple=model.vocab_multiple,
        logprob_buffer_bytes=model.logprob_buffer_mib * 2**20,
        fp32_head=model.fp32_head,
        # The embedding's gradient: torch does not refuse F.embedding on CUDA, but its sums have no fixed order.
        deterministic=default_device().type == "cuda" and torch.are_deterministic_algorithms_enabled(),
        transformer_engine=_transformer_engine(model, groups),
        head=head,
    )
    if load_weights:
        load_pretrained(chunks, Path(model.path), architecture, groups, new_head_seed=new_head_seed)
    return chunks


def _transformer_engine(model: ModelSection, groups: Groups) -> TransformerEngineOptions | None:
    if model.layer_spec == "local":
        return None
    layout = groups.layout
    return TransformerEngineOptions(
        fp8=None if model.fp8 == "none" else model.fp8,
        fp8_recipe=model.fp8_recipe,
        overlap_rows=layout.row_multiple // layout.context if layout.tp_comm_overlap else None,
    )


def wrap_data_parallel(
    chunks: Sequence[nn.Module], parallel: ParallelSection, optimizer: OptimizerSection, groups: Groups
) -> list[DistributedDataParallel]:
    """megatron DDP that *sums* gradients (losses carry the global denominators already)."""
    config: Any = chunks[0].config
    config.calculate_per_token_loss = True  # gradient_scaling_factor 1: sum over ranks instead of mean
    config.finalize_model_grads_func = _finalize_gradients
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=optimizer.gradient_dtype == "float32",
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
        bucket_size=parallel.gradient_bucket_size,
    )
    wrapped = [
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=index > 0, pg_collection=groups.pg)
        for index, chunk in enumerate(chunks)
    ]
    if parallel.overlap_grad_reduce:
        no_sync: list[Any] = [each.no_sync for each in wrapped]
        grad_sync: list[Any] = [each.start_grad_sync for each in wrapped]
        param_sync: list[Any] = [each.start_param_sync for each in wrapped]
        single = len(wrapped) == 1
        config.no_sync_func = no_sync[0] if single else no_sync
        config.grad_sync_func = grad_sync[0] if single else grad_sync
        if parallel.overlap_param_gather:
            config.param_sync_func = param_sync[0] if single else param_sync
    return wrapped


def _finalize_gradients(
    chunks: list[nn.Module], num_tokens: object = None, pg_collection: object = None, force_all_reduce: bool = False
) -> None:
    """Reduce gradients over data-parallel, sequence-parallel and embedding groups, without megatron's division by
    `num_tokens`."""
    finalize_model_grads(chunks, num_tokens=None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
