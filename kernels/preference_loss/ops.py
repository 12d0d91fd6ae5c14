"""preference_loss: DPO losses on per-token log-probs of a pack.  Shapes: K scored tokens, Q sequences, P pairs."""

import torch
from torch import Tensor

from tulu_hpc.kernels.preference_loss import reference
from tulu_hpc.kernels.registry import USABLE, LossOutput, choose, record, register

OP = "preference_loss"
KINDS = ("dpo", "dpo_norm")
register(OP, {"reference": lambda: USABLE})


def preference_loss(
    logprobs_K: Tensor,
    sequence_id_K: Tensor,
    reference_sums_Q: Tensor,
    pairs_P2: Tensor,
    *,
    kind: str = "dpo",
    beta: float,
    label_smoothing: float = 0.0,
    policy_sums_Q: Tensor | None = None,
    lengths_Q: Tensor | None = None,
    backend: str | None = None,
) -> LossOutput:
    """Sum over pairs of a preference loss; formulas in `reference`.

    Args:
        logprobs_K: log-probs of the scored tokens under the policy, differentiable.
        sequence_id_K: int64 [K], the sequence of each token.
        reference_sums_Q: sums of reference log-probs of every sequence (sums also for dpo_norm).
        pairs_P2: int64 [P, 2], sequence ids of chosen and rejected.
        kind: "dpo" or "dpo_norm" (log-probs averaged over a sequence's tokens).
        policy_sums_Q: the policy's sums when they were reduced over context-parallel ranks already; the gradient then
            flows through them and logprobs_K is not read.
        lengths_Q: scored tokens of each sequence; needed with policy_sums_Q for dpo_norm, else counted here.

    Returns:
        loss: sum over pairs. metrics: sums over pairs of rewards/{chosen,rejected,margins,accuracies} and
        logps/{chosen,rejected}; divide by the number of pairs.

    Raises:
        ValueError: wrong kind, shapes or values.
        BackendError: the backend cannot run.
    """
    name = choose(OP, backend, "reference")
    sequences = reference_sums_Q.shape[0]
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not beta > 0 or not 0 <= label_smoothing < 0.5:
        raise ValueError(f"beta > 0 and 0 <= label_smoothing < 0.5 expected, got {beta} and {label_smoothing}")
    if pairs_P2.dim() != 2 or pairs_P2.shape[1] != 2:
        raise ValueError(f"pairs_P2 must be [P, 2], got {list(pairs_P2.shape)}")
    for label, table in (("policy_sums_Q", policy_sums_Q), ("lengths_Q", lengths_Q)):
        if table is not None and table.shape != (sequences,):
            raise ValueError(f"{label} must be [{sequences}] as reference_sums_Q, got {list(table.shape)}")
    if policy_sums_Q is None:
        if logprobs_K.shape != sequence_id_K.shape or logprobs_K.dim() != 1:
            raise ValueError(
                f"logprobs_K {list(logprobs_K.shape)} and sequence_id_K {list(sequence_id_K.shape)} differ"
            )
        policy_sums_Q = reference.sequence_sums(logprobs_K, sequence_id_K, sequences)
        if kind == "dpo_norm" and lengths_Q is None:
            lengths_Q = torch.bincount(sequence_id_K, minlength=sequences)
    elif kind == "dpo_norm" and lengths_Q is None:
        raise ValueError("dpo_norm needs lengths_Q beside policy_sums_Q")
    record(OP, name)
    lengths = lengths_Q if kind == "dpo_norm" else None
    return reference.preference_loss(policy_sums_Q, reference_sums_Q, lengths, pairs_P2, beta, label_smoothing)
