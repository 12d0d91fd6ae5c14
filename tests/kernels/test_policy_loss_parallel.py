"""policy_loss where a rank has a part of every sequence: with sums added over ranks it is that of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.kernels.policy_cases import NAMES, SOME, cast, pack, run, sequence_sums
from tests.parallel.forked import run_forked


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("options", SOME, ids=NAMES)
def test_parts_of_sequences(backend: str, options: dict[str, Any]) -> None:
    """Two ranks with parts of the sequences, in any order: losses, metrics and gradients are those of the whole."""
    columns = pack([5, 1, 0, 7, 4], seed=4)
    out, grad, grad_entropy = run(columns, **options, num_sequences=5)
    dtype = torch.float64 if backend == "reference" else torch.float32
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    ranks = [order[:6], order[6:]]
    parts = [cast({name: column[rank] for name, column in columns.items()}, dtype) for rank in ranks]
    sums = sum(sequence_sums(part, options) for part in parts)
    results = [run(part, **options, sequence_sums_Q5=sums, backend=backend) for part in parts]
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(sum(result[0].loss for result in results).double(), out.loss, **near)
    for rank, result in zip(ranks, results):
        torch.testing.assert_close(result[1].double(), grad[rank], **near)
        torch.testing.assert_close(result[2].double(), grad_entropy[rank], **near)
        assert torch.equal(result[0].active_K, out.active_K[rank])
    for name, value in out.metrics.items():
        torch.testing.assert_close(sum(result[0].metrics[name] for result in results).double(), value, **near)


def gspo_on_half() -> tuple[float, Tensor]:
    mine = torch.arange(12) % 2 == dist.get_rank()
    columns = {name: column[mine] for name, column in pack([5, 7]).items()}
    sums = sequence_sums(columns, {}, 2)
    dist.all_reduce(sums)
    out, grad, _ = run(columns, kind="gspo", normalisation="sequence_mean", sequence_sums_Q5=sums)
    whole = torch.zeros(12, dtype=torch.float64)
    whole[mine] = grad
    dist.all_reduce(whole)
    loss = out.loss.detach().clone()
    dist.all_reduce(loss)
    return float(loss), whole


def test_gspo_on_two_ranks() -> None:
    out, grad, _ = run(pack([5, 7]), kind="gspo", normalisation="sequence_mean")
    for loss, whole in run_forked(2, gspo_on_half):
        assert loss == pytest.approx(float(out.loss.detach()), rel=1e-12)
        torch.testing.assert_close(whole, grad, rtol=1e-10, atol=1e-14)
