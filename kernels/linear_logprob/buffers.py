"""Every buffer that linear_logprob holds beside its arguments and results, and the blocks that keep them in a budget.

Pure arithmetic on sizes (backends `cpu` and `cuda`), so that a planner can ask before anything is allocated.

Shapes: N rows used, H hidden, Vl local vocabulary shard, R x C one block. Bytes per element: o of the operands, s of
the logits (8 for float64, else 4). "Half": bf16 operands on CUDA, whose GEMM writes fp32. "Widened": bf16 operands on
CPU, copied to fp32 piece by piece. "Picked": some rows of hidden are used, and copied block by block.

Forward                                                     Backward
    logits kept      N Vl s                                     kept as before, and the gradient of a piece of them:
                                                                half h Vl 2 (h rows <= KEPT_ROWS), else N C s
    or a block       R C s                                      "blocks": block R C s, half also its gradient R C 2;
                                                                fp32 sums of the gradient of hidden N H 4 (o = 2), of
                                                                the weight's C H 4 (widened, or half with R < N)
                                                                "whole" (half, when Vl 2 <= H 4): block R C 4 and the
                                                                gradient of all logits N Vl 2, no sums
Widened: pieces of both operands, (C + R) H 4. oneDNN: its results before they are added up.
Picked: the rows of a block, R H o (N H o where logits are kept or "whole"), and while their gradient moves to its
places in that of all rows, a few of it. Batch-invariant: blocks of one shape, and padded copies of their operands.
Each logit is computed once where logits are kept (6 N H Vl FLOPs in all), else twice (8 N H Vl).
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from tulu_hpc.kernels.linear_logprob import onednn

# Columns below which a GEMM is inefficient: rows are blocked too rather than going under it.
MIN_COLUMNS = 1024
MIN_CPU_COLUMNS = 128
# Rows below which only the logits are held to the budget, and no longer the copies of the operands beside them.
LEAST_ROWS = 64
# Columns of every block on CPU, which then stays in the cache.
CPU_COLUMNS = 2048
# Scratch columns of the backward pass over kept logits on CUDA.
SCRATCH_COLUMNS = 4096
# Most and fewest rows of one product of the gradient of hidden from kept logits with bf16 operands.
KEPT_ROWS = 2048
MIN_KEPT_ROWS = 256
# Blocks get this much even when the sums beside them take the whole budget.
LEAST_BLOCK_BYTES = 32 * 2**20
# Batch-invariant GEMMs on CPU have this many rows: as fast as a large one, and fewer would be padded to it.
INVARIANT_ROWS = 64
# And this many columns; their operands are padded to multiples of PAD_COLUMNS and PAD_HIDDEN, because the vendor GEMM
# computes ragged edges in another order.
INVARIANT_COLUMNS = 2048
PAD_COLUMNS = 64
PAD_HIDDEN = 16
MOVED_ROWS = 512
MOVED_CPU_ROWS = 32
# Blocks that are narrower than the vocabulary have a multiple of this many columns, if they have as many.
COLUMN_MULTIPLE = 64

Strategy = Literal["kept", "whole", "blocks"]
Size = Callable[[int, int], int]


@dataclass(frozen=True)
class Sizes:
    """What the buffers depend on; operand_bytes: 2, 4 or 8.

    picked: the rows are some of those of hidden. invariant_rows: of a batch-invariant GEMM, 0 for another forward pass.
    """

    rows: int
    hidden: int
    vocab: int
    operand_bytes: int
    cuda: bool
    onednn: bool = False
    picked: bool = False
    invariant_rows: int = 0

    @property
    def half(self) -> bool:
        """bf16 operands go into the GEMM as they are: where it can write fp32."""
        return self.cuda and self.operand_bytes == 2

    @property
    def widened(self) -> bool:
        return not self.cuda and self.operand_bytes == 2

    @property
    def logit_bytes(self) -> int:
        return max(4, self.operand_bytes)


@dataclass(frozen=True)
class Blocks:
    """rows x columns of one block."""

    rows: int
    columns: int


@dataclass(frozen=True)
class Plan:
    """How the two passes run, and the bytes of each buffer at the peak of either.

    strategy: "kept" logits, or recomputed ones by "blocks" or into the "whole" gradient of the logits.
    """

    strategy: Strategy
    forward: Blocks
    backward: Blocks
    forward_bytes: dict[str, int]
    backward_bytes: dict[str, int]

    @property
    def extra_bytes(self) -> int:
        """The larger pass."""
        return max(sum(self.forward_bytes.values()), sum(self.backward_bytes.values()))


def extra_bytes(
    rows: int,
    hidden: int,
    vocab: int,
    operand_bytes: int,
    max_buffer_bytes: int,
    *,
    cuda: bool,
    gradients: bool = True,
    total_rows: int | None = None,
    batch_invariant: bool = False,
) -> int:
    """Bytes of `linear_logprob` beyond its arguments and the gradients it returns, at the peak.

    Args:
        rows: N, rows with a target that is not ignored.
        vocab: Vl, rows of this rank's weight.
        cuda: backend `cuda`; else `cpu`.
        gradients: forward and backward; else forward alone.
        total_rows: rows of hidden, None for N. When N of more are used, they are copied block by block.
        batch_invariant: as in `linear_logprob` (backend `cpu`).

    Raises:
        ValueError: see `plan_buffers`.
    """
    uses_onednn = not cuda and operand_bytes < 8 and onednn.available()
    picked = total_rows is not None and total_rows != rows
    invariant_rows = INVARIANT_ROWS if batch_invariant else 0
    sizes = Sizes(rows, hidden, vocab, operand_bytes, cuda, uses_onednn, picked, invariant_rows)
    plan = plan_buffers(sizes, max_buffer_bytes, allow_keep=gradients)
    return plan.extra_bytes if gradients else sum(plan.forward_bytes.values())


def plan_buffers(sizes: Sizes, max_buffer_bytes: int, allow_keep: bool) -> Plan:
    """Strategy and blocks of both passes, so that all buffers together stay within `max_buffer_bytes` if they can.

    Logits are kept when they and what the backward pass needs beside them fit. Otherwise the fp32 sums (or the gradient
    of all logits, whichever is smaller) are what the budget must hold first; blocks share the rest, or
    LEAST_BLOCK_BYTES of a budget that is smaller than the sums.

    Raises:
        ValueError: the budget does not hold one logit, or one block of a batch-invariant pass.
    """
    if max_buffer_bytes < sizes.logit_bytes:
        raise ValueError(f"max_buffer_bytes={max_buffer_bytes} does not hold one logit of {sizes.logit_bytes} bytes")
    rows, vocab = max(sizes.rows, 1), max(sizes.vocab, 1)
    empty = sizes.rows == 0 or sizes.vocab == 0
    statistics = {"statistics": _statistics(sizes)}
    room = _room(sizes, max_buffer_bytes)
    if sizes.invariant_rows and not empty:
        need = sum(_invariant(sizes)[1].values())
        if need > room:
            least = min(need + _statistics(sizes), 2 * need)
            raise ValueError(f"batch_invariant needs max_buffer_bytes of {least} at least, got {max_buffer_bytes}")
    if allow_keep and not empty and (kept := _kept(sizes, room)):
        forward, backward, scratch = kept
        logits = {"kept logits": rows * vocab * sizes.logit_bytes}
        beside = _beside_kept(sizes)[1]
        return Plan("kept", forward, backward, statistics | logits | beside, statistics | logits | scratch)
    if sizes.invariant_rows:
        forward, forward_bytes = _invariant(sizes)
    else:
        forward = _fit(sizes, room, lambda r, c: _block_bytes(sizes, r, c))
        logits = {"block of logits": forward.rows * forward.columns * sizes.logit_bytes}
        forward_bytes = logits | _copies(sizes, forward)
    strategy, backward, backward_bytes = _recomputed(sizes, room)
    if empty:
        forward_bytes, backward_bytes = {}, {}
    return Plan(strategy, forward, backward, statistics | forward_bytes, statistics | backward_bytes)


def _statistics(sizes: Sizes) -> int:
    """Per-row and per-target vectors, with one target per row."""
    return 16 * sizes.rows * sizes.logit_bytes


def _room(sizes: Sizes, budget: int) -> int:
    """What the budget leaves to the matrices."""
    return max(budget - _statistics(sizes), (budget + 1) // 2)


def _fit(sizes: Sizes, room: int, size: Size) -> Blocks:
    """The widest block of all rows with size(rows, columns) <= room.

    Vocabulary blocks come first (each weight block is read once and its gradient is written once); rows are divided as
    well only when a block would have fewer than the least columns.
    """
    rows, vocab = max(sizes.rows, 1), max(sizes.vocab, 1)
    widest = vocab if sizes.cuda else min(vocab, CPU_COLUMNS)
    least = min(widest, MIN_COLUMNS if sizes.cuda else MIN_CPU_COLUMNS)

    def columns(r: int) -> int:
        found = bisect_right(range(1, widest + 1), room, key=lambda c: size(r, c))
        return found if found == widest or found < COLUMN_MULTIPLE else found // COLUMN_MULTIPLE * COLUMN_MULTIPLE

    if (wide := columns(rows)) >= least:
        return Blocks(rows, wide)
    tall = bisect_right(range(1, rows + 1), room, key=lambda r: size(r, least))
    # Copies of the operands then exceed the room; the logits never do.
    logits = room // sizes.logit_bytes
    if tall < min(rows, LEAST_ROWS):
        tall = min(rows, LEAST_ROWS, logits // least)
    return Blocks(tall, least) if tall else Blocks(1, max(1, min(widest, logits)))


def _operand_bytes(sizes: Sizes, block: Blocks) -> int:
    """Copies of operands. Rows that are picked and widened have both forms for a moment."""
    widened = (block.rows + block.columns) * 4 if sizes.widened else 0
    picked = block.rows * sizes.operand_bytes if sizes.picked else 0
    return (widened + picked) * sizes.hidden


def moved_rows(cuda: bool) -> int:
    """Rows of a gradient that are moved at once."""
    return MOVED_ROWS if cuda else MOVED_CPU_ROWS


def _moved_bytes(sizes: Sizes) -> int:
    """Rows of the gradient of hidden on their way to their places."""
    rows = min(sizes.rows, moved_rows(sizes.cuda))
    return rows * sizes.hidden * sizes.operand_bytes if sizes.picked else 0


def _copies(sizes: Sizes, block: Blocks) -> dict[str, int]:
    """What the forward pass holds beside the logits of a block."""
    return {"operands": _operand_bytes(sizes, block), "products": _logit_products(sizes, block)}


def _beside_kept(sizes: Sizes) -> tuple[Blocks, dict[str, int]]:
    """Block of the forward pass where logits are kept, and what it holds beside them."""
    if sizes.invariant_rows:
        return _invariant(sizes)
    block = Blocks(sizes.rows, sizes.vocab if sizes.cuda else min(sizes.vocab, CPU_COLUMNS))
    return block, _copies(sizes, block)


def invariant_columns(vocab: int) -> int:
    """Columns of the batch-invariant blocks; the last one may have fewer, a multiple of PAD_COLUMNS too."""
    return min(INVARIANT_COLUMNS, vocab + -vocab % PAD_COLUMNS)


def pads_weight(hidden: int, vocab: int) -> bool:
    """Whether a batch-invariant block of the weight needs padding."""
    return bool(hidden % PAD_HIDDEN or vocab % PAD_COLUMNS)


def _invariant(sizes: Sizes) -> tuple[Blocks, dict[str, int]]:
    """Block and buffers of a batch-invariant forward pass."""
    block = Blocks(sizes.invariant_rows, invariant_columns(sizes.vocab))
    width = sizes.hidden + -sizes.hidden % PAD_HIDDEN
    copied = block.columns if sizes.widened or pads_weight(sizes.hidden, sizes.vocab) else 0
    picked = block.rows * sizes.hidden * sizes.operand_bytes if sizes.picked else 0
    products = onednn.exact_product_bytes(block.rows, width, block.columns) if sizes.onednn else 0
    return block, {
        "block of logits": block.rows * block.columns * sizes.logit_bytes,
        "operands": (block.rows + copied) * width * sizes.logit_bytes + picked,
        "products": products,
    }


def _logit_products(sizes: Sizes, block: Blocks) -> int:
    return onednn.exact_product_bytes(block.rows, sizes.hidden, block.columns) if sizes.onednn else 0


def _block_bytes(sizes: Sizes, r: int, c: int) -> int:
    """A block of logits and what computing it takes."""
    block = Blocks(r, c)
    return r * c * sizes.logit_bytes + _operand_bytes(sizes, block) + _logit_products(sizes, block)


def _products(sizes: Sizes, r: int, c: int, recompute: bool) -> int:
    """oneDNN's temporaries in the backward pass, as far as they exceed a gradient that is not yet there.

    The gradient of hidden in bf16 is made from its fp32 sums, after all products but those of the weight.
    """
    if not sizes.onednn:
        return 0
    hidden = sizes.hidden
    logits = _logit_products(sizes, Blocks(r, c)) if recompute else 0
    late = sizes.rows * hidden * sizes.operand_bytes if sizes.widened else 0
    before = max(logits, onednn.add_product_bytes(r, hidden)) - late
    return max(0, before, onednn.exact_product_bytes(c, r, hidden, transposed=True))


def _kept(sizes: Sizes, budget: int) -> tuple[Blocks, Blocks, dict[str, int]] | None:
    """Blocks of both passes and scratch of the backward pass beside kept logits; None when they do not fit."""
    room = budget - sizes.rows * sizes.vocab * sizes.logit_bytes
    beside = _gradients_from_kept(sizes, room)
    forward, buffers = _beside_kept(sizes)
    return None if beside is None or sum(buffers.values()) > room else (forward, *beside)


def kept_blocks(sizes: Sizes, kept_rows: int, max_buffer_bytes: int) -> Blocks | None:
    """Blocks of the backward pass of some rows from the kept logits of `kept_rows`; None when they do not fit."""
    of_all = replace(sizes, rows=kept_rows)
    room = _room(of_all, max_buffer_bytes) - kept_rows * sizes.vocab * sizes.logit_bytes
    found = _gradients_from_kept(sizes, room)
    return found and found[0]


def _gradients_from_kept(sizes: Sizes, room: int) -> tuple[Blocks, dict[str, int]] | None:
    """Blocks and scratch of the backward pass, of `room` beside the kept logits at most."""
    rows, vocab, hidden, size = sizes.rows, sizes.vocab, sizes.hidden, sizes.logit_bytes
    moved = _moved_bytes(sizes)
    if sizes.half:
        copies = moved + _operand_bytes(sizes, Blocks(rows, vocab))
        height = min(rows, KEPT_ROWS, (room - copies) // (2 * vocab))
        if height < min(rows, MIN_KEPT_ROWS, KEPT_ROWS):
            return None
        columns = max(1, height * vocab // rows)
        logits = 2 * max(height * vocab, rows * columns)
        return Blocks(height, columns), {"gradient of logits": logits, "copies of rows": copies}
    columns = min(vocab, SCRATCH_COLUMNS if sizes.cuda else CPU_COLUMNS)
    block = Blocks(rows, columns)
    scratch = {
        "gradient of a block": rows * columns * size,
        "sums of hidden": rows * hidden * 4 if sizes.widened else 0,
        "gradient of weight": columns * hidden * 4 if sizes.widened else 0,
        "operands": _operand_bytes(sizes, block),
        "products": _products(sizes, rows, columns, recompute=False),
        "moved rows": moved,
    }
    return None if sum(scratch.values()) > room else (block, scratch)


def _recomputed(sizes: Sizes, budget: int) -> tuple[Strategy, Blocks, dict[str, int]]:
    rows, vocab, hidden = sizes.rows, sizes.vocab, sizes.hidden
    least, moved = min(budget, LEAST_BLOCK_BYTES), _moved_bytes(sizes)
    if sizes.half and vocab <= 2 * hidden:
        whole, copies = rows * vocab * 2, _operand_bytes(sizes, Blocks(rows, vocab))
        block = _fit(sizes, max(budget - whole - copies, least), lambda r, c: 4 * r * c)
        # Rows move when the block is gone.
        scratch = {"block of logits": max(4 * block.rows * block.columns, moved)}
        return "whole", block, scratch | {"gradient of logits": whole, "copies of rows": copies}
    sums = rows * hidden * 4 if sizes.operand_bytes == 2 else 0

    def buffers(r: int, c: int) -> dict[str, int]:
        weight_sums = sizes.widened or (sizes.half and r < rows)
        return {
            "block of logits": r * c * sizes.logit_bytes,
            "gradient of a block": 2 * r * c if sizes.half else 0,
            "gradient of weight": c * hidden * 4 if weight_sums else 0,
            "operands": _operand_bytes(sizes, Blocks(r, c)),
            "products": _products(sizes, r, c, recompute=True),
            "moved rows": moved,
        }

    block = _fit(sizes, max(budget - sums, least), lambda r, c: sum(buffers(r, c).values()))
    return "blocks", block, {"sums of hidden": sums} | buffers(block.rows, block.columns)


def keeps_logits(sizes: Sizes, max_buffer_bytes: int) -> bool:
    """Whether `plan_buffers` with `allow_keep` has the strategy "kept"."""
    return bool(sizes.rows and sizes.vocab) and _kept(sizes, _room(sizes, max_buffer_bytes)) is not None
