"""All Triton kernels of packed_attention, and what the ahead-of-time gate compiles of them."""

from typing import Any

from tulu_hpc.kernels.ahead_of_time import Case
from tulu_hpc.kernels.packed_attention.triton_backward import (
    add_parts_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from tulu_hpc.kernels.packed_attention.triton_forward import forward_kernel
from tulu_hpc.kernels.packed_attention.triton_parts import merge_kernel, sum_copies_kernel
from tulu_hpc.kernels.packed_attention.triton_plan import tiles


def ahead_of_time() -> list[Case]:
    """Every dtype and head dim (64, 128, 256), 4 query heads to a key head, 8 with permuted keys; the small ones."""
    import torch

    found = []
    for head_dim in (64, 128, 256):
        for permuted in (False, True):
            found += _attention_cases(head_dim, permuted, torch.bfloat16)
        for dtype in (torch.float16, torch.float32):
            found += _attention_cases(head_dim, False, dtype)
    return found + _small_cases(tiles(128, torch.bfloat16, True).key_gradient.keys)


def _attention_cases(head_dim: int, permuted: bool, dtype: Any) -> list[Case]:
    """The three kernels; fp32 is multiplied without tensor cores."""
    kind = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[str(dtype).removeprefix("torch.")]
    sizes = tiles(head_dim, dtype, permuted)
    group = 8 if permuted else 4  # the ratio is a loop bound, both in one go
    of = lambda *names: dict.fromkeys(names, f"*{kind}")  # noqa: E731
    numbers = {"heads": "i32", "kv_heads": "i32", "scale": "fp32"}
    kernels = {
        "forward": (
            forward_kernel,
            sizes.forward,
            {**of("q", "k", "v", "out"), "lse": "*fp32", "tables": "*i32", "key_rows": "*i32", **numbers},
        ),
        "query_gradient": (
            query_gradient_kernel,
            sizes.query_gradient,
            {**of("grad", "q", "k", "v", "out"), "lse": "*fp32", **of("dq"), "levels": "*fp32", "deltas": "*fp32"}
            | {"tables": "*i32", "key_rows": "*i32", "queries": "i32", **numbers},
        ),
        "key_gradient": (
            key_gradient_kernel,
            sizes.key_gradient,
            {**of("grad", "q", "k", "v"), "levels": "*fp32", "deltas": "*fp32", **of("dk", "dv")}
            | {"partial": "*fp32", "parts": "*i32", "visits": "*i32"}
            | {"key_rows": "*i32", "queries": "i32", **numbers},
        ),
    }
    ending = ("" if kind == "bf16" else f"_{kind}") + ("_permuted" if permuted else "")
    found = []
    for name, (kernel, tile, signature) in kernels.items():
        for what in sizes.key_passes if name == "key_gradient" else [{}]:
            one = "" if len(what) == 0 or all(what.values()) else "_dk" if what["OF_KEYS"] else "_dv"
            found.append(
                Case(
                    f"packed_attention/{name}{one}/d{head_dim}_g{group}{ending}",
                    kernel,
                    signature,
                    {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_M": tile.queries}
                    | {"BLOCK_N": tile.keys, "PERMUTED": permuted, **what},
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    aligned=[name for name, pointer in signature.items() if pointer.startswith("*")],
                    tensor_core=kind != "fp32",
                )
            )
    return found


def _small_cases(block_n: int) -> list[Case]:
    rest = {"HEAD_DIM": 128, "BLOCK_D": 128, "BLOCK_ROWS": 16}
    small = [
        (
            add_parts_kernel,
            {"partial": "*fp32", "dk": "*bf16", "dv": "*bf16", "splits": "*i32", "key_rows": "*i32", "kv_heads": "i32"},
            {**rest, "BLOCK_N": block_n, "PERMUTED": True},
        ),
        (
            merge_kernel,
            {"out": "*bf16", "lse": "*fp32", "part_out": "*bf16", "part_lse": "*fp32", "queries": "i32", "heads": "i32"}
            | {"part_row_stride": "i32", "part_head_stride": "i32"},
            rest,
        ),
        (
            sum_copies_kernel,
            {"part": "*bf16", "order": "*i64", "offsets": "*i32", "out": "*bf16", "width": "i32"},
            {"BLOCK": 1024},
        ),
    ]
    return [
        Case(
            f"packed_attention/{kernel.__name__.removesuffix('_kernel')}",
            kernel,
            signature,
            constants,
            aligned=[name for name, kind in signature.items() if kind.startswith("*")],
        )
        for kernel, signature, constants in small
    ]
