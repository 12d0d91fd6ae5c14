"""The `cpu` backend: one call of the compiled core (fp32).  Shapes: K scored tokens, Q sequences."""

import torch
from torch import Tensor

from tulu_hpc.kernels.native import check, core
from tulu_hpc.kernels.policy_loss import problem
from tulu_hpc.kernels.policy_loss.problem import Inputs, Outputs, Settings, empty_outputs

_KINDS = {"gspo": 1, "cispo": 2}  # others: the ratio of the token


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def evaluate(inputs: Inputs, settings: Settings) -> Outputs:
    """See `problem.Outputs`."""
    outputs = empty_outputs(inputs)
    has_sums = inputs.sums_Q5 is not None
    results = (
        outputs.gradient_K,
        outputs.gradient_entropy_K,
        outputs.active_K,
        outputs.loss,
        outputs.stats_M,
    )
    sequence_mean = settings.normalisation == "sequence_mean"
    modes = (
        _KINDS.get(settings.kind, 0),
        problem.KL_KINDS.index(settings.kl_kind) + 1,
        problem.IMPORTANCES.index(settings.importance),
        int(settings.sequence_importance),
        int(sequence_mean),
        (1 if sequence_mean else 2) if settings.counts_units(has_sums) else 0,
    )
    numbers = (
        settings.lowest,
        settings.highest,
        settings.dual_clip,
        settings.kl_coef,
        settings.importance_low,
        settings.importance_high,
        settings.entropy_coef,
        settings.host_scale(len(inputs.logprobs_K), has_sums),
    )
    code = core().policy_loss_cpu(
        [_address(x) for x in (*inputs, *results)],
        modes,
        numbers,
        len(inputs.logprobs_K),
        settings.num_sequences,
        torch.get_num_threads(),
    )
    check(code, "policy_loss (cpu): a sequence id or a size")
    return outputs
