"""Which rows of hidden the op works on: targets in row order, rows without a target left out.

Shapes: T rows of hidden, U rows that have targets, K targets.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Selection(NamedTuple):
    """Targets in row order without the ignored ones (`masked`: with them, as -1).

    rows_U: rows of hidden to use, None for all. place_K: position of each target in the caller's order, None for the
    same.
    """

    rows_U: Tensor | None
    target_K: Tensor
    row_start_U1: Tensor
    place_K: Tensor | None
    masked: bool

    def restore(self, values: Tensor, count: int) -> Tensor:
        """Values in the caller's order, 0 for ignored targets."""
        if self.masked:
            values = values.where(self.target_K >= 0, 0)
        return values if self.place_K is None else values.new_zeros(count).index_copy(0, self.place_K, values)


def select_rows(rows: int, target_K: Tensor, row_K: Tensor | None, ignore_index: int) -> Selection:
    if row_K is None and len(target_K) != rows:
        raise ValueError(f"{len(target_K)} targets for {rows} rows of hidden; give row_K when they differ")
    if torch.compiler.is_compiling():
        return _select_rows_static(rows, target_K, row_K, ignore_index)
    keep_K = target_K != ignore_index
    all_kept = bool(keep_K.all())
    if row_K is None:
        if all_kept:
            return Selection(None, target_K.contiguous(), _arange(rows + 1, target_K), None, False)
        rows_U = keep_K.nonzero()[:, 0]
        return Selection(rows_U, target_K[rows_U], _arange(len(rows_U) + 1, target_K), rows_U, False)
    place = None if all_kept else keep_K.nonzero()[:, 0]
    row = row_K if place is None else row_K[place]
    if len(row) and (int(row.min()) < 0 or int(row.max()) >= rows):
        raise ValueError(f"row_K holds {int(row.min())}..{int(row.max())}, hidden has {rows} rows")
    if not bool((row[1:] >= row[:-1]).all()):
        row, order = row.sort(stable=True)
        place = order if place is None else place[order]
    rows_U, counts_U = torch.unique_consecutive(row, return_counts=True)
    row_start = torch.nn.functional.pad(counts_U.cumsum(0), (1, 0))
    target = target_K.contiguous() if place is None else target_K[place]
    return Selection(None if len(rows_U) == rows else rows_U, target, row_start, place, False)


def _select_rows_static(rows: int, target_K: Tensor, row_K: Tensor | None, ignore_index: int) -> Selection:
    """Without shapes that depend on data, for torch.compile: every row enters the GEMM, ignored targets are masked."""
    target_K = target_K.where(target_K != ignore_index, -1)
    if row_K is None:
        return Selection(None, target_K.contiguous(), _arange(rows + 1, target_K), None, True)
    # Ignored targets keep their place in the order, so that all shapes stay those of the arguments.
    row, order = row_K.sort(stable=True)
    row_start = torch.searchsorted(row, _arange(rows + 1, row))
    return Selection(None, target_K[order], row_start, order, True)


def _arange(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=torch.int64)
