"""The `triton` backend of linear_logprob: fused tile kernels, logits live in registers only. Imports triton.

Shapes: U rows used, K targets (sorted by row), H hidden, Vl local vocabulary shard, S splits of it. A tile is BLOCK_R
rows x BLOCK_C columns in the forward pass, BLOCK_O owned x BLOCK_L looped vectors in the backward pass.

Forward: one program per (row block, split) keeps the online (maximum, sum, centred sum) of its rows; the splits are
merged in order. Splits and tiles depend on the dtype and on Vl only: a row's result does not depend on the other rows.
Backward: a program owns rows (gradient of hidden) or vocabulary rows (gradient of the weight), loops over the others,
computes each tile's logits again and adds (tile of d logits) @ (looped vectors) to fp32 sums of its own: no atomics, so
it is deterministic. 2NHV forward + 8NHV backward FLOPs: the backend with the smallest memory, not the fastest.
Memory: 3 S U floats forward; one fp32 [BLOCK_O, H] per running program backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tulu_hpc.kernels.ahead_of_time import Case
from tulu_hpc.kernels.linear_logprob.problem import HiddenGradient, Problem, drop_zero_rows, per_target, spread_rows
from tulu_hpc.kernels.triton_dot import dot

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
MERGE_ROWS = 64
# Columns of a split: at 128256 columns 63 splits fill a GPU even for one row block.
SPLIT_COLUMNS = 2048
FORWARD = {
    torch.bfloat16: {"BLOCK_R": 128, "BLOCK_C": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    torch.float32: {"BLOCK_R": 64, "BLOCK_C": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
}
BACKWARD = {
    torch.bfloat16: {"BLOCK_O": 64, "BLOCK_L": 128, "BLOCK_K": 64, "BLOCK_H": 64, "num_warps": 8, "num_stages": 3},
    torch.float32: {"BLOCK_O": 32, "BLOCK_L": 32, "BLOCK_K": 32, "BLOCK_H": 32, "num_warps": 4, "num_stages": 2},
}


@triton.jit
def _tanh(x):
    """Polynomial of Cephes tanhf below 0.625, where 1 - 2 / (e^2x + 1) would cancel."""
    magnitude = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(magnitude, 20.0)) + 1.0)
    s = x * x
    p = -5.70498872745e-3
    p = p * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    return tl.where(magnitude < 0.625, p * s * x + x, tl.where(x < 0, -far, far))


@triton.jit
def _product(
    left, right, lefts, rights, H, EVEN_K: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_K: tl.constexpr
):
    """[LEFT, RIGHT] dot products of the vectors that start at `left` and at `right`, of which so many exist.

    Places beyond them repeat the last vector; the caller masks the result.
    """
    i = tl.minimum(tl.arange(0, LEFT), lefts - 1)
    j = tl.minimum(tl.arange(0, RIGHT), rights - 1)
    total = tl.zeros((LEFT, RIGHT), tl.float32)
    for k0 in range(0, H, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if EVEN_K:
            a = tl.load(left + i[:, None] * H + k[None, :])
            b = tl.load(right + j[None, :] * H + k[:, None])
        else:
            a = tl.load(left + i[:, None] * H + k[None, :], mask=(k < H)[None, :], other=0.0)
            b = tl.load(right + j[None, :] * H + k[:, None], mask=(k < H)[:, None], other=0.0)
        total = dot(a, b, total)
    return total


@triton.jit
def forward_tiles(
    hidden, weight, target, row_start, partial, picked,
    rows, vocab, H, vocab_start, inv_temperature, softcap,
    CAP: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[split, 0:3, row] and picked[target] of one row block and one split of the vocabulary."""
    r0 = tl.program_id(0) * BLOCK_R
    split = tl.program_id(1)
    row = r0 + tl.arange(0, BLOCK_R)
    j = tl.arange(0, BLOCK_C)
    begin = tl.load(row_start + row, mask=row < rows, other=0)
    count = (tl.load(row_start + row + 1, mask=row < rows, other=0) - begin).to(tl.int32)
    most = tl.max(count, 0)
    m = tl.full((BLOCK_R,), _LOWEST, tl.float32)
    s = tl.zeros((BLOCK_R,), tl.float32)
    d = tl.zeros((BLOCK_R,), tl.float32)
    for c0 in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, vocab), BLOCK_C):
        x = _product(
            hidden + tl.cast(r0, tl.int64) * H, weight + tl.cast(c0, tl.int64) * H, rows - r0, vocab - c0, H,
            EVEN_K, BLOCK_R, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        if CAP:
            x = softcap * _tanh(x / softcap)
        x = x * inv_temperature
        x = tl.where((c0 + j < vocab)[None, :], x, _LOWEST)
        for n in range(most):
            place = tl.load(target + begin + n, mask=n < count, other=-1) - vocab_start - c0
            inside = (n < count) & (place >= 0) & (place < tl.minimum(vocab - c0, BLOCK_C))
            if tl.max(inside.to(tl.int32), 0) > 0:
                value = tl.sum(tl.where(place[:, None] == j[None, :], x, 0.0), 1)
                tl.store(picked + begin + n, value, mask=inside)
        top = tl.maximum(m, tl.max(x, 1))
        shift = x - top[:, None]
        e = tl.exp(shift)
        scale = tl.exp(m - top)
        d = scale * (d + (m - top) * s) + tl.sum(e * shift, 1)
        s = scale * s + tl.sum(e, 1)
        m = top
    place = partial + tl.cast(split, tl.int64) * 3 * rows + row
    tl.store(place, m, mask=row < rows)
    tl.store(place + rows, s, mask=row < rows)
    tl.store(place + 2 * rows, d, mask=row < rows)


@triton.jit
def merge_splits(partial, per_row, rows, splits, BLOCK: tl.constexpr):
    """per_row[row] = maximum, log of the sum, centred mean, of the splits in order."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), _LOWEST, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    d = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        place = partial + tl.cast(split, tl.int64) * 3 * rows + row
        m1 = tl.load(place, mask=row < rows, other=0.0)
        s1 = tl.load(place + rows, mask=row < rows, other=1.0)
        d1 = tl.load(place + 2 * rows, mask=row < rows, other=0.0)
        top = tl.maximum(m, m1)
        scale, scale1 = tl.exp(m - top), tl.exp(m1 - top)
        d = scale * (d + (m - top) * s) + scale1 * (d1 + (m1 - top) * s1)
        s = scale * s + scale1 * s1
        m = top
    tl.store(per_row + row * 3, m, mask=row < rows)
    tl.store(per_row + row * 3 + 1, tl.log(s), mask=row < rows)
    tl.store(per_row + row * 3 + 2, d / s, mask=row < rows)


@triton.jit
def row_gradients(stats, grad, row_start, out, rows, BLOCK: tl.constexpr):
    """out[0:4, row] = maximum, log of the sum, a, b: d x_j = p_j (a + b (x_j - maximum)) without the targets' share."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    begin = tl.load(row_start + row, mask=valid, other=0)
    count = (tl.load(row_start + row + 1, mask=valid, other=0) - begin).to(tl.int32)
    has = count > 0
    a = tl.zeros((BLOCK,), tl.float32)
    b = tl.zeros((BLOCK,), tl.float32)
    for n in range(tl.max(count, 0)):
        a += tl.load(grad + (begin + n) * 4 + 1, mask=n < count, other=0.0)
        b += tl.load(grad + (begin + n) * 4 + 2, mask=n < count, other=0.0)
    a += b * (1.0 - tl.load(stats + begin * 4 + 2, mask=has, other=0.0))
    tl.store(out + row, tl.load(stats + begin * 4, mask=has, other=0.0), mask=valid)
    tl.store(out + rows + row, tl.load(stats + begin * 4 + 1, mask=has, other=0.0), mask=valid)
    tl.store(out + 2 * rows + row, a, mask=valid)
    tl.store(out + 3 * rows + row, b, mask=valid)


@triton.jit
def backward_tiles(
    hidden, weight, out, scratch, per_row, target, row_start, grad,
    rows, vocab, H, vocab_start, inv_temperature, softcap,
    OWN_ROWS: tl.constexpr, CAP: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out = the gradient of every owned vector that falls to this program, over all of the others.

    OWN_ROWS: rows of hidden are owned and those of the weight looped over; else the other way round.
    """
    BLOCK_R: tl.constexpr = BLOCK_O if OWN_ROWS else BLOCK_L
    BLOCK_C: tl.constexpr = BLOCK_L if OWN_ROWS else BLOCK_O
    i = tl.arange(0, BLOCK_R)
    j = tl.arange(0, BLOCK_C)
    o = tl.arange(0, BLOCK_O)
    sums = scratch + tl.cast(tl.program_id(0), tl.int64) * BLOCK_O * H
    owned = rows if OWN_ROWS else vocab
    others = vocab if OWN_ROWS else rows
    for o0 in range(tl.program_id(0) * BLOCK_O, owned, tl.num_programs(0) * BLOCK_O):
        out_first = out + tl.cast(o0, tl.int64) * H
        for l0 in range(0, others, BLOCK_L):
            if OWN_ROWS:
                r0, c0 = o0, l0
            else:
                r0, c0 = l0, o0
            hidden_first = hidden + tl.cast(r0, tl.int64) * H
            weight_first = weight + tl.cast(c0, tl.int64) * H
            x = _product(
                hidden_first, weight_first, rows - r0, vocab - c0, H, EVEN_K, BLOCK_R, BLOCK_C, BLOCK_K
            )  # fmt: skip
            if CAP:
                t = _tanh(x / softcap)
                x = softcap * t
            row = r0 + i
            valid = row < rows
            m = tl.load(per_row + row, mask=valid, other=0.0)
            log_sum = tl.load(per_row + rows + row, mask=valid, other=0.0)
            a = tl.load(per_row + 2 * rows + row, mask=valid, other=0.0)
            b = tl.load(per_row + 3 * rows + row, mask=valid, other=0.0)
            begin = tl.load(row_start + row, mask=valid, other=0)
            count = (tl.load(row_start + row + 1, mask=valid, other=0) - begin).to(tl.int32)
            shift = x * inv_temperature - m[:, None]
            dx = tl.exp(shift - log_sum[:, None]) * (a[:, None] + b[:, None] * shift)
            for n in range(tl.max(count, 0)):
                place = tl.load(target + begin + n, mask=n < count, other=-1) - vocab_start - c0
                inside = (n < count) & (place >= 0) & (place < tl.minimum(vocab - c0, BLOCK_C))
                if tl.max(inside.to(tl.int32), 0) > 0:
                    g = tl.load(grad + (begin + n) * 4 + 3, mask=inside, other=0.0)
                    dx += tl.where(place[:, None] == j[None, :], g[:, None], 0.0)
            dx = dx * inv_temperature
            if CAP:
                dx = dx * (1.0 - t * t)
            dx = tl.where(valid[:, None] & (c0 + j < vocab)[None, :], dx, 0.0)
            if OWN_ROWS:
                dz = dx.to(hidden.dtype.element_ty)
                other_first = weight_first
            else:
                dz = tl.trans(dx.to(hidden.dtype.element_ty))
                other_first = hidden_first
            looped = tl.minimum(tl.arange(0, BLOCK_L), others - l0 - 1)
            # As vectors: the interpreter takes no Python bool in a mask.
            again = l0 + 0 * o > 0
            last = l0 + 0 * o >= others - BLOCK_L
            for h0 in range(0, H, BLOCK_H):
                h = h0 + tl.arange(0, BLOCK_H)
                values = tl.load(other_first + looped[:, None] * H + h[None, :], mask=(h < H)[None, :], other=0.0)
                place = o[:, None] * H + h[None, :]
                inside = (h < H)[None, :] & (o0 + o < owned)[:, None]
                total = tl.load(sums + place, mask=inside & again[:, None], other=0.0)
                total = dot(dz, values, total)
                tl.store(sums + place, total, mask=inside & (~last)[:, None])
                tl.store(out_first + place, total.to(hidden.dtype.element_ty), mask=inside & last[:, None])
            # Threads read sums that others have written.
            tl.debug_barrier()


def forward(problem: Problem) -> Tensor:
    """stats_K4, as `blocks.forward` gives them."""
    hidden, weight = problem.used_rows(), problem.weight_VlH
    (rows, width), vocab = hidden.shape, weight.shape[0]
    picked_K = hidden.new_full((len(problem.target_K),), -torch.inf, dtype=torch.float32)
    per_row = hidden.new_zeros(rows, 3, dtype=torch.float32)
    per_row[:, 0] = torch.finfo(torch.float32).min
    if rows and vocab:
        config = FORWARD[hidden.dtype]
        splits = triton.cdiv(vocab, SPLIT_COLUMNS)
        partial = hidden.new_empty(splits, 3, rows, dtype=torch.float32)
        grid = (triton.cdiv(rows, config["BLOCK_R"]), splits)
        forward_tiles[grid](
            hidden,
            weight,
            problem.target_K,
            problem.row_start_U1,
            partial,
            picked_K,
            rows,
            vocab,
            width,
            problem.vocab_start,
            problem.inv_temperature,
            problem.softcap,
            CAP=problem.softcap != 0,
            EVEN_K=width % config["BLOCK_K"] == 0,
            SPLIT=SPLIT_COLUMNS,
            **config,
        )
        merge_splits[(triton.cdiv(rows, MERGE_ROWS),)](partial, per_row, rows, splits, BLOCK=MERGE_ROWS, num_warps=2)
    return per_target(per_row, problem.row_start_U1, picked_K)


def backward(
    problem: Problem,
    stats_K4: Tensor,
    grad_K4: Tensor,
    hidden_gradient: HiddenGradient | None,
    need_weight: bool,
) -> Tensor:
    """As `gradients.backward`; every logit is computed again."""
    problem, stats_K4, grad_K4, rows_A = drop_zero_rows(problem, stats_K4, grad_K4)
    hidden, weight = problem.used_rows(), problem.weight_VlH
    width = hidden.shape[1]
    work = bool(hidden.shape[0] and weight.shape[0] and width)
    per_row = hidden.new_empty(4, hidden.shape[0], dtype=torch.float32)
    config = BACKWARD[hidden.dtype]
    if work:
        row_gradients[(triton.cdiv(hidden.shape[0], MERGE_ROWS),)](
            stats_K4, grad_K4, problem.row_start_U1, per_row, hidden.shape[0], BLOCK=MERGE_ROWS, num_warps=2
        )

    def launch(out: Tensor, own_rows: bool) -> None:
        programs = min(triton.cdiv(len(out), config["BLOCK_O"]), _programs(out.device))
        scratch = out.new_empty(programs, config["BLOCK_O"], width, dtype=torch.float32)
        backward_tiles[(programs,)](
            hidden,
            weight,
            out,
            scratch,
            per_row,
            problem.target_K,
            problem.row_start_U1,
            grad_K4,
            len(hidden),
            len(weight),
            width,
            problem.vocab_start,
            problem.inv_temperature,
            problem.softcap,
            OWN_ROWS=own_rows,
            CAP=problem.softcap != 0,
            EVEN_K=width % config["BLOCK_K"] == 0,
            **config,
        )

    if hidden_gradient is not None:
        grad_hidden = hidden_gradient.rows_UH()
        if work:
            launch(grad_hidden[: len(hidden)], True)
        else:
            grad_hidden.zero_()
        if rows_A is not None:
            spread_rows(grad_hidden, rows_A)
        hidden_gradient.start()
    if not need_weight:
        return weight.new_empty(0)
    grad_weight = torch.empty_like(weight) if work else torch.zeros_like(weight)
    if work:
        launch(grad_weight, False)
    return grad_weight


def _programs(device: torch.device) -> int:
    """Programs that run at once. The interpreter runs one after the other; 2 let each have several blocks to own."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def ahead_of_time() -> list[Case]:
    """Forward and both backward kernels with and without the soft cap, for bf16, and the fp32 ones."""
    found = []
    pointers = {"target": "*i64", "row_start": "*i64"}
    sizes = {"H": "i32", "vocab_start": "i32", "inv_temperature": "fp32", "softcap": "fp32"}
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        half = name == "bf16"
        for cap in (False, True):
            launch = dict(FORWARD[dtype])
            options = {"num_warps": launch.pop("num_warps"), "num_stages": launch.pop("num_stages")}
            signature = {"hidden": f"*{name}", "weight": f"*{name}", **pointers, "partial": "*fp32", "picked": "*fp32"}
            found.append(
                Case(
                    f"linear_logprob/forward/{name}{'/softcap' if cap else ''}",
                    forward_tiles,
                    {**signature, "rows": "i32", "vocab": "i32", **sizes},
                    {"CAP": cap, "EVEN_K": True, "SPLIT": SPLIT_COLUMNS, **launch},
                    aligned=(*signature, "H"),
                    tensor_core=half,
                    **options,
                )
            )
            for own_rows in (True, False):
                launch = dict(BACKWARD[dtype])
                options = {"num_warps": launch.pop("num_warps"), "num_stages": launch.pop("num_stages")}
                signature = {"hidden": f"*{name}", "weight": f"*{name}", "out": f"*{name}", "scratch": "*fp32"}
                signature |= {"per_row": "*fp32", **pointers, "grad": "*fp32"}
                found.append(
                    Case(
                        f"linear_logprob/grad_{'hidden' if own_rows else 'weight'}/{name}{'/softcap' if cap else ''}",
                        backward_tiles,
                        {**signature, "rows": "i32", "vocab": "i32", **sizes},
                        {"OWN_ROWS": own_rows, "CAP": cap, "EVEN_K": True, **launch},
                        aligned=(*signature, "H"),
                        tensor_core=half,
                        **options,
                    )
                )
    rows = {"row_start": "*i64", "rows": "i32"}
    merge = {"partial": "*fp32", "per_row": "*fp32", "rows": "i32", "splits": "i32"}
    found.append(Case("linear_logprob/merge", merge_splits, merge, {"BLOCK": MERGE_ROWS}, num_warps=2))
    gradients = {"stats": "*fp32", "grad": "*fp32", "out": "*fp32", **rows}
    found.append(Case("linear_logprob/row_gradients", row_gradients, gradients, {"BLOCK": MERGE_ROWS}, num_warps=2))
    return found
