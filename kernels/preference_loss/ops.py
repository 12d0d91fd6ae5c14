"""preference_loss: the public function and its torch.library op.  Shapes: K scored tokens, Q sequences, P pairs.

The op `tulu_hpc::preference_loss` returns loss, coefficients (derivatives of the loss) and metrics from one launch; its
backward pass multiplies the coefficients by the upstream gradient. The reference backend is differentiable torch.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tulu_hpc.kernels import triton_support
from tulu_hpc.kernels.native import core_status
from tulu_hpc.kernels.preference_loss import cpu, reference, triton_launch
from tulu_hpc.kernels.preference_loss.problem import KINDS, METRICS, Options, Problem
from tulu_hpc.kernels.registry import USABLE, BackendError, LossOutput, choose, record, register

OP = "preference_loss"
register(OP, {"reference": lambda: USABLE, "cpu": core_status, "triton": triton_support.status})


def preference_loss(
    logprobs_K: Tensor,
    sequence_id_K: Tensor,
    reference_sums_Q: Tensor | None,
    pairs_P2: Tensor,
    *,
    kind: str = "dpo",
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    sft_weight: float | None = None,
    weights_P: Tensor | None = None,
    weighting: str = "none",
    alignment_sums_Q: Tensor | None = None,
    kl: Tensor | float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    policy_sums_Q: Tensor | None = None,
    lengths_Q: Tensor | None = None,
    backend: str | None = None,
) -> LossOutput:
    """Sum over pairs of a preference loss, with its gradient and metrics from one launch; formulas in `reference`.

    Args:
        logprobs_K: fp32 or fp64 log-probs of the scored tokens under the policy, differentiable.
        sequence_id_K: int64 [K], the sequence of each token, non-decreasing.
        reference_sums_Q: fp32 or fp64 sums of reference log-probs of every sequence (sums also for the kinds on means).
            Policy sums, accumulated in fp64, are rounded to its dtype. simpo and orpo do not need it: None, with
            lengths_Q.
        pairs_P2: int64 [P, 2], sequence ids of chosen and rejected. kto takes (q, -1) for a desirable and (-1, q) for
            an undesirable sequence; a pair counts as one of each.
        kind: dpo, dpo_norm, cdpo, robust, simpo, ipo, hinge, orpo or kto.
        beta: > 0; for orpo the weight of the odds-ratio term.
        label_smoothing: in [0, 0.5), the share of wrong preferences; dpo, dpo_norm, cdpo (> 0), robust and simpo.
        gamma: target margin of simpo, in units of the reward.
        sft_weight: weight of the mean negative log-prob of the chosen sequence's tokens; None: 1 for orpo, else 0.
        weights_P: weight of each pair's whole loss, no gradient.
        weighting: "none", or "wpo": the preference term of each pair is weighted by its probability under the policy.
        alignment_sums_Q: for wpo, sums over tokens of log sum_v p_v^2; None: 0.
        kl: baseline of kto, taken as max(0, kl): a number, or a tensor of one element; no gradient.
        desirable_weight, undesirable_weight: of kto.
        policy_sums_Q: the policy's sums when they were reduced over context-parallel ranks already; the gradient then
            flows through them and logprobs_K is not read.
        lengths_Q: scored tokens of each sequence of any dtype; else they are counted. Needed with policy_sums_Q for
            dpo_norm, simpo, ipo, orpo, wpo and the SFT term.
        backend: "reference", "cpu" (fp32) or "triton" (fp32); None: by device, and reference for fp64.

    Returns:
        loss: sum over pairs, in the dtype of logprobs_K (or policy_sums_Q). metrics: sums over pairs of
        rewards/{chosen,rejected,margins,accuracies}, logps/{chosen,rejected}, lengths/{chosen,rejected} (when lengths
        are known), counts/{chosen,rejected} (sides that are not -1), loss/sft (with an SFT term), weights (if any).
        Divide by the number of pairs, or by the counts for kto.

    Raises:
        ValueError, TypeError: wrong kind, shapes, dtypes, devices or values; ids out of range or not sorted. On CUDA a
            check of ids would synchronise: there wrong ids make loss, gradient and metrics NaN.
        BackendError: the backend cannot run.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if weighting not in ("none", "wpo"):
        raise ValueError(f"weighting must be none or wpo, got {weighting!r}")
    options = Options(
        kind=kind,
        beta=beta,
        label_smoothing=label_smoothing,
        gamma=gamma,
        sft_weight=float(kind == "orpo") if sft_weight is None else sft_weight,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        kl=0.0 if isinstance(kl, Tensor) else kl,
        wpo=weighting == "wpo",
    )
    _check_options(options, has_kl=isinstance(kl, Tensor), has_alignment=alignment_sums_Q is not None)
    problem = Problem(
        logprobs_K=logprobs_K,
        sequence_id_K=sequence_id_K,
        pairs_P2=pairs_P2,
        reference_sums_Q=reference_sums_Q,
        policy_sums_Q=policy_sums_Q,
        lengths_Q=lengths_Q,
        weights_P=weights_P,
        alignment_sums_Q=alignment_sums_Q,
        kl=kl if isinstance(kl, Tensor) else None,
        options=options,
    )
    _check_tensors(problem)
    name = _choose(backend, problem.input)
    if name == "reference":
        if not torch.compiler.is_compiling():
            _check_ids(problem)
        record(OP, name)
        loss, metrics = reference.preference_loss(problem)
        loss, metrics = loss.to(problem.input.dtype), metrics.to(problem.input.dtype)
    else:
        numbers = [float(number) for number in options[1:]]
        loss, _, metrics = torch.ops.tulu_hpc.preference_loss(*problem[:-1], kind, numbers, name)
    return LossOutput(loss, _named(metrics.detach(), problem))


def _named(metrics: Tensor, problem: Problem) -> dict[str, Tensor]:
    known_lengths = problem.lengths_Q is not None or problem.policy_sums_Q is None
    shown = {
        "loss": False,
        "lengths/chosen": known_lengths,
        "lengths/rejected": known_lengths,
        "loss/sft": problem.options.sft_weight != 0,
        "weights": problem.options.wpo or problem.weights_P is not None,
    }
    return {name: value for name, value in zip(METRICS, metrics.unbind()) if shown.get(name, True)}


def _check_options(options: Options, *, has_kl: bool, has_alignment: bool) -> None:
    kind, smoothing = options.kind, options.label_smoothing
    if not (options.beta > 0 and math.isfinite(options.beta)) or not 0 <= smoothing < 0.5:
        raise ValueError(f"beta > 0 and 0 <= label_smoothing < 0.5 expected, got {options.beta} and {smoothing}")
    if smoothing and not options.table.smoothing:
        raise ValueError(f"{kind} has no label_smoothing, got {smoothing}")
    if kind == "cdpo" and smoothing == 0:
        raise ValueError("cdpo needs label_smoothing > 0; without it, it is dpo")
    if options.gamma and kind != "simpo":
        raise ValueError(f"gamma is the margin of simpo, {kind} has none")
    if kind == "kto":
        if options.wpo:
            raise ValueError("wpo weights pairs, the sequences of kto are unpaired")
    elif has_kl or options.kl or (options.desirable_weight, options.undesirable_weight) != (1, 1):
        raise ValueError(f"kl, desirable_weight and undesirable_weight belong to kto, not to {kind}")
    if has_alignment and not options.wpo:
        raise ValueError("alignment_sums_Q belongs to weighting='wpo'")
    for name in ("gamma", "sft_weight", "desirable_weight", "undesirable_weight"):
        if not (getattr(options, name) >= 0 and math.isfinite(getattr(options, name))):
            raise ValueError(f"{name} must be finite and not negative, got {getattr(options, name)}")


def _check_tensors(problem: Problem) -> None:
    logprobs, ids, pairs = problem.logprobs_K, problem.sequence_id_K, problem.pairs_P2
    floats = (torch.float32, torch.float64)
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(f"pairs_P2 must be int64 [P, 2], got {pairs.dtype} {list(pairs.shape)}")
    if problem.reference_sums_Q is None:
        if problem.options.table.reference:
            raise ValueError(f"{problem.options.kind} needs reference_sums_Q")
        if problem.lengths_Q is None and problem.policy_sums_Q is None:
            raise ValueError(
                "without reference_sums_Q, lengths_Q or policy_sums_Q must say how many sequences there are"
            )
    sequences = problem.sequences
    for label, table, shape in (
        ("reference_sums_Q", problem.reference_sums_Q, [sequences]),
        ("policy_sums_Q", problem.policy_sums_Q, [sequences]),
        ("lengths_Q", problem.lengths_Q, [sequences]),
        ("alignment_sums_Q", problem.alignment_sums_Q, [sequences]),
        ("weights_P", problem.weights_P, [pairs.shape[0]]),
    ):
        if table is not None and list(table.shape) != shape:
            raise ValueError(f"{label} must have the shape {shape}, got {list(table.shape)}")
        if table is not None and label != "lengths_Q" and table.dtype not in floats:
            raise TypeError(f"{label} must be float32 or float64, got {table.dtype}")
    if problem.kl is not None and (problem.kl.numel() != 1 or problem.kl.dtype not in floats):
        raise ValueError(f"kl must be a number or one float, got {problem.kl.dtype} {list(problem.kl.shape)}")
    if problem.policy_sums_Q is None:
        if logprobs.shape != ids.shape or logprobs.dim() != 1:
            raise ValueError(f"logprobs_K {list(logprobs.shape)} and sequence_id_K {list(ids.shape)} differ")
        if logprobs.dtype not in floats or ids.dtype != torch.int64:
            raise TypeError(
                f"logprobs_K must be float32 or float64 and sequence_id_K int64, got {logprobs.dtype}, {ids.dtype}"
            )
    elif problem.lengths_Q is None and problem.options.needs_lengths:
        raise ValueError(f"{problem.options.kind} with these options needs lengths_Q beside policy_sums_Q")
    devices = {x.device for x in problem[:-1] if isinstance(x, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")


def _check_ids(problem: Problem) -> None:
    """As the compiled core does; CPU tensors only, as the answer of a device would have to be waited for."""
    ids, pairs, sequences = problem.sequence_id_K, problem.pairs_P2, problem.sequences
    if ids.device.type != "cpu":
        return
    read = problem.policy_sums_Q is None and len(ids) > 0
    if read and (bool((ids[1:] < ids[:-1]).any()) or int(ids[0]) < 0 or int(ids[-1]) >= sequences):
        raise ValueError(f"sequence_id_K must be non-decreasing and in 0..{sequences - 1}")
    if len(pairs):
        low, high = pairs.amin(1), pairs.amax(1)
        lowest = -1 if problem.options.kind == "kto" else 0
        if bool(((low < lowest) | (high < 0) | (high >= sequences)).any()):
            raise ValueError(cpu.bad_pair(sequences))


def _choose(backend: str | None, tensor: Tensor) -> str:
    if tensor.dtype == torch.float64:
        default = "reference"
    else:
        default = {"cpu": "cpu", "cuda": "triton"}.get(tensor.device.type, "reference")
    name = choose(OP, backend, default)
    if name != "reference" and tensor.dtype == torch.float64:
        raise BackendError(f"{OP}: backend {name!r} has no float64; backend='reference' has")
    if name == "cpu" and tensor.device.type != "cpu":
        raise BackendError(f"{OP}: backend 'cpu' cannot run on tensors of device {tensor.device}")
    if name == "triton":
        triton_support.check_device(OP, tensor)
    return name


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# ------------------------------------------------------------------------------------------------ torch.library
@torch.library.custom_op("tulu_hpc::preference_loss", mutates_args=())
def preference_loss_op(
    logprobs_K: Tensor,
    sequence_id_K: Tensor,
    pairs_P2: Tensor,
    reference_sums_Q: Tensor | None,
    policy_sums_Q: Tensor | None,
    lengths_Q: Tensor | None,
    weights_P: Tensor | None,
    alignment_sums_Q: Tensor | None,
    kl_tensor: Tensor | None,
    kind: str,
    numbers: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its derivatives by logprobs_K (by policy_sums_Q if given), and the sums of `METRICS`; all fp32.

    numbers: `Options` without the kind. In one list, because torch's autograd of a custom op takes a time that grows
    with the square of the number of arguments.
    """
    beta, smoothing, gamma, sft_weight, desirable_weight, undesirable_weight, kl, wpo = numbers
    options = Options(kind, beta, smoothing, gamma, sft_weight, desirable_weight, undesirable_weight, kl, bool(wpo))
    problem = Problem(
        logprobs_K.contiguous(),
        sequence_id_K.contiguous(),
        pairs_P2.contiguous(),
        _contiguous(reference_sums_Q),
        _contiguous(policy_sums_Q),
        _contiguous(lengths_Q),
        _contiguous(weights_P),
        _contiguous(alignment_sums_Q),
        kl_tensor,
        options,
    )
    if backend == "cpu":
        record(OP, backend)
        return cpu.preference_loss(problem)
    _check_ids(problem)
    record(OP, backend)
    return triton_launch.preference_loss(problem)


@preference_loss_op.register_fake
def _fake(logprobs_K: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    policy_sums_Q = arguments[3]
    source = logprobs_K if policy_sums_Q is None else policy_sums_Q
    one = source.new_empty((), dtype=torch.float32)
    return one, source.new_empty(source.shape, dtype=torch.float32), one.new_empty(len(METRICS))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.place, ctx.inputs = (0 if inputs[4] is None else 4), len(inputs)


def _backward(ctx: Any, grad_loss: Tensor | None, *_unused: Any) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * ctx.inputs
    if grad_loss is not None:
        gradients[ctx.place] = grad_loss * ctx.saved_tensors[0]
    return tuple(gradients)


preference_loss_op.register_autograd(_backward, setup_context=_setup_context)
