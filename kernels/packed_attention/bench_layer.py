"""A whole Llama layer around packed_attention, with shared prompts beside the expanded layout."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tulu_hpc.kernels.contest import OURS, Contestant, contest, lines
from tulu_hpc.kernels.packed_attention.ops import OP, packed_attention
from tulu_hpc.kernels.packed_attention.plan import AttentionPlan
from tulu_hpc.kernels.packed_attention.shapes import Shape, packs
from tulu_hpc.kernels.rope.ops import rope, rope_tables
from tulu_hpc.kernels.timing import Run


class Layer(nn.Module):
    """A Llama layer in plain torch around rope and packed_attention; one tensor-parallel rank's heads."""

    def __init__(self, shape: Shape, run: Run) -> None:
        super().__init__()
        self.shape = shape
        hidden, columns = shape.hidden, shape.heads * shape.head_dim
        new = lambda a, b: nn.Linear(a, b, bias=False, device=run.device, dtype=run.dtype)  # noqa: E731
        self.norm, self.mlp_norm = (nn.RMSNorm(hidden, device=run.device, dtype=run.dtype) for _ in range(2))
        self.qkv = new(hidden, columns + 2 * shape.kv_heads * shape.head_dim)
        self.o = new(columns, hidden)
        self.up, self.down = new(hidden, 2 * shape.ffn), new(shape.ffn, hidden)

    def forward(self, x_TH: Tensor, plan: AttentionPlan, angles: tuple[Tensor, Tensor]) -> Tensor:
        s = self.shape
        qkv = self.qkv(self.norm(x_TH)).unflatten(1, (-1, s.head_dim))
        q, k, v = qkv.split((s.heads, s.kv_heads, s.kv_heads), 1)
        q, k = rope(q, k, None, angles)
        x_TH = x_TH + self.o(packed_attention(q, k, v, plan).flatten(1))
        gate, up = self.up(self.mlp_norm(x_TH)).chunk(2, -1)
        return x_TH + self.down(F.silu(gate) * up)


def measure_layer(shape: Shape, run: Run) -> list[dict[str, Any]]:
    """Forward + backward of the layer in both layouts."""
    torch.manual_seed(0)
    layer = Layer(shape, run)
    weights = sum(p.numel() for p in layer.parameters())
    layouts, calls, strategies = packs(shape, run), dict[str, Contestant](), dict[str, str]()
    for layout, pack in layouts.items():
        plan = pack.plan()
        inverse = 500000.0 ** -(torch.arange(0, shape.head_dim, 2, device=run.device) / shape.head_dim)
        angles = rope_tables(pack.position_ids(), inverse)
        x = torch.randn(pack.rows, shape.hidden, device=run.device).to(run.dtype).requires_grad_()
        grad = torch.randn_like(x)

        def step(plan: Any = plan, angles: Any = angles, x: Tensor = x, grad: Tensor = grad) -> tuple[Tensor, ...]:
            return torch.autograd.grad(layer(x, plan, angles), [x, *layer.parameters()], grad)

        calls[f"{OURS} {layout}"], strategies[layout] = step, plan.strategy
    figures = contest(run, OP, calls, floors={}, baseline=f"{OURS} expanded", error=None)
    result = []
    for layout, pack in layouts.items():
        name = f"{OURS} {layout}"
        attention = 3.5 * 4e-12 * pack.pairs * shape.heads * shape.head_dim
        columns = {"part": "layer", **shape.columns(), "layout": layout, "pass": "both"}
        columns |= {"rows": pack.rows, "pairs": pack.pairs}
        work = 6e-12 * pack.rows * weights + attention
        (line,) = lines(
            {name: figures[name]}, shape=columns, unit="TFLOP/s", work=work, floors=(), ceiling=run.gemm
        )  # fmt: skip
        line["gain"], possible = line.pop("ratio"), layouts["expanded"].rows / pack.rows
        line["of_possible"] = None if line["gain"] is None else line["gain"] / possible
        line["strategy"] = strategies[layout]
        result.append(line)
    return result
