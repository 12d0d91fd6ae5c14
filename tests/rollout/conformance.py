"""What every rollout engine must do: one test body, run on the embedded engine and on real vLLM servers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tulu_hpc.rollout.engine import Completion, EngineError, Request, RolloutEngine, Sampling
from tulu_hpc.rollout.texts import completion_text

LIMIT = 1e-4  # of log-probs in fp32
NEW = 24


def sampled(prompt: list[int], seed: int, **changes: Any) -> Request:
    return Request(prompt, Sampling(**{"max_new_tokens": NEW, **changes}), seed=seed, id=f"{prompt[-1]}/{seed}")


def check_engine(engine: RolloutEngine, model: Any, tokenizer: Any, version: int, longest: int) -> None:
    """An engine that holds the weights of `model` (of transformers, fp32) as `version`.

    Args:
        longest: positions of the engine; a prompt of as many tokens leaves no room for an answer.
    """

    def generate(*requests: Request) -> list[Completion]:
        return asyncio.run(engine.generate(requests))

    for check in (tokens_and_logprobs, seeds, ends, stop_strings, bad_prompts):
        check(generate, model, tokenizer, longest)
    assert generate() == []
    assert {each.policy_version for each in generate(sampled([5, 9], 1), sampled([7], 2))} == {version}
    assert asyncio.run(engine.health())["engine"] in ("embedded", "vllm")


Generate = Callable[..., list[Completion]]


def tokens_and_logprobs(generate: Generate, model: Any, tokenizer: Any, longest: int) -> None:
    asked = [sampled([5, 9, 30 + n // 4], n) for n in range(8)]
    asked += [sampled([11, 40, 12, 13], 1, temperature=0.0), sampled([8], 2, temperature=0.0)]
    found = generate(*asked)
    assert [each.id for each in found] == [each.id for each in asked]
    for request, completion in zip(asked, found, strict=True):
        assert len(completion.token_ids) == len(completion.logprobs) == NEW
        ids = torch.tensor([[*request.token_ids, *completion.token_ids]])
        with torch.no_grad():
            rows = model(ids).logits[0, len(request.token_ids) - 1 : -1].log_softmax(-1)
        wanted = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert (wanted - torch.tensor(completion.logprobs)).abs().max() <= LIMIT
        if request.sampling.temperature == 0:
            assert rows.argmax(-1).tolist() == completion.token_ids


def seeds(generate: Generate, model: Any, tokenizer: Any, longest: int) -> None:
    one, again, other = generate(*(sampled([5, 9], seed) for seed in (3, 3, 1 << 62)))
    assert one.token_ids == again.token_ids != other.token_ids
    crowd = generate(*(sampled([5, 9 + n % 5], 3 + n) for n in range(12)))  # the first is the request from before
    assert crowd[0].token_ids == one.token_ids and len({tuple(each.token_ids) for each in crowd}) == len(crowd)


def ends(generate: Generate, model: Any, tokenizer: Any, longest: int) -> None:
    (free,) = generate(sampled([5, 9], 3))
    assert free.finish_reason == "length" and free.stop_reason is None
    stop = free.token_ids[10]
    end = free.token_ids.index(stop) + 1
    stopped, short = generate(sampled([5, 9], 3, stop_token_ids=(stop,)), sampled([5, 9], 3, max_new_tokens=4))
    assert stopped.token_ids == free.token_ids[:end]  # the stop token is kept
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert short.token_ids == free.token_ids[:4] and short.finish_reason == "length"


def stop_strings(generate: Generate, model: Any, tokenizer: Any, longest: int) -> None:
    free = generate(*(sampled([5, 9], seed) for seed in range(12)))
    stopped = 0
    for seed, each in enumerate(free):
        text = completion_text(tokenizer, each)
        pairs = [text[place : place + 2] for place in range(4, len(text) - 1)]
        stop = next((pair for pair in pairs if pair.isascii() and pair.isprintable()), None)
        if stop is None or set(each.token_ids) & set(tokenizer.all_special_ids):
            continue  # engines need not agree on a string with a special token inside
        (cut,) = generate(sampled([5, 9], seed, stop_strings=(stop, "never to be seen")))
        assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
        assert cut.token_ids == each.token_ids[: len(cut.token_ids)] and stop not in completion_text(tokenizer, cut)
        assert completion_text(tokenizer, cut) == text[: text.index(stop)]
        stopped += 1
    assert stopped


def bad_prompts(generate: Generate, model: Any, tokenizer: Any, longest: int) -> None:
    for tokens in ([], [-1], [10**6], [5] * longest):
        with pytest.raises((ValueError, EngineError), match="request 'bad'"):
            generate(Request(tokens, Sampling(max_new_tokens=2), id="bad"))
