"""Checks of the arguments of policy_loss, and their defaults.  Shapes: K scored tokens, Q sequences."""

import torch

from tulu_hpc.kernels.policy_loss import problem
from tulu_hpc.kernels.policy_loss.problem import Inputs, Settings

# (clip_low, clip_high) of each kind's paper. cispo: no lower bound, ratio at most 5 (arXiv 2510.13786 section 3.2).
DEFAULT_CLIPS = {
    "ppo": (0.2, 0.2),
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 4.0),
}
DEFAULT_DUAL_CLIP = 3.0  # of "ppo"; arXiv 1912.09729 section 4

_LABELS = (
    "logprobs_K",
    "behaviour_logprobs_K",
    "advantages_K",
    "sequence_id_K",
    "old_logprobs_K",
    "reference_logprobs_K",
    "weights_K",
    "entropy_K",
    "sequence_sums_Q5",
)


def settings_of(
    kind: str,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None,
    kl_coef: float,
    kl_kind: str,
    importance: str,
    level: str,
    low: float,
    high: float,
    entropy_coef: float,
    normalisation: str,
    divisor: float | None,
) -> Settings:
    """Checks the scalar arguments of policy_loss and fills defaults in; num_sequences is set later."""
    for label, word, words in (
        ("kind", kind, problem.KINDS),
        ("kl_kind", kl_kind, problem.KL_KINDS),
        ("importance", importance, problem.IMPORTANCES),
        ("importance_level", level, problem.LEVELS),
        ("normalisation", normalisation, problem.NORMALISATIONS),
    ):
        if word not in words:
            raise ValueError(f"{label} must be {', '.join(words[:-1])} or {words[-1]}, got {word!r}")
    clip_low = DEFAULT_CLIPS[kind][0] if clip_low is None else clip_low
    clip_high = DEFAULT_CLIPS[kind][1] if clip_high is None else clip_high
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(f"0 <= clip_low <= 1 and clip_high >= 0 expected, got {clip_low} and {clip_high}")
    if dual_clip is not None and (kind == "cispo" or not dual_clip > 1):
        raise ValueError(f"dual_clip must be greater than 1 and is not for cispo, got {dual_clip} for {kind}")
    if dual_clip is None:
        dual_clip = DEFAULT_DUAL_CLIP if kind == "ppo" else float("inf")
    if not 0 <= low <= high or not high > 0:
        raise ValueError(f"0 <= importance_low <= importance_high expected, got {low} and {high}")
    if (normalisation == "constant") != (divisor is not None) or (divisor is not None and not divisor > 0):
        raise ValueError(f"normalisation 'constant', and no other, needs a positive divisor, got {divisor}")
    return Settings(
        kind, kl_kind, importance, level, normalisation, clip_low, clip_high, dual_clip, kl_coef, low, high,
        entropy_coef, divisor or 1.0, 0,
    )  # fmt: skip


def check_needs(settings: Settings, inputs: Inputs) -> None:
    """Raises ValueError when an option lacks its tensor."""
    if settings.kl_coef and inputs.reference_K is None:
        raise ValueError("kl_coef needs reference_logprobs_K")
    if settings.entropy_coef and inputs.entropy_K is None:
        raise ValueError("entropy_coef needs entropy_K")
    if settings.importance != "none" and inputs.old_K is None:
        raise ValueError("importance weights need old_logprobs_K: they are exp(old - behaviour)")


def check_tensors(inputs: Inputs) -> None:
    """Raises ValueError or TypeError for shapes, dtypes and devices that do not go together."""
    first = inputs.logprobs_K
    if first.dim() != 1 or first.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logprobs_K must be float32 or float64 [K], got {first.dtype} {list(first.shape)}")
    for label, tensor in zip(_LABELS, inputs, strict=True):
        if tensor is None:
            continue
        if tensor.device != first.device:
            raise ValueError(f"{label} is on {tensor.device}, logprobs_K on {first.device}")
        dtype = torch.int64 if label == "sequence_id_K" else first.dtype
        if tensor.dtype != dtype:
            raise TypeError(f"{label} must be {dtype}, got {tensor.dtype}")
        if label == "sequence_sums_Q5":
            if tensor.dim() != 2 or tensor.shape[1] != 5:
                raise ValueError(f"sequence_sums_Q5 must be [Q, 5], got {list(tensor.shape)}")
        elif tensor.shape != first.shape:
            raise ValueError(f"{label} must be {list(first.shape)} as logprobs_K, got {list(tensor.shape)}")


def count_sequences(settings: Settings, inputs: Inputs, given: int | None) -> int:
    """Q, or 0 where nothing depends on it. CPU ids are checked against it."""
    sums_Q5, id_K = inputs.sums_Q5, inputs.sequence_id_K
    if sums_Q5 is not None:
        if given is not None and given != len(sums_Q5):
            raise ValueError(f"num_sequences is {given}, sequence_sums_Q5 has {len(sums_Q5)} rows")
        given = len(sums_Q5)
    elif not settings.by_sequence:
        return 0
    compiling = torch.compiler.is_compiling()
    if given is None:
        if compiling:
            raise ValueError(f"{settings.kind} with these options needs num_sequences under torch.compile")
        given = int(id_K.max()) + 1 if len(id_K) else 0
    if not compiling and not id_K.is_cuda and len(id_K):
        low, high = int(id_K.min()), int(id_K.max())
        if low < 0 or high >= given:
            raise ValueError(f"sequence_id_K holds {low}..{high}, there are {given} sequences")
    return given
