"""Benchmark of preference_loss, forward and gradient, against the same loss written with torch operations.

    python -m tulu_hpc.kernels.preference_loss.bench [--quick] [--json PATH]

64k tokens in 64 pairs. `ms`: CPU seconds of the process per thread on CPU (other programs do not disturb them), time
between events on CUDA, which includes the launch overhead of Python. On CUDA also `device_us`: one replay of the
forward pass (which computes the gradient too) as a CUDA graph, and `launches`: kernels of a call outside of a graph.
The floor is the time that the bytes which must be moved (log-probs, ids, coefficients) take at the speed of a large
copy, measured in the same run.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tulu_hpc.kernels import triton_support
from tulu_hpc.kernels.preference_loss.ops import OP, preference_loss
from tulu_hpc.kernels.registry import USABLE, available_backends, last_backend
from tulu_hpc.kernels.timing import best_milliseconds, report

# kind, tokens, pairs
QUICK = [("dpo_norm", 8192, 16)]
FULL = [(kind, 65536, 64) for kind in ("dpo_norm", "dpo", "ipo", "simpo", "orpo", "kto")] + [
    ("dpo_norm", 1048576, 1024)
]
OPTIONS: dict[str, dict[str, Any]] = {"kto": {"kl": 0.1}, "simpo": {"gamma": 0.5}}
CALLS = 10  # in one measurement


def eager(logprobs: Tensor, ids: Tensor, reference: Tensor, pairs: Tensor, beta: float) -> tuple[Tensor, list[Tensor]]:
    """dpo_norm and its metrics as a trainer without a fused op writes them, sums in fp64."""
    sequences = reference.shape[0]
    sums = torch.zeros(sequences, dtype=torch.float64, device=ids.device).index_add(0, ids, logprobs.double())
    lengths = torch.zeros(sequences, device=ids.device).index_add(0, ids, torch.ones_like(logprobs)).clamp(min=1)
    rewards = beta * (sums.float() - reference) / lengths
    chosen, rejected = pairs.unbind(1)
    margins = rewards[chosen] - rewards[rejected]
    with torch.no_grad():
        metrics = [
            rewards[chosen].sum(),
            rewards[rejected].sum(),
            margins.sum(),
            (margins > 0).float().sum(),
            sums[chosen].sum(),
            sums[rejected].sum(),
            lengths[chosen].sum(),
            lengths[rejected].sum(),
        ]
    return -logsigmoid(margins).sum(), metrics


def copy_bytes_per_second(device: str) -> float:
    """Bytes read and written per second by a copy much larger than the caches."""
    source = torch.ones(2**26 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * best_milliseconds(lambda: target.copy_(source), device))


def on_device(function: Callable[[], Any]) -> tuple[float, int]:
    """Microseconds of one replay of `function` as a CUDA graph, and its kernels."""
    for _ in range(3):
        function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    kernels = sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")

    def replays() -> None:
        for _ in range(100):
            graph.replay()

    return 10 * best_milliseconds(replays, "cuda"), kernels


def measure(kind: str, tokens: int, pair_count: int, device: str, bandwidth: float) -> list[dict[str, Any]]:
    """One line for eager torch (dpo_norm only), and one for each backend that can run."""
    generator = torch.Generator().manual_seed(0)
    sequences = 2 * pair_count
    ids = torch.randint(0, sequences, (tokens,), generator=generator).sort().values.to(device)
    logprobs = (-2 * torch.rand(tokens, generator=generator)).to(device).requires_grad_()
    reference = (-float(tokens / sequences) + torch.randn(sequences, generator=generator)).to(device)
    pairs = torch.randperm(sequences, generator=generator).reshape(-1, 2).to(device)
    options: dict[str, Any] = {"kind": kind, "beta": 0.5, **OPTIONS.get(kind, {})}
    double = logprobs.detach().double().requires_grad_()
    oracle = preference_loss(double, ids, reference, pairs, backend="reference", **options)
    (oracle_gradient,) = torch.autograd.grad(oracle.loss, double)
    functions: dict[str, Callable[[], tuple[Tensor, Any]]] = {}
    if kind == "dpo_norm":
        functions["eager torch"] = lambda: eager(logprobs, ids, reference, pairs, 0.5)
    for backend, status in available_backends(OP).items():
        wrong_device = backend == "cpu" and device != "cpu"
        # A time of Triton's interpreter means nothing.
        if status == USABLE and not wrong_device and not (backend == "triton" and triton_support.interpreting()):
            functions[backend] = lambda name=backend: preference_loss(  # type: ignore[misc]
                logprobs, ids, reference, pairs, backend=name, **options
            )
    lines: list[dict[str, Any]] = []
    for name, function in functions.items():

        def both(function: Callable[[], tuple[Tensor, Any]] = function) -> Tensor:
            return torch.autograd.grad(function()[0], logprobs)[0]

        def repeated(both: Callable[[], Tensor] = both) -> None:
            for _ in range(CALLS):
                both()

        gradient = both()
        if name != "eager torch" and last_backend(OP) != name:
            raise RuntimeError(f"{name} was asked for, {last_backend(OP)} ran")
        milliseconds = best_milliseconds(repeated, device) / CALLS
        floor = 1e3 * tokens * (4 + 8 + 4) / bandwidth
        device_us, launches = on_device(function) if device == "cuda" else (None, None)
        lines.append(
            {
                "kind": kind,
                "tokens": tokens,
                "pairs": pair_count,
                "backend": name,
                "ms": milliseconds,
                "Mtokens/s": 1e-3 * tokens / milliseconds,
                "pairs/s": round(1e3 * pair_count / milliseconds),
                "floor_ms": floor,
                "device_us": device_us,
                "launches": launches,
                "gradient_error": float((gradient.double() - oracle_gradient).abs().max()),
            }
        )
    for line in lines:
        line["eager_ratio"] = lines[0]["ms"] / line["ms"] if lines[0]["backend"] == "eager torch" else None
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Prints a table and, as the last line, one JSON object; --json writes it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, seconds")
    parser.add_argument("--json", metavar="PATH", help="write the JSON object here as well")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for backend, status in available_backends(OP).items():
        if status != USABLE or (backend == "triton" and triton_support.interpreting()):
            print(f"{backend}: not measured ({status if status != USABLE else 'interpreted'})")
    bandwidth = copy_bytes_per_second(device)
    lines = [line for shape in (QUICK if options.quick else FULL) for line in measure(*shape, device, bandwidth)]
    report(OP, lines, options.json)


if __name__ == "__main__":
    main()
