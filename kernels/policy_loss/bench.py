"""Benchmark of policy_loss: forward, gradient and metrics, against the same in eager torch, and its memory floor.

    python -m tulu_hpc.kernels.policy_loss.bench [--quick] [--json PATH]

Times are process CPU seconds over threads on CPU, device time between events on CUDA (`*_ms`, with what Python takes to
launch) and, there, the time inside kernels by the profiler (`*_kernels_us`, with the number of launches). The floor
copies as many bytes as a pass must read and write, in the same run.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tulu_hpc.kernels.policy_loss.ops import policy_loss
from tulu_hpc.kernels.registry import last_backend
from tulu_hpc.kernels.timing import best_milliseconds, report

# tokens, sequences
QUICK = [(4096, 8)]
FULL = [(65536, 64), (65536, 8), (8192, 64)]
VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"kind": "grpo", "clip_high": 0.28, "normalisation": "token_mean"},
    "grpo_truncated": {"kind": "grpo", "normalisation": "token_mean", "importance": "truncated"},
    "gspo": {"kind": "gspo", "normalisation": "sequence_mean"},
}


def make(tokens: int, sequences: int, device: str) -> dict[str, Tensor]:
    """A pack of equal sequences; the policies differ as after one update."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(5, tokens, generator=generator).to(device)
    logprobs = -columns[0].abs()
    return {
        "logprobs": logprobs.requires_grad_(),
        "old": (logprobs + 0.1 * columns[1]).detach(),
        "behaviour": (logprobs + 0.1 * columns[2]).detach(),
        "reference": (logprobs + 0.1 * columns[3]).detach(),
        "advantages": columns[4].contiguous(),
        "ids": torch.arange(tokens, device=device) * sequences // tokens,
    }


def eager(c: dict[str, Tensor], sequences: int, options: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """What a trainer without a fused loss runs, with the same metrics."""
    low, high = (3e-4, 4e-4) if options["kind"] == "gspo" else (0.2, options.get("clip_high", 0.2))
    log_ratio = c["logprobs"] - c["old"]
    lengths = torch.bincount(c["ids"], minlength=sequences)
    if options["kind"] == "gspo":
        sums = log_ratio.new_zeros(sequences).index_add(0, c["ids"], log_ratio)
        log_ratio = (sums / lengths.clamp(min=1))[c["ids"]]
    ratio = log_ratio.exp()
    plain = -c["advantages"] * ratio
    clipped = -c["advantages"] * ratio.clamp(1 - low, 1 + high)
    policy = torch.maximum(plain, clipped)
    raw = (c["old"] - c["behaviour"]).exp()
    if "importance" in options:
        policy = policy * raw.clamp(max=2.0)
    d = c["logprobs"] - c["reference"]
    k3 = torch.expm1(-d) + d
    token = policy + 0.05 * k3
    if options["normalisation"] == "token_mean":
        loss = token.mean()
    else:
        loss = (token / lengths[c["ids"]]).sum() / (lengths > 0).sum()
    with torch.no_grad():
        behaviour = c["logprobs"] - c["behaviour"]
        metrics = {
            "loss": policy.sum(),
            "ratio": ratio.sum(),
            "ratio_min": ratio.amin(),
            "ratio_max": ratio.amax(),
            "low": ((ratio < 1 - low) & (c["advantages"] < 0)).sum(),
            "high": ((ratio > 1 + high) & (c["advantages"] > 0)).sum(),
            "behaviour_kl": (torch.expm1(behaviour) - behaviour).sum(),
            "k1": d.sum(),
            "k2": (d * d / 2).sum(),
            "k3": k3.sum(),
        }
        if "importance" in options:
            metrics |= {"importance": raw.clamp(max=2.0).sum(), "max": raw.amax(), "limited": (raw > 2.0).sum()}
    return loss, metrics


def kernel_microseconds(function: Callable[[], Any]) -> tuple[float, int]:
    """(time inside CUDA kernels, number of launches) of one call; copies and fills count."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(10):
            function()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.time_range.elapsed_us() for event in events) / 10, len(events) // 10


def measure(name: str, tokens: int, sequences: int, device: str, backends: list[str]) -> list[dict[str, Any]]:
    """Lines of the table: one for each backend."""
    options = VARIANTS[name]
    c = make(tokens, sequences, device)
    doubled = {key: x if key == "ids" else x.detach().double() for key, x in c.items()}
    doubled["logprobs"].requires_grad_()
    (exact,) = torch.autograd.grad(eager(doubled, sequences, options)[0], doubled["logprobs"])

    def baseline() -> Tensor:
        return torch.autograd.grad(eager(c, sequences, options)[0], c["logprobs"])[0]

    # Read: logprobs, old, behaviour, reference, advantages, for gspo twice and the ids. Written: gradient and mask.
    moved = tokens * (5 * 4 + 5) + (tokens * (4 * 4 + 8) if name == "gspo" else 0)
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    lines = []
    eager_ms = best_milliseconds(baseline, device)
    for backend in backends:

        def forward(backend: str = backend) -> Tensor:
            return policy_loss(
                c["logprobs"], c["behaviour"], c["advantages"], c["ids"], old_logprobs_K=c["old"],
                reference_logprobs_K=c["reference"], kl_coef=0.05, num_sequences=sequences, backend=backend, **options,
            ).loss  # fmt: skip

        def ours(backend: str = backend) -> Tensor:
            return torch.autograd.grad(forward(backend), c["logprobs"])[0]

        error = float((ours().double() - exact).abs().max() / exact.abs().max())
        line: dict[str, Any] = {"kind": name, "K": tokens, "Q": sequences, "backend": last_backend("policy_loss")}
        line |= {"floor_ms": best_milliseconds(lambda: target.copy_(source), device), "eager_ms": eager_ms}
        line["ours_ms"] = best_milliseconds(ours, device)
        line |= {"ratio": line["eager_ms"] / line["ours_ms"], "MB": moved / 1e6, "error": error}
        if device == "cuda":
            line["floor_kernels_us"], _ = kernel_microseconds(lambda: target.copy_(source))
            line["eager_kernels_us"], line["eager_launches"] = kernel_microseconds(baseline)
            line["forward_kernels_us"], line["forward_launches"] = kernel_microseconds(forward)
        lines.append(line)
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Prints a table and, as the last line, one JSON object; --json writes it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, seconds")
    parser.add_argument("--json", metavar="PATH", help="write the JSON object here as well")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backends = ["reference", "triton" if device == "cuda" else "cpu"]
    shapes = QUICK if options.quick else FULL
    lines = [line for name in VARIANTS for shape in shapes for line in measure(name, *shape, device, backends)]
    report("policy_loss", lines, options.json)


if __name__ == "__main__":
    main()
