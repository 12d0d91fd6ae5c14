"""linear_logprob in plain torch: the specification, and the row kernels of the `reference` backend.

Shapes: T rows of hidden, U rows used, K targets, H hidden, V vocabulary, Vl its local shard, C columns of a
block, A rows with a gradient.

For a row with hidden state h:  z = W h,  z' = softcap * tanh(z / softcap) if there is a cap,  x = z' / temperature,
    logprob of target y:  x_y - logsumexp(x)             entropy:  logsumexp(x) - sum_j softmax(x)_j x_j
"""

import torch
from torch import Tensor


def transform(logits: Tensor, inv_temperature: float, softcap: float) -> Tensor:
    """The logits after the soft cap (0 = none) and the temperature."""
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits * inv_temperature


def linear_logprob_dense(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_K: Tensor,
    row_K: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs [K] and entropies [K] by the definition, with all logits in memory; autograd gives the gradients.

    Use it in float64 as the oracle. Ignored targets give 0 in both outputs.
    """
    row_K = torch.arange(len(target_K), device=target_K.device) if row_K is None else row_K
    keep_K = target_K != ignore_index
    logits_KV = transform(hidden_TH[row_K] @ weight_VH.T, 1.0 / temperature, softcap or 0.0)
    all_logprobs_KV = logits_KV.log_softmax(-1)
    logprobs_K = all_logprobs_KV.gather(1, target_K.where(keep_K, 0)[:, None])[:, 0]
    entropy_K = -(all_logprobs_KV.exp() * all_logprobs_KV).sum(-1)
    return logprobs_K.where(keep_K, 0), entropy_K.where(keep_K, 0)


class ReferenceRows:
    """The two row passes in torch (any device; fp32 and fp64); see `problem.RowKernels` for what they must do."""

    name = "reference"
    # One row at a time: every product has the same shape whatever the number of rows.
    invariant_rows = 1

    def forward(
        self,
        logits_UC: Tensor,
        first: int,
        target_K: Tensor,
        row_start_U1: Tensor,
        state_3U: Tensor,
        picked_K: Tensor,
        inv_temperature: float,
        softcap: float,
    ) -> None:
        x = transform(logits_UC, inv_temperature, softcap)
        maximum, total, dot = state_3U
        new_maximum = torch.maximum(maximum, x.amax(-1))
        scale = (maximum - new_maximum).exp()
        shift = x - new_maximum[:, None]
        exponential = shift.exp()
        dot.add_((maximum - new_maximum).clamp(min=-1e30) * total).mul_(scale).add_((exponential * shift).sum(-1))
        total.mul_(scale).add_(exponential.sum(-1))
        maximum.copy_(new_maximum)
        row_k, column_k, k = _targets(target_K, row_start_U1, first, logits_UC.shape[1])
        picked_K[k] = x[row_k, column_k]

    def backward(
        self,
        logits_UC: Tensor,
        logits_row_A: Tensor | None,
        out_AC: Tensor,
        first: int,
        target_K: Tensor,
        row_start_A1: Tensor,
        stats_K4: Tensor,
        grad_K4: Tensor,
        inv_temperature: float,
        softcap: float,
    ) -> None:
        logits_AC = logits_UC if logits_row_A is None else logits_UC[logits_row_A]
        counts_A = row_start_A1.diff()
        has_A = counts_A > 0
        offset = int(row_start_A1[0]) if len(row_start_A1) else 0
        k = slice(offset, offset + int(counts_A.sum()))
        row_k = torch.repeat_interleave(torch.arange(len(counts_A), device=logits_AC.device), counts_A)
        first_A = row_start_A1[:-1].clamp(max=max(len(stats_K4) - 1, 0))
        maximum, log_sum, centred, _ = stats_K4[first_A].T
        grad_A4 = torch.zeros(len(counts_A), 4, dtype=grad_K4.dtype, device=grad_K4.device)
        grad_A4.index_add_(0, row_k, grad_K4[k])
        x = transform(logits_AC, inv_temperature, softcap)
        slope = torch.full_like(x, inv_temperature)
        if softcap:
            slope.mul_(1 - torch.tanh(logits_AC / softcap) ** 2)
        shift = x - maximum[:, None]
        p = (shift - log_sum[:, None]).exp()
        dx = p * ((grad_A4[:, 1] + grad_A4[:, 2] * (1 - centred))[:, None] + grad_A4[:, 2, None] * shift)
        dx.masked_fill_(~has_A[:, None], 0)
        row_k, column_k, k_k = _targets(target_K, row_start_A1, first, logits_AC.shape[1])
        dx.index_put_((row_k, column_k), grad_K4[k_k, 3], accumulate=True)
        out_AC.copy_(dx * slope)


def _targets(target_K: Tensor, row_start_U1: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column, index in K) of the targets of these rows that lie in the columns first:first+columns."""
    if len(row_start_U1) < 2:
        empty = torch.zeros(0, dtype=torch.int64, device=target_K.device)
        return empty, empty, empty
    k = torch.arange(int(row_start_U1[0]), int(row_start_U1[-1]), device=target_K.device)
    row_k = torch.repeat_interleave(torch.arange(len(row_start_U1) - 1, device=target_K.device), row_start_U1.diff())
    column_k = target_K[k] - first
    inside = (column_k >= 0) & (column_k < columns)
    return row_k[inside], column_k[inside], k[inside]
