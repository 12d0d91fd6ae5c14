"""linear_logprob over tensor-parallel ranks (forked processes, gloo) against one process."""

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tulu_hpc.kernels import linear_logprob, triton_support
from tulu_hpc.kernels.linear_logprob.problem import Problem

T, H, V = 12, 8, 50


def _rank(
    function: Callable[..., None], rank: int, size: int, store: str, errors: Any, arguments: tuple[Any, ...]
) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
        function(*arguments)
        dist.destroy_process_group()
    except BaseException:
        errors.put(f"rank {rank}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None


def run_ranks(size: int, tmp_path: Path, function: Callable[..., None], *arguments: Any) -> None:
    """Runs function(*arguments) in `size` forked processes of one gloo group; fails with their tracebacks."""
    context = multiprocessing.get_context("fork")
    errors = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(function, rank, size, str(tmp_path / "store"), errors, arguments))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    alive = [process for process in ranks if process.is_alive()]
    for process in alive:
        process.kill()
    texts = []
    while not errors.empty():
        texts.append(errors.get())
    assert not texts and not alive and all(p.exitcode == 0 for p in ranks), "\n".join(texts) or "a rank hung or died"


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(T, H, generator=generator, dtype=torch.float64).to(dtype)
    weight = (2 * torch.randn(V, H, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(0, V, (17,), generator=generator)
    target[0], target[1], target[5] = V - 1, 0, -100
    row = torch.randint(0, T, (17,), generator=generator)
    grads = torch.randn(2, 17, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, target, row, grads


def check_rank(cuts: list[int], sequence_parallel: bool, backend: str, dtype: torch.dtype, tolerance: float) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, target, row, grads = data(dtype)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    options = {"row_K": row, "return_entropy": True, "temperature": 0.8, "backend": backend}
    whole = linear_logprob(hidden, weight, target, **options)
    assert whole.entropy_K is not None
    whole_grads = torch.autograd.grad(
        (whole.logprobs_K * grads[0] + whole.entropy_K * grads[1]).sum(), (hidden, weight)
    )

    shard = weight.detach()[cuts[rank] : cuts[rank + 1]].clone().requires_grad_()
    rows = slice(rank * T // size, (rank + 1) * T // size) if sequence_parallel else slice(None)
    local = hidden.detach()[rows].clone().requires_grad_()
    mine = linear_logprob(
        local,
        shard,
        target,
        tp_group=dist.group.WORLD,
        sequence_parallel=sequence_parallel,
        vocab_start=cuts[rank],
        **options,
    )
    assert mine.entropy_K is not None
    mine_grads = torch.autograd.grad((mine.logprobs_K * grads[0] + mine.entropy_K * grads[1]).sum(), (local, shard))
    for got, want in (
        (mine.logprobs_K, whole.logprobs_K),
        (mine.entropy_K, whole.entropy_K),
        (mine_grads[0], whole_grads[0][rows]),
        (mine_grads[1], whole_grads[1][cuts[rank] : cuts[rank + 1]]),
    ):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "cuts",
    [[0, 25, 50], [0, 32, 50], [0, 50, 50], [0, 0, 50]],
    ids=["equal", "last shorter", "last empty", "first empty"],
)
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
def test_two_ranks_equal_one(tmp_path, cuts, sequence_parallel):
    run_ranks(2, tmp_path, check_rank, cuts, sequence_parallel, "cpu", torch.float32, 2e-5)


# Shards of 13 are those of a vocabulary padded to 52, without the padding.
@pytest.mark.parametrize("cuts", [[0, 13, 26, 39, 50], [0, 16, 32, 48, 50]], ids=["padded", "last shorter"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
def test_four_ranks_equal_one(tmp_path, cuts, sequence_parallel):
    run_ranks(4, tmp_path, check_rank, cuts, sequence_parallel, "cpu", torch.float32, 2e-5)


def test_four_ranks_in_float64(tmp_path):
    run_ranks(4, tmp_path, check_rank, [0, 13, 26, 39, 50], True, "reference", torch.float64, 1e-12)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
def test_two_ranks_with_the_fused_kernels(tmp_path, sequence_parallel):
    if torch.cuda.is_available() or triton_support.status() != "usable":
        pytest.skip("runs in Triton's interpreter")
    run_ranks(2, tmp_path, check_rank, [0, 32, 50], sequence_parallel, "triton", torch.float32, 2e-5)


def order_rank(sequence_parallel: bool, buffer: int, backend: str, wanted: list[str]) -> None:
    """What the backward pass does, in order."""
    rank, size = dist.get_rank(), dist.get_world_size()
    log: list[str] = []
    for name in ("all_reduce", "reduce_scatter_tensor"):
        original = getattr(dist, name)

        def collective(*tensors: Any, group: Any, async_op: bool, name: str = name, original: Any = original) -> Any:
            assert async_op
            log.append(f"start {name}")
            work = original(*tensors, group=group, async_op=True)

            class Watched:
                def wait(self) -> None:
                    work.wait()
                    log.append("wait")

            return Watched()

        setattr(dist, name, collective)
    gemm, gemm_add = Problem.gemm, Problem.gemm_add

    def logged(self: Problem, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        log.append("logits" if out.shape[1] != H else "d weight")
        gemm(self, a, b, out)

    def logged_add(self: Problem, total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        log.append("d weight" if len(total) == 25 else "d hidden")
        gemm_add(self, total, a, b)

    Problem.gemm, Problem.gemm_add = logged, logged_add  # type: ignore[method-assign]
    hidden, weight, target, row, _ = data()
    shard = weight[25 * rank : 25 * rank + 25].clone().requires_grad_()
    local = hidden[rank * T // size : (rank + 1) * T // size] if sequence_parallel else hidden
    out = linear_logprob(
        local.clone().requires_grad_(),
        shard,
        target,
        row_K=row,
        tp_group=dist.group.WORLD,
        sequence_parallel=sequence_parallel,
        max_buffer_bytes=buffer,
        backend=backend,
    )
    log.clear()
    out.logprobs_K.sum().backward()
    assert log == wanted, log


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
def test_gradient_of_hidden_is_reduced_beside_the_last_weight_product(tmp_path, backend, sequence_parallel, kept):
    start = "start reduce_scatter_tensor" if sequence_parallel else "start all_reduce"
    # All used rows in one block, or in two.
    recomputed = ["logits", "d hidden", "d weight", "logits", "d hidden", start, "d weight", "wait"]
    rows = len(set(data()[3][data()[2] != -100].tolist()))
    wanted = ["d hidden", start, "d weight", "wait"] if kept else recomputed
    run_ranks(
        2, tmp_path, order_rank, sequence_parallel, 2**20 if kept else 64 * rows + 4 * 25 * (rows - 1), backend, wanted
    )


def zero_gradient_rank(sequence_parallel: bool) -> None:
    """Rows with an upstream gradient of zero, or all of them: every rank still enters the collective."""
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, target, row, grads = data()
    for weights in (grads[0] * (torch.arange(17) % 3 == 0), torch.zeros(17)):
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        whole = linear_logprob(hidden, weight, target, row_K=row).logprobs_K
        want = torch.autograd.grad((whole * weights).sum(), (hidden, weight))
        rows = slice(rank * T // size, (rank + 1) * T // size) if sequence_parallel else slice(None)
        local = hidden.detach()[rows].clone().requires_grad_()
        shard = weight.detach()[25 * rank : 25 * rank + 25].clone().requires_grad_()
        mine = linear_logprob(
            local, shard, target, row_K=row, tp_group=dist.group.WORLD, sequence_parallel=sequence_parallel
        ).logprobs_K
        got = torch.autograd.grad((mine * weights).sum(), (local, shard))
        torch.testing.assert_close(got[0], want[0][rows], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(got[1], want[1][25 * rank : 25 * rank + 25], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
def test_rows_without_a_gradient(tmp_path, sequence_parallel):
    run_ranks(2, tmp_path, zero_gradient_rank, sequence_parallel)


def invariant_rank() -> None:
    """Batch invariance holds over ranks too: the shards' statistics are merged rank by rank."""
    rank = dist.get_rank()
    hidden, weight, target, row, _ = data()
    options = {"return_entropy": True, "tp_group": dist.group.WORLD, "batch_invariant": True, "vocab_start": 13 * rank}
    shard = weight[13 * rank : 13 * rank + 13]
    whole = linear_logprob(hidden, shard, target, row_K=row, **options)
    assert whole.entropy_K is not None
    for choice in ([3], [8, 2], list(range(1, 17)), list(range(16, 0, -1))):
        some = linear_logprob(hidden, shard, target[choice], row_K=row[choice], **options)
        assert torch.equal(some.logprobs_K, whole.logprobs_K[choice])
        assert some.entropy_K is not None and torch.equal(some.entropy_K, whole.entropy_K[choice])


def test_batch_invariance(tmp_path):
    run_ranks(4, tmp_path, invariant_rank)


def extreme_rank() -> None:
    """Shards whose maxima are 2e4 apart; the default vocab_start of equal shards."""
    rank = dist.get_rank()
    weight = torch.tensor([[1e4], [9999.0], [-1e4], [-1e4]])
    shard = weight[2 * rank : 2 * rank + 2].clone().requires_grad_()
    out = linear_logprob(torch.ones(2, 1), shard, torch.tensor([1, 3]), return_entropy=True, tp_group=dist.group.WORLD)
    assert out.entropy_K is not None
    want = torch.tensor([9999.0, -1e4]).double() - weight.double().flatten().logsumexp(0)
    torch.testing.assert_close(out.logprobs_K.double(), want, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(out.logprobs_K.sum() + out.entropy_K.sum(), shard)
    assert torch.isfinite(grad).all()


def test_extreme_logits(tmp_path):
    run_ranks(2, tmp_path, extreme_rank)


def collectives_rank(limit: int) -> None:
    """One all-gather of four numbers per target in the forward pass."""
    calls: list[int] = []
    original = dist.all_gather_into_tensor

    def counted(out: torch.Tensor, x: torch.Tensor, group: Any = None) -> None:
        calls.append(x.numel())
        original(out, x, group=group)

    dist.all_gather_into_tensor = counted
    hidden, weight, target, row, _ = data()
    linear_logprob(
        hidden,
        weight[:25],
        target,
        row_K=row,
        return_entropy=True,
        tp_group=dist.group.WORLD,
        vocab_start=25 * dist.get_rank(),
    )
    assert calls == [limit], calls


def test_one_collective_of_four_numbers_per_target(tmp_path):
    run_ranks(2, tmp_path, collectives_rank, 4 * 16)


def missing_rank() -> None:
    with pytest.raises(ValueError, match="target 99 lies outside"):
        linear_logprob(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([99]), tp_group=dist.group.WORLD)


def test_target_in_no_shard_is_an_error(tmp_path):
    run_ranks(2, tmp_path, missing_rank)
