"""The plan of packed attention: made once per pack on the host, used by every layer.

Shapes: T query rows of this rank, M key rows, S segments, N query heads, Nk key/value heads, D head dim.

A pack is cut into segments by `cu_seqlens`. Row i of a segment sees the rows of its segment up to itself, and all rows
of the segment's prefix range (the shared prompt of a DPO pair or a GRPO group). Two exact ways to compute it with
variable-length flash calls, in which the last query of an entry sees its last key ("bottom-right" causal):

    repeat  one causal call; the keys of an entry are its prefix followed by its own rows, gathered by an index;
            gradients of the copies of a key are summed in fp32 in a fixed order
    merge   a causal call of every segment on itself and a dense call of all rows that have a prefix on that prefix;
            outputs merged by their log-sum-exp, the backward calls given the merged output and log-sum-exp
"""

import itertools
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tulu_hpc.kernels.packed_attention.padded import PaddedBatch, pad_entries
from tulu_hpc.kernels.packed_attention.triton_plan import Tables, Tiles

STRATEGIES = ("repeat", "merge")
_STRATEGY_VARIABLE = "TULU_HPC_PACKED_ATTENTION_STRATEGY"


class Entry(NamedTuple):
    """Consecutive query rows of one segment and what they see (prefix and keys in rows of the pack).

    The last query is row key_stop - 1 of the pack.
    """

    query_start: int
    query_stop: int
    prefix_start: int
    prefix_stop: int
    key_start: int
    key_stop: int

    @property
    def pairs(self) -> int:
        queries, keys = self.query_stop - self.query_start, self.key_stop - self.key_start
        return queries * (self.prefix_stop - self.prefix_start + keys) - queries * (queries - 1) // 2


@dataclass
class VarlenCall:
    """One variable-length call: entry i has query_lengths[i] consecutive query rows and key_lengths[i] keys."""

    query_start: int
    query_stop: int
    key_start: int  # the keys are rows key_start:key_stop of k and v, or with key_index the rows it names
    key_stop: int
    key_index: Tensor | None
    query_lengths: list[int]
    key_lengths: list[int]
    causal: bool
    # For the library of the plan's device: batches of similar entries (CPU), cumulative lengths and the copies of each
    # key row in a fixed order (CUDA).
    padded: list[PaddedBatch] = field(default_factory=list)
    cu_query: Tensor | None = None
    cu_key: Tensor | None = None
    copy_order: Tensor | None = None
    copy_offsets: Tensor | None = None

    @cached_property
    def most_queries(self) -> int:
        """Rows of the longest entry."""
        return max(self.query_lengths, default=0)

    @cached_property
    def most_keys(self) -> int:
        """Keys of the entry with most."""
        return max(self.key_lengths, default=0)


@dataclass(eq=False)
class AttentionPlan:
    """What `packed_attention` needs to know of a pack. `attention_pairs`: (query, key) pairs, the FLOP count is
    4 * pairs * heads * head_dim forward and 2.5 times that backward."""

    num_queries: int
    num_keys: int
    heads: int
    kv_heads: int
    head_dim: int
    device: torch.device
    strategy: str
    entries: list[Entry]
    key_order: Tensor | None
    calls: list[VarlenCall]
    attention_pairs: int
    handle: int
    strategy_reason: str = ""
    triton_tables: dict[Tiles, Tables] = field(default_factory=dict)

    def describe(self, dtype: torch.dtype = torch.bfloat16, backend: str | None = None) -> str:
        """Which backend and strategy `packed_attention` will run on tensors of `dtype`, and why; several lines.

        Args:
            dtype: of q, k and v.
            backend: as will be passed to `packed_attention`.
        """
        from tulu_hpc.kernels.packed_attention.describe import describe  # which knows the backends, and they the plan

        return describe(self, dtype, backend)


# The op's schema carries a number; the plan lives as long as its user (and a backward pass to come) holds it.
_plans: "weakref.WeakValueDictionary[int, AttentionPlan]" = weakref.WeakValueDictionary()
_handles = itertools.count()


def plan_of(handle: int) -> AttentionPlan:
    """The plan with this handle; it must still be alive."""
    plan = _plans.get(handle)
    if plan is None:
        raise RuntimeError("the AttentionPlan of this call no longer exists: keep it until the backward pass is done")
    return plan


def same_device(tensor: torch.device, plan: torch.device) -> bool:
    """Whether tensors lie where the plan's tables do."""
    return tensor.type == plan.type and (tensor.type == "cpu" or tensor.index == plan.index)


def plan_attention(
    cu_seqlens: Tensor | Sequence[int],
    prefix: Tensor | Sequence[Sequence[int]] | None = None,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device | str,
    strategy: str | None = None,
    ranges: Sequence[tuple[int, int]] | None = None,
    key_order: Tensor | None = None,
) -> AttentionPlan:
    """Plans attention over a pack of `cu_seqlens[-1]` rows.

    Args:
        cu_seqlens: [S + 1] ascending from 0; segments may be empty.
        prefix: [S, 2] row range that a segment sees besides itself (start == stop: none); it ends before the segment.
        heads, kv_heads, head_dim: of the tensors that will be given (one tensor-parallel rank's heads).
        device: where the tensors will be.
        strategy: "repeat" or "merge"; None: that of TULU_HPC_PACKED_ATTENTION_STRATEGY, else the cheaper one.
        ranges: context parallelism: the row ranges of the pack that the queries are, in order. Default: all rows.
        key_order: int64 [M]: row i of k and v is row key_order[i] of the pack. Default: pack order.

    Raises:
        ValueError: inconsistent arguments; the message names the segment.
    """
    cu = [int(x) for x in (cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)]
    segments = len(cu) - 1
    if segments < 0 or cu[0] != 0 or any(a > b for a, b in itertools.pairwise(cu)):
        raise ValueError(f"cu_seqlens must ascend from 0, got {cu[:8]}...")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads ({heads}) must be a multiple of kv_heads ({kv_heads})")
    table = [(0, 0)] * segments if prefix is None else [(int(a), int(b)) for a, b in _rows(prefix)]
    if len(table) != segments:
        raise ValueError(f"prefix has {len(table)} rows for {segments} segments")
    for s, (a, b) in enumerate(table):
        if a != b and not 0 <= a < b <= cu[s]:
            raise ValueError(f"prefix {a}:{b} of segment {s} (rows {cu[s]}:{cu[s + 1]}) must lie before it")
    rows = cu[-1]
    if key_order is not None:
        key_order = key_order.to(device="cpu", dtype=torch.int64)
        if not torch.equal(key_order.sort().values, torch.arange(rows)):
            raise ValueError(f"key_order must be a permutation of the {rows} rows of the pack")
    reason = "named in the call"
    if strategy is None and os.environ.get(_STRATEGY_VARIABLE):
        strategy, reason = os.environ[_STRATEGY_VARIABLE], f"named by {_STRATEGY_VARIABLE}"
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    whole = [(0, rows)] if ranges is None else [(int(a), int(b)) for a, b in ranges]
    if any(not 0 <= a <= b <= rows for a, b in whole):
        raise ValueError(f"ranges {whole} leave the {rows} rows of the pack")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # where the tables will be
    entries = _entries(cu, table, whole)
    if strategy is None:
        strategy, reason = _choose(entries, heads // kv_heads)
    calls = _repeat_calls(entries) if strategy == "repeat" else _merge_calls(entries)
    for call in calls:
        _finish(call, key_order, rows, device)
    plan = AttentionPlan(
        num_queries=sum(b - a for a, b in whole),
        num_keys=rows,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        device=device,
        strategy=strategy,
        entries=entries,
        key_order=key_order,
        calls=calls,
        attention_pairs=sum(entry.pairs for entry in entries),
        handle=next(_handles),
        strategy_reason=reason,
    )
    _plans[plan.handle] = plan
    return plan


def _rows(prefix: Tensor | Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    return prefix.tolist() if isinstance(prefix, Tensor) else prefix


def _entries(cu: list[int], prefix: list[tuple[int, int]], ranges: list[tuple[int, int]]) -> list[Entry]:
    entries, local = [], 0
    for start, stop in ranges:
        for segment, (a, b) in enumerate(itertools.pairwise(cu)):
            low, high = max(a, start), min(b, stop)
            if low < high:
                entries.append(Entry(local + low - start, local + high - start, *prefix[segment], a, high))
        local += stop - start
    return entries


def _choose(entries: list[Entry], heads_per_kv_head: int) -> tuple[str, str]:
    """The cheaper in memory traffic: repeated keys cost (prefix + own) / own key rows, a second call 1.4 N / Nk."""
    own = sum(e.key_stop - e.key_start for e in entries if e.prefix_stop > e.prefix_start)
    prefix = sum(e.prefix_stop - e.prefix_start for e in entries)
    if own == 0:
        return "repeat", "no segment has a prefix, nothing is repeated"
    repeat, merge = (prefix + own) / own, 1.4 * heads_per_kv_head
    numbers = f"(prefix + own) / own key rows is {repeat:.2f}, a second call costs 1.4 N / Nk = {merge:.2f}"
    return ("repeat" if repeat <= merge else "merge"), numbers


def _repeat_calls(entries: list[Entry]) -> list[VarlenCall]:
    if not entries:
        return []
    pieces = [r for e in entries for r in ((e.prefix_start, e.prefix_stop), (e.key_start, e.key_stop)) if r[0] < r[1]]
    return [_call([(e.query_start, e.query_stop) for e in entries], pieces, _key_lengths(entries), True)]


def _key_lengths(entries: list[Entry]) -> list[int]:
    return [e.prefix_stop - e.prefix_start + e.key_stop - e.key_start for e in entries]


def _merge_calls(entries: list[Entry]) -> list[VarlenCall]:
    """The causal call covers every query row and comes first; the dense ones follow."""
    if not entries:
        return []
    own = [(e.key_start, e.key_stop) for e in entries]
    calls = [_call([(e.query_start, e.query_stop) for e in entries], own, [b - a for a, b in own], True)]
    dense: list[tuple[int, int, int, int]] = []  # adjacent responses of one prompt are one entry
    for e in entries:
        if e.prefix_start == e.prefix_stop:
            continue
        if dense and dense[-1][1:] == (e.query_start, e.prefix_start, e.prefix_stop):
            dense[-1] = (dense[-1][0], e.query_stop, e.prefix_start, e.prefix_stop)
        else:
            dense.append((e.query_start, e.query_stop, e.prefix_start, e.prefix_stop))
    while dense:
        run = 1  # a call is a slice of the queries
        while run < len(dense) and dense[run][0] == dense[run - 1][1]:
            run += 1
        part, dense = dense[:run], dense[run:]
        keys = [(c, d) for _, _, c, d in part]
        calls.append(_call([(a, b) for a, b, _, _ in part], keys, [d - c for c, d in keys], False))
    return calls


def _call(
    queries: list[tuple[int, int]], keys: list[tuple[int, int]], key_lengths: list[int], causal: bool
) -> VarlenCall:
    """`keys`: row ranges of the pack, in the order of the entries; a plain slice when they follow one another."""
    tiled = all(b == c for (_, b), (c, _) in itertools.pairwise(keys))
    index = None if tiled else torch.cat([torch.arange(a, b) for a, b in keys])
    return VarlenCall(
        query_start=queries[0][0],
        query_stop=queries[-1][1],
        key_start=keys[0][0],
        key_stop=keys[-1][1],
        key_index=index,
        query_lengths=[b - a for a, b in queries],
        key_lengths=key_lengths,
        causal=causal,
    )


def _finish(call: VarlenCall, key_order: Tensor | None, rows: int, device: torch.device) -> None:
    """Turns pack rows into rows of the given k and v, and prepares what the device's library wants."""
    if key_order is not None:
        position = torch.empty_like(key_order)
        position[key_order] = torch.arange(rows)
        pack_rows = torch.arange(call.key_start, call.key_stop) if call.key_index is None else call.key_index
        call.key_index = position[pack_rows]
    if _library(device) == "cpu":
        call.padded = pad_entries(
            call.query_start, call.query_lengths, call.key_start, call.key_index, call.key_lengths, call.causal
        )
        return
    call.cu_query = _cumulative(call.query_lengths, device)
    call.cu_key = _cumulative(call.key_lengths, device)
    if call.key_index is not None:
        call.copy_order = call.key_index.argsort(stable=True).to(device)
        call.copy_offsets = _cumulative(torch.bincount(call.key_index, minlength=rows).tolist(), device)
        call.key_index = call.key_index.to(device)


def _library(device: torch.device) -> str:
    """Which backend's tables a call needs on this device."""
    return "cpu" if device.type == "cpu" else "flash"


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device)
