"""megatron's linear layers with oneDNN's matrix products, for fp32 on a CPU.

torch multiplies fp32 matrices by MKL, which runs at half of the speed of an AMD processor with AVX-512; not so oneDNN.
Weight gradients are added to megatron's gradient buffer where it is fp32, without a tensor in between that autograd
would have to add.

Shapes: T rows (of this rank under sequence parallelism), I inputs, O outputs (of this tensor-parallel rank).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from tulu_hpc.kernels.linear_logprob import onednn


class CpuColumnLinear(ColumnParallelLinear):
    """A weight split by outputs."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
        if not _usable(input, weight):
            return super()._forward_impl(input, weight, *args, **options)
        return _linear(input, weight, **options)


class CpuRowLinear(RowParallelLinear):
    """A weight split by inputs."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
        if not _usable(input, weight):
            return super()._forward_impl(input, weight, *args, **options)
        return _linear(input, weight, **options)


def _usable(*tensors: Tensor) -> bool:
    return onednn.available() and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)


def _linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: None,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: dist.ProcessGroup | None,
    **_: Any,
) -> Tensor:
    """[T, 1, I] -> [T, 1, O]; with sequence parallelism the rows of all ranks."""
    assert bias is None
    out: Tensor = _Linear.apply(x, weight, allreduce_dgrad, sequence_parallel, tp_group)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight_OI)
        ctx.communication = allreduce_dgrad, sequence_parallel, group
        whole = _all_rows(x, sequence_parallel, group)
        return _product(whole.flatten(0, -2), weight_OI.T).view(*whole.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        allreduce_dgrad, sequence_parallel, group = ctx.communication
        grad_TO = grad.flatten(0, -2)
        grad_x, pending = None, None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad_TO, weight_OI).view(*grad.shape[:-1], -1)
            if allreduce_dgrad:
                pending = dist.all_reduce(grad_x, group=group, async_op=True)
            elif sequence_parallel:
                grad_x = tensor_parallel.reduce_scatter_to_sequence_parallel_region(grad_x, group=group)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            x_TI = _all_rows(x, sequence_parallel, group).flatten(0, -2)
            grad_weight = _accumulate(weight_OI, _product(grad_TO.T, x_TI))
        if pending is not None:
            pending.wait()
        return grad_x, grad_weight, None, None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    return onednn.product(a, b) if onednn.suits(a, b) else a @ b


def _all_rows(x: Tensor, sequence_parallel: bool, group: dist.ProcessGroup | None) -> Tensor:
    if not sequence_parallel:
        return x
    gathered: Tensor = tensor_parallel.gather_from_sequence_parallel_region(x, group=group)
    return gathered


def _accumulate(weight: Any, grad_OI: Tensor) -> Tensor:
    """Adds to megatron's sums where they are fp32; autograd gets the gradient in any case."""
    total = getattr(weight, "main_grad", None)
    if total is None or total.dtype != grad_OI.dtype:
        return grad_OI
    total.add_(grad_OI)
    weight.grad_added_to_main_grad = True  # megatron's hook then leaves the gradient below alone
    return grad_OI  # it must exist when reductions overlap, and hooks on the weight read it
