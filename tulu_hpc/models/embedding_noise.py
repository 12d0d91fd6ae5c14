"""NEFTune: uniform noise on the embeddings while fine-tuning (Jain et al., arXiv:2310.05914, algorithm 1).

The paper adds Uniform(-1, 1) * alpha / sqrt(L H) to the embeddings of a sequence of L tokens and H dimensions. Here the
draw is a hash of (row key, dimension) instead of a generator's next number, so that a row gets the same noise whatever
the layout, the packing and the micro-batch.

Shapes: T rows of this rank, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from tulu_hpc.data.packed_batch import PackedBatch

KEY, SCALE = "neftune_key", "neftune_scale"  # per-row columns of a pack
# Constants of the 64-bit finaliser of SplitMix (Steele et al., 2014), as signed numbers.
_GAMMA, _MIX1, _MIX2 = (
    value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # fmt: skip


def add_noise_columns(packs: Sequence[PackedBatch], *, alpha: float, seed: int, step: int) -> None:
    """Give every pack the per-row columns `neftune_key` (int64) and `neftune_scale` (fp32, alpha / sqrt(L)).

    Args:
        packs: of ordinary sequences; padding rows get scale 0.
        alpha: of the paper (5 to 15 there).
        seed, step: with the sample's id and the row's position, what the draw depends on.

    Raises:
        ValueError: a pack shares prompts: a prompt's rows would belong to several sequences.
    """
    for pack in packs:
        if bool((pack.prefix_S2[:, 1] > pack.prefix_S2[:, 0]).any()):
            raise ValueError("embedding noise is for ordinary sequences, the pack shares prompts")
        key_T = torch.zeros(pack.num_rows, dtype=torch.int64)
        scale_T = torch.zeros(pack.num_rows)
        # Sequences of a single token have no row, and what follows the last sequence is padding.
        last_row = torch.zeros(pack.num_sequences, dtype=torch.int64) - 1
        last_row.scatter_reduce_(0, pack.sequence_id_K, pack.hidden_row_K, "amax")
        bounds = pack.cu_seqlens.long()
        for sequence, row in enumerate(last_row.tolist()):
            if row < 0:
                continue
            segment = int(torch.searchsorted(bounds, row, right=True)) - 1
            begin, end = int(bounds[segment]), int(bounds[segment + 1])
            name = f"{seed}/{step}/{pack.item_ids[int(pack.per_sequence['item'][sequence])]}"
            first = xxhash.xxh3_64_intdigest(name.encode()) >> 1
            key_T[begin:end] = first + torch.arange(end - begin) * _GAMMA
            scale_T[begin:end] = alpha / (end - begin) ** 0.5
        pack.per_row.update({KEY: key_T, SCALE: scale_T})


def uniform_noise(key_T: Tensor, hidden: int) -> Tensor:
    """[T, H] fp32 in [-1, 1), a pure function of the keys.

    Args:
        key_T: int64.
    """
    column_H = torch.arange(1, hidden + 1, device=key_T.device, dtype=torch.int64)
    x = _mix(_mix(key_T)[:, None] + column_H * _GAMMA)
    return (x >> 40).to(torch.float32) * 2.0**-23  # the top 24 bits, as a signed number


def noisy(embedding_T1H: Tensor, key_T: Tensor, scale_T: Tensor) -> Tensor:
    """The embeddings of some rows with their noise, in the embeddings' dtype; the gradient passes unchanged."""
    hidden = embedding_T1H.shape[-1]
    noise_TH = uniform_noise(key_T, hidden) * (scale_T / hidden**0.5)[:, None]
    return embedding_T1H + noise_TH[:, None].to(embedding_T1H.dtype)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _MIX1
    x = (x ^ _shifted(x, 27)) * _MIX2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch has only the arithmetic one."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
