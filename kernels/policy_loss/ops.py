"""policy_loss: clipped policy-gradient losses on per-token log-probs of a pack.  Shapes: K scored tokens."""

from torch import Tensor

from tulu_hpc.kernels.policy_loss import reference
from tulu_hpc.kernels.registry import USABLE, LossOutput, choose, record, register

OP = "policy_loss"
KINDS = ("grpo",)
register(OP, {"reference": lambda: USABLE})


def policy_loss(
    logprobs_K: Tensor,
    behaviour_logprobs_K: Tensor,
    advantages_K: Tensor,
    sequence_id_K: Tensor,
    *,
    kind: str = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reference_logprobs_K: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    weights_K: Tensor | None = None,
    backend: str | None = None,
) -> LossOutput:
    """Sum over tokens of the clipped policy loss plus `kl_coef` times a KL estimate; formulas in `reference`.

    Args:
        logprobs_K: log-probs under the current policy, differentiable.
        behaviour_logprobs_K: log-probs under the policy that sampled the tokens.
        advantages_K: advantage of each token.
        sequence_id_K: int64 [K], the sequence of each token (token-level losses only check its shape).
        kind: "grpo": token ratio clipped to [1 - clip_low, 1 + clip_high].
        reference_logprobs_K: of the frozen reference, needed when kl_coef is not 0; with kl_coef 0 KL is only measured.
        kl_kind: "k1", "k2" or "k3".
        weights_K: weight of each token's loss (normalisation); None = 1.

    Returns:
        loss: sum over tokens. metrics: unweighted sums over tokens of policy/{loss,ratio,clip_fraction,behaviour_kl}
        and, with reference log-probs, policy/kl; divide by K.

    Raises:
        ValueError: wrong kind, shapes or values.
        BackendError: the backend cannot run.
    """
    name = choose(OP, backend, "reference")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 0 <= clip_low <= 1 or clip_high < 0:
        raise ValueError(f"0 <= clip_low <= 1 and clip_high >= 0 expected, got {clip_low} and {clip_high}")
    if kl_coef and reference_logprobs_K is None:
        raise ValueError("kl_coef needs reference_logprobs_K")
    tables = {
        "behaviour_logprobs_K": behaviour_logprobs_K,
        "advantages_K": advantages_K,
        "sequence_id_K": sequence_id_K,
        "reference_logprobs_K": reference_logprobs_K,
        "weights_K": weights_K,
    }
    for label, table in tables.items():
        if table is not None and table.shape != logprobs_K.shape:
            raise ValueError(f"{label} must be {list(logprobs_K.shape)} as logprobs_K, got {list(table.shape)}")
    record(OP, name)
    return reference.policy_loss(
        logprobs_K,
        behaviour_logprobs_K,
        advantages_K,
        clip_low,
        clip_high,
        reference_logprobs_K,
        kl_coef,
        kl_kind,
        weights_K,
    )
