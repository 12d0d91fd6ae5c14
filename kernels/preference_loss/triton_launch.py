"""The `triton` backend of preference_loss: buffers and the launch. Triton is imported on the first call."""

from contextlib import nullcontext

import torch
from torch import Tensor

from tulu_hpc.kernels.preference_loss.problem import METRICS, Problem

_arrivals: dict[tuple[torch.device, int], Tensor] = {}


def _arrival_counter(device: torch.device) -> Tensor:
    """A counter that is zero between launches, one for each stream: launches of one stream do not overlap."""
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)  # of the graph's own memory
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _arrivals:
        _arrivals[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _arrivals[key]


def preference_loss(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its derivatives by `problem.input`, and the metrics vector; fp32. Wrong ids make them NaN."""
    from tulu_hpc.kernels.preference_loss import triton_kernels as kernels

    options, kind, sequences = problem.options, problem.options.table, problem.sequences
    device = problem.input.device
    coefficients = torch.empty_like(problem.input, dtype=torch.float32)
    if sequences == 0:
        tokens = problem.logprobs_K.numel() if problem.policy_sums_Q is None else 0
        if tokens or problem.pairs_P2.numel():
            raise ValueError("there are tokens or pairs, but no sequences")
        return torch.zeros((), device=device), coefficients, torch.zeros(len(METRICS), device=device)
    loss = torch.empty((), device=device)
    metrics = torch.empty(len(METRICS), device=device)
    pairs = problem.pairs_P2.shape[0]
    terms = torch.empty(pairs, kernels.COLUMNS, dtype=torch.float64, device=device)
    wrong = torch.empty(sequences, dtype=torch.int32, device=device)
    tables = (
        problem.policy_sums_Q,
        problem.reference_sums_Q,
        problem.lengths_Q,
        problem.pairs_P2,
        problem.weights_P,
        problem.alignment_sums_Q,
        problem.kl,
    )
    down, up = options.softplus_weights
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernels.preference_kernel[(sequences,)](
            problem.logprobs_K,
            problem.sequence_id_K,
            *(wrong if x is None else x for x in tables),  # what is absent is never read
            coefficients,
            loss,
            metrics,
            terms,
            wrong,
            _arrival_counter(device),
            problem.logprobs_K.shape[0],
            sequences,
            pairs,
            float(options.beta),
            down,
            up,
            float(options.margin_shift),
            0.5 / options.beta,
            float(options.sft_weight),
            float(options.desirable_weight),
            float(options.undesirable_weight),
            float(options.kl),
            CODE=kind.code,
            MEAN=kind.mean,
            SUBTRACT=kind.reference,
            TOKENS=problem.policy_sums_Q is None,
            REFERENCE=problem.reference_sums_Q is not None,
            LENGTHS=problem.lengths_Q is not None,
            WEIGHTS=problem.weights_P is not None,
            ALIGNMENT=problem.alignment_sums_Q is not None,
            KL=problem.kl is not None,
            WPO=options.wpo,
            SFT=options.sft_weight != 0,
            BLOCK=kernels.TOKENS_BLOCK,
            SEARCH=kernels.SEARCH_BLOCK,
            PAIRS=kernels.PAIRS_BLOCK,
            num_warps=kernels.WARPS,
        )
    return loss, coefficients, metrics
