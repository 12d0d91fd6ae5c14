"""Log-probs, decoding and conversion under parallel layouts, on forked gloo ranks, against transformers in one process.

Gradients under parallel layouts are proven in tests/training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file
from torch import Tensor

from tests.models.reference import architecture, hf_logprobs, hf_model, mixed_items, on_rank, ours, tokens, write_model
from tests.parallel.forked import run_forked
from tulu_hpc.data.packed_batch import pack
from tulu_hpc.models.convert import save_hf
from tulu_hpc.models.decode import Decoder
from tulu_hpc.models.llama import TokenLogprobs, score
from tulu_hpc.parallel.layout import Groups, Layout, initialize

TWO = {
    "tp2": Layout(tensor=2),
    "tp2 sp": Layout(tensor=2, sequence=True),
    "pp2": Layout(pipeline=2),
    "pp2 vpp2": Layout(pipeline=2, virtual_pipeline=2),
    "pp2 uneven": Layout(pipeline=2, first_stage_layers=1, last_stage_layers=3),
    "pp2 embedding and head counted": Layout(pipeline=2, account_for_embedding=True, account_for_loss=True),
    "cp2": Layout(context=2),
}
FOUR = {
    "tp2 pp2 sp": Layout(tensor=2, pipeline=2, sequence=True),
    "tp2 pp2 vpp2": Layout(tensor=2, pipeline=2, virtual_pipeline=2),
    "cp2 tp2 sp": Layout(context=2, tensor=2, sequence=True),
    "cp2 pp2": Layout(context=2, pipeline=2),
    "dp2 tp2": Layout(tensor=2),
}
LAYOUTS = {2: TWO, 4: FOUR}


def forward(chunks: Any, batches: list[Any], groups: Groups) -> list[Tensor]:
    """Log-probs of this rank's targets of each micro-batch, through megatron's schedule; [] off the last stage."""

    def step(iterator: Any, chunk: Any) -> Any:
        out = score(chunk, next(iterator))
        if isinstance(out, TokenLogprobs):
            return out.logprobs_K, lambda logprobs: (logprobs.sum(), torch.tensor(1), {"logprobs": logprobs.detach()})
        return out, None

    store = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=1,
        micro_batch_size=1,
        forward_only=True,
    )
    return [entry["logprobs"] for entry in store]


def on_all_layouts(world: int, folder: Path, shape: Any, split_kinds: tuple[str, ...]) -> dict[str, Any]:
    """Per layout: log-probs of this rank for two packs, logits of decoding; exports the model."""
    results: dict[str, Any] = {}
    for name, layout in LAYOUTS[world].items():
        groups = initialize(layout, seed=1)
        chunks = ours(shape, folder / "model", groups)
        packs = [pack(mixed_items(seed), multiple=4 * layout.row_multiple) for seed in (0, 1)]
        for split in split_kinds if layout.context > 1 else split_kinds[:1]:
            batches = [on_rank(batch, shape, groups, split=split) for batch in packs]
            found = forward(chunks, batches, groups)
            results[f"{name} {split}"] = [
                (batch.keep_K, logprobs, groups.cp_rank) for batch, logprobs in zip(batches, found, strict=False)
            ]
        results[f"{name} decode"] = decode(chunks, groups, shape)
        save_hf(chunks, folder / f"out {name}", shape, groups, source=folder / "model", max_shard_bytes=3e5)
    return results


def decode(chunks: Any, groups: Groups, shape: Any) -> list[Tensor] | None:
    """Logits of ten forced steps with one compaction in the middle; None off the last stage."""
    generator = torch.Generator().manual_seed(7)
    decoder = Decoder(chunks, groups, shape, max_sequences=8, max_length=40)
    logits = [decoder.prefill([tokens(n, generator) for n in (9, 4, 21)], [2, 1, 2])]
    forced = tokens(50, generator).view(10, 5)
    for step in range(10):
        keep = torch.tensor([4, 1, 2]) if step == 5 else None
        logits.append(decoder.step(forced[step] if step < 5 else forced[step, :3], keep))
    return None if logits[0] is None else [entry for entry in logits if entry is not None]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_layouts(world: int, tied: bool, tmp_path: Path) -> None:
    shape = architecture(tie_word_embeddings=tied)
    layouts = LAYOUTS[world]
    path = write_model(shape, tmp_path / "model")
    theirs = hf_model(path)
    with torch.no_grad():
        expected = [hf_logprobs(theirs, mixed_items(seed)) for seed in (0, 1)]
        expected_decode = re_read(theirs)
    splits = ("greedy", "contiguous", "zigzag")
    ranks = run_forked(world, on_all_layouts, world, tmp_path, shape, splits)
    original = load_file(path / "model.safetensors")
    for name, layout in layouts.items():
        for split in splits if layout.context > 1 else splits[:1]:
            for index, want in enumerate(expected):
                whole = torch.full_like(want, torch.nan)
                for found in (rank[f"{name} {split}"] for rank in ranks):
                    if found:
                        keep, logprobs, _ = found[index]
                        whole[keep] = logprobs
                torch.testing.assert_close(whole, want, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        answers = [rank[f"{name} decode"] for rank in ranks if rank[f"{name} decode"] is not None]
        assert len(answers) == world // layout.pipeline
        for answer in answers:
            for got, want in zip(answer, expected_decode, strict=True):
                torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
        exported: dict[str, Tensor] = {}
        for file in (tmp_path / f"out {name}").glob("*.safetensors"):
            exported.update(load_file(file))
        assert exported.keys() == original.keys()
        assert all(torch.equal(exported[n], original[n]) for n in original), name


def re_read(model: Any) -> list[Tensor]:
    """What `decode` must return, by reading every sequence again at every step."""
    generator = torch.Generator().manual_seed(7)
    prompts = [tokens(n, generator) for n in (9, 4, 21)]
    sequences = [prompts[0], prompts[0], prompts[1], prompts[2], prompts[2]]
    forced = tokens(50, generator).view(10, 5)
    logits = [torch.stack([model(s[None]).logits[0, -1] for s in sequences])]
    for step in range(10):
        if step == 5:
            sequences = [sequences[i] for i in (4, 1, 2)]
        sequences = [torch.cat((s, forced[step, i : i + 1])) for i, s in enumerate(sequences)]
        logits.append(torch.stack([model(s[None]).logits[0, -1] for s in sequences]))
    return logits
