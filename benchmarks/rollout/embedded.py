"""Tokens per second of the embedded engine: continuous batching, static batches, and transformers.generate.

    python benchmarks/rollout/embedded.py [--json PATH]

The quickstart's model shape with random weights in fp32, groups of samples per prompt, log-normal answer lengths (the
same for all three, given as each request's limit, without stop tokens). A static batch is one call of the engine with
as many requests as there are slots, so it ends with its longest answer, but drops ended sequences; the engine under it
is the same. transformers.generate gets the same batches, padded, every copy of a prompt by itself, and cannot end a
sequence before the others; only the tokens asked for are counted. One process, the three in turn, medians.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.models.build import build_model
from tulu_hpc.models.convert import load_hf
from tulu_hpc.models.initialise import random_hf_model
from tulu_hpc.parallel.layout import Layout, destroy, initialize
from tulu_hpc.rollout.embedded import EmbeddedEngine
from tulu_hpc.rollout.engine import GenerationStats, Request, Sampling

SHAPE = Architecture(
    vocab_size=768,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    rope_theta=10000.0,
    tie_word_embeddings=True,
)


def requests_of(prompts: int, samples: int, prompt_length: int, mean_new: int, seed: int) -> list[Request]:
    """Groups of requests with log-normal limits (sigma 0.8) around the mean, at most four times the mean."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(prompts):
        length = int(torch.randint(prompt_length // 2, prompt_length * 3 // 2, (1,), generator=generator))
        tokens = torch.randint(SHAPE.vocab_size, (length,), generator=generator).tolist()
        for sample in range(samples):
            drawn = math.exp(math.log(mean_new) - 0.32 + 0.8 * float(torch.randn(1, generator=generator)))
            sampling = Sampling(max_new_tokens=max(1, min(round(drawn), 4 * mean_new)))
            found.append(Request(tokens, sampling, seed=number * samples + sample))
    return found


def by_transformers(model: Any, batches: list[list[Request]]) -> None:
    for batch in batches:
        width = max(len(request.token_ids) for request in batch)
        ids = torch.tensor([[0] * (width - len(each.token_ids)) + list(each.token_ids) for each in batch])
        mask = torch.tensor([[0] * (width - len(each.token_ids)) + [1] * len(each.token_ids) for each in batch])
        longest = max(request.sampling.max_new_tokens for request in batch)
        model.generate(
            ids, attention_mask=mask, max_new_tokens=longest, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0
        )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    requests = requests_of(options.prompts, options.samples, options.prompt_length, options.mean_new, seed=1)
    tokens = sum(request.sampling.max_new_tokens for request in requests)
    batches = [requests[first : first + options.slots] for first in range(0, len(requests), options.slots)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        random_hf_model(SHAPE, path, seed=1)
        groups = initialize(Layout(), seed=1)
        chunks = build_model(SHAPE, groups)
        load_hf(chunks, path, SHAPE, groups)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    engine = EmbeddedEngine(chunks, groups, SHAPE, None, options.slots)

    def static() -> None:
        for batch in batches:
            engine.generate_batch(batch)

    ways: dict[str, Callable[[], Any]] = {
        "continuous": lambda: engine.generate_batch(requests),
        "static batches": static,
        "transformers.generate": lambda: by_transformers(theirs, batches),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    stats: dict[str, dict[str, Any]] = {}
    for turn in range(options.repeats + 1):  # the first is not counted
        for name, way in ways.items():
            engine.stats = GenerationStats()
            begun = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
            if name != "transformers.generate":
                counted = asdict(engine.stats)
                counted["slot_occupancy"] = counted["slot_steps"] / (counted["decode_steps"] * options.slots)
                stats[name] = counted
    destroy()
    rates = {name: tokens / median(times) for name, times in seconds.items()}
    return {
        "requests": len(requests),
        "new_tokens": tokens,
        "slots": options.slots,
        "tokens_per_second": rates,
        "seconds": seconds,
        "counts": {
            name: {key: each[key] for key in ("prompt_tokens", "prefill_tokens", "decode_steps", "slot_occupancy")}
            for name, each in stats.items()
        },
        "continuous_over_static": rates["continuous"] / rates["static batches"],
        "continuous_over_transformers": rates["continuous"] / rates["transformers.generate"],
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=96)
    parser.add_argument("--mean-new", type=int, default=48)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options)
    for name, rate in found["tokens_per_second"].items():
        print(f"{name:24s} {rate:10.0f} tokens/s   {found['counts'].get(name, '')}")
    line = json.dumps(found)
    if options.json:
        options.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
