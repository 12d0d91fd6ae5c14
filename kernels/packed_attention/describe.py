"""A plan in words: what it is for, which backend and strategy will run, and why.

Shapes: T query rows, M key rows, N query heads, Nk key/value heads, D head dim.
"""

import os
from typing import TYPE_CHECKING

import torch

from tulu_hpc.kernels import triton_support
from tulu_hpc.kernels.packed_attention import flash, parts, providers
from tulu_hpc.kernels.packed_attention.select import default, refusal
from tulu_hpc.kernels.registry import USABLE, available_backends

if TYPE_CHECKING:
    from tulu_hpc.kernels.packed_attention.plan import AttentionPlan

_VARIABLE = "TULU_HPC_PACKED_ATTENTION_BACKEND"


def describe(plan: "AttentionPlan", dtype: torch.dtype, backend: str | None) -> str:
    """See `AttentionPlan.describe`."""
    keys = sum(e.prefix_stop - e.prefix_start + e.key_stop - e.key_start for e in plan.entries)
    lines = [
        f"packed_attention of {plan.num_queries} query rows on {plan.num_keys} key rows, {len(plan.entries)} entries, "
        f"{plan.attention_pairs} pairs, heads {plan.heads}/{plan.kv_heads}, head dim {plan.head_dim}, {dtype} on "
        f"{plan.device}"
    ]
    choice = default(plan.device.type, dtype, plan.head_dim)
    name, reason = choice.backend, choice.reason
    if backend is not None:
        name, reason = backend, "named in the call"
    elif os.environ.get(_VARIABLE):
        name, reason = os.environ[_VARIABLE], f"named by {_VARIABLE}"
    usable = available_backends("packed_attention")
    problem = usable.get(name, "there is no such backend")
    if problem == USABLE:
        problem = refusal(name, plan.device.type, dtype, plan.head_dim) or USABLE
    lines.append(f"backend   {name}: {reason}" + ("" if problem == USABLE else f"; it will raise: {problem}"))
    is_flash = name == flash.NAME or name in flash.NAMED
    if name == flash.NAME:
        lines += _library(plan, dtype)
    if name == "cpu" or is_flash:
        lines.append(f"strategy  {plan.strategy}: {plan.strategy_reason}")
        lines.append(f"          {len(plan.calls)} calls; entries see {keys} key rows in all")
    elif name == "triton":
        lines.append("strategy  one launch over prefixes and segments, nothing is repeated or merged")
    else:
        lines.append("strategy  dense mask, a score matrix of query rows x key rows per head")
    if is_flash:
        for op, what in ((parts.SUM_COPIES, "copies "), (parts.MERGE, "merge  ")):
            chosen, why = parts.default(plan.device.type, dtype)
            variable = f"TULU_HPC_{op.upper()}_BACKEND"
            if os.environ.get(variable):
                chosen, why = os.environ[variable], f"named by {variable}"
            lines.append(f"{what}   {chosen}: {why}")
    lines.append(f"usable    {', '.join(sorted(n for n, status in usable.items() if status == USABLE))}")
    if triton_support.interpreting():
        lines.append("note      Triton runs in its interpreter")
    return "\n".join(lines)


def _library(plan: "AttentionPlan", dtype: torch.dtype) -> list[str]:
    """Which library the flash backend runs, and why not the others."""
    capability = flash.capability()
    if plan.device.type != "cuda" or capability is None:
        orders = {major: ", ".join(providers.order((major, 0))) for major in (8, 9, 10)}
        return [f"library   by compute capability, best first: {'; '.join(f'{k}.x {v}' for k, v in orders.items())}"]
    selection = flash.select(dtype, plan.head_dim)
    chosen = selection.name and f"{selection.name}: {selection.findings[selection.name]}"
    lines = [f"library   {chosen or 'none; it will raise'}, on compute capability {capability[0]}.{capability[1]}"]
    return lines + [
        f"          not {each}: {why}" for each, why in selection.findings.items() if each != selection.name
    ]
