"""The policy loss of a minibatch. Shapes: K scored tokens of this rank, Q sequences of a pack."""

from __future__ import annotations

from torch import Tensor

from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.data.packed_batch import PackedBatch
from tulu_hpc.models.llama import TokenLogprobs
from tulu_hpc.objectives.policy import policy_terms
from tulu_hpc.objectives.terms import Terms, own_targets, sequence_lengths
from tulu_hpc.parallel.context import RankBatch
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.stages.rlvr_mismatch import Mismatch, places
from tulu_hpc.training.normalisation import GlobalCounts
from tulu_hpc.training.runner import LossFn


def policy_loss(config: RlvrConfig, groups: Groups, counts: GlobalCounts, watch: Mismatch | None = None) -> LossFn:
    """The loss of one minibatch of all ranks. `watch` collects the difference between engine and trainer."""
    rlvr = config.rlvr
    low, cap = rlvr.importance_bounds

    def loss(output: TokenLogprobs, batch: RankBatch) -> Terms:
        pack = batch.batch
        sequence_id_K = own_targets(pack.sequence_id_K, batch)
        behaviour_K = column(pack, "behaviour_logprobs", batch, output.logprobs_K)
        if rlvr.kind == "ppo":
            advantages_K = column(pack, "advantages", batch, output.logprobs_K)
        else:
            advantages_K = pack.per_sequence.get("advantage", output.logprobs_K.new_zeros(0))[sequence_id_K]
        if watch is not None:
            watch.add(output.logprobs_K.detach(), behaviour_K, places(pack).of_rank(batch))
        return policy_terms(
            output.logprobs_K,
            behaviour_logprobs_K=behaviour_K,
            advantages_K=advantages_K,
            sequence_id_K=sequence_id_K,
            lengths_Q=sequence_lengths(pack.sequence_id_K, pack.num_sequences),
            kind=rlvr.kind,
            normalisation=rlvr.normalisation,
            global_count=counts.targets if rlvr.normalisation == "token_mean" else counts.sequences,
            constant_length=config.rollout.max_new_tokens,
            clip_low=rlvr.clip_low,
            clip_high=rlvr.clip_high,
            dual_clip=rlvr.dual_clip,
            kl_coef=rlvr.kl_coef if rlvr.kl_in == "loss" else 0.0,
            kl_kind=rlvr.kl_kind,
            reference_logprobs_K=(
                column(pack, "reference_logprobs", batch, output.logprobs_K) if rlvr.kl_coef > 0 else None
            ),
            old_logprobs_K=(column(pack, "old_logprobs", batch, output.logprobs_K) if rlvr.uses_own_logprobs else None),
            importance=rlvr.importance,
            importance_mode=rlvr.importance_mode,
            importance_low=low,
            importance_cap=cap,
            cp_group=groups.pg.cp if groups.cp_size > 1 else None,
        )

    return loss


def column(pack: PackedBatch, name: str, batch: RankBatch, like_K: Tensor) -> Tensor:
    """A column of the pack at this rank's targets; an empty pack has no columns."""
    column = pack.per_target.get(name)
    return like_K.new_zeros(0) if column is None else own_targets(column, batch)
