"""Servers without /inference/v1/generate: streams of /v1/completions, and which weights drew which token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.rollout.small_server import Events, Raw, SmallServer, Status, chunk
from tests.rollout.test_vllm_client import requests, right
from tulu_hpc.rollout.engine import Completion, EngineError, Request, VersionSpan
from tulu_hpc.rollout.vllm import VllmEngine

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def absent(server: SmallServer, path: str, body: Any) -> Any:
    return Status(403)


def event(body: Any, place: int, **changes: Any) -> dict[str, Any]:
    """The token at a place of an answer; its values are those of `small_server.completion`."""
    token = (body["prompt"][0] + body["seed"] + place) % 50
    last = place == body["max_tokens"] - 1
    choice = {
        "index": 0,
        "token_ids": [token],
        "logprobs": {"token_logprobs": [-0.5]},
        "finish_reason": "length" if last else None,
    }
    return {"id": f"cmpl-{body['request_id']}", "choices": [choice | changes]}


async def tokens(body: Any, before: Callable[[int], Any] = lambda place: None) -> AsyncIterator[Any]:
    for place in range(body["max_tokens"]):
        waiting = before(place)
        if waiting is not None:
            await waiting
        yield event(body, place)


def ask(answer: Any, count: int = 1, engines: Any = None, **options: Any) -> tuple[VllmEngine, Any]:
    """The engine and its completions, or the error; the server's weights are those of version 3."""

    async def generate() -> tuple[VllmEngine, Any]:
        async with SmallServer(absent, v1_completions=answer) as server:
            engine = VllmEngine([server.address], vocab_size=50, probe_seconds=1.0, **options)
            engine.use([(server.address, 3)])
            if engines is not None:
                engines.append(engine)
            try:
                return engine, await engine.generate(requests(count))
            except EngineError as error:
                return engine, error

    return asyncio.run(generate())


def test_streams() -> None:
    async def old(server: SmallServer, path: str, body: Any) -> Any:
        return Events(tokens(body))

    engine, found = ask(old, 5, max_in_flight=2)
    assert right(found, requests(5)) and engine.retries == 0
    assert all(each.version_spans == (VersionSpan(3, 0, 4),) for each in found)


def _events(*places: int, end: bytes = b"data: [DONE]\n\n", **last: Any) -> Any:
    def answer(body: Any) -> Any:
        async def some() -> AsyncIterator[Any]:
            for place in places:
                yield event(body, place, **(last if place == places[-1] else {}))

        return Events(some(), end)

    return answer


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (_events(0, 1), "the stream ended after 2 tokens without a finish_reason"),
        (_events(0, 1, end=b""), "the stream ended after 2 tokens without a finish_reason"),
        (_events(0, 1, end=b"data: {"), "ended inside a line"),
        (_events(0, 1, end=b"data: {}\n\n"), "not one choice"),
        (_events(0, 1, end=b"data: x\n\n"), "not JSON"),
        (_events(0, 1, end=b'data: {"error": {"message": "EngineCore", "code": 500}}\n\n'), "EngineCore"),
        (_events(0, 1, 2, 3, 3), "more after the end"),
        (_events(0, 1, 3), "cut at 3 of 4"),
        (_events(0, 1, 2, 3, logprobs=None), "not as many log-probs as tokens"),
        (_events(0, 1, 2, 3, logprobs={"token_logprobs": [-1.0, -1.0]}), "not as many log-probs as tokens"),
        (_events(0, 1, 2, 3, finish_reason="abort"), "finish_reason 'abort'"),
        (_events(0, 1, 2, 3, token_ids=[50]), "outside the vocabulary"),
        (lambda body: Raw(HEAD + chunk(b"data: {}")[:-4]), "bytes read"),
        (lambda body: Raw(HEAD), "0 bytes read"),
    ],
)
def test_a_broken_stream_is_asked_for_again(broken: Any, words: str) -> None:
    """Also one that ends properly, but without a finish reason."""
    seen: set[int] = set()

    async def once(server: SmallServer, path: str, body: Any) -> Any:
        first = body["seed"] not in seen
        seen.add(body["seed"])
        return broken(body) if first else Events(tokens(body))

    engine, found = ask(once, 2)
    assert right(found, requests(2)) and engine.retries == 2
    assert all(words in incident and "http://127.0.0.1" in incident for incident in engine.take_incidents())


def test_tokens_before_and_after_an_update() -> None:
    """The client that sends the weights sees between which tokens they changed."""
    engines: list[VllmEngine] = []

    async def old(server: SmallServer, path: str, body: Any) -> Any:
        async def update(place: int) -> None:
            if place == 3:
                await asyncio.sleep(0.1)  # paused: what came before has been read
                engines[0]._channels[0].held(4)

        return Events(tokens(body, update))

    _, (found,) = ask(old, engines=engines)
    assert found.version_spans == (VersionSpan(3, 0, 3), VersionSpan(4, 3, 4)) and found.policy_version == 3


def test_an_update_by_another_client() -> None:
    """Which tokens are of which weights is not known: such an answer is not taken."""
    engines: list[VllmEngine] = []
    updated = False

    async def old(server: SmallServer, path: str, body: Any) -> Any:
        async def update(place: int) -> None:
            nonlocal updated
            if place == 3 and not updated:
                updated = True
                engines[0].use([(server.address, 4)])

        return Events(tokens(body, update))

    engine, found = ask(old, engines=engines)
    assert right(found, requests(1)) and found[0].version_spans == (VersionSpan(4, 0, 4),)
    assert engine.retries == 1 and "its weights changed meanwhile" in engine.take_incidents()[0]


def test_no_endpoint_at_all() -> None:
    async def gone(server: SmallServer, path: str, body: Any) -> Any:
        return Status(404)

    _, error = ask(gone, attempts=2)
    assert isinstance(error, EngineError) and "/v1/completions: status 404" in str(error)


def test_the_endpoint_is_looked_for_once() -> None:
    async def old(server: SmallServer, path: str, body: Any) -> Any:
        return Events(tokens(body))

    async def generate() -> tuple[SmallServer, list[Completion]]:
        async with SmallServer(absent, v1_completions=old) as server:
            engine = VllmEngine([server.address], vocab_size=50, max_in_flight=1)
            engine.use([(server.address, 3)])
            asked: list[Request] = requests(4)
            return server, await engine.generate(asked)

    server, found = asyncio.run(generate())
    assert len(found) == 4 and [path for path, _ in server.requests].count("/inference/v1/generate") == 1
