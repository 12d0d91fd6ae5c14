"""Drawing tokens from logits: one uniform number per token and request, through the inverse distribution function.

A request's uniforms come from a Philox stream of its own, so a seed gives the same sample whatever else is in the batch
(as long as the logits are the same: a matrix product may round its last bit differently for another batch size, which
changes a sample when a uniform lies within that rounding of a boundary, about one token in 10^6 in fp32).
Shapes: B sequences, V vocabulary, N tokens per sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_BLOCK = 512


def derive_seed(*parts: int | str) -> int:
    """A 64-bit seed from what identifies a sample, e.g. (run seed, step, prompt, number); stable across machines."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def uniform_numbers(seeds: Sequence[int], count: int) -> Tensor:
    """[B, N] fp64 in [0, 1): the first `count` numbers of each seed's stream."""
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(count) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def draw(logits_BV: Tensor, temperature_B: Tensor, top_p_B: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Sample one token per row.

    Args:
        logits_BV: fp32.
        temperature_B: fp32, 0 for the most likely token.
        top_p_B: fp32 in (0, 1].
        uniform_B: fp64 in [0, 1).

    Returns:
        tokens_B int64 and logprobs_B fp32: log-softmax of logits / temperature over the whole vocabulary at the token
        (temperature 1 where greedy, and not renormalised for top_p), which is what a trainer recomputes.
    """
    greedy_B = temperature_B == 0
    scaled_BV = logits_BV / torch.where(greedy_B, 1.0, temperature_B)[:, None]
    logprobs_BV = torch.log_softmax(scaled_BV, dim=-1)
    if bool(greedy_B.all()):
        tokens_B = logits_BV.argmax(-1)
    else:
        probabilities_BV = logprobs_BV.exp()
        if bool((top_p_B < 1).any()):
            probabilities_BV = _nucleus(probabilities_BV, top_p_B)
        tokens_B = _inverse_cdf(probabilities_BV, uniform_B)
        if bool(greedy_B.any()):
            tokens_B = torch.where(greedy_B, logits_BV.argmax(-1), tokens_B)
    return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0]


def _nucleus(probabilities_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Set to 0 what lies outside the smallest set of most likely tokens with at least `top_p` of the probability."""
    sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = _cumulative(sorted_BV.double()) - sorted_BV
    outside_BV = before_BV >= top_p_B.double()[:, None]
    outside_BV[:, 0] = False
    return torch.zeros_like(probabilities_BV).scatter(1, order_BV, sorted_BV.masked_fill(outside_BV, 0.0))


def _inverse_cdf(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token whose cumulated weight exceeds `uniform` times the total; weights need not sum to 1.

    In two levels, the block of tokens and then the token: no [B, V] table of sums in fp64.
    """
    rows, vocabulary = probabilities_BV.shape
    blocks = torch.nn.functional.pad(probabilities_BV, (0, -vocabulary % _BLOCK)).view(rows, -1, _BLOCK)
    block_cdf = _cumulative(blocks.sum(-1, dtype=torch.float64))
    block, below_B, target_B = _first_above(block_cdf, uniform_B * block_cdf[:, -1])
    inside_cdf = _cumulative(blocks[torch.arange(rows, device=block.device), block].double())
    token, _, _ = _first_above(inside_cdf, target_B - below_B)
    return block * _BLOCK + token


def _first_above(cdf: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index of the first entry above the target, the entry before it (0 at the start), and the target.

    The target is kept below the last entry: rounding may put it there, and then no entry would be found.
    """
    target_B = torch.minimum(target_B, torch.nextafter(cdf[:, -1], torch.zeros_like(cdf[:, -1]))).clamp(min=0.0)
    index = torch.searchsorted(cdf, target_B[:, None], right=True)[:, 0]
    below = torch.where(index > 0, cdf.gather(1, (index - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    return index, below, target_B


def _cumulative(weights: Tensor) -> Tensor:
    """Cumulative sum of the last axis; torch.cumsum has no deterministic kernel for floats on CUDA."""
    return weights.cumsum(-1) if weights.device.type == "cpu" else _blocked_cumsum(weights)


def _blocked_cumsum(weights: Tensor) -> Tensor:
    """The same by products with triangles of ones; made monotone, which the order of additions alone does not give."""
    *lead, size = weights.shape
    pieces = torch.nn.functional.pad(weights, (0, -size % _BLOCK)).view(*lead, -1, _BLOCK)
    count = pieces.shape[-2]
    inside = pieces @ torch.ones(_BLOCK, _BLOCK, dtype=weights.dtype, device=weights.device).triu()
    before = inside[..., -1] @ torch.ones(count, count, dtype=weights.dtype, device=weights.device).triu(1)
    cumulated = (inside + before[..., None]).reshape(*lead, -1)[..., :size]
    return torch.cummax(cumulated, dim=-1).values
