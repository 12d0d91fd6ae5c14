"""A pack with one sequence of 32,768 rows, split over context-parallel ranks with recomputed attention.

Not proven here: models of more than one layer, ranks with accelerators, sequences beyond this length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.forked import run_forked
from tests.training import tiny
from tulu_hpc.config.sections import ParallelSection
from tulu_hpc.data.packed_batch import Item, PackedBatch, TokenSequence, pack
from tulu_hpc.parallel.layout import initialize, layout_of
from tulu_hpc.training.runner import row_multiple

ROWS = 32_768
ARCHITECTURE = tiny.ARCHITECTURE.model_copy(
    update={
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": ROWS,
    }
)


def long_pack(multiple: int) -> PackedBatch:
    """The long sequence, trained on a few tokens all along it and on its last 64, between short ones."""
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(1, ARCHITECTURE.vocab_size, (ROWS + 1,), generator=generator)
    mask = torch.rand(ROWS + 1, generator=generator) < 0.01
    mask[-64:] = True
    long = Item("sequence", [TokenSequence(tokens, mask)], id="long")
    return pack([*tiny.make_items("sp", seed=1), long], multiple=multiple)


def loss_and_gradients(model: Path, options: dict[str, Any], recompute: str) -> dict[str, Any]:
    parallel = ParallelSection(**options)
    groups = initialize(layout_of(parallel), seed=1)
    trainer = tiny.make_trainer(model, groups, parallel, recompute=recompute)
    whole = long_pack(row_multiple(groups.layout, parallel.context_split))
    batches = trainer.runner.prepare([whole])
    trainer.zero_grad()
    (terms,) = trainer.runner.forward_backward(batches, tiny.sft_only(float(whole.num_targets)))
    return {
        "loss": float(terms.loss),
        "rows": batches[0].tokens_1T.numel(),
        "targets": whole.num_targets,
        "longest": int(whole.cu_seqlens.diff().max()),
        "gradients": tiny.gradients(trainer),
    }


def test_a_sequence_of_32k_over_two_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "hf", ARCHITECTURE)
    (wanted,) = run_forked(1, loss_and_gradients, model, {}, "none")
    first, second = run_forked(2, loss_and_gradients, model, {"context": 2}, "selective")
    assert wanted["longest"] == ROWS and wanted["targets"] > 300
    assert min(first["rows"], second["rows"]) > 0.3 * ROWS, "both ranks hold a good part of it"
    assert first["loss"] + second["loss"] == pytest.approx(wanted["loss"], rel=1e-5)  # each of its own targets
    assert tiny.largest_difference(first["gradients"], wanted["gradients"], relative=True) <= 1e-5
