"""Small Llamas, packs for them, and what transformers says about both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tulu_hpc.config.architecture import Architecture, RopeScaling
from tulu_hpc.data.packed_batch import Item, PackedBatch, TokenSequence, pack
from tulu_hpc.models.build import build_model, local_heads
from tulu_hpc.models.convert import load_hf
from tulu_hpc.models.initialise import random_hf_model
from tulu_hpc.models.llama import Llama, TokenLogprobs, score
from tulu_hpc.parallel.context import RankBatch, rank_batch
from tulu_hpc.parallel.layout import Groups

VOCAB = 131  # odd, so that two tensor-parallel ranks need vocabulary padding
CPU = torch.device("cpu")


def architecture(**changes: Any) -> Architecture:
    """Four layers, grouped-query attention, llama3 scaling whose original context (16) the packs exceed."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rope_scaling": RopeScaling(factor=8.0, original_max_position_embeddings=16),
    }
    return Architecture(**{**fields, **changes})


def write_model(shape: Architecture, path: Path, seed: int = 1) -> Path:
    """Weights that make every part count: attention far from uniform, logits of order one."""
    random_hf_model(shape, path, seed=seed, embedding_std=0.3, linear_std=0.12, scale_residual_outputs=False)
    return path


def hf_model(path: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def ours(shape: Architecture, path: Path, groups: Groups, **options: Any) -> list[Llama]:
    chunks = build_model(shape, groups, device=CPU, **options)
    load_hf(chunks, path, shape, groups)
    return chunks


def tokens(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, VOCAB, (count,), generator=generator)


def mixed_items(seed: int = 0, kinds: str = "psgsmpg") -> list[Item]:
    """p: pair, g: group, s: sequence, m: sequence with a mask; lengths from 1 to about 60 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def length(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    items: list[Item] = []
    for kind in kinds:
        if kind in "pg":
            count = 2 if kind == "p" else 3
            responses = [TokenSequence(tokens(length(1, 12), generator)) for _ in range(count)]
            name = "pair" if kind == "p" else "group"
            items.append(Item(name, responses, prompt=tokens(length(2, 50), generator)))  # type: ignore[arg-type]
        else:
            sequence = tokens(length(4, 60), generator)
            mask = torch.rand(len(sequence), generator=generator) < 0.6 if kind == "m" else None
            items.append(Item("sequence", [TokenSequence(sequence, mask)]))
    return items


def hf_logprobs(model: LlamaForCausalLM, items: list[Item]) -> Tensor:
    """[K] log-probs of the targets, sequence by sequence, in the order of a pack; differentiable."""
    found = []
    for item in items:
        for response in item.responses:
            whole = torch.cat((item.prompt, response.tokens))
            table = model(whole[None]).logits[0].log_softmax(-1)
            start = len(item.prompt)
            for t in range(len(response.tokens)):
                wanted = response.mask is None or bool(response.mask[t])
                if wanted and start + t > 0:
                    found.append(table[start + t - 1, response.tokens[t]])
    return torch.stack(found)


def on_rank(batch: PackedBatch, shape: Architecture, groups: Groups, **options: Any) -> RankBatch:
    heads, kv_heads = local_heads(shape, groups.layout)
    return rank_batch(batch, groups, heads=heads, kv_heads=kv_heads, head_dim=shape.head_dim, device=CPU, **options)


def logprobs(chunks: list[Llama], items: list[Item], shape: Architecture, groups: Groups, **options: Any) -> Tensor:
    """[K] log-probs of one process (tp = pp = cp = 1); differentiable."""
    out = score(chunks[0], on_rank(pack(items, **options), shape, groups))
    assert isinstance(out, TokenLogprobs)
    return out.logprobs_K
