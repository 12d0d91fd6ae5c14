"""policy_loss where a rank has a part of every sequence: with sums added over ranks it is that of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.kernels.policy_cases import NAMES, SOME, cast, pack, run
from tests.parallel.forked import run_forked
from tulu_hpc.kernels import policy_sequence_sums


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


def sequence_sums(columns: dict[str, Tensor], options: dict[str, Any], sequences: int = 5) -> Tensor:
    names = ("importance", "importance_level", "importance_low", "importance_high")
    wanted = {name: column for name, column in columns.items() if name not in ("reference_logprobs_K", "entropy_K")}
    return policy_sequence_sums(
        **wanted, num_sequences=sequences, **{name: options[name] for name in names if name in options}
    )


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


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("with_sums", [False, True])
def test_clips_of_gspo(backend: str, with_sums: bool) -> None:
    """Mean log-ratios 0.5, 0.5, -0.5, 0.1 with advantages -1, 1, -1, -1: dual clip, high, low, none."""
    lengths = torch.tensor([2, 3, 1, 2])
    ids = torch.arange(4).repeat_interleave(lengths)
    old = torch.full((8,), -1.0)
    columns = {
        "logprobs_K": old + torch.tensor([0.5, 0.5, -0.5, 0.1])[ids] + torch.tensor([0.1, -0.1, 0, 0, 0, 0, 0.2, -0.2]),
        "behaviour_logprobs_K": old,
        "advantages_K": torch.tensor([-1.0, 1.0, -1.0, -1.0])[ids],
        "sequence_id_K": ids,
    }
    sums = sequence_sums(columns, {}, 4) if with_sums else None
    options = {"kind": "gspo", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 1.3, "num_sequences": 4}
    out, grad, _ = run(columns, **options, sequence_sums_Q5=sums, backend=backend)
    ratio = torch.tensor(0.1).exp()
    torch.testing.assert_close(out.loss, 2 * 1.3 - 3 * 1.2 + 0.8 + 2 * ratio)
    torch.testing.assert_close(grad / 1.5, torch.cat([torch.zeros(6), ratio.expand(2)]))
    assert out.active_K.tolist() == [False] * 6 + [True] * 2
    counts = {"dual_clip_fraction": 2, "clip_fraction_high": 3, "clip_fraction_low": 1, "clip_fraction": 4}
    assert {name: int(out.metrics[f"policy/{name}"]) for name in counts} == counts
