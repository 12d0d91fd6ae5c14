"""policy_loss: the public function and the torch.library op under it.

Shapes: K scored tokens of this rank, Q sequences, M columns of the statistics.

The op `tulu_hpc::policy_loss` computes loss, gradients, active tokens and statistics in one pass (`problem.Outputs`);
its backward only multiplies the gradients by the upstream one.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tulu_hpc.kernels import triton_support
from tulu_hpc.kernels.native import core_status
from tulu_hpc.kernels.policy_loss import arguments, cpu, problem, reference
from tulu_hpc.kernels.policy_loss.problem import Inputs, Outputs, Settings
from tulu_hpc.kernels.registry import USABLE, BackendError, choose, record, register

OP = "policy_loss"
register(OP, {"reference": lambda: USABLE, "cpu": core_status, "triton": triton_support.status})


class PolicyLossOutput(NamedTuple):
    """What policy_loss returns.

    Attributes:
        loss: scalar, differentiable in logprobs_K and entropy_K.
        metrics: detached scalar sums over this rank's tokens, without weights: divide by the tokens.
        active_K: bool [K]; where it is False, the gradients of the token's log-prob and entropy are exactly 0.
        extremes: detached scalar minima and maxima over this rank's tokens, -inf or inf without any.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    active_K: Tensor
    extremes: dict[str, Tensor]


def policy_loss(
    logprobs_K: Tensor,
    behaviour_logprobs_K: Tensor,
    advantages_K: Tensor,
    sequence_id_K: Tensor,
    *,
    kind: str = "grpo",
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    old_logprobs_K: Tensor | None = None,
    reference_logprobs_K: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    importance: str = "none",
    importance_level: str = "token",
    importance_low: float = 0.5,
    importance_high: float = 2.0,
    entropy_K: Tensor | None = None,
    entropy_coef: float = 0.0,
    weights_K: Tensor | None = None,
    normalisation: str = "sum",
    divisor: float | None = None,
    num_sequences: int | None = None,
    sequence_sums_Q5: Tensor | None = None,
    backend: str | None = None,
) -> PolicyLossOutput:
    """Clipped policy-gradient loss with KL penalty and entropy bonus; the formulas and their sources: `reference`.

    The ratio is of `logprobs_K` to `old_logprobs_K`, the trainer's own log-probs before the first update, or to
    `behaviour_logprobs_K`, the rollout engine's, when there are none. The importance weight corrects for the engine: it
    is exp(old - behaviour), without gradient.

    Sequence-level quantities (gspo, importance_level "sequence", normalisation "sequence_mean") are sums over the
    tokens of a sequence. Under context parallelism, where a rank has a part of them, add `policy_sequence_sums` over
    the ranks and pass the result: loss and metrics are then this rank's share, and its gradient that of the whole.

    Args:
        logprobs_K: log-probs under the current policy, fp32 (fp64: reference backend), differentiable.
        behaviour_logprobs_K: log-probs under the policy that sampled the tokens.
        advantages_K: advantage of each token.
        sequence_id_K: int64 [K], the sequence of each token. The `triton` backend needs sequence-level quantities
            in order (ids never decrease) unless sums are passed; on CUDA ids out of order give a loss of NaN.
        kind: "ppo", "grpo" and "dr_grpo" (ratio of the token clipped; ppo with dual clip), "dapo" (clip_high >
            clip_low), "gspo" (ratio of the sequence), "cispo" (clipped ratio as a constant weight of the log-prob).
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; None: the kind's own, see
            `arguments.DEFAULT_CLIPS`.
        dual_clip: > 1, bound of the ratio for negative advantages; None: 3 for ppo, none for other kinds.
        reference_logprobs_K: of the frozen reference, needed when kl_coef is not 0; with kl_coef 0 KL is only measured.
        kl_kind: "k1", "k2" or "k3".
        importance: "none", "truncated" (at importance_high) or "masked" (0 outside importance_low..importance_high);
            needs old_logprobs_K.
        importance_level: "token", or "sequence": the weight of a sequence is the product over its tokens.
        entropy_K: entropies at the tokens, differentiable; entropy_coef times their weighted sum is subtracted.
        weights_K: weight of each token's loss; None = 1.
        normalisation: "sum", "token_mean", "sequence_mean" (mean over sequences that have tokens, of means over their
            tokens) or "constant" (sum over `divisor`). Means are over the call, with sums passed over their ranks.
        num_sequences: Q; without it the largest id is looked up, which synchronises with the device.
        sequence_sums_Q5: as `policy_sequence_sums` returns it, reduced over ranks; not differentiable.
        backend: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        metrics: policy/{loss,ratio,clip_fraction,clip_fraction_low,clip_fraction_high,behaviour_kl,active}; dual_clip:
        policy/dual_clip_fraction; reference: policy/{kl,kl_k1,kl_k2,kl_k3}; importance: policy/{importance,
        importance_limited}; entropies: policy/entropy. extremes: policy/{ratio_min,ratio_max}, policy/importance_max.

    Raises:
        ValueError, TypeError: wrong kind, shapes, dtypes, devices or values.
        BackendError: the backend cannot run.
    """
    settings = arguments.settings_of(
        kind, clip_low, clip_high, dual_clip, kl_coef, kl_kind, importance, importance_level, importance_low,
        importance_high, entropy_coef, normalisation, divisor,
    )  # fmt: skip
    inputs = Inputs(
        logprobs_K, behaviour_logprobs_K, advantages_K, sequence_id_K, old_logprobs_K, reference_logprobs_K, weights_K,
        entropy_K, sequence_sums_Q5,
    )  # fmt: skip
    arguments.check_needs(settings, inputs)
    arguments.check_tensors(inputs)
    sequences = arguments.count_sequences(settings, inputs, num_sequences)
    name = _choose(backend, logprobs_K)
    if name == "triton" and settings.by_sequence and sequence_sums_Q5 is None:
        _check_order(sequence_id_K)
    inputs = Inputs(*(None if x is None else x.contiguous() for x in inputs))  # type: ignore[arg-type]
    outputs = Outputs(
        *torch.ops.tulu_hpc.policy_loss(
            *inputs, *_words(settings), list(_numbers(settings)), sequences, name
        )
    )  # fmt: skip
    return PolicyLossOutput(outputs.loss, *_metrics(settings, inputs, outputs))


def policy_sequence_sums(
    logprobs_K: Tensor,
    behaviour_logprobs_K: Tensor,
    advantages_K: Tensor,
    sequence_id_K: Tensor,
    *,
    num_sequences: int,
    old_logprobs_K: Tensor | None = None,
    weights_K: Tensor | None = None,
    importance: str = "none",
    importance_level: str = "token",
    importance_low: float = 0.5,
    importance_high: float = 2.0,
) -> Tensor:
    """This rank's part of `sequence_sums_Q5` of policy_loss: add it over context-parallel ranks, in one all-reduce.

    [Q, 5], without gradient: sum of log-ratios, sum of log importance weights, tokens, and the sums of weight times
    importance weight times advantage over tokens with positive and with other advantages. The arguments are those of
    policy_loss.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes, devices or values.
    """
    settings = arguments.settings_of(
        "gspo", None, None, None, 0.0, "k3", importance, importance_level, importance_low, importance_high, 0.0,
        "sum", None,
    )  # fmt: skip
    inputs = Inputs(
        logprobs_K, behaviour_logprobs_K, advantages_K, sequence_id_K, old_logprobs_K, None, weights_K, None, None
    )
    arguments.check_needs(settings, inputs)
    arguments.check_tensors(inputs)
    sequences = arguments.count_sequences(settings, inputs, num_sequences)
    with torch.no_grad():
        return reference.sequence_sums(inputs, replace(settings, num_sequences=sequences))


def _check_order(sequence_id_K: Tensor) -> None:
    """On CUDA the kernel itself finds out, without a synchronisation, and makes the loss NaN."""
    if torch.compiler.is_compiling() or sequence_id_K.is_cuda:
        return
    if not bool((sequence_id_K[1:] >= sequence_id_K[:-1]).all()):
        raise ValueError("backend 'triton' needs sequence_id_K in order, or sequence_sums_Q5")


def _choose(backend: str | None, logprobs_K: Tensor) -> str:
    double = logprobs_K.dtype == torch.float64
    default = "reference" if double else "triton" if logprobs_K.is_cuda else "cpu"
    name = choose(OP, backend, default)
    if name != "reference" and double:
        raise BackendError(f"{OP}: backend {name!r} has no float64; backend='reference' has")
    if name == "cpu" and logprobs_K.device.type != "cpu":
        raise BackendError(f"{OP}: backend 'cpu' cannot run on tensors of device {logprobs_K.device}")
    if name == "triton":
        triton_support.check_device(OP, logprobs_K)
    return name


def _metrics(
    settings: Settings, inputs: Inputs, outputs: Outputs
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    stats_M = outputs.stats_M.detach()
    columns = {
        "loss": problem.POLICY,
        "ratio": problem.RATIO,
        "clip_fraction": problem.CLIPPED,
        "clip_fraction_low": problem.CLIP_LOW,
        "clip_fraction_high": problem.CLIP_HIGH,
        "behaviour_kl": problem.BEHAVIOUR_KL,
        "active": problem.ACTIVE,
    }
    extremes = {"ratio_min": problem.RATIO_MIN, "ratio_max": problem.RATIO_MAX}
    if settings.dual_clip != float("inf"):
        columns["dual_clip_fraction"] = problem.DUAL_CLIP
    if inputs.reference_K is not None:
        kinds = {f"kl_{kind}": column for kind, column in zip(problem.KL_KINDS, (problem.K1, problem.K2, problem.K3))}
        columns |= {"kl": kinds[f"kl_{settings.kl_kind}"], **kinds}
    if settings.importance != "none":
        columns |= {"importance": problem.IMPORTANCE, "importance_limited": problem.IMPORTANCE_LIMITED}
        extremes["importance_max"] = problem.IMPORTANCE_MAX
    if inputs.entropy_K is not None:
        columns["entropy"] = problem.ENTROPY
    metrics = {f"policy/{name}": stats_M[column] for name, column in columns.items()}
    return metrics, outputs.active_K, {f"policy/{name}": stats_M[column] for name, column in extremes.items()}


# ------------------------------------------------------------------------------------------------ torch.library
def _words(settings: Settings) -> tuple[str, ...]:
    return tuple(value for value in vars(settings).values() if isinstance(value, str))


def _numbers(settings: Settings) -> tuple[float, ...]:
    """Everything else but num_sequences."""
    return tuple(value for value in vars(settings).values() if not isinstance(value, str))[:-1]


@torch.library.custom_op("tulu_hpc::policy_loss", mutates_args=())
def policy_loss_op(
    logprobs_K: Tensor,
    behaviour_K: Tensor,
    advantages_K: Tensor,
    sequence_id_K: Tensor,
    old_K: Tensor | None,
    reference_K: Tensor | None,
    weights_K: Tensor | None,
    entropy_K: Tensor | None,
    sums_Q5: Tensor | None,
    kind: str,
    kl_kind: str,
    importance: str,
    importance_level: str,
    normalisation: str,
    numbers: Sequence[float],
    num_sequences: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`problem.Outputs` of `problem.Inputs` and `problem.Settings`; `numbers` are the float settings in their order."""
    record(OP, backend)
    inputs = Inputs(
        logprobs_K, behaviour_K, advantages_K, sequence_id_K, old_K, reference_K, weights_K, entropy_K, sums_Q5
    )
    settings = Settings(kind, kl_kind, importance, importance_level, normalisation, *numbers, num_sequences)  # type: ignore[call-arg, arg-type]
    if backend == "reference":
        return tuple(reference.evaluate(inputs, settings))  # type: ignore[return-value]
    if backend == "cpu":
        return tuple(cpu.evaluate(inputs, settings))  # type: ignore[return-value]
    from tulu_hpc.kernels.policy_loss import triton_kernels

    with torch.cuda.device_of(logprobs_K):
        return tuple(triton_kernels.evaluate(inputs, settings))  # type: ignore[return-value]


@policy_loss_op.register_fake
def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(problem.empty_outputs(Inputs(*arguments[:9])))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    outputs = Outputs(*output)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(outputs.gradient_K, outputs.gradient_entropy_K, outputs.stats_M)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * 17
    if grad_loss is not None:
        gradient_K, gradient_entropy_K, stats_M = ctx.saved_tensors
        scale = grad_loss * stats_M[problem.SCALE]
        if ctx.needs_input_grad[0]:
            gradients[0] = gradient_K * scale
        if ctx.needs_input_grad[7]:
            gradients[7] = gradient_entropy_K * scale
    return tuple(gradients)


policy_loss_op.register_autograd(_backward, setup_context=_setup_context)
