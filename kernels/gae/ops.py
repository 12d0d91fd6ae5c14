"""gae: generalised advantage estimation of a pack, and the torch.library op under it.  Shapes: K tokens, S segments."""

import torch
from torch import Tensor

from tulu_hpc.kernels import triton_support
from tulu_hpc.kernels.gae import reference
from tulu_hpc.kernels.native import check, core, core_status
from tulu_hpc.kernels.registry import USABLE, BackendError, choose, record, register

OP = "gae"
register(OP, {"reference": lambda: USABLE, "cpu": core_status, "triton": triton_support.status})


def gae(
    rewards_K: Tensor,
    values_K: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap_S: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every token, segment by segment; the formulas are in `reference`.

    Args:
        rewards_K: reward of each token, fp32 (fp64: reference backend).
        values_K: value of the state before each token.
        cu_seqlens: int32 or int64 [S + 1], 0 = first <= ... <= last = K; segments may be empty. Checked on the CPU; on
            CUDA, where a check would synchronise, tokens outside all segments are undefined.
        gamma, lam: in [0, 1].
        bootstrap_S: value after the last token of each segment: that of the next state where a sequence was cut off, 0
            where it ended. None: all ended.
        backend: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (advantages_K, returns_K), detached: they are targets.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes, devices or values.
        BackendError: the backend cannot run.
    """
    if not 0 <= gamma <= 1 or not 0 <= lam <= 1:
        raise ValueError(f"gamma and lam must be in [0, 1], got {gamma} and {lam}")
    if rewards_K.dim() != 1 or rewards_K.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rewards_K must be float32 or float64 [K], got {rewards_K.dtype} {list(rewards_K.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) < 1:
        raise TypeError(f"cu_seqlens must be int32 or int64 [S + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    for label, tensor, shape in (
        ("values_K", values_K, rewards_K.shape),
        ("bootstrap_S", bootstrap_S, (len(cu_seqlens) - 1,)),
    ):
        if tensor is not None and tensor.dtype != rewards_K.dtype:
            raise TypeError(f"{label} must be {rewards_K.dtype} as rewards_K, got {tensor.dtype}")
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{label} must be {list(shape)}, got {list(tensor.shape)}")
    if any(x is not None and x.device != rewards_K.device for x in (values_K, cu_seqlens, bootstrap_S)):
        raise ValueError("rewards_K, values_K, cu_seqlens and bootstrap_S must be on one device")
    if not torch.compiler.is_compiling() and not cu_seqlens.is_cuda:
        ordered = bool((cu_seqlens[1:] >= cu_seqlens[:-1]).all())
        if not ordered or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != len(rewards_K):
            raise ValueError(f"cu_seqlens must rise from 0 to {len(rewards_K)}, the number of tokens")
    tensors = (x.detach().contiguous() for x in (rewards_K, values_K, cu_seqlens))
    bootstrap_S = None if bootstrap_S is None else bootstrap_S.detach().contiguous()
    advantages_K, returns_K = torch.ops.tulu_hpc.gae(*tensors, bootstrap_S, gamma, lam, _choose(backend, rewards_K))
    return advantages_K, returns_K


def _choose(backend: str | None, rewards_K: Tensor) -> str:
    double = rewards_K.dtype == torch.float64
    name = choose(OP, backend, "reference" if double else "triton" if rewards_K.is_cuda else "cpu")
    if name != "reference" and double:
        raise BackendError(f"{OP}: backend {name!r} has no float64; backend='reference' has")
    if name == "cpu" and rewards_K.device.type != "cpu":
        raise BackendError(f"{OP}: backend 'cpu' cannot run on tensors of device {rewards_K.device}")
    if name == "triton":
        triton_support.check_device(OP, rewards_K)
    return name


@torch.library.custom_op("tulu_hpc::gae", mutates_args=())
def gae_op(
    rewards_K: Tensor,
    values_K: Tensor,
    cu_seqlens: Tensor,
    bootstrap_S: Tensor | None,
    gamma: float,
    lam: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Contiguous tensors; see `gae`."""
    record(OP, backend)
    if backend == "reference":
        return reference.gae(rewards_K, values_K, cu_seqlens, gamma, lam, bootstrap_S)
    if backend == "triton":
        from tulu_hpc.kernels.gae import triton_kernels

        with torch.cuda.device_of(rewards_K):
            return triton_kernels.gae(rewards_K, values_K, cu_seqlens, gamma, lam, bootstrap_S)
    advantages_K, returns_K = _fake(rewards_K)
    starts_S1 = cu_seqlens.long()
    code = core().gae_cpu(
        rewards_K.data_ptr(),
        values_K.data_ptr(),
        starts_S1.data_ptr(),
        0 if bootstrap_S is None else bootstrap_S.data_ptr(),
        len(cu_seqlens) - 1,
        gamma,
        lam,
        advantages_K.data_ptr(),
        returns_K.data_ptr(),
        torch.get_num_threads(),
    )
    check(code, "gae (cpu)")
    return advantages_K, returns_K


@gae_op.register_fake
def _fake(rewards_K: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rewards_K), torch.empty_like(rewards_K)
