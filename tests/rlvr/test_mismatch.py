"""Where engine and trainer disagree: by place in the answer, by its length, and the worst token of all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tulu_hpc.data.packed_batch import Item, PackedBatch, TokenSequence, pack
from tulu_hpc.stages.rlvr_mismatch import BUCKETS, Mismatch, breach, mismatch_metrics, places

LENGTHS = ([3, 20], [70])


def groups(stale: tuple[int, ...] = ()) -> PackedBatch:
    """Two groups of two answers and one; older weights drew the answers `stale` (counted through the pack)."""
    items, answer = [], 0
    for number, lengths in enumerate(LENGTHS):
        fresh = [torch.full((n,), float(answer + index not in stale)) for index, n in enumerate(lengths)]
        answer += len(lengths)
        items.append(
            Item(
                "group",
                [TokenSequence(torch.arange(length) + 100 * number) for length in lengths],
                prompt=torch.tensor([1, 2]),
                per_sequence={"answer": [float(index) for index in range(len(lengths))]},
                per_target={"fresh": fresh},
                id=f"record{number}",
            )
        )
    return pack(items)


def compared(differences: Tensor, stale: tuple[int, ...] = (), parts: int = 1) -> list[Mismatch]:
    """The differences of all tokens of the pack, counted by `parts` ranks."""
    found = []
    where = places(groups(stale))
    trainer = torch.full_like(differences, -2.0)
    for rank in range(parts):
        share = where.each(lambda column, rank=rank: column[rank::parts])
        mismatch = Mismatch()
        mismatch.add(trainer[rank::parts], (trainer - differences)[rank::parts], share)
        found.append(mismatch)
    return found


def test_places() -> None:
    where = places(groups())
    assert where.samples == ["record0#0", "record0#1", "record1#0"]
    assert where.position_K.tolist() == [*range(3), *range(20), *range(70)]
    assert where.length_K.tolist() == [3] * 3 + [20] * 20 + [70] * 70
    assert where.token_K.tolist() == [*range(3), *range(20), *range(100, 170)] and where.fresh_K.all()
    assert places(pack([])).samples == []


@pytest.mark.parametrize("parts", [1, 3])
def test_buckets(parts: int) -> None:
    """A difference of 0.1 at the first token beyond position 15 and at those beyond 63, of 0.4 at one of them."""
    differences = torch.zeros(93)
    differences[3 + 16] = 0.1
    differences[23 + 64 :] = -0.1
    differences[23 + 66] = -0.4
    found = compared(differences, parts=parts)
    metrics = mismatch_metrics(found)
    means = {bucket: metrics.get(f"rollout/logprob_error_mean/position_{bucket}") for bucket in BUCKETS[:4]}
    assert means["0-15"] == 0 and means["256-1023"] is None
    assert means["16-63"] == pytest.approx(0.1 / (4 + 48)) and means["64-255"] == pytest.approx(0.9 / 6)
    assert metrics["rollout/logprob_error_max/position_16-63"] == pytest.approx(0.1)
    assert (
        metrics["rollout/logprob_error_max/length_64-255"]
        == pytest.approx(0.4)
        == pytest.approx(metrics["rollout/logprob_error_max"])
    )
    assert metrics["rollout/logprob_error_mean/length_16-63"] == pytest.approx(0.1 / 20)
    assert metrics["rollout/logprob_error_mean/length_0-15"] == 0
    message = breach(found, 0.2, 2.0)
    assert message == (
        "by up to 0.4 (limit 0.2) over 93 tokens; worst in sample record1#0 at position 66 of 70: token 166, "
        "trainer -2, engine -1.6, worst positions 64-255 (mean 0.15, max 0.4), "
        "worst lengths 64-255 (mean 0.0129, max 0.4)"
    )
    assert breach(found, 0.5, 2.0) is None
    assert "on average (limit 1.005) over 93 tokens; worst in sample record1#0" in (breach(found, None, 1.005) or "")


def test_nan_is_the_worst() -> None:
    differences = torch.full((93,), 0.1)
    differences[4] = math.nan
    message = breach(compared(differences, parts=2), 0.2, 2.0) or ""
    assert "by up to nan" in message and "worst in sample record0#1 at position 1 of 20: token 1," in message
    assert "worst positions 0-15 (mean nan, max nan), worst lengths 16-63 (mean nan, max nan)" in message
    assert "nan" in (breach(compared(differences), None, 2.0) or "")


def test_stale_answers_are_not_compared() -> None:
    """What another policy sampled must differ; the others are still compared."""
    differences = torch.zeros(93)
    differences[3:23] = 1.0  # of the second answer
    assert breach(compared(differences), 0.2, 2.0)
    found = compared(differences, stale=(1,))
    assert breach(found, 0.2, 2.0) is None and mismatch_metrics(found)["rollout/logprob_error_max"] == 0
    assert found[0].count == 73
    assert mismatch_metrics(compared(differences, stale=(0, 1, 2))) == {}
