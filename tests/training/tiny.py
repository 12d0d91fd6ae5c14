"""A model of a few thousand parameters, data that mixes ordinary sequences, pairs and groups, and one training run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.sections import ModelSection, OptimizerSection, ParallelSection
from tulu_hpc.data.loader import ItemLoader, StepData
from tulu_hpc.data.packed_batch import MEMBER, SEQUENCE, Item, PackedBatch, TokenSequence
from tulu_hpc.models.convert import iter_hf_tensors
from tulu_hpc.models.initialise import random_hf_model
from tulu_hpc.models.llama import TokenLogprobs
from tulu_hpc.objectives.policy import policy_terms
from tulu_hpc.objectives.preference import preference_terms
from tulu_hpc.objectives.sft import sft_terms
from tulu_hpc.objectives.terms import Terms, own_targets, sequence_lengths
from tulu_hpc.parallel.context import RankBatch
from tulu_hpc.parallel.layout import Groups, initialize, layout_of
from tulu_hpc.training.runner import LossFn, row_multiple
from tulu_hpc.training.step import train_step
from tulu_hpc.training.trainer import Trainer, build_trainer

# An odd vocabulary: tensor parallelism pads it.
ARCHITECTURE = Architecture(
    vocab_size=131,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
# Over pipeline stages the shared embedding is a gradient bucket of its own; 131 x 32 numbers do not fill it evenly.
TIED = ARCHITECTURE.model_copy(update={"tie_word_embeddings": True})
OPTIMIZER = OptimizerSection(lr=1e-3, weight_decay=0.1, clip_grad=0.5, warmup_ratio=0.0)


def write_model(path: Path, architecture: Architecture = ARCHITECTURE) -> Path:
    random_hf_model(architecture, path, seed=5, embedding_std=0.3, linear_std=0.15)
    return path


def sequence(generator: torch.Generator, low: int, high: int, *, masked: bool = False) -> TokenSequence:
    size = int(torch.randint(low, high, (), generator=generator))
    tokens = torch.randint(1, ARCHITECTURE.vocab_size, (size,), generator=generator)
    mask = torch.rand(size, generator=generator) < 0.7 if masked else None
    return TokenSequence(tokens, mask)


def make_items(kinds: str, seed: int = 0) -> list[Item]:
    """One item per letter: s(equence), p(air), g(roup); pairs carry reference log-probs, groups advantages."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for index, kind in enumerate(kinds):
        prompt = sequence(generator, 3, 12).tokens
        common: dict[str, Any] = {"id": f"{kind}{index}", "prompt": prompt}
        if kind == "s":
            items.append(Item("sequence", [sequence(generator, 6, 30, masked=True)], id=f"s{index}"))
        elif kind == "p":
            responses = [sequence(generator, 2, 14) for _ in range(2)]
            column = [-4.5 * len(r) + float(torch.randn((), generator=generator)) for r in responses]
            items.append(Item("pair", responses, per_sequence={"reference_logprobs": column}, **common))
        else:
            responses = [sequence(generator, 2, 10) for _ in range(3)]
            behaviour = [-4.8 + 0.3 * torch.randn(len(r), generator=generator) for r in responses]
            per_target = {"behaviour_logprobs": behaviour, "old_reference": [b - 0.1 for b in behaviour]}
            advantage = torch.randn(3, generator=generator).tolist()
            items.append(
                Item("group", responses, per_sequence={"advantage": advantage}, per_target=per_target, **common)
            )
    return items


def mixed_loss(groups: Groups, items: Sequence[Item]) -> LossFn:
    """SFT on sequences, DPO on pairs, GRPO on groups, each over its global count in `items` (the global batch)."""
    trained = sum(targets_of(i) for i in items if i.kind == "sequence")
    pairs = sum(i.kind == "pair" for i in items)
    tokens = sum(targets_of(i) for i in items if i.kind == "group")
    cp_group = groups.pg.cp if groups.cp_size > 1 else None

    def loss(output: TokenLogprobs, batch: RankBatch) -> Terms:
        pack, logprobs_K = batch.batch, output.logprobs_K
        sequence_id_K = own_targets(pack.sequence_id_K, batch)
        kind_K = pack.per_sequence["kind"][sequence_id_K]
        sft = sft_terms(logprobs_K[kind_K == SEQUENCE], divisor=float(trained))
        none_Q, none_K = logprobs_K.new_zeros(pack.num_sequences), logprobs_K.new_zeros(pack.num_targets)
        lengths_Q = sequence_lengths(pack.sequence_id_K, pack.num_sequences)
        dpo = preference_terms(
            logprobs_K,
            sequence_id_K=sequence_id_K,
            pairs_P2=pack.pairs_P2,
            reference_sums_Q=pack.per_sequence.get("reference_logprobs", none_Q).nan_to_num(),
            lengths_Q=lengths_Q,
            global_pairs=pairs,
            kind="dpo_norm",
            beta=2.0,
            cp_group=cp_group,
        )
        member_K = kind_K == MEMBER
        grpo = policy_terms(
            logprobs_K[member_K],
            behaviour_logprobs_K=own_targets(pack.per_target.get("behaviour_logprobs", none_K), batch)[member_K],
            reference_logprobs_K=own_targets(pack.per_target.get("old_reference", none_K), batch)[member_K],
            advantages_K=pack.per_sequence.get("advantage", none_Q)[sequence_id_K][member_K],
            sequence_id_K=sequence_id_K[member_K],
            lengths_Q=lengths_Q,
            normalisation="token_mean",
            global_count=tokens,
            clip_low=0.2,
            clip_high=0.2,
            kl_coef=0.05,
            cp_group=cp_group,
        )
        parts = {"sft": sft, "dpo": dpo, "grpo": grpo}
        total = sft.loss + dpo.loss + grpo.loss
        metrics = {f"{name}/{key}": value for name, part in parts.items() for key, value in part.metrics.items()}
        return Terms(total, {"loss": metrics["sft/loss"], **metrics})

    return loss


def targets_of(item: Item) -> int:
    """Scored tokens; the first token of a sequence without prompt is predicted by nothing."""
    start = 0 if item.prompt.numel() else 1
    return sum(len(r) - start if r.mask is None else int(r.mask[start:].sum()) for r in item.responses)


def sft_only(divisor: float) -> LossFn:
    return lambda output, batch: sft_terms(output.logprobs_K, divisor=divisor)


def make_trainer(
    model: Path,
    groups: Groups,
    parallel: ParallelSection,
    *,
    recompute: Any = "none",
    optimizer: Any = OPTIMIZER,
    dtype: Any = "float32",
    strategy: Any = None,
) -> Trainer:
    return build_trainer(
        model=ModelSection(path=str(model), dtype=dtype, attention_strategy=strategy),
        parallel=parallel,
        optimizer=optimizer,
        recompute=recompute,
        total_steps=10,
        groups=groups,
        architecture=Architecture.from_hf(model),
    )


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """The whole model under its Hugging Face names; complete on global rank 0, empty elsewhere."""
    stream = iter_hf_tensors(trainer.models, trainer.architecture, trainer.groups)
    return {name: tensor.clone() for name, tensor in stream if tensor is not None}


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """The whole reduced gradient under Hugging Face names (the distributed optimizer's shards are gathered).

    In the parameters' dtype: p.data of another one would be cut from its hooks.
    """
    for chunk in trainer.chunks:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                group = trainer.groups.pg.dp_cp
                if chunk.ddp_config.use_distributed_optimizer and group.size() > 1:
                    shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
    parameters = [p for model in trainer.models for p in model.parameters()]
    kept = [p.data for p in parameters]
    for p in parameters:
        p.data = p.main_grad.view_as(p).to(p.dtype)
    try:
        return weights(trainer)
    finally:
        for p, data in zip(parameters, kept, strict=True):
            p.data = data


def train(
    model: Path,
    kinds: Sequence[str],
    *,
    parallel: ParallelSection,
    recompute: str = "none",
    dtype: str = "float32",
    pack_rows: int = 96,
    share: bool = True,
    loss: Callable[[Groups, Sequence[Item]], LossFn] = mixed_loss,
) -> dict[str, Any]:
    """len(kinds) steps, one global batch per string of `kinds`; everything that a layout must not change."""
    groups = initialize(layout_of(parallel), seed=1)
    trainer = make_trainer(model, groups, parallel, recompute=recompute, dtype=dtype)
    result: dict[str, Any] = {"losses": [], "norms": [], "metrics": [], "gradients": None}
    for step, letters in enumerate(kinds):
        items = make_items(letters, seed=step)
        data = global_batch(items, groups, parallel, pack_rows=pack_rows, share=share)
        loss_fn = loss(groups, items)
        if step == 0:
            trainer.zero_grad()
            trainer.runner.forward_backward(trainer.runner.prepare(data.packs), loss_fn)
            result["gradients"] = gradients(trainer)
        outcome = train_step(trainer, data.packs, loss_fn)
        result["losses"].append(outcome.loss)
        result["norms"].append(outcome.grad_norm)
        result["metrics"].append(outcome.metrics)
    trainer.synchronise_parameters()
    result["weights"] = weights(trainer)
    return result


def global_batch(
    items: list[Item], groups: Groups, parallel: ParallelSection, *, pack_rows: int, share: bool = True
) -> StepData:
    return ItemLoader(
        items,
        global_batch_size=len(items),
        seed=0,
        steps=1,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        pack_rows=pack_rows,
        multiple=row_multiple(groups.layout, parallel.context_split),
        share=share,
    ).next_step()


def empty_pack_count(packs: Sequence[PackedBatch]) -> int:
    return sum(pack.num_targets == 0 for pack in packs)


def largest_difference(found: dict[str, Tensor], wanted: dict[str, Tensor], *, relative: bool) -> float:
    """max over tensors of max|d| (relative: over max|wanted| of the tensor)."""
    assert found.keys() == wanted.keys()
    worst = 0.0
    for name, tensor in wanted.items():
        difference = (found[name] - tensor).abs().max().item()
        worst = max(worst, difference / max(tensor.abs().max().item(), 1e-12) if relative else difference)
    return worst
