"""megatron's linear layers with oneDNN's matrix products, for fp32 on a CPU.

torch multiplies fp32 matrices by MKL, which reaches half of the speed of an AMD processor with AVX-512; oneDNN all. The
MLP keeps only what its first layer returned: the activation is made again in the backward pass.

Shapes: T rows (of this rank under sequence parallelism), I inputs, O outputs, F features of the MLP (of this
tensor-parallel rank).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from tulu_hpc.kernels import gated
from tulu_hpc.kernels.linear_logprob import onednn

# megatron asks for its own MLP by name, to give it a group; ours gets it from the layer's specification.
logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(
    lambda record: "Unknown MLP type" not in record.getMessage()
)


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model on this device and in this dtype is to be made of these layers."""
    return device.type == "cpu" and dtype == torch.float32 and onednn.available()


class CpuColumnLinear(ColumnParallelLinear):
    """A weight split by outputs."""

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        bias: None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup,
        **_: Any,
    ) -> Tensor:
        """[T, 1, I] -> [T, 1, O]; with sequence parallelism the rows of all ranks."""
        assert bias is None
        out: Tensor = _Linear.apply(input, weight, allreduce_dgrad, sequence_parallel, tp_group)
        return out


class CpuRowLinear(RowParallelLinear):
    """A weight split by inputs."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **_: Any) -> Tensor:
        """[T, 1, I] -> [T, 1, O], the part of this rank's inputs."""
        out: Tensor = _Linear.apply(input, weight, False, False, None)
        return out


class CpuGatedRowLinear(RowParallelLinear):
    """A weight split by inputs that first makes its inputs from rows [gate | up]."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **_: Any) -> Tensor:
        """[T, 1, 2 F] -> [T, 1, O], the part of this rank's features."""
        out: Tensor = _GatedLinear.apply(input, weight)
        return out


class CpuMLP(MLP):
    """megatron's gated MLP; the activation is part of the second layer."""

    def forward(self, hidden_states: Tensor, per_token_scale: None = None, **_: Any) -> tuple[Tensor, None]:
        """[T, 1, H] -> [T, 1, H]."""
        both, _no_bias = self.linear_fc1(hidden_states)
        out, _no_bias = self.linear_fc2(both)
        return out, None


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
            grad_weight = _product(grad_TO.T, x_TI)
        if pending is not None:
            pending.wait()
        return grad_x, grad_weight, None, None, None


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, weight_OF: Tensor) -> Tensor:
        ctx.save_for_backward(both, weight_OF)
        activated_TF = gated.forward(both.flatten(0, -2))
        return _product(activated_TF, weight_OF.T).view(*both.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        both, weight_OF = ctx.saved_tensors
        grad_TO = grad.flatten(0, -2)
        grad_both, activated_TF = gated.backward(both.flatten(0, -2), _product(grad_TO, weight_OF))
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = _product(grad_TO.T, activated_TF)
        return grad_both.view(both.shape), grad_weight


def _product(a: Tensor, b: Tensor) -> Tensor:
    return onednn.product(a, b) if onednn.suits(a, b) else a @ b


def _all_rows(x: Tensor, sequence_parallel: bool, group: dist.ProcessGroup | None) -> Tensor:
    if not sequence_parallel:
        return x
    gathered: Tensor = tensor_parallel.gather_from_sequence_parallel_region(x, group=group)
    return gathered
