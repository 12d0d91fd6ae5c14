"""Decoding with a key/value cache in one process; parallel layouts are in test_layouts.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.models.reference import architecture, hf_model, ours, tokens, write_model
from tests.parallel.forked import single_process
from tulu_hpc.models.cache import attend_one_token
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


@pytest.mark.parametrize("masked", [True, False])
def test_query_heads_as_rows_attend_the_same(masked: bool) -> None:
    """The form that CUDA runs, here on the CPU."""
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(3, 6, 8, generator=generator)
    keys, values = (torch.randn(3, 2, 11, 8, generator=generator) for _ in range(2))
    visible = (torch.arange(11) >= torch.tensor([0, 4, 9])[:, None])[:, None, None] if masked else None
    plain, grouped = (attend_one_token(query, keys, values, visible, 0.3, grouped=way) for way in (False, True))
    assert plain.shape == (3, 48)
    torch.testing.assert_close(grouped, plain, atol=1e-6, rtol=0)
