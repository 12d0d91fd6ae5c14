"""What the gain is made of: each part of our trainer that can be taken away, so that a run without it can be timed.

Shapes: T rows of a pack, K targets, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tulu_hpc.data.packed_batch import Item, TokenSequence, rows_of
from tulu_hpc.kernels.linear_logprob.ops import LogprobOutput
from tulu_hpc.models import llama


def pad_to_longest(items: Sequence[Item], group: int) -> list[Item]:
    """Every sequence as long as the longest of its `group` items, by tokens at its end that are not trained.

    Groups are taken in the order of `items`; that is what a trainer computes that stacks `group` rows (or pairs) into
    one rectangle. The targets stay the same.
    """
    padded = []
    for start in range(0, len(items), group):
        members = items[start : start + group]
        longest = max(item.prompt.numel() + len(r) for item in members for r in item.responses)
        for item in members:
            length = longest - item.prompt.numel()
            padded.append(replace(item, responses=[_padded(response, length) for response in item.responses]))
    return padded


def _padded(response: TokenSequence, length: int) -> TokenSequence:
    missing = length - len(response)
    mask = torch.ones(len(response), dtype=torch.bool) if response.mask is None else response.mask
    return TokenSequence(
        torch.cat((response.tokens, response.tokens.new_zeros(missing))), torch.cat((mask, mask.new_zeros(missing)))
    )


def longest_item(items: Sequence[Item], share: bool) -> int:
    """Rows of the largest item."""
    return max(rows_of(item, share) for item in items)


def use_full_logits() -> None:
    """Replace the fused head of every model in this process: logits of all rows, then log_softmax, then the targets."""
    llama.linear_logprob = _full_logits  # type: ignore[assignment]


def _full_logits(
    hidden_TH: Tensor, weight_VH: Tensor, target_K: Tensor, *, row_K: Tensor, **others: Any
) -> LogprobOutput:
    logprobs_TV = torch.log_softmax(hidden_TH @ weight_VH.T, dim=-1)
    return LogprobOutput(logprobs_TV[row_K, target_K], None)
