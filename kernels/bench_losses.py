"""What the benchmarks of the losses share: lines of both passes beside a copy of the same bytes, and their goals."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tulu_hpc.kernels.bench_report import Goal, one
from tulu_hpc.kernels.contest import OURS, Contestant, contest, lines
from tulu_hpc.kernels.timing import Run, copying

Loss = Callable[[], tuple[Tensor, Any]]
EAGER, COPY = "eager", "copy"


def loss_lines(
    run: Run,
    op: str,
    losses: Mapping[str, Loss | str],
    leaf_K: Tensor,
    exact_K: Tensor,
    bytes_moved: int,
    columns: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Lines of the passes forward (loss and metrics) and both (with the gradient of `leaf_K`).

    Args:
        losses: functions that return (loss, metrics), or the reason why there is none; one is named EAGER, or there are
            no ratios.
        exact_K: the gradient in float64.
        bytes_moved: that a pass must read and write.
    """
    largest = exact_K.abs().max().clamp(min=1e-30)
    result = []
    for step in ("forward", "both"):

        def bound(loss: Loss | str, step: str = step) -> Contestant:
            if isinstance(loss, str):
                return loss
            return (lambda: loss()[0].detach()) if step == "forward" else lambda: torch.autograd.grad(loss()[0], leaf_K)

        def error(gradient: tuple[Tensor]) -> float:
            return float((gradient[0].double() - exact_K).abs().max() / largest)

        figures = contest(
            run,
            op,
            {name: bound(loss) for name, loss in losses.items()},
            floors={COPY: copying(bytes_moved, run.device)},
            baseline=EAGER if EAGER in losses else None,
            error=error if step == "both" else None,
        )
        shape = {**columns, "pass": step}
        result += lines(figures, shape=shape, unit="GB/s", work=1e-9 * bytes_moved, floors=(COPY,))
    return result


def loss_goals(table: list[dict[str, Any]], name: str, **columns: Any) -> list[Goal]:
    """Of Triton's kernel on an H200: one launch, close to its memory floor, far from eager torch."""
    mine: dict[str, Any] = {**columns, "kernel": f"{OURS} triton"}
    forward: dict[str, Any] = {"pass": "forward"}
    launches = one(table, "launches", **mine, **forward)
    kernel = one(table, "kernel_us", **mine, **forward)
    floor = one(table, "kernel_us", **columns, kernel=COPY, **forward)
    above = None if kernel is None or floor is None else kernel - floor
    return [
        Goal("H200", f"{name}, launches", "=", 1, launches),
        Goal("H200", f"{name}, µs over its memory floor", "≤", 20, above),
        Goal("H200", f"{name}, times as fast as eager", "≥", 20, one(table, "ratio", **mine, **{"pass": "both"})),
    ]
