"""Benchmark of packed_attention: shared prefixes beside the expanded layout and beside other libraries; a whole layer.

    python -m tulu_hpc.kernels.packed_attention.bench [--quick | --rehearse] [--part attention|layer] [--json PATH]
    TRITON_INTERPRET=1 python -m tulu_hpc.kernels.packed_attention.bench --rehearse    # Triton too, without a GPU

Lines of part `attention`: one contestant on one layout, forward and both (with the gradients of q, k, v). Lines of part
`layer`: a Llama layer (norms, projections, RoPE, attention, MLP) around packed_attention. Columns:

    shape       groups prompts of P rows with G responses of R rows each; G = 0: ordinary sequences of R rows
    layout      expanded: every response with its own prompt; shared: a prompt once
    pairs       (query, key) pairs of the layout
    ms          best turn: CPU time of the process on CPU, device time on CUDA
    TFLOP/s     4 pairs N D operations forward, 2.5 times that backward; layer: and 6 per row and weight
    roofline    TFLOP/s over those of the fastest square GEMM measured in the same run
    gain        milliseconds of the expanded layout (attention: of its fastest contestant) over those of the line
    of_possible gain over the best possible: the ratio of pairs (attention) or of rows (layer)
    extra_MiB   peak memory beyond inputs and results
    error       against float64, of 16 rows: largest of the outputs; both: largest of the gradients of q
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tulu_hpc.kernels import timing
from tulu_hpc.kernels.bench_report import Goal, lines_of, one, report, select, worst
from tulu_hpc.kernels.contest import OURS, Contestant, contest, lines
from tulu_hpc.kernels.packed_attention import contestants, shapes
from tulu_hpc.kernels.packed_attention.bench_layer import measure_layer
from tulu_hpc.kernels.packed_attention.contestants import Pack, Unavailable
from tulu_hpc.kernels.packed_attention.ops import OP
from tulu_hpc.kernels.packed_attention.shapes import Shape, packs
from tulu_hpc.kernels.timing import Run

SAMPLE = 16  # rows that are checked
TRITON = f"{OURS} triton"


def measure_attention(shape: Shape, run: Run) -> list[dict[str, Any]]:
    """Every contestant on every layout of a shape."""
    table: list[dict[str, Any]] = []
    for layout, pack in packs(shape, run).items():
        table += _measure_layout(shape, layout, pack, run)
    for step in ("forward", "both"):
        expanded = [line for line in select(table, layout="expanded", **{"pass": step}) if line["ms"] is not None]
        fastest = min(expanded, key=lambda line: line["ms"], default=None)
        for line in table:
            if fastest and line["pass"] == step and line["ms"] is not None:
                line["gain"] = fastest["ms"] / line["ms"]
                line["of_possible"] = line["gain"] / (fastest["pairs"] / line["pairs"])
    return table


def _measure_layout(shape: Shape, layout: str, pack: Pack, run: Run) -> list[dict[str, Any]]:
    q, k, v, grad = pack.tensors()
    sample = torch.linspace(0, pack.rows - 1, min(SAMPLE, pack.rows), device=run.device).long()
    wanted = contestants.exact(pack, q, k, v, grad, sample)
    leaves = tuple(x.clone().requires_grad_() for x in (q, k, v))
    functions: dict[str, contestants.Attention | str] = {}
    for name, make in contestants.of(layout, run).items():
        try:  # FlexAttention's mask takes a while, so not for nothing
            functions[name] = "left out by --skip" if run.skips(name) else make(pack)
        except Unavailable as reason:
            functions[name] = str(reason)

    def error(result: Tensor | tuple[Tensor, ...]) -> float:
        mine, right = (result[0], wanted[1]) if isinstance(result, tuple) else (result, wanted[0])
        return float((mine[sample].double() - right).abs().max())

    result = []
    for step, passes in (("forward", 1.0), ("both", 3.5)):

        def bound(name: str, step: str = step) -> Contestant:
            function = functions[name]
            if isinstance(function, str):
                return function
            if step == "both":
                return lambda: torch.autograd.grad(function(*leaves), leaves, grad)
            return partial(function, q, k, v)

        calls = {name: bound(name) for name in functions}
        figures = contest(run, OP, calls, floors={}, baseline=None, error=error)
        columns = {"part": "attention", **shape.columns(), "layout": layout, "pass": step}
        columns |= {"rows": pack.rows, "pairs": pack.pairs}
        work = passes * 4e-12 * pack.pairs * shape.heads * shape.head_dim
        result += lines(figures, shape=columns, unit="TFLOP/s", work=work, floors=(), ceiling=run.gemm)
    return result


# ------------------------------------------------------------------------------------------------ goals
def goals(table: list[dict[str, Any]]) -> list[Goal]:
    """The layer's gain on a CPU; Triton against the libraries and the gain of attention on an H200."""
    shared = select(table, part="layer", layout="shared", G=8)
    found = [
        Goal("cpu", "layer, G 8 P=R, gain over the ratio of rows", "≥", 0.85, worst(x["of_possible"] for x in shared))
    ]
    same = {"part": "attention", "shape": "causal 8k, D 128", "layout": "expanded"}
    names = list(dict.fromkeys(line["kernel"] for line in select(table, **same) if line["kernel"] != TRITON))
    for step, limit in (("forward", 0.75), ("backward", 0.65)):
        mine = _milliseconds(table, step, kernel=TRITON, **same)
        theirs = [ms for name in names if (ms := _milliseconds(table, step, kernel=name, **same)) is not None]
        value = min(theirs) / mine if theirs and mine else None
        found.append(Goal("H200", f"Triton, causal 8k D 128, {step}, over the best library", "≥", limit, value))
    of_possible = []
    for label in dict.fromkeys(line["shape"] for line in select(table, part="attention", layout="shared")):
        routes = select(table, part="attention", shape=label, layout="shared", **{"pass": "both"})
        of_possible.append(max((x["of_possible"] for x in routes if x.get("of_possible") is not None), default=None))
    what = "shared prefixes, best route, gain over the ratio of pairs"
    return [*found, Goal("H200", what, "≥", 0.9, worst(of_possible))]


def _milliseconds(table: list[dict[str, Any]], step: str, **columns: Any) -> float | None:
    """Of a contestant's forward pass, or of both passes less the forward pass."""
    forward, both = (one(table, "ms", **columns, **{"pass": name}) for name in ("forward", "both"))
    if step == "forward" or forward is None or both is None:
        return forward if step == "forward" else None
    return max(both - forward, 1e-6)


def main(arguments: list[str] | None = None) -> None:
    """Prints tables and, as the last line, one JSON object."""
    parser = timing.parser(__doc__)
    parser.add_argument("--part", choices=("attention", "layer"), help="default: both")
    options = parser.parse_args(arguments)
    run = timing.start(options)
    chosen = run.table(shapes.TABLES)
    table: list[dict[str, Any]] = []
    if options.part != "layer":
        table += lines_of(OP, run, chosen, measure_attention)
    if options.part != "attention":
        table += lines_of(f"{OP}, layer", run, [shape for shape in chosen if shape.hidden], measure_layer)
    report(OP, run, table, goals(table))


if __name__ == "__main__":
    main()
