"""The FLOP formula against torch's counter on a transformers Llama, and the counts it is fed against a slow reading."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.data.builders import random_items
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.data.flops import Recompute, Work, forward_flops, hardware_flops, item_work, model_flops, pack_work
from tulu_hpc.data.packed_batch import PackedBatch, pack

ARCHITECTURE = Architecture(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,  # not hidden / heads: N D and H must not be confused
    max_position_embeddings=64,
)
LENGTH = 21


def counted(*, checkpointing: bool = False) -> int:
    """Operations of forward and backward of a dense model, all tokens scored, by torch's counter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE.to_hf(), attn_implementation="eager")).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(0, ARCHITECTURE.vocab_size, (1, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False).logits.sum().backward()
    return int(counter.get_total_flops())


# Dense attention multiplies every row with every key, the masked ones too.
DENSE = Work(rows=LENGTH, pairs=LENGTH * LENGTH, head_rows=LENGTH)


def test_forward_and_backward_are_what_torch_counts() -> None:
    assert model_flops(ARCHITECTURE, DENSE) == counted()


def test_full_recomputation_is_what_torch_counts() -> None:
    # torch stops a recomputation once the last saved tensor is there, before the down projection: count that too.
    missing = 2 * ARCHITECTURE.hidden_size * ARCHITECTURE.intermediate_size * LENGTH * ARCHITECTURE.num_hidden_layers
    assert hardware_flops(ARCHITECTURE, DENSE, "full") == counted(checkpointing=True) + missing


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_recomputation_adds_to_hardware_flops_only(recompute: Recompute) -> None:
    forward = forward_flops(ARCHITECTURE, DENSE)
    again = {"none": 0, "selective": forward.attention, "full": forward.total - forward.head}[recompute]
    assert hardware_flops(ARCHITECTURE, DENSE, recompute) - model_flops(ARCHITECTURE, DENSE) == again


def slow_work(batch: PackedBatch) -> Work:
    pairs = 0
    for segment in range(len(batch.cu_seqlens) - 1):
        begin, end = batch.cu_seqlens[segment : segment + 2].tolist()
        low, high = batch.prefix_S2[segment].tolist()
        pairs += sum(high - low + row - begin + 1 for row in range(begin, end))
    return Work(batch.tokens_T.numel(), pairs, len(set(batch.hidden_row_K.tolist())))


@pytest.mark.parametrize("kinds", ["s", "p", "g", "S", "P", "G", "GSPpgs", "sgSsGp"])
@pytest.mark.parametrize("share", [True, False])
def test_work_of_packs_and_items(kinds: str, share: bool) -> None:
    items = random_items(kinds, seed=5)
    batch = pack(items, share=share)
    assert pack_work(batch) == slow_work(batch)
    assert sum((item_work(item, share=share) for item in items), Work()) == slow_work(batch)
    padded = pack(items, share=share, multiple=16)
    padding = padded.num_rows - batch.num_rows
    assert pack_work(padded) == slow_work(batch) + Work(padding, padding * (padding + 1) // 2)
    assert pack_work(padded) == slow_work(padded)


def test_sharing_a_prompt_saves_its_rows_and_not_its_pairs_with_the_answers() -> None:
    (item,) = random_items("p", seed=1)
    prompt = item.prompt.numel()
    saved = [item_work(item, share=False), item_work(item, share=True)]
    assert saved[0].rows - saved[1].rows == prompt
    assert saved[0].pairs - saved[1].pairs == prompt * (prompt + 1) // 2
