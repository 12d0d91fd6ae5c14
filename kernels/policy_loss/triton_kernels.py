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
from tulu_hpc.kernels.policy_loss import problem
from tulu_hpc.kernels.policy_loss.problem import Inputs, Outputs, Settings, empty_outputs

_BLOCK = 512  # tokens of a program: 128 programs for 64k tokens
_SEQUENCE_BLOCK = 1024
_PROBES = 256  # ids read at once in a bisection step
_MOST_PROGRAMS = 1024
_PARTIAL_ROWS = 32  # rows that the last program adds at once

MAX_LOG_RATIO = tl.constexpr(problem.MAX_LOG_RATIO)
SUMS = tl.constexpr(problem.SUMS)
COLUMNS = tl.constexpr(problem.COLUMNS)
LOSS, POLICY, RATIO = (tl.constexpr(i) for i in (problem.LOSS, problem.POLICY, problem.RATIO))
CLIP_LOW, CLIP_HIGH, CLIPPED = (tl.constexpr(i) for i in (problem.CLIP_LOW, problem.CLIP_HIGH, problem.CLIPPED))
DUAL_CLIP, BEHAVIOUR_KL = (tl.constexpr(i) for i in (problem.DUAL_CLIP, problem.BEHAVIOUR_KL))
K1, K2, K3 = (tl.constexpr(i) for i in (problem.K1, problem.K2, problem.K3))
IMPORTANCE, LIMITED = (tl.constexpr(i) for i in (problem.IMPORTANCE, problem.IMPORTANCE_LIMITED))
ENTROPY, ACTIVE, TOKENS = (tl.constexpr(i) for i in (problem.ENTROPY, problem.ACTIVE, problem.TOKENS))
UNITS, VIOLATIONS, SCALE = (tl.constexpr(i) for i in (problem.UNITS, problem.VIOLATIONS, problem.SCALE))
RATIO_MAX, RATIO_MIN = (tl.constexpr(i) for i in (problem.RATIO_MAX, problem.RATIO_MIN))
IMPORTANCE_MAX = tl.constexpr(problem.IMPORTANCE_MAX)

TOKEN_RATIO, SEQUENCE_RATIO, DETACHED_RATIO = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
TRUNCATED, MASKED = tl.constexpr(1), tl.constexpr(2)
NO_UNITS, COUNT_SEQUENCES, COUNT_TOKENS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _bound(x):
    """Within the range where exp is finite; by comparisons, which leave NaN as it is."""
    x = tl.where(x > MAX_LOG_RATIO, MAX_LOG_RATIO, x)
    return tl.where(x < -MAX_LOG_RATIO, -MAX_LOG_RATIO, x)


@triton.jit
def _exp_tail(x):
    """exp(x) - 1 - x, with all its digits near 0 (series up to x^9: below 1e-8 of the value at 0.5)."""
    p = 1.0 / 40320.0 + x * (1.0 / 362880.0)
    p = 1.0 / 720.0 + x * (1.0 / 5040.0 + x * p)
    p = 1.0 / 24.0 + x * (1.0 / 120.0 + x * p)
    p = 0.5 + x * (1.0 / 6.0 + x * p)
    return tl.where(tl.abs(x) < 0.5, x * x * p, tl.exp(x) - 1.0 - x)


@triton.jit
def _importance(log_weight, low, high, MODE: tl.constexpr):
    """(weight, whether it was truncated or masked)."""
    raw = tl.exp(_bound(log_weight))
    if MODE == TRUNCATED:
        limited = raw > high
        return tl.where(limited, high, raw), limited
    limited = (raw < low) | (raw > high)
    return tl.where(limited, 0.0, raw), limited


@triton.jit
def _start_statistics():
    """A row of statistics over nothing."""
    column = tl.arange(0, COLUMNS)
    lowest = tl.where((column == RATIO_MAX) | (column == IMPORTANCE_MAX), float("-inf"), 0.0)
    return tl.where(column == RATIO_MIN, float("inf"), lowest)


@triton.jit
def _add(row_M, COLUMN: tl.constexpr, value):
    return tl.where(tl.arange(0, COLUMNS) == COLUMN, row_M + value, row_M)


@triton.jit
def _count(row_M, COLUMN: tl.constexpr, condition):
    return _add(row_M, COLUMN, tl.sum(condition.to(tl.float32), 0))


@triton.jit
def _tile(
    row_M, k, inside, logprobs, behaviour, advantages, old, reference, weights, entropy, gradient, gradient_entropy,
    active, level_sum, log_importance_sum, length, positive, negative, lowest, highest, dual_clip, kl_coef,
    importance_low, importance_high, entropy_coef, scale,
    KIND: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REFERENCE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, KL_KIND: tl.constexpr, IMPORTANCE_MODE: tl.constexpr,
    SEQUENCE_IMPORTANCE: tl.constexpr, SEQUENCE_MEAN: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens `k`, and their statistics added to `row_M`. Sequence sums: one for all, or a token's."""
    logprob = tl.load(logprobs + k, mask=inside, other=0.0)
    behaviour_logprob = tl.load(behaviour + k, mask=inside, other=0.0)
    advantage = tl.load(advantages + k, mask=inside, other=0.0)
    behaviour_ratio = logprob - behaviour_logprob
    old_logprob = behaviour_logprob
    if HAS_OLD:
        old_logprob = tl.load(old + k, mask=inside, other=0.0)
    factor = tl.where(inside, scale, 0.0)
    if SEQUENCE_MEAN:
        factor = factor / length
    weight = factor
    if HAS_WEIGHTS:
        weight = weight * tl.load(weights + k, mask=inside, other=0.0)

    importance = tl.where(inside, 1.0, 0.0)
    if IMPORTANCE_MODE != 0:
        log_weight = old_logprob - behaviour_logprob
        if SEQUENCE_IMPORTANCE:
            log_weight = tl.where(inside, log_importance_sum, 0.0)
        importance, limited = _importance(log_weight, importance_low, importance_high, IMPORTANCE_MODE)
        importance = tl.where(inside, importance, 0.0)
        row_M = _count(row_M, LIMITED, limited & inside)
    level = logprob - old_logprob
    if KIND == SEQUENCE_RATIO:
        level = tl.where(inside, level_sum / length, 0.0)
    ratio = tl.exp(_bound(level))
    low, high = ratio < lowest, ratio > highest
    is_positive = advantage > 0
    if KIND == DETACHED_RATIO:
        slope = -advantage * tl.where(low, lowest, tl.where(high, highest, ratio))
        policy = slope * logprob
    else:
        beyond = tl.abs(level) > MAX_LOG_RATIO
        dual = ratio > dual_clip
        held = tl.where(low, lowest, tl.where(dual, dual_clip, ratio))
        policy = -advantage * tl.where(is_positive, tl.where(high, highest, ratio), held)
        if KIND == TOKEN_RATIO:
            flat = tl.where(is_positive, high, low | dual) | beyond
            slope = tl.where(flat, 0.0, -advantage * ratio)
        else:
            slope = -ratio * (tl.where(high, 0.0, positive) + tl.where(low | dual, 0.0, negative)) / length
            slope = tl.where(beyond, 0.0, slope)
        is_negative = advantage < 0
        row_M = _count(row_M, DUAL_CLIP, dual & is_negative & inside)
        low, high = low & is_negative, high & is_positive
    total = importance * policy
    if KIND == SEQUENCE_RATIO:
        grad = slope * factor
        if SEQUENCE_IMPORTANCE:
            grad = grad * importance
    else:
        grad = weight * importance * slope
    row_M = _add(row_M, POLICY, tl.sum(total, 0))
    if HAS_REFERENCE:
        difference = logprob - tl.load(reference + k, mask=inside, other=0.0)
        d = _bound(difference)
        tail = _exp_tail(-d)
        row_M = _add(row_M, K1, tl.sum(d, 0))
        row_M = _add(row_M, K2, tl.sum(d * d * 0.5, 0))
        row_M = _add(row_M, K3, tl.sum(tail, 0))
        if KL_KIND == 1:
            kl, kl_slope = d, d * 0.0 + 1.0
        elif KL_KIND == 2:
            kl, kl_slope = d * d * 0.5, d
        else:
            kl, kl_slope = tail, d - tail
        total += kl_coef * kl
        grad += weight * kl_coef * tl.where(tl.abs(difference) > MAX_LOG_RATIO, 0.0, kl_slope)
    live = grad != 0.0
    if HAS_ENTROPY:
        entropies = tl.load(entropy + k, mask=inside, other=0.0)
        total -= entropy_coef * entropies
        grad_entropy = -entropy_coef * weight
        live = live | (grad_entropy != 0.0)
        tl.store(gradient_entropy + k, grad_entropy, mask=inside)
        row_M = _add(row_M, ENTROPY, tl.sum(entropies, 0))
    tl.store(gradient + k, grad, mask=inside)
    tl.store(active + k, live.to(tl.int8), mask=inside)
    row_M = _add(row_M, LOSS, tl.sum(weight * total, 0))
    row_M = _add(row_M, RATIO, tl.sum(tl.where(inside, ratio, 0.0), 0))
    row_M = _add(row_M, IMPORTANCE, tl.sum(importance, 0))
    row_M = _add(row_M, BEHAVIOUR_KL, tl.sum(_exp_tail(_bound(behaviour_ratio)), 0))
    row_M = _count(row_M, CLIP_LOW, low & inside)
    row_M = _count(row_M, CLIP_HIGH, high & inside)
    row_M = _count(row_M, CLIPPED, (low | high) & inside)
    row_M = _count(row_M, ACTIVE, live & inside)
    row_M = _count(row_M, TOKENS, inside)
    column = tl.arange(0, COLUMNS)
    top = tl.max(tl.where(inside, ratio, float("-inf")), 0)
    bottom = tl.min(tl.where(inside, ratio, float("inf")), 0)
    row_M = tl.where(column == RATIO_MAX, tl.maximum(row_M, top), row_M)
    row_M = tl.where(column == RATIO_MIN, tl.minimum(row_M, bottom), row_M)
    top = tl.max(tl.where(inside, importance, float("-inf")), 0)
    return tl.where(column == IMPORTANCE_MAX, tl.maximum(row_M, top), row_M)


@triton.jit
def _finish(
    row_M, partials, counter, loss, stats, tokens, COUNT_UNITS: tl.constexpr, CHECK_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Leaves this program's row; the last program adds all rows, in their order, and resets the counter."""
    column = tl.arange(0, COLUMNS)
    programs = tl.num_programs(0)
    tl.store(partials + tl.program_id(0) * COLUMNS + column, row_M)
    tl.debug_barrier()  # all threads have stored before the one that counts does
    if tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1:
        total_M = tl.zeros((COLUMNS,), tl.float64)
        top_M = tl.full((COLUMNS,), float("-inf"), tl.float32)
        bottom_M = tl.full((COLUMNS,), float("inf"), tl.float32)
        for start in range(0, programs, ROWS):
            row = start + tl.arange(0, ROWS)[:, None]
            inside = row < programs
            part = tl.load(partials + row * COLUMNS + column[None, :], mask=inside, other=0.0, cache_modifier=".cg")
            total_M += tl.sum(part.to(tl.float64), 0)
            top_M = tl.maximum(top_M, tl.max(tl.where(inside, part, float("-inf")), 0))
            bottom_M = tl.minimum(bottom_M, tl.min(tl.where(inside, part, float("inf")), 0))
        factor = 1.0
        if COUNT_UNITS:
            units = tl.sum(tl.where(column == UNITS, total_M, 0.0), 0).to(tl.float32)
            factor = 1.0 / tl.maximum(units, 1.0)
        if CHECK_TOKENS:
            bad = tl.sum(tl.where(column == VIOLATIONS, total_M, 0.0), 0) > 0
            bad = bad | (tl.sum(tl.where(column == TOKENS, total_M, 0.0), 0) != tokens)
            factor = tl.where(bad, float("nan"), factor)
        result_M = tl.where(column < SUMS, total_M.to(tl.float32), top_M)
        result_M = tl.where(column == RATIO_MIN, bottom_M, result_M)
        result_M = tl.where(column == LOSS, result_M * factor, tl.where(column == SCALE, factor, result_M))
        tl.store(stats + column, result_M)
        tl.store(loss, tl.sum(tl.where(column == LOSS, result_M, 0.0), 0))
        tl.store(counter, 0)


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
    row_M = _tile(
        _start_statistics(), k, inside, logprobs, behaviour, advantages, old, reference, weights, entropy, gradient,
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
            row_M = _add(row_M, UNITS, tl.sum(lengths, 0))
    _finish(row_M, partials, counter, loss, stats, tokens, COUNT != NO_UNITS, False, ROWS)


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
    row_M = _start_statistics()
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
                        importance, _ = _importance(log_weight, importance_low, importance_high, IMPORTANCE_MODE)
                        weighted *= importance
                    positive += tl.sum(tl.where(advantage > 0, weighted, 0.0), 0)
                    negative += tl.sum(tl.where(advantage > 0, 0.0, weighted), 0)
        length = tl.maximum(end - begin, 1).to(tl.float32)
        for start in range(begin, end, BLOCK):
            k = start + tl.arange(0, BLOCK)
            inside = k < end
            row_M = _count(row_M, VIOLATIONS, (tl.load(ids + k, mask=inside, other=q) != q))
            row_M = _tile(
                row_M, k, inside, logprobs, behaviour, advantages, old, reference, weights, entropy, gradient,
                gradient_entropy, active, level_sum, log_importance_sum, length, positive, negative, lowest, highest,
                dual_clip, kl_coef, importance_low, importance_high, entropy_coef, scale,
                KIND, HAS_OLD, HAS_REFERENCE, HAS_WEIGHTS, HAS_ENTROPY, KL_KIND, IMPORTANCE_MODE,
                SEQUENCE_IMPORTANCE, SEQUENCE_MEAN,
            )  # fmt: skip
        row_M = _add(row_M, UNITS, tl.where(end > begin, 1.0, 0.0))
    _finish(row_M, partials, counter, loss, stats, tokens, SEQUENCE_MEAN, True, ROWS)


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
        count = NO_UNITS
        if settings.counts_units(has_sums):
            count = COUNT_SEQUENCES if settings.normalisation == "sequence_mean" else COUNT_TOKENS
        sums = inputs.sums_Q5 if inputs.sums_Q5 is not None else first
        token_kernel[(programs,)](
            *inputs[:4], *optional, sums, *results, *numbers, **variant, USE_SUMS=settings.by_sequence,
            COUNT=count.value, BLOCK=_BLOCK, ROWS=_PARTIAL_ROWS,
        )  # fmt: skip
    return outputs


def ahead_of_time() -> list[Case]:
    """Variants with everything switched on, and the plain ones that trainers use most."""
    pointers = ("logprobs", "behaviour", "advantages", "ids", "old", "reference", "weights", "entropy", "gradient")
    pointers += ("gradient_entropy", "active", "loss", "stats", "partials", "counter")
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
        cases.append(
            Case(f"policy_loss/{name}", kernel, {**signature, **own}, constants, aligned=(*pointers, *own))
        )
    return cases
