"""policy_loss in one Triton launch, values, gradients and statistics. Imports triton: import it inside functions only.

Shapes: K scored tokens of this rank, Q sequences, P programs, M columns of the statistics.

`token_kernel`: a program has BLOCK tokens and looks sequence sums up in the table if there is one. `sequence_kernel`: a
program has every P-th sequence, finds its tokens by bisection and goes over them twice. Every program leaves a row of
partial statistics; the last one to finish adds them, in the order of programs.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tulu_hpc.kernels.ahead_of_time import Case
from tulu_hpc.kernels.policy_loss import problem, triton_value
from tulu_hpc.kernels.policy_loss.problem import Inputs, Outputs, Settings, empty_outputs
from tulu_hpc.kernels.policy_loss.triton_tile import (
    COUNT_SEQUENCES,
    COUNT_TOKENS,
    DETACHED_RATIO,
    NO_UNITS,
    SEQUENCE_RATIO,
    TOKEN_RATIO,
    UNITS,
    VIOLATIONS,
    add,
    count,
    finish,
    limit_importance,
    start_statistics,
    tile,
)

_BLOCK = 512  # tokens of a program: 128 programs for 64k tokens
_SEQUENCE_BLOCK = 1024
_PROBES = 256  # ids read at once in a bisection step
_MOST_PROGRAMS = 1024
_PARTIAL_ROWS = 32  # rows that the last program adds at once


@triton.jit(do_not_specialize=["tokens", "sequences"])
def token_kernel(
    logprobs, behaviour, advantages, ids, old, reference, weights, entropy, sums, gradient, gradient_entropy, active,
    loss, stats, partials, counter, tokens, sequences, lowest, highest, dual_clip, kl_coef, importance_low,
    importance_high, entropy_coef, scale,
    KIND: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REFERENCE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, KL_KIND: tl.constexpr, IMPORTANCE_MODE: tl.constexpr,
    SEQUENCE_IMPORTANCE: tl.constexpr, SEQUENCE_MEAN: tl.constexpr, USE_SUMS: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens a program; `sums` [Q, 5] is read where a sequence matters (USE_SUMS), and its lengths for COUNT."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = k < tokens
    level_sum, log_importance_sum, length, positive, negative = 0.0, 0.0, 1.0, 0.0, 0.0
    if USE_SUMS:
        row = sums + tl.load(ids + k, mask=inside, other=0) * 5
        level_sum = tl.load(row, mask=inside, other=0.0)
        log_importance_sum = tl.load(row + 1, mask=inside, other=0.0)
        length = tl.maximum(tl.load(row + 2, mask=inside, other=1.0), 1.0)
        positive = tl.load(row + 3, mask=inside, other=0.0)
        negative = tl.load(row + 4, mask=inside, other=0.0)
    row_M = tile(
        start_statistics(), k, inside, logprobs, behaviour, advantages, old, reference, weights, entropy, gradient,
        gradient_entropy, active, level_sum, log_importance_sum, length, positive, negative, lowest, highest,
        dual_clip, kl_coef, importance_low, importance_high, entropy_coef, scale,
        KIND, HAS_OLD, HAS_REFERENCE, HAS_WEIGHTS, HAS_ENTROPY, KL_KIND, IMPORTANCE_MODE, SEQUENCE_IMPORTANCE,
        SEQUENCE_MEAN,
    )  # fmt: skip
    if COUNT != NO_UNITS and tl.program_id(0) == 0:
        for start in range(0, sequences, BLOCK):
            q = start + tl.arange(0, BLOCK)
            lengths = tl.load(sums + q * 5 + 2, mask=q < sequences, other=0.0)
            if COUNT == COUNT_SEQUENCES:
                lengths = (lengths > 0).to(tl.float32)
            row_M = add(row_M, UNITS, tl.sum(lengths, 0))
    finish(row_M, partials, counter, loss, stats, tokens, COUNT != NO_UNITS, False, ROWS)


@triton.jit
def _count_below(ids, limit, tokens, LEVELS: tl.constexpr, PROBES: tl.constexpr):
    """How many of the ids, which never decrease, are below `limit`: PROBES of them are read at once, LEVELS times."""
    found = 0
    step = 1
    for _ in tl.static_range(LEVELS - 1):
        step = step * PROBES
    for _ in tl.static_range(LEVELS):
        last = found + (tl.arange(0, PROBES) + 1) * step - 1  # of each of PROBES pieces
        below = (tl.load(ids + last, mask=last < tokens, other=limit) < limit).to(tl.int32)
        found += tl.sum(below, 0) * step
        step = step // PROBES
    return found


@triton.jit(do_not_specialize=["tokens", "sequences"])
def sequence_kernel(
    logprobs, behaviour, advantages, ids, old, reference, weights, entropy, gradient, gradient_entropy, active,
    loss, stats, partials, counter, tokens, sequences, lowest, highest, dual_clip, kl_coef, importance_low,
    importance_high, entropy_coef, scale,
    KIND: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REFERENCE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, KL_KIND: tl.constexpr, IMPORTANCE_MODE: tl.constexpr,
    SEQUENCE_IMPORTANCE: tl.constexpr, SEQUENCE_MEAN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    LEVELS: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    """Whole sequences: first their sums, then loss and gradients."""
    row_M = start_statistics()
    for q in range(tl.program_id(0), sequences, tl.num_programs(0)):
        begin = _count_below(ids, q, tokens, LEVELS, PROBES)
        end = _count_below(ids, q + 1, tokens, LEVELS, PROBES)
        level_sum, log_importance_sum, positive, negative = 0.0, 0.0, 0.0, 0.0
        if KIND == SEQUENCE_RATIO or SEQUENCE_IMPORTANCE:
            for start in range(begin, end, BLOCK):
                k = start + tl.arange(0, BLOCK)
                inside = k < end
                behaviour_logprob = tl.load(behaviour + k, mask=inside, other=0.0)
                old_logprob = behaviour_logprob
                if HAS_OLD:
                    old_logprob = tl.load(old + k, mask=inside, other=0.0)
                log_weight = old_logprob - behaviour_logprob
                log_importance_sum += tl.sum(log_weight, 0)
                if KIND == SEQUENCE_RATIO:
                    level_sum += tl.sum(tl.load(logprobs + k, mask=inside, other=0.0) - old_logprob, 0)
                    advantage = tl.load(advantages + k, mask=inside, other=0.0)
                    weighted = advantage
                    if HAS_WEIGHTS:
                        weighted *= tl.load(weights + k, mask=inside, other=0.0)
                    if IMPORTANCE_MODE != 0 and not SEQUENCE_IMPORTANCE:
                        importance, _ = limit_importance(log_weight, importance_low, importance_high, IMPORTANCE_MODE)
                        weighted *= importance
                    positive += tl.sum(tl.where(advantage > 0, weighted, 0.0), 0)
                    negative += tl.sum(tl.where(advantage > 0, 0.0, weighted), 0)
        length = tl.maximum(end - begin, 1).to(tl.float32)
        for start in range(begin, end, BLOCK):
            k = start + tl.arange(0, BLOCK)
            inside = k < end
            row_M = count(row_M, VIOLATIONS, (tl.load(ids + k, mask=inside, other=q) != q))
            row_M = tile(
                row_M, k, inside, logprobs, behaviour, advantages, old, reference, weights, entropy, gradient,
                gradient_entropy, active, level_sum, log_importance_sum, length, positive, negative, lowest, highest,
                dual_clip, kl_coef, importance_low, importance_high, entropy_coef, scale,
                KIND, HAS_OLD, HAS_REFERENCE, HAS_WEIGHTS, HAS_ENTROPY, KL_KIND, IMPORTANCE_MODE,
                SEQUENCE_IMPORTANCE, SEQUENCE_MEAN,
            )  # fmt: skip
        row_M = add(row_M, UNITS, tl.where(end > begin, 1.0, 0.0))
    finish(row_M, partials, counter, loss, stats, tokens, SEQUENCE_MEAN, True, ROWS)


@cache
def _kept_counter(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def finish_counter(device: torch.device) -> Tensor:
    """A zero that the kernel leaves as a zero; one per stream, so that no launch is spent on it."""
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)  # must live in the memory of the graph
    return _kept_counter(device, torch.cuda.current_stream(device).cuda_stream)


def value_loss(
    values_K: Tensor, old_K: Tensor, returns_K: Tensor, weights_K: Tensor | None, clip: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and sums of `value.evaluate`."""
    outputs = values_K.new_empty(()), torch.empty_like(values_K), values_K.new_empty(4)
    counter = finish_counter(values_K.device)
    triton_value.launch(values_K, old_K, returns_K, weights_K, clip, scale, *outputs, counter)
    return outputs


def _variant(inputs: Inputs, settings: Settings) -> dict[str, object]:
    kinds = {"gspo": SEQUENCE_RATIO.value, "cispo": DETACHED_RATIO.value}
    return {
        "KIND": kinds.get(settings.kind, TOKEN_RATIO.value),
        "HAS_OLD": inputs.old_K is not None,
        "HAS_REFERENCE": inputs.reference_K is not None,
        "HAS_WEIGHTS": inputs.weights_K is not None,
        "HAS_ENTROPY": inputs.entropy_K is not None,
        "KL_KIND": problem.KL_KINDS.index(settings.kl_kind) + 1,
        "IMPORTANCE_MODE": problem.IMPORTANCES.index(settings.importance),
        "SEQUENCE_IMPORTANCE": settings.sequence_importance,
        "SEQUENCE_MEAN": settings.normalisation == "sequence_mean",
    }


def evaluate(inputs: Inputs, settings: Settings) -> Outputs:
    """See `problem.Outputs`; one launch on the current stream."""
    outputs = empty_outputs(inputs)
    first = inputs.logprobs_K
    tokens, has_sums = len(first), inputs.sums_Q5 is not None
    by_sequence = settings.by_sequence and not has_sums
    programs = max(min(settings.num_sequences, _MOST_PROGRAMS) if by_sequence else triton.cdiv(tokens, _BLOCK), 1)
    partials = first.new_empty(programs, problem.COLUMNS)
    # Optional arguments that are missing are never read: any address will do.
    optional = [first if x is None else x for x in inputs[4:8]]
    results = (
        outputs.gradient_K,
        outputs.gradient_entropy_K,
        outputs.active_K.view(torch.int8),
        outputs.loss,
        outputs.stats_M,
        partials,
        finish_counter(first.device),
    )
    numbers = (
        tokens,
        settings.num_sequences,
        settings.lowest,
        settings.highest,
        settings.dual_clip,
        settings.kl_coef,
        settings.importance_low,
        settings.importance_high,
        settings.entropy_coef,
        settings.host_scale(tokens, has_sums),
    )
    variant = _variant(inputs, settings)
    if by_sequence:
        if tokens > _PROBES**3:
            raise ValueError(f"backend 'triton' takes at most {_PROBES**3} tokens with sequences, got {tokens}")
        levels = 1
        while _PROBES**levels < tokens:
            levels += 1
        sequence_kernel[(programs,)](
            *inputs[:4], *optional, *results, *numbers, **variant, BLOCK=_SEQUENCE_BLOCK, ROWS=_PARTIAL_ROWS,
            LEVELS=levels, PROBES=_PROBES,
        )  # fmt: skip
    else:
        units = NO_UNITS
        if settings.counts_units(has_sums):
            units = COUNT_SEQUENCES if settings.normalisation == "sequence_mean" else COUNT_TOKENS
        sums = inputs.sums_Q5 if inputs.sums_Q5 is not None else first
        token_kernel[(programs,)](
            *inputs[:4], *optional, sums, *results, *numbers, **variant, USE_SUMS=settings.by_sequence,
            COUNT=units.value, BLOCK=_BLOCK, ROWS=_PARTIAL_ROWS,
        )  # fmt: skip
    return outputs


def ahead_of_time() -> list[Case]:
    """Variants with everything switched on, and the plain ones that trainers use most."""
    inputs = ("logprobs", "behaviour", "advantages", "ids", "old", "reference", "weights", "entropy")
    results = ("gradient", "gradient_entropy", "active", "loss", "stats", "partials", "counter")
    pointers = (*inputs, *results)
    types = {"ids": "*i64", "active": "*i8", "counter": "*i32"}
    signature = {name: types.get(name, "*fp32") for name in pointers}
    signature |= {"tokens": "i32", "sequences": "i32"}
    floats = ("lowest", "highest", "dual_clip", "kl_coef", "importance_low", "importance_high", "entropy_coef", "scale")
    signature |= dict.fromkeys(floats, "fp32")
    plain = {
        "KIND": 0, "HAS_OLD": False, "HAS_REFERENCE": True, "HAS_WEIGHTS": False, "HAS_ENTROPY": False, "KL_KIND": 3,
        "IMPORTANCE_MODE": 0, "SEQUENCE_IMPORTANCE": False, "SEQUENCE_MEAN": False, "ROWS": _PARTIAL_ROWS,
    }  # fmt: skip
    full = {**plain, "HAS_OLD": True, "HAS_WEIGHTS": True, "HAS_ENTROPY": True}
    by_token = {"USE_SUMS": False, "COUNT": 0, "BLOCK": _BLOCK}
    by_table = {"USE_SUMS": True, "COUNT": 1, "BLOCK": _BLOCK, "SEQUENCE_MEAN": True}
    by_sequence = {"BLOCK": _SEQUENCE_BLOCK, "LEVELS": 2, "PROBES": _PROBES}
    variants = {
        "token/grpo": {**plain, **by_token},
        "token/ppo_all_truncated": {**full, **by_token, "IMPORTANCE_MODE": 1},
        "token/cispo_all_masked": {**full, **by_token, "KIND": 2, "IMPORTANCE_MODE": 2},
        "token/gspo_sums": {**full, **by_table, "KIND": 1, "IMPORTANCE_MODE": 2},
        "sequence/grpo_mean": {**plain, **by_sequence, "SEQUENCE_MEAN": True},
        "sequence/gspo_all_masked": {**full, **by_sequence, "KIND": 1, "IMPORTANCE_MODE": 2, "SEQUENCE_MEAN": True},
        "sequence/ppo_importance": {**full, **by_sequence, "IMPORTANCE_MODE": 1, "SEQUENCE_IMPORTANCE": True},
    }  # fmt: skip
    cases = []
    for name, constants in variants.items():
        kernel, own = (sequence_kernel, {}) if name.startswith("sequence") else (token_kernel, {"sums": "*fp32"})
        cases.append(Case(f"policy_loss/{name}", kernel, {**signature, **own}, constants, aligned=(*pointers, *own)))
    return [*cases, *triton_value.cases()]
