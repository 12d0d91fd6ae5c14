"""CUDA backend: variable-length flash attention of a library (`providers`), under both strategies of the plan.

Shapes: T query rows, M key rows, N query heads, Nk key/value heads, D head dim.

All libraries keep the flash contract: forward returns the log-sum-exp, backward takes any output and log-sum-exp.
"""

import torch
from torch import Tensor

from tulu_hpc.kernels.packed_attention import providers
from tulu_hpc.kernels.packed_attention.parts import merge, sum_copies
from tulu_hpc.kernels.packed_attention.plan import AttentionPlan, VarlenCall
from tulu_hpc.kernels.packed_attention.providers import PROVIDERS, Capability, Provider, Selection
from tulu_hpc.kernels.packed_attention.providers.base import common_refusal
from tulu_hpc.kernels.registry import USABLE, BackendError, constant

NAME = "flash"
NAMED = tuple(f"{NAME}:{each}" for each in PROVIDERS)
_NO_GPU = "torch sees no CUDA device"


def status(provider: str | None = None) -> str:
    """ "usable" or why not: of one library, or (None) of whichever library will be chosen."""
    if not torch.cuda.is_available():
        return _NO_GPU
    if provider is None:
        return USABLE
    state = PROVIDERS[provider].state()
    return USABLE if state.kind == "usable" else state.text


def capability() -> Capability | None:
    """Compute capability of this process's GPU, None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def deterministic() -> bool:
    """Whether non-deterministic kernels are to be refused."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def refusal(dtype: torch.dtype, head_dim: int, provider: str | None = None) -> str | None:
    """Why such tensors are not taken, None if they are: by one library, or (None) by any."""
    if provider is None:
        return common_refusal(dtype, head_dim)
    return PROVIDERS[provider].refusal(dtype, head_dim, capability() or (0, 0), deterministic())


def select(dtype: torch.dtype, head_dim: int) -> Selection:
    """The library that runs on this GPU when none is named."""
    return providers.select(dtype, head_dim, capability() or (0, 0), deterministic())


@constant
def resolve(dtype: torch.dtype, head_dim: int) -> str:
    """The name of the backend with its library, such as "flash:fa3".

    Raises:
        BackendError: no library takes such tensors, or the one that would run is installed and broken.
    """
    selection = select(dtype, head_dim)
    if selection.name is not None:
        return f"{NAME}:{selection.name}"
    if selection.problem is not None:
        raise BackendError(
            f"packed_attention: {selection.problem}. Repair or remove it, or name what shall run: "
            "backend='flash:aten', 'triton', or TULU_HPC_PACKED_ATTENTION_BACKEND"
        )
    found = "; ".join(f"{name} {text}" for name, text in selection.findings.items())
    raise BackendError(f"packed_attention: no library of backend 'flash' can run: {found}")


def _keys(x: Tensor, call: VarlenCall) -> Tensor:
    return x[call.key_start : call.key_stop] if call.key_index is None else x.index_select(0, call.key_index)


def _key_gradient(total: Tensor | None, part: Tensor, call: VarlenCall, alone: bool) -> Tensor:
    """total + the gradients of the call's keys, in fp32 and in the plan's order; `alone`: the only call of the plan."""
    if call.key_index is None:
        assert total is not None
        total[call.key_start : call.key_stop] += part
        return total
    assert call.copy_order is not None and call.copy_offsets is not None
    # The sum is in fp32 either way; the only call's is rounded at once.
    added = sum_copies(part.contiguous(), call.copy_order, call.copy_offsets, part.dtype if alone else torch.float32)
    return added if total is None else total.add_(added)


class Flash:
    """The backend on one library."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
        """out [T, N, D] and log-sum-exp [T, N]."""
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        for number, call in enumerate(plan.calls):
            rows = slice(call.query_start, call.query_stop)
            part_out, part_lse = self.provider.forward(q[rows], _keys(k, call), _keys(v, call), call, scale)
            if number == 0:
                out[rows], lse[rows] = part_out, part_lse
            else:
                merge(out[rows], lse[rows], part_out, part_lse)
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        plan: AttentionPlan,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v; sums over calls and copies in fp32."""
        alone = len(plan.calls) == 1
        zeros = lambda x: torch.zeros(x.shape, dtype=torch.float32, device=x.device)  # noqa: E731
        dq = zeros(q)
        direct = alone and plan.calls[0].key_index is not None
        dk, dv = (None, None) if direct else (zeros(k), zeros(v))
        for call in plan.calls:
            rows = slice(call.query_start, call.query_stop)
            part_dq, part_dk, part_dv = self.provider.backward(
                *(grad[rows], q[rows], _keys(k, call), _keys(v, call), out[rows], lse[rows]),
                *(call, scale, deterministic()),
            )
            dq[rows] += part_dq
            dk = _key_gradient(dk, part_dk, call, alone)
            dv = _key_gradient(dv, part_dv, call, alone)
        assert dk is not None and dv is not None
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


BACKENDS = {name: Flash(provider) for name, provider in zip(NAMED, PROVIDERS.values())}
