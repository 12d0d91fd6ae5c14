"""What stands between flash calls: the merge of two calls' results and the sum over copies of a key's gradient.

Shapes: T query rows, M key rows, C copies of key rows, N query heads, Nk key/value heads, D head dim.

Each is an op of the registry with backends `reference` (plain torch) and `triton` (one launch), so that
`last_backend("packed_attention_merge")` and TULU_HPC_PACKED_ATTENTION_MERGE_BACKEND work as for the other ops.
"""

import torch
from torch import Tensor

from tulu_hpc.kernels import triton_support
from tulu_hpc.kernels.registry import USABLE, BackendError, choose, record, register

MERGE, SUM_COPIES = "packed_attention_merge", "packed_attention_sum_copies"
for _op in (MERGE, SUM_COPIES):
    register(_op, {"reference": lambda: USABLE, "triton": triton_support.status})


def default(device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """The backend of both ops when nobody names one, and the reason."""
    if device_type != "cuda":
        return "reference", f"the default on {device_type}"
    if dtype == torch.float64:
        return "reference", "triton sums in fp32"
    status = triton_support.status()
    return ("triton", "the default on cuda") if status == USABLE else ("reference", status)


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, *, backend: str | None = None) -> None:
    """out [T, N, D], lse [T, N] <- attention over the keys of both calls, in place.

    With L = log(exp lse + exp part_lse): out exp(lse - L) + part_out exp(part_lse - L), computed in the precision of
    the log-sum-exp. out and lse are contiguous.

    Raises:
        ValueError: shapes do not fit, or out or lse is not contiguous.
        BackendError: the backend cannot run here.
    """
    if out.shape != part_out.shape or lse.shape != out.shape[:2] or part_lse.shape != lse.shape:
        raise ValueError(f"shapes {list(out.shape)} {list(lse.shape)}, {list(part_out.shape)} {list(part_lse.shape)}")
    name = _choose(MERGE, backend, out)
    record(MERGE, name)
    if name == "reference":
        total = torch.logaddexp(lse, part_lse)
        safe = total.masked_fill(total == -torch.inf, 0)
        first = (lse - safe).exp_().unsqueeze(-1)
        second = (part_lse - safe).exp_().unsqueeze(-1)
        out.copy_(out * first + part_out * second)
        lse.copy_(total)
        return
    from tulu_hpc.kernels.packed_attention import triton_parts

    if not (out.is_contiguous() and lse.is_contiguous()):
        raise ValueError("out and lse must be contiguous")
    rows, heads, head_dim = out.shape
    if out.numel() == 0:
        return
    triton_parts.merge_kernel[(-(-rows // 16), heads)](
        *(out, lse, part_out.contiguous(), part_lse, rows, heads, *part_lse.stride()),
        HEAD_DIM=head_dim,
        BLOCK_D=1 << (head_dim - 1).bit_length(),
        BLOCK_ROWS=16,
    )


def sum_copies(
    part_CND: Tensor, order_C: Tensor, offsets: Tensor, dtype: torch.dtype, *, backend: str | None = None
) -> Tensor:
    """[M, Nk, D] in `dtype`: row m is the sum over i in offsets[m]:offsets[m + 1] of part[order[i]].

    Summed in fp32 (fp64 for fp64) in the order given: no atomics, the same bits in every run.

    Args:
        part_CND: [C, Nk, D] contiguous.
        order_C: int [C] permutation of the rows of `part`.
        offsets: int [M + 1] ascending from 0 to C.

    Raises:
        ValueError: shapes do not fit, or `part_CND` is not contiguous.
        BackendError: the backend cannot run here.
    """
    if part_CND.dim() != 3 or order_C.shape != part_CND.shape[:1] or offsets.dim() != 1 or len(offsets) < 1:
        raise ValueError(
            f"part {list(part_CND.shape)}, order {list(order_C.shape)} and offsets {list(offsets.shape)} do not fit"
        )
    name = _choose(SUM_COPIES, backend, part_CND)
    record(SUM_COPIES, name)
    rows = len(offsets) - 1
    if name == "reference":
        wide = torch.float64 if part_CND.dtype == torch.float64 else torch.float32
        ordered = part_CND.index_select(0, order_C).to(wide)
        # unsafe: the lengths are the plan's own; checking them would wait for the device in every layer.
        total = torch.segment_reduce(ordered, "sum", lengths=offsets.diff(), axis=0, unsafe=True, initial=0)
        return total.to(dtype)
    from tulu_hpc.kernels.packed_attention import triton_parts

    if not part_CND.is_contiguous():
        raise ValueError("part must be contiguous")
    out = part_CND.new_empty((rows, *part_CND.shape[1:]), dtype=dtype)
    width = part_CND.shape[1] * part_CND.shape[2]
    if out.numel() == 0:
        return out
    block = min(1024, 1 << (width - 1).bit_length())
    triton_parts.sum_copies_kernel[(rows, -(-width // block))](part_CND, order_C, offsets, out, width, BLOCK=block)
    return out


def _choose(op: str, backend: str | None, tensor: Tensor) -> str:
    name = choose(op, backend, default(tensor.device.type, tensor.dtype)[0])
    if name == "triton":
        triton_support.check_device(op, tensor)
        if tensor.dtype == torch.float64:
            raise BackendError(f"{op}: backend 'triton' cannot run on float64, it computes in fp32")
    return name
