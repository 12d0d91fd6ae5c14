"""A training step allocates neither [rows, vocabulary] nor padded [sequences, longest] tensors.

Two observers: every tensor that an operator returns (shapes), and every allocation of the CPU allocator, also inside
custom operators and their C++ (bytes). Not proven here: allocations of CUDA kernels. The CPU attention kernel may
put segments of similar length (within 15 %) side by side inside its operator; that is not the batch's padding.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.parallel.forked import run_forked, single_process
from tests.training import tiny
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.sections import ModelSection, ParallelSection
from tulu_hpc.data.loader import pack_items
from tulu_hpc.data.packed_batch import Item, PackedBatch, TokenSequence
from tulu_hpc.models.initialise import random_hf_model
from tulu_hpc.models.llama import TokenLogprobs
from tulu_hpc.objectives.policy import policy_terms
from tulu_hpc.objectives.preference import preference_terms
from tulu_hpc.objectives.terms import Terms, sequence_lengths
from tulu_hpc.parallel.context import RankBatch
from tulu_hpc.parallel.layout import Groups, initialize, layout_of
from tulu_hpc.training.runner import LossFn
from tulu_hpc.training.step import train_step
from tulu_hpc.training.trainer import Trainer, build_trainer

# No dimension of the model equals a number of sequences or a length below.
VOCAB, SEQUENCES, LONGEST = 20011, 14, 37
BUFFER_MIB = 1  # 13 rows of logits
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
        """[sequences, longest] side by side or as one dimension, the longest rounded up by 8 or less."""
        lengths = range(LONGEST - 1, LONGEST + 9)
        pairs = {(SEQUENCES, n) for n in lengths} | {(n, SEQUENCES) for n in lengths}
        flat = {SEQUENCES * n for n in lengths}
        return [s for s in self.seen if pairs & set(pairwise(s)) or flat & set(s)]

    def logits(self) -> list[tuple[int, ...]]:
        """More rows of the vocabulary than the buffer has room for (weights are [vocabulary, hidden])."""
        columns = {VOCAB, (VOCAB + 1) // 2}  # the whole, and the shard of two tensor-parallel ranks
        return [
            s
            for s in self.seen
            if columns & set(s) and s[1:] != (ARCHITECTURE.hidden_size,) and prod(s) * 4 > BUFFER_MIB * 2**20
        ]


def sequences(kind: str) -> list[Item]:
    """14 responses, the longest row-for-row 37 tokens (with its prompt)."""
    generator = torch.Generator().manual_seed(0)

    def tokens(size: int) -> Tensor:
        return torch.randint(0, VOCAB, (size,), generator=generator)

    if kind == "sft":
        return [Item("sequence", [TokenSequence(tokens(LONGEST - i))], id=str(i)) for i in range(SEQUENCES)]
    if kind == "grpo":
        responses = [tokens(LONGEST - 9 - i) for i in range(SEQUENCES // 2)]
        columns = {"behaviour_logprobs": [torch.full((len(r),), -9.0) for r in responses]}
        return [
            Item(
                "group",
                [TokenSequence(r) for r in responses],
                prompt=tokens(9),
                per_sequence={"advantage": [float(i) for i in range(len(responses))]},
                per_target=columns,
                id=str(group),
            )
            for group in range(2)
        ]
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

    def grpo(output: TokenLogprobs, batch: RankBatch) -> Terms:
        pack = batch.batch
        return policy_terms(
            output.logprobs_K,
            behaviour_logprobs_K=pack.per_target["behaviour_logprobs"],
            advantages_K=pack.per_sequence["advantage"][pack.sequence_id_K],
            sequence_id_K=pack.sequence_id_K,
            lengths_Q=sequence_lengths(pack.sequence_id_K, pack.num_sequences),
            normalisation="token_mean",
            global_count=pack.num_targets,
            clip_low=0.2,
            clip_high=0.2,
        )

    return {"sft": tiny.sft_only(1.0), "dpo": dpo, "grpo": grpo}[kind]


def observe(trainer: Trainer, pack: PackedBatch, loss: LossFn) -> tuple[Shapes, int]:
    """Shapes of a step and of a pass without gradients (a reference), and the largest allocation of another step."""
    train_step(trainer, [pack], loss)
    with Shapes() as shapes:
        train_step(trainer, [pack], loss)
        trainer.runner.logprobs([pack])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_step(trainer, [pack], loss)
    # Raw events: the operators' own figures are net of what they free again.
    events = profiler.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    assert len(sizes) > 100, "the profiler reported no allocations"
    return shapes, max(sizes)


def planted(loss: LossFn, *shape: int) -> LossFn:
    """The same loss, beside a tensor that must not exist."""

    def with_plant(output: TokenLogprobs, batch: RankBatch) -> Terms:
        _ = torch.zeros(shape)
        return loss(output, batch)

    return with_plant


def make_trainer(folder: Path, groups: Groups, parallel: ParallelSection) -> Trainer:
    return build_trainer(
        model=ModelSection(path=str(folder), logprob_buffer_mib=BUFFER_MIB),
        parallel=parallel,
        optimizer=tiny.OPTIMIZER,
        recompute="none",
        total_steps=10,
        groups=groups,
        architecture=ARCHITECTURE,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    random_hf_model(ARCHITECTURE, folder, seed=0)
    return folder


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_no_logits_and_no_padding(model: Path, kind: str) -> None:
    with single_process() as groups:
        trainer = make_trainer(model, groups, ParallelSection())
        (pack,) = pack_items(sequences(kind), capacity=4096)
        shapes, largest = observe(trainer, pack, loss_of(kind))
    assert shapes.logits() == [] and shapes.padded() == []
    # The largest legitimate buffers are the gradient of the embedding and the block of logits.
    limit = max(VOCAB * ARCHITECTURE.hidden_size * 4, BUFFER_MIB * 2**20) * 1.2
    assert largest < limit < pack.num_rows * VOCAB * 4 / 8, largest


@pytest.mark.parametrize("options", [{"tensor": 2}, {"pipeline": 2}, {"context": 2}])
def test_no_logits_and_no_padding_on_two_ranks(model: Path, options: dict[str, int]) -> None:
    def find() -> list[tuple[int, ...]]:
        parallel = ParallelSection(**options)
        groups = initialize(layout_of(parallel), seed=0)
        trainer = make_trainer(model, groups, parallel)
        (pack,) = pack_items(sequences("sft"), capacity=4096, multiple=2)
        with Shapes() as shapes:
            train_step(trainer, [pack], loss_of("sft"))
        assert len(shapes.seen) > 20
        return shapes.logits() + shapes.padded()

    assert run_forked(2, find) == [[], []]


@pytest.mark.parametrize("share", [1, 5, 9])
def test_planted_logits_are_seen(model: Path, share: int) -> None:
    with single_process() as groups:
        trainer = make_trainer(model, groups, ParallelSection())
        (pack,) = pack_items(sequences("sft"), capacity=4096)
        shape = (pack.num_rows // share, VOCAB)
        shapes, largest = observe(trainer, pack, planted(loss_of("sft"), *shape))
    assert shapes.logits() == [shape] and largest == 4 * prod(shape)


@pytest.mark.parametrize("shape", [(14, 37), (14, 40), (40, 14), (14 * 37,), (14, 38, 16), (14 * 40, 16)])
def test_planted_padding_is_seen(model: Path, shape: tuple[int, ...]) -> None:
    with single_process() as groups:
        trainer = make_trainer(model, groups, ParallelSection())
        (pack,) = pack_items(sequences("sft"), capacity=4096)
        with Shapes() as shapes:
            train_step(trainer, [pack], planted(loss_of("sft"), *shape))
    assert shapes.padded() == [shape]
