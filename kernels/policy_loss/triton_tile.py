"""Device functions of policy_loss. Imports triton: import it inside functions only.

Shapes: K scored tokens of this rank, P programs, M columns of the statistics.
"""
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from tulu_hpc.kernels.policy_loss import problem

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
def limit_importance(log_weight, low, high, MODE: tl.constexpr):
    """(weight, whether it was truncated or masked)."""
    raw = tl.exp(_bound(log_weight))
    if MODE == TRUNCATED:
        limited = raw > high
        return tl.where(limited, high, raw), limited
    limited = (raw < low) | (raw > high)
    return tl.where(limited, 0.0, raw), limited


@triton.jit
def start_statistics():
    """A row of statistics over nothing."""
    column = tl.arange(0, COLUMNS)
    lowest = tl.where((column == RATIO_MAX) | (column == IMPORTANCE_MAX), float("-inf"), 0.0)
    return tl.where(column == RATIO_MIN, float("inf"), lowest)


@triton.jit
def add(row_M, COLUMN: tl.constexpr, value):
    return tl.where(tl.arange(0, COLUMNS) == COLUMN, row_M + value, row_M)


@triton.jit
def count(row_M, COLUMN: tl.constexpr, condition):
    return add(row_M, COLUMN, tl.sum(condition.to(tl.float32), 0))


@triton.jit
def tile(
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
        importance, limited = limit_importance(log_weight, importance_low, importance_high, IMPORTANCE_MODE)
        importance = tl.where(inside, importance, 0.0)
        row_M = count(row_M, LIMITED, limited & inside)
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
        row_M = count(row_M, DUAL_CLIP, dual & is_negative & inside)
        low, high = low & is_negative, high & is_positive
    total = importance * policy
    if KIND == SEQUENCE_RATIO:
        grad = slope * factor
        if SEQUENCE_IMPORTANCE:
            grad = grad * importance
    else:
        grad = weight * importance * slope
    row_M = add(row_M, POLICY, tl.sum(total, 0))
    if HAS_REFERENCE:
        difference = logprob - tl.load(reference + k, mask=inside, other=0.0)
        d = _bound(difference)
        tail = _exp_tail(-d)
        row_M = add(row_M, K1, tl.sum(d, 0))
        row_M = add(row_M, K2, tl.sum(d * d * 0.5, 0))
        row_M = add(row_M, K3, tl.sum(tail, 0))
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
        row_M = add(row_M, ENTROPY, tl.sum(entropies, 0))
    tl.store(gradient + k, grad, mask=inside)
    tl.store(active + k, live.to(tl.int8), mask=inside)
    row_M = add(row_M, LOSS, tl.sum(weight * total, 0))
    row_M = add(row_M, RATIO, tl.sum(tl.where(inside, ratio, 0.0), 0))
    row_M = add(row_M, IMPORTANCE, tl.sum(importance, 0))
    row_M = add(row_M, BEHAVIOUR_KL, tl.sum(_exp_tail(_bound(behaviour_ratio)), 0))
    row_M = count(row_M, CLIP_LOW, low & inside)
    row_M = count(row_M, CLIP_HIGH, high & inside)
    row_M = count(row_M, CLIPPED, (low | high) & inside)
    row_M = count(row_M, ACTIVE, live & inside)
    row_M = count(row_M, TOKENS, inside)
    column = tl.arange(0, COLUMNS)
    top = tl.max(tl.where(inside, ratio, float("-inf")), 0)
    bottom = tl.min(tl.where(inside, ratio, float("inf")), 0)
    row_M = tl.where(column == RATIO_MAX, tl.maximum(row_M, top), row_M)
    row_M = tl.where(column == RATIO_MIN, tl.minimum(row_M, bottom), row_M)
    top = tl.max(tl.where(inside, importance, float("-inf")), 0)
    return tl.where(column == IMPORTANCE_MAX, tl.maximum(row_M, top), row_M)


@triton.jit
def finish(
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
