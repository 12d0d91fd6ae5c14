"""Benchmark of rope: our backends, forward and backward, beside a plain copy of the same bytes.

    python -m tulu_hpc.kernels.rope.bench [--quick] [--json PATH]

    of_copy  bytes that must move (q and k in and out, the tables in) per second, over those of a copy of as many bytes
    error    largest absolute difference from float64 over the largest value

CPU time of the process on CPU, device time on CUDA. Under TRITON_INTERPRET=1 Triton's line is its interpreter's.
"""

import argparse
from functools import partial
from typing import Any

import torch

from tulu_hpc.kernels.registry import USABLE, available_backends
from tulu_hpc.kernels.rope.ops import rope, rope_tables
from tulu_hpc.kernels.timing import best_milliseconds, report

# rows, heads, kv heads, head dim
QUICK = [(64, 4, 2, 32)]
FULL = [(2048, 8, 2, 64), (4096, 32, 8, 64)]
FULL_CUDA = [(8192, 32, 8, 128), (65536, 8, 1, 128), (65536, 32, 8, 128)]


def measure(
    rows: int, heads: int, kv_heads: int, head_dim: int, device: str, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """A line for each backend that can run here."""
    generator = torch.Generator().manual_seed(0)
    new = lambda n: torch.randn(rows, n, head_dim, generator=generator).to(device, dtype)  # noqa: E731
    q, k = new(heads), new(kv_heads)
    ids = torch.arange(rows, device=device) % 4096
    tables = rope_tables(ids, 500000.0 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim))
    moved = 2 * (q.nbytes + k.nbytes) + sum(x.nbytes for x in tables)
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = best_milliseconds(lambda: target.copy_(source), device)
    want = rope(q.double(), k.double(), None, tables)[0]
    lines = []
    for backend, status in available_backends("rope").items():
        if status != USABLE:
            continue
        run = partial(rope, position_ids_T=None, frequencies=tables, backend=backend)
        with torch.no_grad():
            forward = best_milliseconds(partial(run, q, k), device)
            found = run(q, k)[0]
        inputs = [q.clone().requires_grad_(), k.clone().requires_grad_()]
        out = run(*inputs)
        backward = best_milliseconds(partial(torch.autograd.grad, out, inputs, (q, k), retain_graph=True), device)
        line: dict[str, Any] = {"rows": rows, "heads": f"{heads}/{kv_heads}x{head_dim}", "backend": backend}
        line |= {"forward_ms": forward, "backward_ms": backward, "copy_ms": copy, "GB/s": 1e-6 * moved / forward}
        line["of_copy"] = copy / forward
        line["error"] = float((found.double() - want).abs().max() / want.abs().max())
        lines.append(line)
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Prints a table and, as the last line, one JSON object; --json writes it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, seconds")
    parser.add_argument("--json", metavar="PATH", help="write the JSON object here as well")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    shapes = QUICK if options.quick else FULL_CUDA if cuda else FULL
    settings = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    report("rope", [line for shape in shapes for line in measure(*shape, *settings)], options.json)


if __name__ == "__main__":
    main()
