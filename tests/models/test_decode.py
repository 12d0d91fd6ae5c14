"""Decoding with a key/value cache in one process; parallel layouts are in test_layouts.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.models.reference import architecture, hf_model, ours, tokens, write_model
from tests.parallel.forked import single_process
from tulu_hpc.models.cache import KVCache, attend_one_token, plan_step
from tulu_hpc.models.decode import Decoder
from tulu_hpc.parallel.layout import Groups


@pytest.fixture
def groups() -> Iterator[Groups]:
    with single_process() as made:
        yield made


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("lengths", [(7, 7), (3, 12, 1)])
def test_steps_equal_reading_everything_again(
    recompute: str, lengths: tuple[int, ...], groups: Groups, tmp_path: Path
) -> None:
    shape = architecture(num_hidden_layers=2)
    path = write_model(shape, tmp_path / "model")
    chunks, theirs = ours(shape, path, groups, recompute=recompute), hf_model(path)
    generator = torch.Generator().manual_seed(1)
    decoder = Decoder(chunks, groups, shape, max_sequences=len(lengths), max_length=20)
    for _again in range(2):  # the second round finds the memory of the first
        sequences = [tokens(n, generator) for n in lengths]
        logits = decoder.prefill(sequences, [1] * len(lengths))
        for _step in range(6):
            with torch.no_grad():
                expected = torch.stack([theirs(s[None]).logits[0, -1] for s in sequences])
            assert logits is not None
            assert not logits.requires_grad
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
            new = logits.argmax(-1)
            sequences = [torch.cat((s, new[i : i + 1])) for i, s in enumerate(sequences)]
            logits = decoder.step(new)
    assert all(module.training for module in chunks[0].modules())


def test_copies_share_one_prefill_and_part_ways(groups: Groups, tmp_path: Path) -> None:
    shape = architecture(num_hidden_layers=2)
    path = write_model(shape, tmp_path / "model")
    prompt = tokens(10, torch.Generator().manual_seed(2))
    decoder = Decoder(ours(shape, path, groups), groups, shape, max_sequences=3, max_length=12)
    together = decoder.prefill([prompt], [3])
    assert together is not None
    assert torch.equal(together[0], together[2])
    parted = decoder.step(torch.tensor([1, 2, 3]))
    assert parted is not None
    with torch.no_grad():
        read = hf_model(path)(torch.stack([torch.cat((prompt, torch.tensor([i]))) for i in (1, 2, 3)])).logits[:, -1]
    torch.testing.assert_close(parted, read, atol=2e-5, rtol=0)


def test_what_does_not_fit_is_refused(groups: Groups, tmp_path: Path) -> None:
    shape = architecture(num_hidden_layers=1)
    chunks = ours(shape, write_model(shape, tmp_path / "model"), groups)
    decoder = Decoder(chunks, groups, shape, max_sequences=2, max_length=5)
    prompt = torch.arange(4)
    with pytest.raises(ValueError, match="3 sequences, but the cache holds 2"):
        decoder.prefill([prompt], [3])
    with pytest.raises(ValueError, match="a prompt of 6 tokens"):
        decoder.prefill([torch.arange(6)], [1])
    with pytest.raises(ValueError, match="at least one token"):
        decoder.prefill([prompt[:0]], [1])
    with pytest.raises(ValueError, match="1 prompts with 2 numbers"):
        decoder.prefill([prompt], [1, 1])
    decoder.prefill([prompt], [2])
    with pytest.raises(ValueError, match="1 tokens for 2 live sequences"):
        decoder.step(torch.tensor([1]))
    decoder.prefill([prompt], [2])
    decoder.step(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="the cache is full"):
        decoder.step(torch.tensor([1, 2]))


def test_logits_of_a_bf16_model_are_not_rounded_to_bf16(groups: Groups, tmp_path: Path) -> None:
    """What is sampled has the log-probs that the trainer computes, from logits in fp32."""
    shape = architecture(num_hidden_layers=2)
    path = write_model(shape, tmp_path / "model")
    chunks = ours(shape, path, groups, dtype=torch.bfloat16)
    prompt = tokens(10, torch.Generator().manual_seed(2))
    logits = Decoder(chunks, groups, shape, max_sequences=1, max_length=12).prefill([prompt], [1])
    assert logits is not None and logits.dtype == torch.float32
    weight, _ = chunks[0].local_vocab()
    assert weight.dtype == torch.bfloat16
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9


def test_sequences_come_and_go(groups: Groups, tmp_path: Path) -> None:
    """Prompts read between steps, slots and places used again, groups of unequal size: as reading everything anew."""
    shape = architecture(num_hidden_layers=2)
    path = write_model(shape, tmp_path / "model")
    theirs, generator = hf_model(path), torch.Generator().manual_seed(3)
    decoder = Decoder(ours(shape, path, groups), groups, shape, max_sequences=5, max_length=90)
    first, second, third = (tokens(n, generator) for n in (9, 4, 70))
    decoder.prefill([first, second], [3, 2])
    sequences = [first, first, first, second, second]

    def step(keep: list[int] | None = None) -> None:
        nonlocal sequences
        sequences = sequences if keep is None else [sequences[i] for i in keep]
        new = tokens(len(sequences), generator)
        logits = decoder.step(new, None if keep is None else torch.tensor(keep))
        sequences = [torch.cat((s, new[i : i + 1])) for i, s in enumerate(sequences)]
        with torch.no_grad():
            expected = torch.stack([theirs(s[None]).logits[0, -1] for s in sequences])
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)

    step()
    step([0, 1, 2])  # the second prompt is forgotten
    places, _ = decoder.read([third], [2])
    assert places == [1] and decoder.cache.prompts.shape[2] == 2  # and its place is used again
    decoder.cache.open(places)
    sequences.append(third)
    step()
    step([3, 1])
    decoder.cache.open(places)
    sequences.append(third)
    step()
    step([2])
    assert decoder.cache.prompt_length == [0, 70]  # one of its two sequences lives


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_prompts_attend_like_private_ones(dtype: torch.dtype) -> None:
    """Against torch's attention on each sequence alone; bf16 inputs are summed in fp32."""
    generator = torch.Generator().manual_seed(3)
    cache = KVCache(
        [1], max_sequences=4, max_length=40, kv_heads=2, head_dim=8, dtype=dtype, device=torch.device("cpu")
    )
    assert cache.store([11, 5], [3, 1]) == [0, 1]
    cache.open([0, 1, 0, 0])
    for _ in range(3):
        cache.advance()
    cache.prompts.copy_(torch.randn(cache.prompts.shape, generator=generator))
    cache.own.copy_(torch.randn(cache.own.shape, generator=generator))
    query = torch.randn(4, 6, 8, generator=generator).to(dtype)
    found = attend_one_token(query, cache.prompts[0], cache.own[0], plan_step(cache), 0.3)
    for row, (place, length) in enumerate([(0, 11), (1, 5), (0, 11), (0, 11)]):
        keys, values = torch.cat((cache.prompts[0, :, place, :, :length], cache.own[0, :, row, :, :3]), dim=2).float()
        wanted = torch.nn.functional.scaled_dot_product_attention(
            query[row].float()[:, None], keys, values, scale=0.3, enable_gqa=True
        )
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found[row].float(), wanted.flatten(), atol=tolerance, rtol=0)
