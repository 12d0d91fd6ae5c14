"""Floating-point operations of training on a pack or an item: the one formula behind MFU, balancing and planning.

Matrix products only, 2 operations per multiply-add, as in [2204.02311, appendix B] and [2205.05198]; norms, rotations,
softmax, the embedding look-up and the optimizer are left out. Unlike the 6 N D of those papers the count is exact for
the pack: attention by its (row, key) pairs, prefixes included, and the LM head for the rows that predict something.

Symbols: H hidden, F intermediate, N query heads, Nk key/value heads, D head dim, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.data.packed_batch import Item, PackedBatch, TokenSequence, shares_prompt

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Work:
    """What the network has to do for some tokens, whatever its size.

    Attributes:
        rows: tokens that go through the layers.
        pairs: (row, key) pairs of attention: a row of a segment sees its prefix, the rows before it and itself.
        head_rows: rows that predict at least one target; each goes through the LM head once.
    """

    rows: int = 0
    pairs: int = 0
    head_rows: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.rows + other.rows, self.pairs + other.pairs, self.head_rows + other.head_rows)


@dataclass(frozen=True)
class Flops:
    """Operations of one forward pass, by where they happen."""

    projections: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.projections + self.attention + self.head


def forward_flops(architecture: Architecture, work: Work) -> Flops:
    """Operations of one forward pass, all ranks together.

    Per layer and row: 2 H (N + 2 Nk) D for q, k and v, 2 N D H for the output, 6 H F for gate, up and down; per layer
    and pair: 2 N D for the score and 2 N D for the value; per head row: 2 H V (vocabulary without padding).
    """
    hidden, heads, dim = architecture.hidden_size, architecture.num_attention_heads, architecture.head_dim
    qkv = 2 * hidden * (heads + 2 * architecture.num_key_value_heads) * dim
    row = qkv + 2 * heads * dim * hidden + 6 * hidden * architecture.intermediate_size
    layers = architecture.num_hidden_layers
    return Flops(
        projections=layers * row * work.rows,
        attention=layers * 4 * heads * dim * work.pairs,
        head=2 * hidden * architecture.vocab_size * work.head_rows,
    )


def model_flops(architecture: Architecture, work: Work) -> int:
    """Operations of forward and backward pass without any recomputation: what MFU counts.

    The backward pass of a product is two products of the same size, so three times the forward pass.
    """
    return 3 * forward_flops(architecture, work).total


def hardware_flops(architecture: Architecture, work: Work, recompute: Recompute) -> int:
    """`model_flops` and what `train.recompute` makes the layers do again: what HFU counts [2205.05198].

    `selective` runs attention twice, `full` whole layers. What a fused kernel computes again inside itself (attention
    scores in its backward pass, logits that did not fit their buffer) is not counted.
    """
    forward = forward_flops(architecture, work)
    again = {"none": 0, "selective": forward.attention, "full": forward.projections + forward.attention}
    return 3 * forward.total + again[recompute]


def pack_work(batch: PackedBatch) -> Work:
    """The work of a pack; its padding rows (fewer than the layout's row multiple) are counted like others."""
    lengths = batch.cu_seqlens.diff().long()
    prefix = (batch.prefix_S2[:, 1] - batch.prefix_S2[:, 0]).long()
    pairs = (lengths * prefix + lengths * (lengths + 1) // 2).sum()
    return Work(batch.num_rows, int(pairs), int(batch.hidden_row_K.unique().numel()))


def packs_work(packs: Iterable[PackedBatch]) -> Work:
    """The work of several packs."""
    return sum((pack_work(each) for each in packs), Work())


def item_work(item: Item, *, share: bool = True) -> Work:
    """What `item` adds to a pack: the sum over a pack's items, and its padding segment, is `pack_work` of the pack."""
    prompt = item.prompt.numel()
    shared = shares_prompt(item, share)
    rows = _causal(prompt) if shared else Work()
    first_scored = False
    for response in item.responses:
        own = len(response) - 1  # nothing reads the last token
        segment = own if shared else prompt + own
        pairs = own * prompt if shared else 0
        scored, first = _scored(response, has_prompt=prompt > 0)
        if shared and first:  # predicted by the prompt's last row, which all responses have in common
            scored -= 1
            first_scored = True
        rows += _causal(segment) + Work(pairs=pairs, head_rows=scored)
    return rows + Work(head_rows=int(first_scored))


def _causal(length: int) -> Work:
    return Work(length, length * (length + 1) // 2)


def _scored(response: TokenSequence, *, has_prompt: bool) -> tuple[int, bool]:
    """Targets of a response, and whether its first token is one of them."""
    mask: Tensor | None = response.mask
    first = has_prompt and (mask is None or bool(mask[0]))
    rest = len(response) - 1 if mask is None else int(mask[1:].sum())
    return rest + int(first), first
