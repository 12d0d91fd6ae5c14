"""The baseline z of kto, estimated at every step: how far the policy is from the reference on answers that do not fit.

As in the paper [2402.01306, section 4.1], z is the mean log-ratio of answers to the prompts of other rows. Which answer
goes with which prompt is fixed by the order of the data, so that z is the same at any layout and the reference's
log-probs of these answers can be cached like all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tulu_hpc.data.loader import pack_items
from tulu_hpc.data.packed_batch import Item, PackedBatch, TokenSequence
from tulu_hpc.training import reference
from tulu_hpc.training.pair_sums import PackOptions
from tulu_hpc.training.runner import Runner, row_multiple


def mismatched(items: Sequence[Item], max_length: int) -> list[Item]:
    """Each prompt with the answer of the next row that has another prompt, under the id of the prompt's row.

    A row is left out where there is no other prompt, or where `max_length` tokens leave no room for a scored one.
    """
    keys = [item.prompt.numpy().tobytes() for item in items]
    following = _next_other(keys)
    found = []
    for index, item in enumerate(items):
        if following[index] is None:
            continue
        (answer,) = items[following[index]].responses  # type: ignore[index]
        room = max_length - item.prompt.numel()
        mask = None if answer.mask is None else answer.mask[: max(0, room)]
        if room < 1 or (mask is not None and not mask.any()):
            continue
        response = TokenSequence(answer.tokens[:room], mask)
        found.append(Item("sequence", [response], prompt=item.prompt, id=item.id, source=item.source))
    return found


def _next_other(keys: Sequence[bytes]) -> list[int | None]:
    """For each place, going round, the next one with another key."""
    count = len(keys)
    found: list[int | None] = [None] * count
    for index in reversed(range(2 * count - 1)):
        here, after = index % count, (index + 1) % count
        found[here] = after if keys[after] != keys[here] else found[after]
    return found


@dataclass(frozen=True)
class Baseline:
    """Estimates z.

    Attributes:
        items: of `mismatched`, by id; with the reference's log-probs unless `resident` computes them.
        runner: of the policy. resident: of the reference.
    """

    items: dict[str, Item]
    runner: Runner
    resident: Runner | None
    options: PackOptions

    def estimate(self, packs: Sequence[PackedBatch]) -> float:
        """Mean log-ratio over the mismatched answers of these rows, all ranks; may be negative. Collective.

        Args:
            packs: of this data-parallel rank.
        """
        groups, options = self.runner.groups, self.options
        own = [self.items[name] for pack in packs for name in pack.item_ids if name in self.items]
        other = pack_items(
            own,
            capacity=options.pack_rows,
            multiple=row_multiple(groups.layout, self.runner.split),
            share=options.share,
            pad_id=options.pad_id,
        )
        if self.resident is not None:
            reference.add_sums(other, self.resident)
        totals = torch.zeros(2, dtype=torch.float64, device=self.runner.device)
        for pack, logprobs_K in zip(other, self.runner.logprobs(other), strict=True):
            totals[0] += logprobs_K.double().sum() - pack.per_sequence[reference.COLUMN].double().sum().item()
            totals[1] += pack.num_sequences
        if groups.dp_size > 1:
            dist.all_reduce(totals, group=groups.pg.dp)
        total, count = totals.tolist()
        return total / count if count else 0.0
