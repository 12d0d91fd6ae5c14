"""How the processes of a job are arranged, and the process groups that follow from it."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from tulu_hpc.config.sections import ParallelSection
from tulu_hpc.parallel.device import default_backend, default_device


class LayoutError(ValueError):
    """The layout does not fit the number of processes or the model."""


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism of one model replica; data parallelism is what the world size leaves.

    Attributes:
        tensor: ranks that split every weight matrix.
        pipeline: stages of layers.
        virtual_pipeline: model chunks per stage (interleaved schedule), None for one.
        context: ranks that split the rows of a pack.
        sequence: split the rows between tensor-parallel regions too (no effect at tensor = 1).
        account_for_embedding, account_for_loss: count the embedding (the head) as one layer when layers are dealt to
            stages, so that the first (last) stage has one layer less.
        first_stage_layers, last_stage_layers: explicit numbers of layers there; the rest is dealt evenly.
        row_step: the rows of a pack per rank that splits them are a multiple of this.
        tp_comm_overlap: tensor-parallel communication runs beside GEMMs, on packs of exactly `row_multiple` rows.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    sequence: bool = False
    account_for_embedding: bool = False
    account_for_loss: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    row_step: int = 1
    tp_comm_overlap: bool = False

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "context"):
            if getattr(self, name) < 1:
                raise LayoutError(f"layout.{name} = {getattr(self, name)}: must be at least 1")
        if self.virtual_pipeline is not None and (self.virtual_pipeline < 2 or self.pipeline < 2):
            raise LayoutError(
                f"virtual_pipeline = {self.virtual_pipeline} needs at least 2 chunks and pipeline >= 2 "
                f"(pipeline = {self.pipeline})"
            )

    @property
    def sequence_parallel(self) -> bool:
        """Whether rows are really split over the tensor-parallel ranks."""
        return self.sequence and self.tensor > 1

    @property
    def model_parallel(self) -> int:
        """Processes of one data-parallel replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def row_multiple(self) -> int:
        """The number of rows of every pack must be a multiple of this (`pack(multiple=...)`)."""
        return self.context * (self.tensor if self.sequence_parallel else 1) * self.row_step

    def data(self, world_size: int) -> int:
        """Number of data-parallel replicas.

        Raises:
            LayoutError: the world size is not a multiple of `model_parallel`.
        """
        if world_size % self.model_parallel:
            raise LayoutError(
                f"{world_size} processes cannot hold replicas of tensor {self.tensor} x pipeline {self.pipeline} x "
                f"context {self.context} = {self.model_parallel} processes each; start a multiple of that"
            )
        return world_size // self.model_parallel


def layout_of(parallel: ParallelSection, row_step: int = 1) -> Layout:
    """The process layout that a configuration asks for; `row_step` is that of `config.layer_spec`."""
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        sequence=parallel.sequence_parallel,
        account_for_embedding=parallel.account_for_embedding_in_pipeline_split,
        account_for_loss=parallel.account_for_loss_in_pipeline_split,
        row_step=row_step,
        tp_comm_overlap=parallel.tp_comm_overlap,
        first_stage_layers=parallel.first_stage_layers,
        last_stage_layers=parallel.last_stage_layers,
    )


@dataclass(frozen=True)
class Groups:
    """The process groups of a layout and this process's place in each.

    `pg` is megatron's ProcessGroupCollection (`pg.tp`, `pg.pp`, `pg.cp`, `pg.dp`, `pg.dp_cp`, `pg.mp` = tp x pp, ...).
    """

    layout: Layout
    pg: ProcessGroupCollection
    rank: int
    world_size: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    dp_size: int

    @property
    def tp_size(self) -> int:
        return self.layout.tensor

    @property
    def pp_size(self) -> int:
        return self.layout.pipeline

    @property
    def cp_size(self) -> int:
        return self.layout.context

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_main(self) -> bool:
        """Global rank 0: writes files and talks to the user."""
        return self.rank == 0

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """`value` of global rank `source`, on every rank of the job (pickled)."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=source, device=_object_device())
        return box[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """The `value` of every rank of the job, in rank order (pickled)."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def all_gather_over_replicas(self, value: Any) -> list[Any]:
        """The `value` of every data-parallel replica, in the order of their ranks (pickled); the processes of a replica
        hold equal values."""
        if self.dp_size == 1:
            return [value]
        values: list[Any] = [None] * self.dp_size
        dist.all_gather_object(values, value, group=self.pg.dp)
        return values

    def barrier(self) -> None:
        """Wait for every rank of the job."""
        if self.world_size > 1:
            dist.barrier()


def initialize(layout: Layout, *, seed: int, timeout_minutes: float = 30.0) -> Groups:
    """Start torch.distributed (if it is not running) and build the process groups of `layout`.

    Under torchrun the rendezvous comes from its environment variables; without them the job is this one process. May be
    called again with another layout: the groups before are dropped, the world stays.

    Args:
        seed: seeds python, torch and megatron's random-number tracker (the same on every rank; megatron derives the
            tensor-parallel streams).
        timeout_minutes: how long a collective may wait before the job is given up.

    Raises:
        LayoutError: the number of processes does not fit the layout.
    """
    timeout = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        layout.data(int(os.environ.get("WORLD_SIZE", 1)))  # a clear error before any rendezvous
        device = default_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(default_backend(), timeout=timeout)
        else:
            dist.init_process_group(default_backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    layout.data(dist.get_world_size())
    random.seed(seed)
    torch.manual_seed(seed)
    _forget_groups()
    groups = build_groups(layout, timeout_minutes)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return groups


def initialize_fake(layout: Layout, *, rank: int, world_size: int) -> Groups:
    """Groups of one rank of a job that does not exist: collectives return at once without moving data.

    For building a model on the meta device as a given rank of a large layout would (planning, tests). Replaces any
    running process group of this process; `destroy()` ends it.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    layout.data(world_size)
    destroy()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    _forget_groups()
    groups = build_groups(layout, 30.0)
    tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    return groups


def destroy() -> None:
    """Drop the process groups and leave torch.distributed; safe to call when nothing was started."""
    _forget_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


_built: list[dist.ProcessGroup] = []  # by `build_groups`; megatron forgets its groups without ending their threads


def _forget_groups() -> None:
    mpu.destroy_model_parallel()
    for name, value in list(vars(mpu).items()):
        if isinstance(value, dist.ProcessGroup):
            setattr(mpu, name, None)  # megatron forgets some itself
    while _built:
        group = _built.pop()
        if group in _known_groups():
            dist.destroy_process_group(group)


def _known_groups() -> list[dist.ProcessGroup]:
    """Every process group of torch.distributed in this process, in the order of their making."""
    return list(dist.distributed_c10d._world.pg_map)


def build_groups(layout: Layout, timeout_minutes: float) -> Groups:
    """Groups of a layout in megatron's globals, which must be empty; `initialize` and `second_layout` see to that."""
    before = _known_groups()
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
        create_gloo_process_groups=False,  # nothing here uses them, and beside NCCL they need an interface of their own
    )
    _built.extend(group for group in _known_groups() if group not in before)
    pg = ProcessGroupCollection.use_mpu_process_groups()
    return Groups(
        layout=layout,
        pg=pg,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=pg.tp.rank(),
        pp_rank=pg.pp.rank(),
        cp_rank=pg.cp.rank(),
        dp_rank=pg.dp.rank(),
        dp_size=pg.dp.size(),
    )


def _object_device() -> torch.device:
    return default_device() if dist.get_backend() == "nccl" else torch.device("cpu")
