"""preference_loss in one Triton launch; formulas in `reference`.  Shapes: K scored tokens, Q sequences, P pairs.

One program per *sequence*, so that every coefficient has one writer, also when a sequence is in several pairs or in
none: it sums its own tokens, looks itself up in the pair table, sums its partner's tokens (they are in the cache: the
partner's program reads them too) and writes the derivative to its tokens. The program of a pair's chosen sequence
writes the pair's terms; the last program to finish adds those up in the order of the table. Sums and the arithmetic of
pairs are in fp64 (options arrive in fp32). With many pairs the look-ups cost Q P / 128 loads of 2 KiB.
"""

from typing import Any

import triton
import triton.language as tl

from tulu_hpc.kernels.ahead_of_time import Case
from tulu_hpc.kernels.preference_loss import problem as table
from tulu_hpc.kernels.preference_loss.problem import METRICS, ODDS_LIMIT

_SIGMOID, _SQUARE, _HINGE = tl.constexpr(table.SIGMOID), tl.constexpr(table.SQUARE), tl.constexpr(table.HINGE)
_ODDS, _UNPAIRED = tl.constexpr(table.ODDS), tl.constexpr(table.UNPAIRED)
_ODDS_LIMIT = tl.constexpr(ODDS_LIMIT)
_METRICS = tl.constexpr(len(METRICS))
COLUMNS = 16  # metrics of a pair, rounded up to a power of two
_COLUMNS = tl.constexpr(COLUMNS)

# Per thread few enough values that nothing is spilled on any architecture.
TOKENS_BLOCK, SEARCH_BLOCK, PAIRS_BLOCK, WARPS = 1024, 128, 128, 4
_NUMBERS = (
    "beta",
    "softplus_down",
    "softplus_up",
    "margin_shift",
    "distance",
    "sft_weight",
    "desirable",
    "undesirable",
    "kl_value",
)


@triton.jit
def _sigmoids(z):
    """sigmoid(z) and sigmoid(-z), each to full relative precision, by one division."""
    decay = tl.exp(-tl.abs(z))
    large = 1.0 / (1.0 + decay)
    small = decay * large
    return tl.where(z >= 0, large, small), tl.where(z >= 0, small, large)


@triton.jit
def _softplus(z):
    return tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z)))


@triton.jit
def _narrow(ids, first, size, q, BLOCK: tl.constexpr):
    """The first position with an id >= q is in [first, first + size]; cuts that range into BLOCK parts, takes one."""
    lane = tl.arange(0, BLOCK)
    step = (size + BLOCK - 1) // BLOCK
    inside = lane * step < size
    found = tl.load(ids + first + lane * step, mask=inside, other=0)
    smaller = tl.sum((inside & (found < q)).to(tl.int32))
    next_first = first + tl.where(smaller > 0, (smaller - 1) * step + 1, 0)
    next_size = tl.where(smaller > 0, tl.minimum(step - 1, first + size - next_first), 0)
    return next_first, next_size


@triton.jit
def _token_range(ids, K, Q, q, BLOCK: tl.constexpr):
    """Tokens [start, end) of sequence q. The ranges of all sequences tile 0..K, whatever the ids are."""
    start = K * 0
    end = K * 0
    start_size = tl.where(q > 0, K, 0)
    end_size = K + 0
    while (start_size > 0) | (end_size > 0):
        start, start_size = _narrow(ids, start, start_size, q, BLOCK)
        end, end_size = _narrow(ids, end, end_size, q + 1, BLOCK)
    return start, tl.where(q == Q - 1, K, end)


@triton.jit
def _sequence(
    logprobs, ids, policy_sums, reference, lengths, K, Q, q,
    TOKENS: tl.constexpr, REFERENCE: tl.constexpr, LENGTHS: tl.constexpr, BLOCK: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Sum and length (fp64) of sequence q, its tokens [start, end), and whether its ids are not sorted."""
    wrong = K * 0
    if TOKENS:
        start, end = _token_range(ids, K, Q, q, SEARCH)
        lane = tl.arange(0, BLOCK)
        partial = tl.zeros((BLOCK,), tl.float64)
        other_ids = tl.zeros((BLOCK,), tl.int32)
        for first in range(start, end, BLOCK):
            k = first + lane
            partial += tl.load(logprobs + k, mask=k < end, other=0.0).to(tl.float64)
            other_ids |= (tl.load(ids + k, mask=k < end, other=q) != q).to(tl.int32)
        total = tl.sum(partial)
        length = (end - start).to(tl.float64)
        wrong = tl.maximum(tl.max(other_ids), (end < start).to(tl.int32))
    else:
        start, end = K * 0, K * 0
        total = tl.load(policy_sums + q).to(tl.float64)
        length = total * 0.0
    if LENGTHS:
        length = tl.load(lengths + q).to(tl.float64)
    if REFERENCE and reference.dtype.element_ty == tl.float32:
        total = total.to(tl.float32).to(tl.float64)  # equal models have equal sums
    return total, length, start, end, wrong


@triton.jit
def _log_odds(x):
    """Value and slope of log(p / (1 - p)), p = e^x."""
    bounded = tl.minimum(x, -_ODDS_LIMIT)
    complement = 1.0 - tl.exp(bounded)
    return bounded - tl.log(complement), tl.where(x <= -_ODDS_LIMIT, 1.0 / complement, 0.0)


@triton.jit
def _pair(
    x_chosen, x_rejected, has_chosen, has_rejected, z, beta, softplus_down, softplus_up, margin_shift, distance,
    desirable, undesirable, CODE: tl.constexpr,
):  # fmt: skip
    """f of a pair and its derivatives by the two scores. z: the KL baseline (unpaired kind)."""
    margin = beta * (x_chosen - x_rejected)
    if CODE == _SIGMOID:
        z = margin - margin_shift
        up, down = _sigmoids(z)
        loss = _softplus(-z)
        loss = softplus_down * loss + softplus_up * (loss + z)
        slope_chosen = beta * (softplus_up * up - softplus_down * down)
        slope_rejected = -slope_chosen
    elif CODE == _SQUARE:
        away = x_chosen - x_rejected - distance
        loss = away * away
        slope_chosen = 2.0 * away
        slope_rejected = -slope_chosen
    elif CODE == _HINGE:
        loss = tl.maximum(1.0 - margin, 0.0)
        slope_chosen = tl.where(margin <= 1.0, -1.0, 0.0) * (margin * 0.0 + beta)
        slope_rejected = -slope_chosen
    elif CODE == _ODDS:
        odds_chosen, growth_chosen = _log_odds(x_chosen)
        odds_rejected, growth_rejected = _log_odds(x_rejected)
        odds = odds_chosen - odds_rejected
        loss = beta * _softplus(-odds)
        _up, down = _sigmoids(odds)
        slope_chosen = -beta * down * growth_chosen
        slope_rejected = beta * down * growth_rejected
    else:
        up, down = _sigmoids(beta * x_chosen - z)
        loss = has_chosen * desirable * down
        slope_chosen = -loss * beta * up
        up, down = _sigmoids(beta * x_rejected - z)
        slope_rejected = has_rejected * undesirable * up * beta * down
        loss += has_rejected * undesirable * up
    return loss, slope_chosen, slope_rejected


@triton.jit
def _add_up(pairs, terms, wrong, loss, metrics, P, Q, CODE: tl.constexpr, PAIRS: tl.constexpr):
    """Totals over pairs in the order of the table; NaN as the loss when an id was wrong."""
    lane, column = tl.arange(0, PAIRS), tl.arange(0, _COLUMNS)
    lowest = -1 if CODE == _UNPAIRED else 0
    total = tl.zeros((_COLUMNS,), tl.float64)
    bad = tl.zeros((PAIRS,), tl.int32)
    for first in range(0, P, PAIRS):
        p = first + lane
        chosen = tl.load(pairs + 2 * p, mask=p < P, other=0)
        rejected = tl.load(pairs + 2 * p + 1, mask=p < P, other=0)
        low, high = tl.minimum(chosen, rejected), tl.maximum(chosen, rejected)
        good = (low >= lowest) & (high >= 0) & (high < Q)
        bad |= ((p < P) & (good == 0)).to(tl.int32)
        inside = ((p < P) & good)[:, None]
        # Past the first-level cache, which may hold what was there before the other programs wrote.
        place = terms + p[:, None] * _COLUMNS + column[None, :]
        total += tl.sum(tl.load(place, mask=inside, other=0.0, cache_modifier=".cg"), 0)
    for first in range(0, Q, PAIRS):
        q = first + lane
        bad |= tl.load(wrong + q, mask=q < Q, other=0, cache_modifier=".cg")
    total = tl.where(tl.max(bad) > 0, float("nan"), total)
    tl.store(metrics + column, total.to(tl.float32), mask=column < _METRICS)
    tl.store(loss, tl.sum(tl.where(column == 0, total, 0.0)).to(tl.float32))


@triton.jit(do_not_specialize=["K", "Q", "P"])
def preference_kernel(
    logprobs, ids, policy_sums, reference, lengths, pairs, weights, alignment, kl,
    coefficients, loss, metrics, terms, wrong, arrivals, K, Q, P,
    beta, softplus_down, softplus_up, margin_shift, distance, sft_weight, desirable, undesirable, kl_value,
    CODE: tl.constexpr, MEAN: tl.constexpr, SUBTRACT: tl.constexpr, TOKENS: tl.constexpr, REFERENCE: tl.constexpr,
    LENGTHS: tl.constexpr, WEIGHTS: tl.constexpr, ALIGNMENT: tl.constexpr, KL: tl.constexpr, WPO: tl.constexpr,
    SFT: tl.constexpr, BLOCK: tl.constexpr, SEARCH: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Program q: the coefficients of sequence q, and the terms of the pairs that it is the chosen (or only) side of."""
    q = tl.program_id(0)
    lane = tl.arange(0, PAIRS)
    own_sum, own_length, start, end, own_wrong = _sequence(
        logprobs, ids, policy_sums, reference, lengths, K, Q, q, TOKENS, REFERENCE, LENGTHS, BLOCK, SEARCH
    )
    slope = own_sum * 0.0
    for first in range(0, P, PAIRS):
        p = first + lane
        matches = (tl.load(pairs + 2 * p, mask=p < P, other=-1) == q) | (
            tl.load(pairs + 2 * p + 1, mask=p < P, other=-1) == q
        )
        index = tl.min(tl.where(matches, p, P))
        while index < P:
            chosen = tl.load(pairs + 2 * index).to(tl.int32)
            rejected = tl.load(pairs + 2 * index + 1).to(tl.int32)
            # A wrong id is found by _add_up; nothing may be read through it here.
            partner = tl.minimum(tl.maximum(tl.where(chosen == q, rejected, chosen), 0), Q - 1)
            low, high = tl.minimum(chosen, rejected), tl.maximum(chosen, rejected)
            if (low < (-1 if CODE == _UNPAIRED else 0)) | (high >= Q):
                own_wrong = 1
            sum_2, length_2, _start, _end, _wrong = _sequence(
                logprobs, ids, policy_sums, reference, lengths, K, Q, partner,
                TOKENS, REFERENCE, LENGTHS, BLOCK, SEARCH,
            )  # fmt: skip
            has_chosen = tl.where(chosen >= 0, 1.0, 0.0).to(tl.float64)
            has_rejected = tl.where(rejected >= 0, 1.0, 0.0).to(tl.float64)
            sum_chosen = tl.where(chosen == q, own_sum, sum_2) * has_chosen
            sum_rejected = tl.where(rejected == q, own_sum, sum_2) * has_rejected
            length_chosen = tl.where(chosen == q, own_length, length_2) * has_chosen
            length_rejected = tl.where(rejected == q, own_length, length_2) * has_rejected
            if MEAN or WPO or SFT:
                per_chosen, per_rejected = 1.0 / tl.maximum(length_chosen, 1.0), 1.0 / tl.maximum(length_rejected, 1.0)
            x_chosen, x_rejected = sum_chosen, sum_rejected
            row_chosen = tl.minimum(tl.maximum(chosen, 0), Q - 1)
            row_rejected = tl.minimum(tl.maximum(rejected, 0), Q - 1)
            if SUBTRACT:
                x_chosen -= tl.load(reference + row_chosen).to(tl.float64) * has_chosen
                x_rejected -= tl.load(reference + row_rejected).to(tl.float64) * has_rejected
            if MEAN:
                x_chosen *= per_chosen
                x_rejected *= per_rejected
            z = x_chosen * 0.0 + kl_value
            if KL:
                z = tl.load(kl).to(tl.float64)
            z = beta * tl.maximum(z, 0.0)
            f, slope_chosen, slope_rejected = _pair(
                x_chosen, x_rejected, has_chosen, has_rejected, z, beta, softplus_down, softplus_up, margin_shift,
                distance, desirable, undesirable, CODE,
            )  # fmt: skip
            if MEAN:
                slope_chosen *= per_chosen
                slope_rejected *= per_rejected
            weight = x_chosen * 0.0 + 1.0
            if WEIGHTS:
                weight = tl.load(weights + index).to(tl.float64)
            factor = weight
            if WPO:
                aligned_chosen, aligned_rejected = sum_chosen, sum_rejected
                if ALIGNMENT:
                    aligned_chosen -= tl.load(alignment + row_chosen).to(tl.float64)
                    aligned_rejected -= tl.load(alignment + row_rejected).to(tl.float64)
                factor *= tl.exp(aligned_chosen * per_chosen + aligned_rejected * per_rejected)
            sft, sft_slope = weight * 0.0, weight * 0.0
            if SFT:
                sft_slope = -weight * sft_weight * per_chosen * has_chosen
                sft = sft_slope * sum_chosen
            slope += tl.where(chosen == q, factor * slope_chosen + sft_slope, 0.0)
            slope += tl.where(rejected == q, factor * slope_rejected, 0.0)
            if (chosen == q) | (chosen < 0):
                row = terms + index * _COLUMNS
                reward_chosen, reward_rejected = beta * x_chosen, beta * x_rejected
                tl.store(row + 0, factor * f + sft)
                tl.store(row + 1, reward_chosen)
                tl.store(row + 2, reward_rejected)
                tl.store(row + 3, reward_chosen - reward_rejected)
                tl.store(row + 4, tl.where(reward_chosen > reward_rejected, 1.0, 0.0).to(tl.float64))
                tl.store(row + 5, sum_chosen)
                tl.store(row + 6, sum_rejected)
                tl.store(row + 7, length_chosen)
                tl.store(row + 8, length_rejected)
                tl.store(row + 9, has_chosen)
                tl.store(row + 10, has_rejected)
                tl.store(row + 11, sft)
                tl.store(row + 12, factor)
                tl.store(row + 13, x_chosen * 0.0)
                tl.store(row + 14, x_chosen * 0.0)
                tl.store(row + 15, x_chosen * 0.0)
            index = tl.min(tl.where(matches & (p > index), p, P))
    slope = tl.where(own_wrong > 0, float("nan"), slope)
    tl.store(wrong + q, own_wrong)
    if TOKENS:
        token = tl.arange(0, BLOCK)
        for first in range(start, end, BLOCK):
            tl.store(coefficients + first + token, slope.to(tl.float32), mask=first + token < end)
    else:
        tl.store(coefficients + q, slope.to(tl.float32))
    # All threads' stores come before the arrival; the last program to arrive sees those of all programs.
    tl.debug_barrier()
    if tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == Q - 1:
        _add_up(pairs, terms, wrong, loss, metrics, P, Q, CODE, PAIRS)
        tl.store(arrivals, 0)


def ahead_of_time() -> list[Case]:
    """Every kind with what it needs in production, and the sums of context parallelism."""
    kinds = [name for name in table.KINDS if name not in ("cdpo", "robust")]  # the same code as dpo
    variants: list[tuple[str, str, dict[str, bool]]] = [(name, name, {}) for name in kinds]
    variants += [
        ("dpo_norm_sums", "dpo_norm", {"TOKENS": False, "LENGTHS": True}),
        ("dpo_norm_fp64", "dpo_norm", {"LENGTHS": True}),
        ("dpo_norm_wpo", "dpo_norm", {"WPO": True, "ALIGNMENT": True, "WEIGHTS": True, "SFT": True}),
    ]
    cases = []
    for name, kind_name, changes in variants:
        kind = table.KINDS[kind_name]
        flags: dict[str, Any] = {
            "CODE": kind.code,
            "MEAN": kind.mean,
            "SUBTRACT": kind.reference,
            "TOKENS": True,
            "REFERENCE": kind.reference,
            "LENGTHS": False,
            "WEIGHTS": False,
            "ALIGNMENT": False,
            "KL": kind_name == "kto",
            "WPO": False,
            "SFT": kind_name == "orpo",
            **changes,
        }
        pointers = {
            **dict.fromkeys(("logprobs", "policy_sums", "reference", "lengths", "weights", "alignment", "kl"), "*fp32"),
            **dict.fromkeys(("coefficients", "loss", "metrics"), "*fp32"),
            **dict.fromkeys(("ids", "pairs"), "*i64"),
            **dict.fromkeys(("wrong", "arrivals"), "*i32"),
            "terms": "*fp64",
        }
        if name == "dpo_norm_fp64":
            pointers.update(reference="*fp64", lengths="*i64")
        cases.append(
            Case(
                name=f"preference_loss/preference_kernel/{name}",
                kernel=preference_kernel,
                signature={**pointers, **dict.fromkeys("KQP", "i32"), **dict.fromkeys(_NUMBERS, "fp32")},
                constants={**flags, "BLOCK": TOKENS_BLOCK, "SEARCH": SEARCH_BLOCK, "PAIRS": PAIRS_BLOCK},
                num_warps=WARPS,
                aligned=tuple(pointers),
            )
        )
    return cases
