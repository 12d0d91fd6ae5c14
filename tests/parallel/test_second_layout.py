"""Two layouts over the same processes: each has megatron's globals to itself while it is active."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from tests.parallel.forked import run_forked
from tulu_hpc.parallel.layout import Layout, LayoutError, destroy, initialize
from tulu_hpc.parallel.second_layout import second_layout


def _sizes() -> tuple[int, int, int, int]:
    return (
        mpu.get_tensor_model_parallel_world_size(),
        mpu.get_pipeline_model_parallel_world_size(),
        mpu.get_context_parallel_world_size(),
        mpu.get_data_parallel_world_size(),
    )


def _both() -> dict[str, Any]:
    before = len(dist.distributed_c10d._world.pg_map)
    first = initialize(Layout(tensor=2), seed=1)
    generator = torch.get_rng_state()
    second = second_layout(Layout(pipeline=2, context=2), first)
    found: dict[str, Any] = {"first": _sizes(), "generator": torch.equal(generator, torch.get_rng_state())}
    tensor_group = mpu.get_tensor_model_parallel_group()
    with second.active():
        found["second"] = _sizes()
        found["ranks"] = (mpu.get_pipeline_model_parallel_rank(), mpu.get_context_parallel_rank())
        with pytest.raises(RuntimeError), second.active():
            raise RuntimeError
        found["nested"] = _sizes()
    found["back"] = _sizes()
    found["same group"] = mpu.get_tensor_model_parallel_group() is tensor_group
    found["own"] = (second.groups.pp_rank, second.groups.cp_rank, second.groups.dp_size)
    found["shares"] = second.groups.all_gather_over_replicas(first.rank), first.all_gather_over_replicas(first.rank)
    same = second_layout(Layout(tensor=2), first)
    found["shared"] = same.groups is first
    with pytest.raises(LayoutError, match="4 processes cannot hold"):
        second_layout(Layout(tensor=3), first)
    found["after the error"] = _sizes()
    initialize(Layout(), seed=1)
    found["started anew"] = _sizes()
    destroy()
    found["left"] = before, dist.is_initialized()
    return found


def test_each_has_its_own_globals() -> None:
    for rank, found in enumerate(run_forked(4, _both)):
        assert found["first"] == found["back"] == found["after the error"] == (2, 1, 1, 2)
        assert found["second"] == found["nested"] == (1, 2, 2, 1)
        assert found["ranks"] == found["own"][:2] == (rank // 2, rank % 2) and found["own"][2] == 1
        assert found["same group"] and found["generator"] and found["shared"]
        assert found["shares"] == ([rank], [rank % 2, rank % 2 + 2])
        assert found["started anew"] == (1, 1, 1, 4) and not found["left"][1]
