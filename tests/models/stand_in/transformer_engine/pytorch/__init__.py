"""Linear layers and norms of transformer_engine.pytorch in plain torch, with the arguments of version 2.20.2."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.pytorch import distributed, fp8, ops

__all__ = ["DotProductAttention", "GroupedLinear", "LayerNormLinear", "Linear", "RMSNorm", "distributed", "fp8", "ops"]


class _Layer(torch.nn.Module):
    """A weight split over tensor-parallel ranks; its state has an `_extra_state`, as that of every TE module."""

    def _make(
        self, in_features: int, out_features: int, bias: bool, mode: str, tp_group: Any, tp_size: int, sequence: bool
    ) -> None:
        assert not bias and mode in ("column", "row")
        self.in_features, self.out_features = in_features, out_features
        self.parallel_mode, self.tp_group, self.tp_size, self.sequence_parallel = mode, tp_group, tp_size, sequence
        self.use_bias = False
        if mode == "column":
            self.out_features //= tp_size
        else:
            self.in_features //= tp_size

    def _weight(self, device: Any, dtype: torch.dtype) -> torch.nn.Parameter:
        weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, device=device, dtype=dtype))
        weight.tensor_model_parallel, weight.partition_stride = True, 1  # type: ignore[attr-defined]
        weight.partition_dim = 0 if self.parallel_mode == "column" else 1  # type: ignore[attr-defined]
        return weight

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        pass

    def _multiply(self, x: Tensor) -> Tensor:
        from megatron.core import tensor_parallel as parallel

        group, many = self.tp_group, self.tp_size > 1
        if self.parallel_mode == "column" and many:
            if self.sequence_parallel:
                x = parallel.gather_from_sequence_parallel_region(x, group=group)
            else:
                x = parallel.copy_to_tensor_model_parallel_region(x, group=group)
        out = F.linear(x, self.weight)
        if self.parallel_mode == "row" and many:
            if self.sequence_parallel:
                return parallel.reduce_scatter_to_sequence_parallel_region(out, group=group)
            return parallel.reduce_from_tensor_model_parallel_region(out, group=group)
        return out


class Linear(_Layer):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.overlap = (ub_overlap_ag, ub_overlap_rs, ub_name)
        self._make(in_features, out_features, bias, str(parallel_mode), tp_group, tp_size, sequence_parallel)
        self.weight = self._weight(device, params_dtype or torch.float32)

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> Tensor:
        assert is_first_microbatch is None, "weights must be quantised in every call"
        return self._multiply(inp)


class LayerNormLinear(_Layer):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        init_method: Any = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Any = None,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert normalization == "RMSNorm" and not zero_centered_gamma and not return_layernorm_output
        self.eps = eps
        self.overlap = (ub_overlap_ag, ub_overlap_rs, ub_name)
        self._make(in_features, out_features, bias, str(parallel_mode), tp_group, tp_size, sequence_parallel)
        dtype = params_dtype or torch.float32
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(in_features, device=device, dtype=dtype))
        self.layer_norm_weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        self.weight = self._weight(device, dtype)

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> Tensor:
        assert is_first_microbatch is None, "weights must be quantised in every call"
        return self._multiply(F.rms_norm(inp, (self.in_features,), self.layer_norm_weight, self.eps))


class RMSNorm(torch.nn.RMSNorm):
    def __init__(
        self,
        normalized_shape: Any = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: Any = None,
    ) -> None:
        super().__init__(hidden_size, eps=eps, device=device, dtype=params_dtype)
        self.weight.sequence_parallel = bool(sequence_parallel)  # type: ignore[attr-defined]


class DotProductAttention(torch.nn.Module):
    """Only derived from: our attention takes its place."""


class GroupedLinear(torch.nn.Module):
    """Only derived from."""
