from __future__ import annotations

import gc
import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.parallel.forked import WorkerError, run_forked, single_process
from tulu_hpc.parallel.collectives import sum_over
from tulu_hpc.parallel.layout import Layout, LayoutError, destroy, initialize, initialize_fake


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tensor": 0}, "layout.tensor = 0"),
        ({"virtual_pipeline": 2}, "pipeline >= 2"),
        ({"virtual_pipeline": 1, "pipeline": 2}, "at least 2 chunks"),
    ],
)
def test_impossible_layouts_are_refused(fields: dict[str, int], words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        Layout(**fields)  # type: ignore[arg-type]


def test_world_size_must_hold_whole_replicas() -> None:
    with pytest.raises(LayoutError, match=r"6 processes .* tensor 2 x pipeline 2 x context 1 = 4"):
        Layout(tensor=2, pipeline=2).data(6)
    with pytest.raises(LayoutError, match="1 processes"):
        initialize(Layout(tensor=2), seed=0)
    assert not dist.is_initialized()


def test_one_process_needs_no_environment() -> None:
    with single_process() as groups:
        assert (groups.rank, groups.world_size, groups.dp_size) == (0, 1, 1)
        assert groups.is_main
        assert groups.is_first_stage
        assert groups.is_last_stage
        assert groups.broadcast_object({"a": 1}) == {"a": 1}
        assert groups.all_gather_object(3) == [3]
        groups.barrier()
    assert not dist.is_initialized()


def test_sequence_parallelism_without_tensor_parallelism_has_no_effect() -> None:
    assert not Layout(sequence=True).sequence_parallel
    assert Layout(sequence=True, context=2).row_multiple == 2
    assert Layout(sequence=True, tensor=2, context=2).row_multiple == 4
    assert Layout(tensor=2, context=2).row_multiple == 2


def places() -> list[tuple[int, ...]]:
    found = []
    for layout in (Layout(tensor=2), Layout(pipeline=2), Layout(context=2), Layout(tensor=2, pipeline=2), Layout()):
        g = initialize(layout, seed=1)
        found.append((g.rank, g.tp_rank, g.pp_rank, g.cp_rank, g.dp_rank, g.dp_size))
        assert g.broadcast_object(f"from {g.rank}", source=2) == "from 2"
        assert g.all_gather_object(g.rank) == [0, 1, 2, 3]
        assert (g.pg.tp.size(), g.pg.pp.size(), g.pg.cp.size()) == (g.tp_size, g.pp_size, g.cp_size)
    return found


def test_every_rank_has_its_own_place_in_each_layout() -> None:
    ranks = run_forked(4, places)
    for layout in zip(*ranks, strict=True):
        assert [place[0] for place in layout] == [0, 1, 2, 3]
        assert len({place[1:5] for place in layout}) == 4
    # Global rank 0 is the first of every group: it can write what its stage 0, shard 0 collects.
    assert all(place[1:5] == (0, 0, 0, 0) for place in ranks[0])


def threads_after(times: int) -> int:
    for _ in range(times):
        initialize(Layout(tensor=2), seed=1)
        gc.collect()
    return len(os.listdir("/proc/self/task"))


def test_groups_of_an_earlier_layout_are_ended() -> None:
    assert run_forked(2, threads_after, 6) == run_forked(2, threads_after, 2)


def test_a_rank_of_a_job_that_does_not_exist() -> None:
    try:
        groups = initialize_fake(Layout(tensor=8, pipeline=16, sequence=True), rank=128 + 8 * 3 + 5, world_size=256)
        assert (groups.tp_rank, groups.dp_size, groups.world_size) == (5, 2, 256)
        assert groups.pp_rank == (128 + 8 * 3 + 5) // 16
    finally:
        destroy()


def sum_twice() -> tuple[float, float]:
    groups = initialize(Layout(context=2), seed=0)
    x = torch.tensor([1.0 + groups.rank], requires_grad=True)
    total = sum_over(x, groups.pg.cp)
    total.square().sum().backward()
    assert x.grad is not None
    return float(total), float(x.grad)


def test_sum_over_passes_the_gradient_through() -> None:
    # d(total^2)/d(total) = 2 total = 6 reaches each addend once, not once per rank.
    assert run_forked(2, sum_twice) == [(3.0, 6.0), (3.0, 6.0)]
    x = torch.ones(2)
    assert sum_over(x, None) is x


def fail_on_one() -> None:
    if int(os.environ["RANK"]) == 1:
        raise ValueError("this rank had enough")
    dist.barrier()


def stop_on_one() -> None:
    if int(os.environ["RANK"]) == 1:
        os._exit(3)


def hang() -> None:
    time.sleep(60)


def test_forked_workers_report_failures() -> None:
    with pytest.raises(WorkerError, match=r"rank 1(.|\n)*this rank had enough"):
        run_forked(2, fail_on_one)
    with pytest.raises(WorkerError, match="rank 1: died without a word"):
        run_forked(2, stop_on_one)
    with pytest.raises(WorkerError, match="did not finish within"):
        run_forked(1, hang, timeout=1)
    with single_process(), pytest.raises(RuntimeError, match="process group runs"):
        run_forked(1, hang)
