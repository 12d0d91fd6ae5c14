"""Benchmark of linear_logprob against F.linear + log_softmax + gather, and the bare GEMM as the floor.

    python -m tulu_hpc.kernels.linear_logprob.bench [--quick] [--json PATH]

CPU seconds of the process per thread on CPU (other programs do not disturb them), device time on CUDA. Extra memory is
the sum of what is alive at the peak beyond the inputs on CUDA; on CPU it is not measured.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tulu_hpc.kernels.linear_logprob.ops import linear_logprob
from tulu_hpc.kernels.linear_logprob.reference import linear_logprob_dense
from tulu_hpc.kernels.registry import last_backend
from tulu_hpc.kernels.timing import best_milliseconds, report

# rows, hidden, vocabulary, buffer in MiB
QUICK = [(512, 128, 2000, 256), (256, 256, 8000, 256), (256, 256, 8000, 1)]
FULL = [
    (2048, 256, 4096, 256),
    (512, 1024, 32000, 256),
    (512, 1024, 32000, 8),
    (512, 1024, 128256, 256),
    (512, 2048, 128256, 256),
]
FULL_CUDA = [
    (8192, 4096, 128256, 5120),
    (8192, 4096, 128256, 1024),
    (8192, 16384, 16032, 1024),
    (8192, 16384, 16032, 256),
]


def dense(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """What a trainer without a fused op does."""
    return F.linear(hidden, weight).float().log_softmax(-1).gather(1, target[:, None])[:, 0]


def measure(rows: int, hidden: int, vocab: int, buffer_mib: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """One line of the table."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(rows, hidden, generator=generator).to(device, dtype).requires_grad_()
    w = (torch.randn(vocab, hidden, generator=generator) * hidden**-0.5).to(device, dtype).requires_grad_()
    target = torch.randint(0, vocab, (rows,), generator=generator).to(device)
    grad = torch.randn(rows, generator=generator).to(device)

    def ours() -> Tensor:
        return linear_logprob(h, w, target, max_buffer_bytes=buffer_mib * 2**20).logprobs_K

    def baseline() -> Tensor:
        return dense(h, w, target)

    line: dict[str, Any] = {"N": rows, "H": hidden, "V": vocab, "buffer_MiB": buffer_mib}
    with torch.no_grad():
        sample = slice(0, 16)
        oracle, _ = linear_logprob_dense(h[sample].double(), w.double(), target[sample])
        line["error"] = float((ours()[sample] - oracle).abs().max())
        line["gemm_ms"] = best_milliseconds(lambda: F.linear(h, w), device)
        line["forward_ms"] = best_milliseconds(ours, device)
        line["dense_forward_ms"] = best_milliseconds(baseline, device)
    line["both_ms"] = best_milliseconds(lambda: torch.autograd.grad(ours(), (h, w), grad), device)
    line["dense_both_ms"] = best_milliseconds(lambda: torch.autograd.grad(baseline(), (h, w), grad), device)
    line["forward_ratio"] = line["dense_forward_ms"] / line["forward_ms"]
    line["both_ratio"] = line["dense_both_ms"] / line["both_ms"]
    line["backend"] = last_backend("linear_logprob")
    return line


def main(arguments: list[str] | None = None) -> None:
    """Prints a table and, as the last line, one JSON object; --json writes it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, seconds")
    parser.add_argument("--json", metavar="PATH", help="write the JSON object here as well")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    shapes = QUICK if options.quick else FULL_CUDA if cuda else FULL
    dtype = torch.bfloat16 if cuda else torch.float32
    lines = [measure(*shape, "cuda" if cuda else "cpu", dtype) for shape in shapes]
    report("linear_logprob", lines, options.json)


if __name__ == "__main__":
    main()
