"""Our model equals transformers' in fp32: logits, log-probs and gradients, one process.

Parallel layouts are in test_layouts.py, gradients under parallel layouts in tests/training.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.reference import (
    architecture,
    hf_logprobs,
    hf_model,
    logprobs,
    mixed_items,
    on_rank,
    ours,
    tokens,
    write_model,
)
from tests.parallel.forked import single_process
from tulu_hpc.config.architecture import Architecture, RopeScaling
from tulu_hpc.data.packed_batch import pack
from tulu_hpc.models import convert
from tulu_hpc.models.decode import Decoder
from tulu_hpc.models.llama import Llama, score
from tulu_hpc.models.names import merge_shards
from tulu_hpc.models.rope import inverse_frequencies
from tulu_hpc.parallel.layout import Groups

SHAPES: dict[str, dict[str, Any]] = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 8},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "seven heads": {"num_attention_heads": 7, "num_key_value_heads": 7, "hidden_size": 70},
    "head_dim apart from hidden": {
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "hidden_size": 60,
        "head_dim": 24,
    },
    "no scaling": {"rope_scaling": None},
    "other scaling": {
        "rope_theta": 10000.0,
        "rope_scaling": RopeScaling(
            factor=4.0, low_freq_factor=1.5, high_freq_factor=6.0, original_max_position_embeddings=32
        ),
    },
}


@pytest.fixture
def groups() -> Iterator[Groups]:
    with single_process() as made:
        yield made


def gradients(chunks: list[Llama], shape: Architecture) -> dict[str, Tensor]:
    """Under Hugging Face names."""
    found = {}
    for _name, parameter, mapped in convert._parameters(chunks, shape):
        assert parameter.grad is not None
        found.update(zip(mapped.hf_names, merge_shards(mapped, [parameter.grad], shape), strict=True))
    return found


def largest_relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in b)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_logprobs_gradients(name: str, groups: Groups, tmp_path: Path) -> None:
    shape = architecture(**SHAPES[name])
    path = write_model(shape, tmp_path / "model")
    theirs, chunks = hf_model(path), ours(shape, path, groups)

    generator = torch.Generator().manual_seed(3)
    prompts = [tokens(n, generator) for n in (48, 5, 17)]
    logits = Decoder(chunks, groups, shape, max_sequences=3, max_length=64).prefill(prompts, [1, 1, 1])
    with torch.no_grad():
        expected = torch.stack([theirs(prompt[None]).logits[0, -1] for prompt in prompts])
    assert logits is not None
    assert float(logits.abs().max()) > 1
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)

    items = mixed_items()
    got, want = logprobs(chunks, items, shape, groups), hf_logprobs(theirs, items)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    weights = torch.randn(len(got), generator=generator)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    expected_gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert largest_relative(gradients(chunks, shape), expected_gradients) <= 1e-5


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(recompute: str, groups: Groups, tmp_path: Path) -> None:
    shape = architecture()
    path = write_model(shape, tmp_path / "model")
    results = []
    for how in ("none", recompute):
        chunks = ours(shape, path, groups, recompute=how)
        out = logprobs(chunks, mixed_items(), shape, groups)
        out.square().sum().backward()
        results.append((out.detach(), gradients(chunks, shape)))
    (plain, plain_gradients), (again, again_gradients) = results
    assert torch.equal(plain, again)
    assert all(torch.equal(plain_gradients[n], again_gradients[n]) for n in plain_gradients)


def test_shared_prompts_equal_expanded_ones(groups: Groups, tmp_path: Path) -> None:
    shape = architecture()
    chunks = ours(shape, write_model(shape, tmp_path / "model"), groups)
    items = mixed_items(seed=5, kinds="pgpg")
    shared, expanded = pack(items), pack(items, share=False)
    assert shared.num_rows < expanded.num_rows
    torch.testing.assert_close(
        logprobs(chunks, items, shape, groups), logprobs(chunks, items, shape, groups, share=False), atol=1e-5, rtol=0
    )


def test_positions_that_restart_are_seen(groups: Groups, tmp_path: Path) -> None:
    """Negative control: RoPE by segment (what cu_seqlens alone would give) must fail the parity test by far."""
    shape = architecture()
    chunks = ours(shape, write_model(shape, tmp_path / "model"), groups)
    batch = on_rank(pack(mixed_items(seed=5, kinds="ppgg")), shape, groups)
    right = score(chunks[0], batch).logprobs_K
    cu = batch.batch.cu_seqlens.tolist()
    batch.position_ids_1T = torch.cat([torch.arange(b - a) for a, b in pairwise(cu)])[None]
    wrong = score(chunks[0], batch).logprobs_K
    assert float((right - wrong).abs().max()) > 1e-2


def test_past_the_original_context(groups: Groups, tmp_path: Path) -> None:
    """600 tokens, original context 16: frequencies are scaled exactly as in transformers."""
    shape = architecture(num_hidden_layers=2)
    path = write_model(shape, tmp_path / "model")
    prompt = tokens(600, torch.Generator().manual_seed(0))
    logits = Decoder(ours(shape, path, groups), groups, shape, 1, 600).prefill([prompt], [1])
    with torch.no_grad():
        torch.testing.assert_close(logits, hf_model(path)(prompt[None]).logits[:, -1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["grouped-query", "no scaling", "other scaling"])
def test_inverse_frequencies_are_bitwise_those_of_transformers(name: str, tmp_path: Path) -> None:
    shape = architecture(**SHAPES[name])
    theirs = hf_model(write_model(shape, tmp_path / "model")).model.rotary_emb.inv_freq
    assert torch.equal(inverse_frequencies(shape), theirs)


def test_entropy_and_temperature(groups: Groups, tmp_path: Path) -> None:
    shape = architecture()
    path = write_model(shape, tmp_path / "model")
    chunks, theirs = ours(shape, path, groups), hf_model(path)
    chunks[0].return_entropy, chunks[0].logprob_temperature = True, 0.7
    items = mixed_items(kinds="s")
    out = score(chunks[0], on_rank(pack(items), shape, groups))
    sequence = items[0].responses[0].tokens
    with torch.no_grad():
        table = (theirs(sequence[None]).logits[0, :-1] / 0.7).log_softmax(-1)
    torch.testing.assert_close(out.logprobs_K, table.gather(1, sequence[1:, None])[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.entropy_K, -(table.exp() * table).sum(-1), atol=1e-5, rtol=0)


def test_padding_rows_of_the_vocabulary_get_no_gradient(groups: Groups, tmp_path: Path) -> None:
    shape = architecture()
    chunks = ours(shape, write_model(shape, tmp_path / "model"), groups, vocab_multiple=64)
    model = chunks[0]
    assert model.output_layer.weight.shape[0] == 192
    assert not model.output_layer.weight[shape.vocab_size :].any()
    logprobs(chunks, mixed_items(), shape, groups).sum().backward()
    for weight in (model.output_layer.weight, model.embedding.word_embeddings.weight):
        assert weight.grad is not None
        assert not weight.grad[shape.vocab_size :].any()
        assert weight.grad[: shape.vocab_size].any()


def test_bfloat16_is_close_to_fp32(groups: Groups, tmp_path: Path) -> None:
    """Finite, near and unbiased; how near is a property of bf16, not proven here."""
    shape = architecture()
    path = write_model(shape, tmp_path / "model")
    exact = logprobs(ours(shape, path, groups), mixed_items(), shape, groups)
    rough = logprobs(ours(shape, path, groups, dtype=torch.bfloat16), mixed_items(), shape, groups)
    assert rough.dtype == torch.float32
    assert float((exact - rough).abs().mean()) < 0.1
