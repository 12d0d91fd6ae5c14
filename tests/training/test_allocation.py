"""A training step allocates neither [rows, vocabulary] nor padded [sequences, longest] tensors.

Two observers: every tensor that an operator returns (shapes), and every allocation of the CPU allocator, also inside
custom operators and their C++ (bytes). Not proven here: allocations of CUDA kernels. The CPU attention kernel may
put segments of similar length (within 15 %) side by side inside its operator; that is not the batch's padding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.parallel.forked import single_process
from tests.training import tiny
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.schema import ModelSection, ParallelSection
from tulu_hpc.data.loader import pack_items
from tulu_hpc.data.packed_batch import Item, PackedBatch, TokenSequence
from tulu_hpc.models.initialise import random_hf_model
from tulu_hpc.models.llama import TokenLogprobs
from tulu_hpc.objectives.preference import preference_terms
from tulu_hpc.objectives.terms import Terms, sequence_lengths
from tulu_hpc.parallel.context import RankBatch
from tulu_hpc.training.runner import LossFn
from tulu_hpc.training.step import train_step
from tulu_hpc.training.trainer import Trainer, build_trainer

# No dimension of the model equals a number of sequences or a length below.
VOCAB, SEQUENCES, LONGEST = 20011, 14, 37
ARCHITECTURE = Architecture(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


class Shapes(TorchDispatchMode):
    """Shapes of everything that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        return result

    def padded(self) -> list[tuple[int, ...]]:
        return [s for s in self.seen if SEQUENCES in s and (LONGEST in s or LONGEST - 1 in s)]

    def logits(self, rows: int) -> list[tuple[int, ...]]:
        return [s for s in self.seen if VOCAB in s and any(d >= rows // 4 and d != VOCAB for d in s)]


def sequences(kind: str) -> list[Item]:
    """14 responses, the longest row-for-row 37 tokens (with its prompt)."""
    generator = torch.Generator().manual_seed(0)

    def tokens(size: int) -> Tensor:
        return torch.randint(0, VOCAB, (size,), generator=generator)

    if kind == "sft":
        return [Item("sequence", [TokenSequence(tokens(LONGEST - i))], id=str(i)) for i in range(SEQUENCES)]
    return [
        Item(
            "pair",
            [TokenSequence(tokens(LONGEST - 9 - i)), TokenSequence(tokens(20 - i))],
            prompt=tokens(9),
            per_sequence={"reference_logprobs": [-300.0, -200.0]},
            id=str(i),
        )
        for i in range(SEQUENCES // 2)
    ]


def loss_of(kind: str) -> LossFn:
    def dpo(output: TokenLogprobs, batch: RankBatch) -> Terms:
        pack = batch.batch
        return preference_terms(
            output.logprobs_K,
            sequence_id_K=pack.sequence_id_K,
            pairs_P2=pack.pairs_P2,
            reference_sums_Q=pack.per_sequence["reference_logprobs"],
            lengths_Q=sequence_lengths(pack.sequence_id_K, pack.num_sequences),
            global_pairs=SEQUENCES // 2,
            kind="dpo_norm",
            beta=1.0,
        )

    return tiny.sft_only(1.0) if kind == "sft" else dpo


def observe(trainer: Trainer, pack: PackedBatch, loss: LossFn) -> tuple[Shapes, int]:
    """Shapes of one step, and the largest allocation (bytes) of another."""
    train_step(trainer, [pack], loss)
    with Shapes() as shapes:
        train_step(trainer, [pack], loss)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_step(trainer, [pack], loss)
    # Raw events: the operators' own figures are net of what they free again.
    events = profiler.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    assert len(sizes) > 100, "the profiler reported no allocations"
    return shapes, max(sizes)


def plant_logits(loss: LossFn, trainer: Trainer) -> LossFn:
    weight = next(trainer.models[0].parameters())

    def planted(output: TokenLogprobs, batch: RankBatch) -> Terms:
        _ = torch.zeros(batch.batch.num_rows, weight.shape[1]) @ weight.detach().t()
        return loss(output, batch)

    return planted


def plant_padding(loss: LossFn, trainer: Trainer) -> LossFn:
    def planted(output: TokenLogprobs, batch: RankBatch) -> Terms:
        _ = torch.zeros(SEQUENCES, LONGEST)
        return loss(output, batch)

    return planted


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("plant", [None, plant_logits, plant_padding])
def test_no_logits_and_no_padding(tmp_path: Path, kind: str, plant: Callable[[LossFn, Trainer], LossFn] | None) -> None:
    random_hf_model(ARCHITECTURE, tmp_path / "hf", seed=0)
    with single_process() as groups:
        trainer = build_trainer(
            model=ModelSection(path=str(tmp_path / "hf"), logprob_buffer_mib=1),
            parallel=ParallelSection(),
            optimizer=tiny.OPTIMIZER,
            recompute="none",
            total_steps=10,
            groups=groups,
            architecture=ARCHITECTURE,
        )
        items = sequences(kind)
        (pack,) = pack_items(items, capacity=4096)
        loss = loss_of(kind)
        shapes, largest = observe(trainer, pack, loss if plant is None else plant(loss, trainer))
    # A quarter of the pack's logits; the largest legitimate buffer is the gradient of the embedding.
    limit = pack.num_rows * VOCAB * 4 // 4
    assert VOCAB * ARCHITECTURE.hidden_size * 4 < limit
    if plant is plant_logits:
        assert shapes.logits(pack.num_rows) and largest > limit
    elif plant is plant_padding:
        assert shapes.padded()
    else:
        assert shapes.logits(pack.num_rows) == [] and largest < limit, largest
        assert shapes.padded() == []
