"""The `cpu` backend of preference_loss, in the compiled core: fp32 log-probs, arithmetic in fp64."""

import torch
from torch import Tensor

from tulu_hpc.kernels.native import check, core
from tulu_hpc.kernels.preference_loss.problem import METRICS, ODDS_LIMIT, Problem

# As in csrc/include/tulu_core.h.
BAD_SEQUENCE_ID, BAD_PAIR = -101, -102


def preference_loss(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its derivatives by `problem.input`, and the metrics vector; fp32.

    Raises:
        ValueError: sequence ids or pairs are out of range, or the ids are not sorted.
    """
    options, kind = problem.options, problem.options.table
    # Tables of Q or P numbers; kept in variables, as the core reads them by address.
    doubles = [
        None if x is None else x.double()
        for x in (
            problem.policy_sums_Q,
            problem.reference_sums_Q if kind.reference else None,
            problem.lengths_Q,
            problem.weights_P,
            problem.alignment_sums_Q,
        )
    ]
    policy, reference, lengths, weights, alignment = (0 if x is None else x.data_ptr() for x in doubles)
    rounded = problem.reference_sums_Q is not None and problem.reference_sums_Q.dtype == torch.float32
    coefficients = torch.empty_like(problem.input, dtype=torch.float32)
    metrics = torch.empty(len(METRICS), dtype=torch.float64)
    code = core().preference_loss_cpu(
        problem.logprobs_K.data_ptr(),
        problem.sequence_id_K.data_ptr(),
        policy,
        reference,
        lengths,
        problem.pairs_P2.data_ptr(),
        weights,
        alignment,
        problem.logprobs_K.shape[0],
        problem.sequences,
        problem.pairs_P2.shape[0],
        kind.code,
        kind.mean,
        kind.reference,
        rounded,
        options.wpo,
        options.beta,
        *options.softplus_weights,
        options.margin_shift,
        options.sft_weight,
        options.desirable_weight,
        options.undesirable_weight,
        options.kl if problem.kl is None else float(problem.kl),
        ODDS_LIMIT,
        coefficients.data_ptr(),
        metrics.data_ptr(),
        torch.get_num_threads(),
    )
    if code == BAD_SEQUENCE_ID:
        raise ValueError(f"sequence_id_K must be non-decreasing and in 0..{problem.sequences - 1}")
    if code == BAD_PAIR:
        raise ValueError(bad_pair(problem.sequences))
    check(code, "preference_loss (cpu)")
    metrics = metrics.float()
    return metrics[0].clone(), coefficients, metrics


def bad_pair(sequences: int) -> str:
    """What is wrong with a pair that is refused."""
    return f"pairs_P2 must hold sequence ids in 0..{sequences - 1} (for kto one of the two may be -1)"
