"""A real vLLM server for tests, with a model that its CPU kernels run (head dim 32)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from tests.training import tiny_run
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.data.tokenizer import load_tokenizer
from tulu_hpc.models.initialise import random_hf_model
from tulu_hpc.rollout.engine import Completion, Request
from tulu_hpc.rollout.server import Server, ServerOptions
from tulu_hpc.stages import served

PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"

needs_vllm = pytest.mark.skipif(not PYTHON.is_file(), reason="no .venv-vllm here: make rollout-engine makes it")


def architecture(vocab_size: int, *, tied: bool, hidden_size: int = 64, intermediate_size: int = 96) -> Architecture:
    return Architecture(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        tie_word_embeddings=tied,
    )


def write_model(folder: Path, *, tied: bool, **sizes: int) -> Architecture:
    """`folder/model` with a tokenizer, and the data files of `tiny_run`; its architecture."""
    tiny_run.write_inputs(folder)
    vocabulary = len(load_tokenizer(str(folder / "model")))
    shape = architecture(vocabulary, tied=tied, **sizes)
    random_hf_model(shape, folder / "new", seed=1, embedding_std=0.2, linear_std=0.1)
    for file in (folder / "new").iterdir():
        file.replace(folder / "model" / file.name)
    return shape


def options(folder: Path, **changes: Any) -> ServerOptions:
    values: dict[str, Any] = {
        "python": str(PYTHON),
        "model": str(folder / "model"),
        "dtype": "float32",
        "max_model_len": 512,
        "max_sequences": 32,
        "kv_cache_mib": 64,
    }
    return ServerOptions(**values | changes)


def start(folder: Path, **changes: Any) -> Server:
    server = Server(options(folder, **changes), folder / "server.log")
    wait(server)
    return server


def wait(server: Server) -> None:
    try:
        asyncio.run(server.wait_ready(240))
    except BaseException:
        server.stop()
        raise


def processes(server: Server) -> list[psutil.Process]:
    """Supervisor, API server, engine core."""
    supervisor = psutil.Process(server.pid)
    return [supervisor, *supervisor.children(recursive=True)]


def kill(server: Server) -> None:
    """kill -9 of API server and engine core, not of their supervisor."""
    for process in processes(server)[1:]:
        process.kill()


def hf_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()


def state(model: Any) -> list[tuple[str, Tensor]]:
    """Weights as a trainer sends them: without the second name of a tied head."""
    tied = model.config.tie_word_embeddings
    return [(name, tensor) for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")]


@torch.no_grad()
def perturb(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@torch.no_grad()
def logprobs(model: Any, prompt: Sequence[int], answer: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Of each token of the answer, [N] fp32."""
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0].float() / temperature
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return rows.gather(1, torch.tensor(answer)[:, None])[:, 0]


def largest_difference(model: Any, asked: Sequence[Request], found: Sequence[Completion]) -> float:
    """Between the engine's log-probs and those of the model, over all completions."""
    worst = 0.0
    for request, completion in zip(asked, found, strict=True):
        theirs = torch.tensor(completion.logprobs)
        temperature = request.sampling.temperature or 1.0
        ours = logprobs(model, request.token_ids, completion.token_ids, temperature)
        worst = max(worst, float((ours - theirs).abs().max()))
    return worst


def send_wrong_weights(is_wrong: Callable[[int], bool], parameter: str = "lm_head.weight") -> None:
    """From here on, in this (forked) process, this parameter is not the trainer's in the updates of these numbers."""
    stream, calls = served.iter_hf_tensors, 0

    def wrong(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        for name, tensor in stream(*args):
            yield name, tensor * 1.05 if is_wrong(calls) and name == parameter else tensor

    served.iter_hf_tensors = wrong
